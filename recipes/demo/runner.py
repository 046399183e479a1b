"""Runs the steps of the tour one after another; a step that fails does not stop the others.

Each step has a folder with what its commands wrote, ``stdout.txt``, ``stderr.txt`` and ``step.json``, which says how it
ended. A step that ended well is kept until its script changes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from recipes.demo.figures import Shown, read_figure
from recipes.demo.step import Step
from toolbox.shell.atomic import atomic_file
from toolbox.shell.errors import CannotCreate, ToolboxError, TryAgain, clean, without_escapes

RECORD, STDOUT, STDERR = "step.json", "stdout.txt", "stderr.txt"
ROOT = Path(__file__).resolve().parents[2]
_GRACE = 10.0
"""Seconds between asking a step to end and ending it."""
_POLL = 0.1

Status = Literal["done", "failed", "skipped"]


class Record(msgspec.Struct, frozen=True):
    """``step.json``: ``status`` is running until the step ends, so a folder that has one was made here."""

    name: str
    digest: str
    status: Literal["running", "done", "failed"]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mb: int = 0
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step ended. ``kept``: in an earlier run. ``why`` says what went wrong with a failed or skipped one."""

    step: Step
    status: Status
    kept: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mb: int = 0
    why: str = ""
    figures: tuple[Shown, ...] = ()
    outputs: tuple[tuple[str, str, int], ...] = ()
    """Path below the step's folder, what it is, bytes."""


Watch = Callable[[Step, float, str], None]
"""Called while a step runs, with its seconds so far and the last line of its stderr."""


def run_steps(
    steps: Iterable[Step], root: Path, *, fresh: bool = False, watch: Watch | None = None
) -> Iterator[Outcome]:
    """Run what is not there yet below ``root``, and yield the outcome of each step as it ends."""
    ended: dict[str, Outcome] = {}
    for step in steps:
        lacking = [name for name in step.needs if ended[name].status != "done"]
        if lacking:
            outcome = Outcome(step, "skipped", why=f"needs {', '.join(lacking)}, which failed")
        else:
            stale = fresh or any(not ended[name].kept for name in step.needs)
            outcome = (None if stale else kept(step, root)) or run_step(step, root, watch)
        ended[step.name] = outcome
        yield outcome


def kept(step: Step, root: Path) -> Outcome | None:
    """The outcome of an earlier run, where that ended well and is whole."""
    record = read_record(root / step.name)
    if record is None or record.status != "done" or record.digest != step.digest:
        return None
    outcome = _judge(step, root / step.name, record)
    return replace(outcome, kept=True) if outcome.status == "done" else None


def read_record(folder: Path) -> Record | None:
    """What ``step.json`` says; None where there is none, or none of ours."""
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def run_step(step: Step, root: Path, watch: Watch | None = None) -> Outcome:
    """Run one step in a new folder and judge what it left.

    Raises: CannotCreate (73) where its folder exists and was not made here.
    """
    folder = root / step.name
    if folder.exists() and read_record(folder) is None:
        raise CannotCreate(
            f"{folder}: is in the way and was not made by the tour", "rename it, or choose another --out"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record = Record(step.name, step.digest, "running")
    _write(folder, record)
    code, used = _execute(step, root, folder, watch)
    record = Record(
        step.name, step.digest, "failed" if code else "done", round(used.seconds, 1), round(used.cpu_seconds, 1),
        used.peak_mb, last_words(folder / STDERR, code) if code else "",
    )  # fmt: skip
    outcome = _judge(step, folder, record)
    _write(folder, Record(record.name, record.digest, outcome.status, record.seconds, record.cpu_seconds,
                          record.peak_mb, outcome.why))  # fmt: skip
    return outcome


def _judge(step: Step, folder: Path, record: Record) -> Outcome:
    """A step is done when its script ended well and its figures, picture and outputs are there."""
    outcome = Outcome(step, "failed", False, record.seconds, record.cpu_seconds, record.peak_mb, record.why)
    if record.status != "done":
        return outcome
    missing = [name for name in (step.picture.file, *step.outputs) if not (folder / name).exists()]
    if missing:
        return replace(outcome, why=f"it ended well but did not write {', '.join(missing)}")
    try:
        figures = tuple(read_figure(figure, folder) for figure in step.figures)
    except ToolboxError as error:
        return replace(outcome, why=f"{error.what} ({error.advice})")
    outputs = tuple((name, what, size_of(folder / name)) for name, what in step.outputs.items())
    return replace(outcome, status="done", figures=figures, outputs=outputs)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file() and not one.is_symlink())


