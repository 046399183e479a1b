"""What the provocations share: a command started with its own good input, killed, starved of disk, or told lies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.contract.commands import Case, lines
from tests.server import Client, Result, Running

RESUMING = {
    "coca-refactor": lambda folder: ["--log", str(folder / "log.jsonl")],
    "landscape-plot": lambda folder: [],
    "legit-loop": lambda folder: ["--state", str(folder / "state")],
    "lit-generate": lambda folder: ["--log", str(folder / "log.jsonl")],
    "lm-generate": lambda folder: ["--log", str(folder / "log.jsonl")],
    "lwi-fuse": lambda folder: [],
}
"""What those that are no trainers and take --resume need to go on from."""


def resumes(case: Case) -> bool:
    """Whether a run that was cut off can be continued."""
    return case.trainer or case.name in RESUMING


@dataclass
class Bench:
    """Runs cases, each in a folder of its own below ``root``."""

    tool: Client
    tiny: Path
    root: Path
    _arguments: dict[tuple[str, Path], list[str]] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """A folder below the test's own, made if it is not there."""
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def words(self, case: Case, folder: Path) -> list[str]:
        """The arguments of the case's short run; its further inputs are written once a folder."""
        if (case.name, folder) not in self._arguments:
            self._arguments[case.name, folder] = case.arguments(self.tiny, folder)
        return list(self._arguments[case.name, folder])

    def run(self, case: Case, *more: object, folder: Path | None = None, stdin: bytes | None = None, **how) -> Result:
        """The case's short run with more arguments, to its end."""
        where = self.folder("run") if folder is None else folder
        data = lines(case.good) if stdin is None else stdin
        return self.tool(case.name, *self.words(case, where), *more, stdin=data, **how)

    def start(self, case: Case, words: list[str], folder: Path) -> Started:
        """A run left to itself: its rows come from a file, what it says goes to files."""
        (folder / "stdin").write_bytes(lines(case.good))
        out, err = (folder / "stdout").open("wb"), (folder / "stderr").open("wb")
        with (folder / "stdin").open("rb") as source, out, err:
            fds = (source.fileno(), out.fileno(), err.fileno())
            return Started(self.tool.start(case.name, *words, fds=fds), folder)


@dataclass
class Started:
    """A running command whose stdout and stderr are files of ``folder``."""

    running: Running
    folder: Path

    def alive(self) -> bool:
        """Whether it runs still: a zombie does not."""
        return self.state() != "Z"

    def state(self) -> str:
        """Its state in the kernel's letters: R, S, D, T (stopped), Z (ended)."""
        try:
            return Path(f"/proc/{self.running.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return "Z"

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.running.pid, number)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit status; a command that does not come to its end in time is killed, and that is a failure."""
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                self.running.wait()
                raise AssertionError(f"it did not end within {seconds:g} s; it had said: {self.err}")
            time.sleep(0.005)
        return self.running.wait()

    @property
    def out(self) -> bytes:
        return (self.folder / "stdout").read_bytes()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Wait for ``condition`` as long as the command runs; whether it came true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.alive():
                return condition()
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.001)
        return True


def complaint(case: Case, code: int, out: bytes, err: str) -> str:
    """The line of a failure that was told as the house tells them: nothing on stdout, one line and one of advice."""
    assert "Traceback" not in err, err
    assert out == b"", out[:200]
    told = [line for line in err.splitlines() if line.startswith(f"{case.name}: ")]
    last = err.splitlines()[-2:]
    assert told, (code, err)
    assert 1 <= len(err.splitlines()) <= 3 or told[-1] in last, err
    return told[-1]


def without_output(words: list[str]) -> list[str]:
    """Arguments without ``--overwrite``, which some cases need for their second run."""
    return [word for word in words if word != "--overwrite"]


def artefacts(case: Case, folder: Path) -> dict[str, bytes]:
    """What stays of a run: the files of its output without those that tell times, or nothing."""
    timed = {"run.json", "events.jsonl", ".lock", ".complete"}
    found = {}
    for path in sorted((folder / "out").rglob("*")):
        if path.is_file() and path.name not in timed:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def left_behind(folder: Path) -> list[str]:
    """Names of part files and directories that no finished run may leave."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix in (".part", ".partial", ".replaced") or path.name in (".lock", ".complete")
    )


def events(text: bytes) -> list[dict]:
    """JSON lines without the times they tell."""
    dropped = {"seconds", "labels_per_s", "tokens_per_s", "peak_mem_mb", "settings", "model", "out"}
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key not in dropped} for row in rows]
