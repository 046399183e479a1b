"""The C library's heap under a training loop."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt."""
_LARGE_BLOCK = 1 << 30
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for what is allocated next; whether that is so from now on.

    Left to itself it hands blocks of some 32 MiB and more back to the system at once. A step that adds to gradients
    takes blocks of that size anew for every large parameter, and the kernel clears their pages each time: up to a
    fifth of a step's CPU. What a step needs at its height is the same either way. Elsewhere than under glibc nothing
    changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no such thing
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
