"""Inputs that are not there, outputs that are there already, streams that nobody reads, disks that fill up."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.contract.commands import Case, lines
from tests.faults.bench import Bench, Started, artefacts, complaint, left_behind, resumes, without_output

TWICE = {
    "coca-train": ["--watch", "more=-"],
    "dull-train": ["--eval", "-"],
    "gru-unlearn": ["--retain", "-"],
    "lit-eval": ["--refs", "-"],
    "lm-tune": ["--watch", "more=-"],
    "lwi-train": ["--val", "-"],
    "satimp-unlearn": ["--retain", "-"],
    "unlearn-eval": ["--retain", "-"],
}
"""Arguments by which a second input of these commands is stdin too."""


def makes_directory(case: Case) -> bool:
    """Whether its short run makes ``out`` as a directory of its own."""
    return case.trainer or case.fills or case.artefact


def from_file(words: list[str], path: object) -> list[str]:
    """The arguments with ``path`` in the place of stdin."""
    return [str(path) if word == "-" else word for word in words] if "-" in words else [*words, str(path)]


def missing(bench: Bench, case: Case) -> Iterator[str]:
    """An input that is not there, a directory, an empty name."""
    folder = bench.folder("run")
    words = bench.words(case, folder)
    (folder / "file").write_text("")
    for name, path, codes in [
        ("no such file", folder / "none.jsonl", {66}),
        ("a file as a directory", folder / "file" / "below", {66}),
        ("a directory", folder, {2, 65, 66}),  # where a folder of images may stand for rows it is looked into
        ("an empty name", "", {2}),
    ]:
        done = bench.tool(case.name, *from_file(words, path))
        told = complaint(case, done.code, done.out, done.err)
        assert done.code in codes, (name, done.err)
        assert not path or str(path) in told
        yield name


def terminal(bench: Bench, case: Case) -> Iterator[str]:
    """Nothing piped in: stdin is a terminal that nobody types at."""
    folder = bench.folder("run")
    leader, follower = pty.openpty()
    try:
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            fds = (follower, out.fileno(), err.fileno())
            code = bench.tool.start(case.name, *bench.words(case, folder), fds=fds).wait()
    finally:
        os.close(leader)
        os.close(follower)
    told = complaint(case, code, (folder / "stdout").read_bytes(), (folder / "stderr").read_text())
    assert code == 2
    assert "terminal" in told
    yield "terminal"


def claimed_twice(bench: Bench, case: Case) -> Iterator[str]:
    """Two inputs from one stdin."""
    done = bench.run(case, *TWICE[case.name])
    told = complaint(case, done.code, done.out, done.err)
    assert done.code == 2
    assert "stdin" in told, told
    yield "twice"


def wrong_words(bench: Bench, case: Case) -> Iterator[str]:
    """Options that are none, values of another type, files of options that are not there."""
    for words, code in [
        (["--no-such-option"], 2),
        (["--seed", "x"], 2),
        (["--seed", "1e999"], 2),
        (["--map", "question"], 2),
        (["--recipe", bench.root / "none.yaml"], 66),
        (["--accelerate", bench.root / "none.yaml"], 66),
    ]:
        if words[0] == "--accelerate" and not case.model:
            words, code = ["--seed", ""], 2
        done = bench.run(case, *words)
        complaint(case, done.code, done.out, done.err)
        assert done.code == code, (words, done.err)
        yield " ".join(map(str, words))


# -- streams ---------------------------------------------------------------------------------------------------------


def closed_pipe(bench: Bench, case: Case) -> Iterator[str]:
    """Nobody reads stdout: silence by SIGPIPE, or one warning from what makes something else."""
    folder = bench.folder("run")
    read_out, write_out = os.pipe()
    os.close(read_out)
    code = _fed(bench, case, folder, write_out)
    os.close(write_out)
    said = (folder / "stderr").read_text()
    if not (case.trainer or case.artefact):
        assert (code, said) == (128 + signal.SIGPIPE, "")
    else:
        assert code == 0, said
        assert said.count("stdout was closed") == 1
        assert (folder / "out" / "run.json").is_file()
    yield "closed pipe"


def full_stdout(bench: Bench, case: Case) -> Iterator[str]:
    """stdout is a disk without room."""
    folder = bench.folder("run")
    with open("/dev/full", "wb") as full:
        assert _fed(bench, case, folder, full.fileno()) == 74
    said = (folder / "stderr").read_text()
    assert "No space left" in said
    assert "Traceback" not in said
    yield "/dev/full"


def full_stderr(bench: Bench, case: Case) -> Iterator[str]:
    """stderr is a disk without room, or gone: the data come all the same."""
    expected = bench.run(case, folder=bench.folder("whole"))
    for name in ("full", "closed"):
        folder = bench.folder(name)
        with contextlib.ExitStack() as stack:
            if name == "full":
                err = stack.enter_context(open("/dev/full", "wb")).fileno()
            else:
                read_end, err = os.pipe()
                os.close(read_end)
                stack.callback(os.close, err)
            out = stack.enter_context((folder / "stdout").open("wb"))
            code = _fed(bench, case, folder, out.fileno(), err)
        assert code == 0, (code, name)
        if not makes_directory(case):
            assert (folder / "stdout").read_bytes() == expected.out
        yield name


def _fed(bench: Bench, case: Case, folder: Path, stdout: int, stderr: int | None = None) -> int:
    """Run with its rows through a pipe and the given stdout."""
    read_in, write_in = os.pipe()
    with (folder / "stderr").open("wb") as err:
        fds = (read_in, stdout, err.fileno() if stderr is None else stderr)
        running = bench.tool.start(case.name, *bench.words(case, folder), fds=fds)
        os.close(read_in)
        with contextlib.suppress(BrokenPipeError), open(write_in, "wb") as feed:
            feed.write(lines(case.good))
        return running.wait()


# -- outputs ---------------------------------------------------------------------------------------------------------


def existing(bench: Bench, case: Case) -> Iterator[str]:
    """The output is there already: a finished one, a file, somebody's own directory."""
    folder = bench.folder("run")
    words = without_output(bench.words(case, folder))
    out, data = folder / "out", lines(case.good)

    def refused(*more: str) -> None:
        done = bench.tool(case.name, *words, *more, stdin=data)
        complaint(case, done.code, done.out, done.err)
        assert done.code == 73, done.err

    first = bench.tool(case.name, *words, stdin=data)
    assert first.code == 0, first.err
    before = artefacts(case, folder)
    refused()
    assert artefacts(case, folder) == before
    yield "a finished output"
    again = bench.tool(case.name, *words, "--overwrite", stdin=data)
    assert again.code == 0, again.err
    assert artefacts(case, folder) == before
    yield "a finished output, to be replaced"
    if case.trainer:
        finished = bench.tool(case.name, *words, "--resume", stdin=data)
        assert finished.code == 0, finished.err
        assert finished.rows[-1]["event"] == "done"
        assert artefacts(case, folder) == before
        yield "a finished output, to be resumed"
    out.rename(folder / "aside")
    out.write_text("mine")
    for more in ((), ("--overwrite",)):
        refused(*more)
        assert out.read_text() == "mine"
    yield "a file"
    out.unlink()
    out.mkdir()
    (out / "mine").write_text("mine")
    for more in ((), ("--overwrite",)):
        refused(*more)
        assert [path.name for path in out.iterdir()] == ["mine"]
    yield "somebody's directory"
    assert left_behind(folder) == []


