"""SIGINT and SIGTERM as a wish that long work grants at its next good place."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

_SAME_WISH = 1.0
"""Seconds in which a second signal counts as the first one's echo: Ctrl-C reaches a worker from the terminal and from
its launcher."""


class Interrupts:
    """``asked`` tells whether a signal has asked for a stop while ``heard`` was entered."""

    def __init__(self) -> None:
        self._since = 0.0

    @property
    def asked(self) -> bool:
        return self._since > 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM is noted; the next one ends the process at once. Handlers are put back."""
        before = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, _: Any) -> None:
        if self.asked and time.monotonic() - self._since > _SAME_WISH:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._since = self._since or time.monotonic()
