"""What people see in the terminal: a checklist while the tour runs, a table of figures at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from recipes.demo.runner import STDERR, Outcome
from recipes.demo.step import Step
from toolbox.shell.errors import clean

_WIDTH = 110
_MARKS = {"done": ("✓", "ok", "green"), "failed": ("✗", "FAILED", "bold red"), "skipped": ("–", "skipped", "yellow")}


def took(seconds: float) -> str:
    """``8 s``, ``2 min 05 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def summary(outcome: Outcome) -> str:
    """Time and CPU of a step, or what went wrong with it."""
    if outcome.status == "done":
        times = f"{took(outcome.seconds)}, {outcome.cpu_seconds:.0f} CPU-s"
        return f"kept ({times})" if outcome.kept else times
    return outcome.why


class Checklist:
    """A list of all steps that fills with marks: redrawn in place on a terminal, a line a step otherwise."""

    def __init__(self, steps: Sequence[Step], console: Any) -> None:
        self._steps, self._console = steps, console
        self._ended: dict[str, Outcome] = {}
        self._running: tuple[str, float, str] | None = None
        self._announced = ""
        self._live: Any = None

    def __enter__(self) -> Checklist:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(self._table(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running = None
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def running(self, step: Step, seconds: float, line: str) -> None:
        """A step is at work; ``line`` is what its commands said last."""
        self._running = step.name, seconds, line
        if self._live is not None:
            self._live.update(self._table())
        elif self._announced != step.name:
            self._announced = step.name
            self._console.print(f"{self._place(step)}   {step.command}: {step.title}", soft_wrap=True)

    def ended(self, outcome: Outcome) -> None:
        """A step has ended, was kept, or cannot run."""
        self._ended[outcome.step.name] = outcome
        self._running = None
        if self._live is not None:
            self._live.update(self._table())
        else:
            step = outcome.step
            line = f"{self._place(step)} {self._mark(outcome)} {step.command}: {clean(summary(outcome))}"
            self._console.print(line, soft_wrap=True)

    def _place(self, step: Step) -> str:
        return f"[{self._steps.index(step) + 1:>2}/{len(self._steps)}]"

    def _mark(self, outcome: Outcome) -> str:
        sign, word, _ = _MARKS[outcome.status]
        return word if self._console.options.ascii_only else sign

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True)
        table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        for step in self._steps:
            outcome = self._ended.get(step.name)
            if outcome is not None:
                mark, state = Text(self._mark(outcome), _MARKS[outcome.status][2]), Text(clean(summary(outcome)), "dim")
            elif self._running is not None and self._running[0] == step.name:
                _, seconds, line = self._running
                mark, state = Text(">", "bold cyan"), Text(f"{took(seconds)}  {line}", "dim")
            else:
                mark, state = Text(" "), Text("")
            table.add_row(mark, Text(step.command, "bold"), Text(step.title), state)
        return table


def console(stream: Any) -> Any:
    """A rich console that keeps 110 columns where the stream is no terminal."""
    from rich.console import Console

    width = None if stream.isatty() else _WIDTH
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def figures_table(outcomes: Sequence[Outcome], root: Path) -> Any:
    """Every step with its figures, intervals, n, time, and where its outputs lie."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title="the tour (95 % intervals)", title_justify="left", expand=True)
    table.add_column("command", no_wrap=True)
    table.add_column("figure", ratio=1)
    table.add_column("value", justify="right")
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for outcome in outcomes:
        folder = f"{root / outcome.step.name}/"
        time = took(outcome.seconds) if outcome.status == "done" else ""
        if outcome.status != "done":
            table.add_row(Text(outcome.step.command, "bold red"), Text(f"{outcome.status}: {clean(outcome.why)}"))
            table.add_row("", Text(f"{folder}{STDERR}" if outcome.status == "failed" else "", "dim"), end_section=True)
            continue
        for i, shown in enumerate(outcome.figures):
            table.add_row(
                Text(outcome.step.command, "bold") if i == 0 else "", Text(shown.label), Text(shown.text), shown.n,
                time if i == 0 else "",
            )  # fmt: skip
        table.add_row("", Text(folder, "dim"), end_section=True)
    return table


def say(text: str) -> None:
    """One line for people."""
    print(text, file=sys.stderr, flush=True)
