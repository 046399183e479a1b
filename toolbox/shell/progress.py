"""What people see while a command works: a live bar on a terminal, a plain line now and then otherwise.

Everything goes to stderr, only from rank 0, and nothing at all with ``--quiet``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from toolbox.shell.errors import clean, tell, without_escapes
from toolbox.shell.streams import process_rank

_PLAIN_EVERY = 15.0
"""Seconds between two plain lines when stderr is no terminal."""

_PLAIN_WIDTH = 110
"""Columns of a table when stderr is no terminal."""


class Reporter:
    """Notes, tables and progress for people."""

    def __init__(self, command: str, quiet: bool = False) -> None:
        self.command = command
        self.silent = quiet or process_rank() != 0
        self._console: Any = None

    @property
    def console(self) -> Any:
        """A rich console on stderr, made when first used."""
        if self._console is None:
            from rich.console import Console

            # Without a terminal rich assumes 80 columns and cuts tables; a log file has room.
            width = None if sys.stderr.isatty() else _PLAIN_WIDTH
            self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False, width=width)
        return self._console

    def note(self, text: str) -> None:
        """One line for people."""
        if not self.silent:
            tell(f"{self.command}: {clean(text)}\n")

    def warn(self, text: str) -> None:
        """One line that is shown even with ``--quiet``; from rank 0, as all else."""
        if process_rank() == 0:
            tell(f"{self.command}: warning: {clean(text)}\n")

    def show(self, renderable: Any) -> None:
        """A rich table or text, or a string; terminal escapes that its words carry are left out."""
        if self.silent:
            return
        from rich.segment import Segment, Segments
        from rich.text import Text

        if isinstance(renderable, str):
            renderable = Text(without_escapes(renderable))
        # Words and styles are apart only in segments. Captured, because rich itself leaves with status 1 when the
        # reader of stderr is gone.
        segments = [
            part if part.control else Segment(without_escapes(part.text), part.style)
            for part in self.console.render(renderable)
        ]
        with self.console.capture() as captured:
            self.console.print(Segments(segments), end="")
        tell(captured.get())

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Progress]:
        """Count work: ``with reporter.progress("step", 10) as bar: bar.advance(1, "loss 0.3")``."""
        bar = Progress(self, what, total)
        try:
            yield bar
        finally:
            bar.close()


class Progress:
    """One running count. Made by ``Reporter.progress``."""

    def __init__(self, reporter: Reporter, what: str, total: int | None) -> None:
        self._reporter, self._what, self._total = reporter, what, total
        self._done = 0
        self._last = time.monotonic()
        self._rich: Any = None
        if not reporter.silent and sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}", markup=False),
            )
            self._rich = RichProgress(*columns, console=reporter.console, transient=True)
            self._task = self._rich.add_task(what, total=total, detail="")
            self._rich.start()

    def advance(self, by: int = 1, detail: str = "") -> None:
        """``by`` more units are done; ``detail`` stands behind the bar."""
        self._done += by
        if self._rich is not None:
            self._rich.update(self._task, advance=by, detail=clean(detail))
        elif time.monotonic() - self._last >= _PLAIN_EVERY:
            self._last = time.monotonic()
            of = f"/{self._total}" if self._total is not None else ""
            self._reporter.note(f"{self._what} {self._done}{of} {detail}".rstrip())

    def close(self) -> None:
        if self._rich is not None:
            self._rich.stop()
