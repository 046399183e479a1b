"""Commands that are killed, asked to stop, or lose one of their processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.contract.commands import Case, lines
from tests.faults.bench import RESUMING, Bench, Started, artefacts, events, left_behind, resumes, without_output
from tests.faults.places import makes_directory
from tests.server import Result

MOMENTS = 10


def longer(case: Case, folder: Path) -> list[str]:
    """More arguments: a run of several steps that saves behind each, or keeps what it has."""
    if case.trainer:
        return ["--epochs", "4", "--save-every", "1"]
    return RESUMING[case.name](folder) if case.name in RESUMING else []


class Job:
    """One command's longer run: whole in a folder of its own, then cut off and begun again in another."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.bench, self.case = bench, case
        self.whole = bench.folder("whole")
        began = time.monotonic()
        done = self.again(self.whole, resume=False)
        self.seconds = time.monotonic() - began
        self.expected, self.out = artefacts(case, self.whole), done.out

    def words(self, folder: Path, resume: bool = True) -> list[str]:
        more = ["--resume"] if resume and resumes(self.case) else []
        return [*without_output(self.bench.words(self.case, folder)), *longer(self.case, folder), *more]

    def start(self, folder: Path) -> Started:
        """The run in ``folder``, to be continued there where it can be."""
        self.make_way(folder)
        return self.bench.start(self.case, self.words(folder), folder)

    def again(self, folder: Path, *, resume: bool = True) -> Result:
        """The run in ``folder`` to its end."""
        done = self.bench.tool(self.case.name, *self.words(folder, resume), stdin=lines(self.case.good))
        assert done.code == 0, done.err
        return done

    def make_way(self, folder: Path) -> None:
        """Take away an output that had come to its end before the kill where, without --resume, a second is refused."""
        if not resumes(self.case) and (folder / "out").is_dir():
            shutil.rmtree(folder / "out")

    def nothing_half_done(self, folder: Path) -> None:
        """The output stands whole or not at all."""
        if (folder / "out").exists():
            assert artefacts(self.case, folder) == self.expected

    def ends_the_same(self, folder: Path) -> None:
        """Begun once more, and continued where it can be, it ends with the bytes of the whole run."""
        self.make_way(folder)
        done = self.again(folder)
        assert artefacts(self.case, folder) == self.expected
        if makes_directory(self.case):  # of a run that was done already only the last line is told again
            assert events(done.out)[-1] == events(self.out)[-1]
        else:
            assert _placeless(done.out, folder) == _placeless(self.out, self.whole)
        assert [name for name in left_behind(folder) if name.startswith("out")] == []


def _placeless(text: bytes, folder: Path) -> bytes:
    return text.replace(str(folder).encode(), b"")


def killed(bench: Bench, case: Case) -> Iterator[str]:
    """kill -9 at ten random moments, each time begun again: nothing half-done stands, and the end is the same."""
    job, draw, folder = Job(bench, case), random.Random(case.name), bench.folder("cut")
    for number in range(MOMENTS):
        running = job.start(folder)
        moment = draw.uniform(0.02, 0.95) * job.seconds
        time.sleep(moment)
        running.send(signal.SIGKILL)
        code = running.wait()
        assert code in (137, 0), running.err
        job.nothing_half_done(folder)
        if code == 0:  # it got to its end between two kills
            job.ends_the_same(folder)
            folder = bench.folder(f"cut{number}")
        yield f"{moment:.3f} s"
    job.ends_the_same(folder)


def interrupted(bench: Bench, case: Case) -> Iterator[str]:
    """Asked to stop, once and twice: it ends soon, says so, keeps its state, and goes on to the same end."""
    job = Job(bench, case)
    for number in (signal.SIGINT, signal.SIGTERM):
        for times in (1, 2):
            folder = bench.folder(f"{number.name}{times}")
            for share in (0.3, 0.6, 0.9):
                running = job.start(folder)
                time.sleep(share * job.seconds)
                for _ in range(times):
                    running.send(number)
                    time.sleep(0.02)
                code = running.wait(120)
                assert code in (0, 75, 128 + number), (code, running.err)
                assert "Traceback" not in running.err, running.err
                assert "Exception ignored" not in running.err, running.err
                if code == 75:
                    assert "--resume" in running.err
                    assert not (folder / "out").exists()
                job.nothing_half_done(folder)  # a signal may find the output renamed and the process not yet gone
                yield f"{number.name} x {times} at {share}"
            job.ends_the_same(folder)


# -- processes -------------------------------------------------------------------------------------------------------


def _rank(number: int, port: int) -> dict[str, str]:
    """The environment of one of two processes under a launcher of the user's own."""
    return {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wrong_rank(bench: Bench, case: Case) -> Iterator[str]:
    """Two processes share one stdin, and the one that may not read it comes first."""
    alone = bench.run(case, folder=bench.folder("alone"))
    assert alone.code == 0, alone.err
    folder, port = bench.folder("two"), _free_port()
    words = bench.words(case, folder)
    (folder / "stdin").write_bytes(lines(case.good))
    running, outs = [], []
    with (folder / "stdin").open("rb") as source:
        for number in (1, 0):
            out, err = (folder / f"stdout{number}").open("wb"), (folder / f"stderr{number}").open("wb")
            with out, err:
                fds = (source.fileno(), out.fileno(), err.fileno())
                running.append(bench.tool.start(case.name, *words, fds=fds, env=_rank(number, port)))
            time.sleep(0.5)
    codes = [one.wait() for one in running]
    outs = [(folder / f"stdout{number}").read_bytes() for number in (1, 0)]
    said = [(folder / f"stderr{number}").read_text() for number in (1, 0)]
    assert codes == [0, 0], said
    assert outs[0] == b""
    if case.trainer or case.artefact or case.fills:
        assert events(outs[1])[-1]["event"] == events(alone.out)[-1]["event"]
    else:
        assert outs[1] == alone.out
    yield "the wrong rank first"


def lost_rank(bench: Bench, case: Case) -> Iterator[str]:
    """One of two workers is killed: the launcher ends soon and not well, nobody is left, nothing half-done stands."""
    for victim in (0, 1):
        folder = bench.folder(f"victim{victim}")
        more = ["--epochs", "200", "--save-every", "1"] if case.trainer else []
        first = bench.start(case, [*without_output(bench.words(case, folder)), *more, "-j", "2"], folder)
        assert first.until(partial(_both_work, first), 120), first.err
        workers = _workers(first)
        if case.trainer:
            assert first.until(partial(_steps, first), 120), first.err
        os.kill(workers[victim], signal.SIGKILL)
        code = first.wait(90)
        assert code == 137, (code, first.err)
        assert "Traceback" not in first.err, first.err
        deadline = time.monotonic() + 20
        while any(map(_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_alive, workers))
        assert not (folder / "out").exists()
        yield f"rank {victim}"


def _both_work(first: Started) -> bool:
    return len(_workers(first)) == 2


def _steps(first: Started) -> bool:
    return b'"step"' in first.out


def _workers(first: Started) -> list[int]:
    """The worker processes of a launcher, by rank; none before all of them are there."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if int((place / "stat").read_text().rsplit(")", 1)[1].split()[1]) == first.running.pid:
                    rank = (place / "environ").read_bytes().split(b"\0LOCAL_RANK=")[1].split(b"\0")[0]
                    found[int(rank)] = int(place.name)
            except (OSError, IndexError):
                continue
    return [found[rank] for rank in sorted(found)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
