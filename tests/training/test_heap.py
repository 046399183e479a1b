"""Freed memory that is kept for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from toolbox.training import heap

FAULTS = """
import resource
import torch
from toolbox.training.heap import keep_freed_memory

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(40 << 18)  # 40 MiB: more than glibc keeps of itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults(2)
left = faults(5)
assert keep_freed_memory()
faults(30)  # until there is room
print(left, faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is asked")
def test_memory_is_not_cleared_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 100  # with huge pages far fewer than 5 × 10,240
    assert after < before / 20


@pytest.mark.parametrize("library", [OSError("no C library"), object()])
def test_elsewhere_nothing_happens(monkeypatch, library):
    def load(name):
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(heap.ctypes, "CDLL", load)
    assert not heap.keep_freed_memory()
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.keep_freed_memory()