def two_at_once(bench: Bench, case: Case) -> Iterator[str]:
    """A second run while the first, held in mid-run, is not done."""
    first = next(one for one in map(partial(_held, bench, case), range(10)) if one is not None)
    words, data = bench.words(case, first.folder), lines(case.good)
    try:
        for more in ((), ("--overwrite",), *([("--resume",)] if case.trainer else [])):
            done = bench.tool(case.name, *words, *more, stdin=data)
            complaint(case, done.code, done.out, done.err)
            assert done.code == 73, done.err
            yield " ".join(more) or "plain"
    finally:
        first.send(signal.SIGCONT)
    assert first.wait() == 0, first.err
    assert left_behind(first.folder) == []


def _held(bench: Bench, case: Case, number: int) -> Started | None:
    """A run that is stopped between its claim and its end; None where it was over before that."""
    folder = bench.folder(f"held{number}")
    first = bench.start(case, bench.words(case, folder), folder)
    begun = first.until(lambda: _claimed(folder))
    first.send(signal.SIGSTOP)
    if begun and first.until(lambda: first.state() == "T") and _claimed(folder):
        return first
    first.send(signal.SIGCONT)
    assert first.wait() == 0, first.err
    return None


def _claimed(folder: Path) -> bool:
    """Whether a run holds the lock of the output it is making (asked of the kernel: taking it would get in its way)."""
    try:
        inode = (folder / "out.partial/.lock").stat().st_ino
    except OSError:
        return False
    return f":{inode} " in Path("/proc/locks").read_text()


