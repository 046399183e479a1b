"""What every bench shares: the figure, timing in CPU seconds, child processes, memory, and rows to work on.

Nothing here imports torch; a bench does so inside its function.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import json
import math
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOFU = ROOT.parent / "shared" / "data" / "unlearning" / "tofu" / "full.json.gz"
PEOPLE = ROOT / "recipes" / "unlearning" / "people"

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # CPU seconds say nothing about work done elsewhere
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""One thread, no accelerator, no network, no progress bars: set before torch is imported."""


class Skip(Exception):
    """A bench that cannot run here; the reason goes into the results."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    ``ratio_of`` says what is divided by what where the value is a ratio; ``target`` is a comparison such as
    ``>= 1.1``; ``spread`` is the least and greatest value over the repeats.
    """

    name: str
    value: float | None
    unit: str
    ratio_of: str | None = None
    target: str | None = None
    spread: tuple[float, float] | None = None
    repeats: int = 1
    note: str | None = None
    skipped: str | None = None

    @staticmethod
    def of(name: str, values: Sequence[float], unit: str, **more: Any) -> Figure:
        """The median of ``values``, one a repeat."""
        return Figure(
            name, statistics.median(values), unit, spread=(min(values), max(values)), repeats=len(values), **more
        )

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target or a value."""
        if self.target is None or self.value is None:
            return None
        sign, number = self.target.split()
        return _COMPARE[sign](self.value, float(number))

    def record(self) -> dict[str, Any]:
        """The figure as one JSON object; every figure has the same keys."""
        return {
            "name": self.name,
            "value": _short(self.value),
            "unit": self.unit,
            "ratio_of": self.ratio_of,
            "target": self.target,
            "met": self.met,
            "spread": [_short(end) for end in self.spread] if self.spread else None,
            "repeats": self.repeats,
            "note": self.note,
            "skipped": self.skipped,
        }


def _short(value: float | None) -> float | None:
    """Five significant digits: more would be noise."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


# -- time -----------------------------------------------------------------------------------------------------------
def alternate(repeats: int, functions: dict[str, Callable[[], Any]], *, warm: bool = True) -> dict[str, list[float]]:
    """CPU seconds of each function in each repeat.

    The functions take turns, in the opposite order every other time, so that a machine that slows down meanwhile slows
    them all. With ``warm`` each is called once before, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    if warm:
        for function in functions.values():
            function()
    for repeat in range(repeats):
        for name in list(functions)[:: -1 if repeat % 2 else 1]:
            began = time.process_time()
            functions[name]()
            seconds[name].append(time.process_time() - began)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Repeat by repeat: what ran side by side is compared."""
    return [one / other for one, other in zip(above, below, strict=True)]


def process_seconds(words: Sequence[str], code: int = 0) -> float:
    """CPU seconds, user and system, of one true process; RuntimeError when it does not leave with ``code``."""
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise RuntimeError(f"{' '.join(words[1:])} left with {process.returncode} instead of {code}")
    return used.ru_utime + used.ru_stime


# -- fresh processes ------------------------------------------------------------------------------------------------
def in_child(
    function: Callable[..., Any],
    *arguments: Any,
    feed: Iterable[bytes] | None = None,
    env: dict[str, str] | None = None,
    python: str | Path = sys.executable,
) -> Any:
    """What ``function(*arguments)`` returns (as JSON) in a fresh interpreter, ``python``.

    ``feed`` goes to the child's stdin; its stdout is /dev/null. Memory is only comparable between fresh processes: a
    freed block stays with the one that asked for it.
    """
    result, sink = os.pipe()
    words = [str(sink), function.__module__, function.__name__, json.dumps(arguments)]
    process = subprocess.Popen(
        [str(python), "-m", "bench.common", *words],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL if feed is None else subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[sink],
    )
    os.close(sink)
    if feed is not None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            for block in feed:
                pipe.write(block)
    with os.fdopen(result) as answer:
        text = answer.read()
    if process.wait():
        raise RuntimeError(f"{function.__name__} ended with {process.returncode} in a process of its own")
    value, skipped = json.loads(text)
    if skipped is not None:
        raise Skip(skipped)
    return value


def _child(sink: str, module: str, name: str, arguments: str) -> None:
    # Skip is taken from where the benches import it: run with -m this module is there twice.
    skip = importlib.import_module("bench.common").Skip
    value, skipped = None, None
    try:
        value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    except skip as reason:
        skipped = str(reason)
    with os.fdopen(int(sink), "w") as answer:
        json.dump((value, skipped), answer)


# -- memory ---------------------------------------------------------------------------------------------------------
def memory_mib(field: str, process: int | str = "self") -> float:
    """``VmRSS`` (resident now) or ``VmHWM`` (its peak) of a process, in MiB; 0 of one that has ended.

    Not ``ru_maxrss``: a process inherits that from the one it was forked from.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        raise Skip("resident memory is read from /proc, which this system has not") from None
    return next((int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0) / 1024


def forget_peak() -> None:
    """Let ``VmHWM`` start anew from what is resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        raise Skip("the peak of resident memory cannot be reset here") from None


# -- rows -----------------------------------------------------------------------------------------------------------
def question_rows(count: int) -> tuple[list[dict[str, str]], str]:
    """``count`` questions with answers and where they are from: TOFU where it lies beside the checkout, else the
    embedded people. Repeated when there are fewer."""
    if TOFU.is_file():
        with gzip.open(TOFU, "rt", encoding="utf-8") as lines:
            found, source = [json.loads(line) for line in lines], "TOFU rows"
    else:
        names = ("forget", "retain", "neighbours")
        texts = [(PEOPLE / f"{name}.jsonl").read_text(encoding="utf-8") for name in names]
        found, source = [json.loads(line) for text in texts for line in text.splitlines()], "embedded people rows"
    rows = [{"question": row["question"], "answer": row["answer"]} for row in found]
    return [rows[place % len(rows)] for place in range(count)], source


if __name__ == "__main__":
    _child(*sys.argv[1:])