def last_words(stderr: Path, code: int) -> str:
    """What a failed step said last: its last line, and the line above where that one is advice, indented."""
    with contextlib.suppress(OSError):
        text = without_escapes(stderr.read_text(errors="replace").replace("\r", "\n"))
        lines = [line for line in text.splitlines() if line.strip()]
        first = -2 if len(lines) > 1 and lines[-1].startswith("  ") else -1
        if lines:
            return "; ".join(clean(line.strip()) for line in lines[first:])
    return f"it ended with {code} and said nothing"


def _write(folder: Path, record: Record) -> None:
    with atomic_file(folder / RECORD) as handle:
        handle.write(msgspec.json.encode(record) + b"\n")


# -- the process ------------------------------------------------------------------------------------------------------
Ended = tuple[int, resource.struct_rusage]
"""Exit code, and what a process used with all descendants that it waited for."""


@dataclass(frozen=True)
class Used:
    """What a step took, with all its descendants. ``peak_mb`` is that of the largest process."""

    seconds: float
    cpu_seconds: float
    peak_mb: int


def _execute(step: Step, root: Path, folder: Path, watch: Watch | None) -> tuple[int, Used]:
    """Run the script in a session of its own, so that whatever ends the tour ends all its processes."""
    began = time.monotonic()

    def tick() -> None:
        if watch is not None:
            watch(step, time.monotonic() - began, _last_line(folder / STDERR))

    with (folder / STDOUT).open("wb") as out, (folder / STDERR).open("wb") as err:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", step.preamble(root) + step.run],
            cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            ended = _wait(process.pid, step.limit, tick)
            if ended is None:
                ended = _end(process.pid)
                err.write(f"stopped: not done after {step.limit:g} s\n".encode())
                ended = 124, ended[1]
        except BaseException:
            _end(process.pid)
            raise
        finally:
            process.returncode = 0  # waited for here, since only wait4 tells what it used; Popen would warn
    code, usage = ended
    return code, Used(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024)


def _wait(pid: int, limit: float, tick: Callable[[], None]) -> Ended | None:
    """How it ended; None when the limit (seconds) is over."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended = _reaped(pid)
        if ended is not None:
            return ended
        tick()
        time.sleep(_POLL)
    return None


def _reaped(pid: int) -> Ended | None:
    """How a child ended, once; None while it runs."""
    reaped, status, usage = os.wait4(pid, os.WNOHANG)
    if not reaped:
        return None
    code = os.waitstatus_to_exitcode(status)
    return (code if code >= 0 else 128 - code), usage


def _end(pid: int) -> Ended:
    """Ask the whole session of a process to end, and then make it; returns when all of it is gone.

    The script itself dies at once, while its commands may take seconds to put away what they have half written: a new
    run in the same folder must not begin before.
    """
    ended: Ended | None = None
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signum)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            ended = ended or _reaped(pid)
            if ended is not None and not _lives(pid):
                return ended
            time.sleep(_POLL)
    raise TryAgain(f"the processes of session {pid} do not end", "look at them with ps")


def _lives(group: int) -> bool:
    """Whether a process group has a member that is no zombie (some containers leave those about)."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member = status.read_text().rpartition(")")[2].split()[:3]
            if int(member) == group and state != "Z":
                return True
    return False


def _last_line(path: Path) -> str:
    """The end of a file that is being written, as one line."""
    with contextlib.suppress(OSError), path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - 2000))
        lines = handle.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
        return clean(without_escapes(lines[-1])) if lines else ""
    return ""