# -- disks -----------------------------------------------------------------------------------------------------------


def full_at_the_end(bench: Bench, case: Case) -> Iterator[str]:
    """Files may grow to half of the largest: no output stands, nothing half-written, and the same run with room works.

    The limit is the system's (RLIMIT_FSIZE), which says EFBIG where a disk says ENOSPC; both are one fault to us.
    """
    folder = bench.folder("run")
    done = bench.run(case, *(["--save-every", "0"] if case.trainer else []), file_size=case.full_disk, folder=folder)
    assert done.code == 74, done.err
    assert "Traceback" not in done.err
    assert not (folder / "out").exists()
    yield "the end"


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes that is seen through a process which has it mounted for itself alone."""
    (folder / "disk").mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} none {folder}/disk && echo ready && exec sleep 600"
    holder = subprocess.Popen(["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            pytest.skip("nobody may mount a file system here")
        yield Path(f"/proc/{holder.pid}/root{folder}/disk")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


DISK = 2 << 20
SHARES = (0.05, 0.5, 0.9, 1.5, 2.5, 4.0)
"""Free room as shares of what the finished output takes: from the first file to states beside it."""


def full_disk(bench: Bench, case: Case) -> Iterator[str]:
    """A disk of 2 MiB with little room: at a state or at the end, 74 and no output; with room again, the same bytes."""
    whole = bench.folder("whole")
    more = SAVING if case.trainer else []
    done = bench.run(case, *more, folder=whole)
    assert done.code == 0, done.err
    expected, words, data = artefacts(case, whole), bench.words(case, whole), lines(case.good)
    taken = sum(4096 * -(-path.stat().st_size // 4096) for path in (whole / "out").rglob("*") if path.is_file())
    full = 0
    with small_disk(bench.folder("small"), max(DISK, 40 * taken)) as disk:
        moved = [*without_output(_moved(words, whole, disk)), *more]
        for share in SHARES:
            with ballast(disk, int(share * taken)):
                tight = bench.tool(case.name, *moved, stdin=data)
            assert tight.code in (0, 74), (share, tight.code, tight.err)
            assert "Traceback" not in tight.err
            if tight.code == 74:
                full += 1
                assert not (disk / "out").exists(), share
                assert re.search("No space left|ENOSPC", tight.err), tight.err
                again = bench.tool(case.name, *moved, *(["--resume"] if resumes(case) else []), stdin=data)
                assert again.code == 0, again.err
            found = artefacts(case, disk)
            other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            assert other == [], (other, share, tight.code, tight.err)
            assert left_behind(disk) == []
            for path in list(disk.iterdir()):
                shutil.rmtree(path)
            yield f"{share} free"
    assert full >= 2, "the disk was never full"


@contextlib.contextmanager
def ballast(disk: Path, room: int) -> Iterator[None]:
    """A file that leaves only so much room meanwhile."""
    with (disk / "ballast").open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, max(4096, os.statvfs(disk).f_bavail * 4096 - room))
    try:
        yield
    finally:
        (disk / "ballast").unlink()


SAVING = ["--save-every", "1"]


def _moved(words: list[str], before: Path, now: Path) -> list[str]:
    """The arguments with the output elsewhere."""
    return [str(now / "out") if word == str(before / "out") else word for word in words]
