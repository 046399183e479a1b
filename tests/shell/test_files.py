"""Outputs are whole or not there, whatever kills the writer; left-overs of the dead go, those of the living stay."""

import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from toolbox.shell import files
from toolbox.shell.errors import CannotCreate, InternalError, UsageProblem, from_os_error
from toolbox.shell.files import OutputDirectory, atomic_directory, atomic_file, fsync_tree, lock, sha256_file

ROOT = Path(__file__).parents[2]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(directory):
    return sorted(entry.name for entry in Path(directory).iterdir())


@pytest.fixture
def umask_022():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def child(tmp_path):
    """Start a Python process that runs ``code``; ``wait_for_line`` returns once it has printed a line."""
    started = []

    class Child:
        def __init__(self, code):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            started.append(self.process)

        def wait_for_line(self):
            line = self.process.stdout.readline().strip()
            if not line:
                raise AssertionError(self.process.communicate()[1])
            return line

        def kill(self):
            self.process.send_signal(signal.SIGKILL)
            assert self.process.wait() == -signal.SIGKILL

        def finish(self):
            out, err = self.process.communicate(timeout=30)
            return self.process.returncode, out, err

    yield Child
    for process in started:
        process.kill()
        process.communicate()


def make_output(path, content="old"):
    """A finished output directory."""
    with OutputDirectory(path) as out:
        (out.partial / "run.json").write_text("{}")
        (out.partial / "model").write_text(content)
        out.commit()


# --- atomic_file ----------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_with_the_mode_of_the_umask(tmp_path, umask_022):
    path = tmp_path / "a.bin"
    with atomic_file(path) as handle:
        handle.write(b"x" * 100_000)
        handle.flush()
        assert not path.exists()
    assert path.read_bytes() == b"x" * 100_000
    assert mode(path) == 0o644
    assert names(tmp_path) == ["a.bin"]


def test_a_stricter_umask_is_respected(tmp_path, umask_022):
    os.umask(0o077)
    with atomic_file(tmp_path / "a") as handle:
        handle.write(b"x")
    assert mode(tmp_path / "a") == 0o600


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_no_part(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write():
        with atomic_file(path) as handle:
            handle.write(b"new")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_an_existing_file_is_refused_without_overwrite_even_if_it_came_meanwhile(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(CannotCreate, match="exists already"), atomic_file(path, overwrite=False):
        path.write_bytes(b"came meanwhile")
    with pytest.raises(CannotCreate, match="exists already"), atomic_file(path, overwrite=False):
        pytest.fail("the block must not run")
    assert path.read_bytes() == b"came meanwhile"
    assert names(tmp_path) == ["a"]
    with atomic_file(tmp_path / "b", overwrite=False) as handle:
        handle.write(b"new")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert (tmp_path / "b").stat().st_nlink == 1


def test_a_missing_directory_and_a_directory_as_target_are_refused(tmp_path):
    with pytest.raises(CannotCreate, match="its directory does not exist"), atomic_file(tmp_path / "no" / "a"):
        pytest.fail("the block must not run")
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path):
        pytest.fail("the block must not run")
    with pytest.raises(UsageProblem, match="cannot be stdout"), atomic_file("-"):
        pytest.fail("the block must not run")


def test_a_symbolic_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    for content in (b"first", b"second"):
        with atomic_file(tmp_path / "link") as handle:
            handle.write(content)
        assert (tmp_path / "elsewhere" / "real").read_bytes() == content
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_is_written_directly(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    with atomic_file(fifo, overwrite=False) as handle:
        handle.write(b"through")
    reader.join()
    assert got == [b"through"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_full_device_is_named_in_the_error():
    with pytest.raises(OSError, match="No space left") as caught, atomic_file("/dev/full") as handle:
        handle.write(b"x" * 10)
    assert from_os_error(caught.value).exit_code == 74
    assert from_os_error(caught.value).what.startswith("/dev/full: ")


def test_a_text_wrapper_that_closes_the_handle_does_no_harm(tmp_path):
    with atomic_file(tmp_path / "a") as handle, io.TextIOWrapper(handle, encoding="utf-8") as text:
        text.write("ä")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä"


def test_names_up_to_the_limit_of_the_file_system(tmp_path):
    for name in ("n" * 255, "ä" * 127):
        with atomic_file(tmp_path / name) as handle:
            handle.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


WRITE_HALF = """
import time
from toolbox.shell.files import atomic_file
with atomic_file({path!r}) as handle:
    handle.write(b"half"); handle.flush()
    print("written", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_changes_nothing_and_its_part_goes_at_the_next_write(tmp_path, child):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    other = tmp_path / ".a.b.1-00000000.part"
    other.write_bytes(b"of another target")
    killed, living = child(WRITE_HALF.format(path=str(path))), child(WRITE_HALF.format(path=str(path)))
    killed.wait_for_line()
    living.wait_for_line()
    killed.kill()
    parts = [name for name in names(tmp_path) if name.endswith(".part")]
    assert len(parts) == 3
    assert path.read_bytes() == b"old"
    with atomic_file(path) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"new"
    left = [name for name in names(tmp_path) if name.endswith(".part")]
    assert len(left) == 2  # the living writer's, and the one that belongs to another target
    assert other.name in left
    assert str(living.process.pid) in "".join(left)
    assert str(killed.process.pid) not in "".join(left)


def test_two_writers_at_once_leave_one_of_both_contents(tmp_path):
    path, failures = tmp_path / "a", []

    def write(letter):
        try:
            for _ in range(30):
                with atomic_file(path) as handle:
                    handle.write(letter * 5000)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert set(path.read_bytes()) in ({ord("a")}, {ord("b")}, {ord("c")})
    assert len(path.read_bytes()) == 5000
    assert names(tmp_path) == ["a"]


# A file-size limit with SIGXFSZ ignored fails in write(2) as a full disk does, with EFBIG in place of ENOSPC.
TOO_BIG = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from toolbox.shell.errors import top_level
from toolbox.shell.files import OutputDirectory, atomic_directory, atomic_file
with top_level("writer"):
    {body}
"""


def test_a_full_disk_leaves_the_old_file_and_ends_with_74(tmp_path, child):
    (tmp_path / "a").write_bytes(b"old")
    body = "with atomic_file('a') as handle:\n        handle.write(b'x' * (2 << 20))"
    code, _, err = child(TOO_BIG.format(body=body)).finish()
    assert code == 74
    assert err.splitlines()[0] == "writer: a: File too large"
    assert len(err.splitlines()) == 2
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_at_a_checkpoint_keeps_the_last_state(tmp_path, child):
    body = """with OutputDirectory('out') as out:
        with atomic_directory(out.partial / 'step-0001') as state:
            (state / 'w').write_bytes(b'good')
        with atomic_directory(out.partial / 'step-0002') as state:
            (state / 'w').write_bytes(b'x' * (2 << 20))"""
    code, _, err = child(TOO_BIG.format(body=body)).finish()
    assert code == 74, err
    assert names(tmp_path / "out.partial") == [".lock", "step-0001"]
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert out.resumed
        assert (out.partial / "step-0001" / "w").read_bytes() == b"good"


# --- lock, sha256, atomic_directory ---------------------------------------------------------------------------------


def test_lock_waits_for_the_other_process_and_says_so_once(tmp_path, child):
    holder = child(
        "import sys\nfrom toolbox.shell.files import lock\n"
        "with lock('cache/l'):\n  print('held', flush=True)\n  sys.stdin.readline()\n  open('done', 'w').close()"
    )
    holder.wait_for_line()
    waits = []

    def on_wait():
        waits.append((tmp_path / "done").exists())
        holder.process.stdin.write("go\n")
        holder.process.stdin.flush()

    with lock(tmp_path / "cache" / "l", on_wait):
        assert (tmp_path / "done").exists()
    assert waits == [False]
    with lock(tmp_path / "cache" / "l", on_wait):
        assert waits == [False]


def test_a_killed_holder_does_not_block_the_lock(tmp_path, child):
    holder = child(
        "import time\nfrom toolbox.shell.files import lock\n"
        "with lock('l'):\n  print('held', flush=True)\n  time.sleep(60)"
    )
    holder.wait_for_line()
    with lock(tmp_path / "l", holder.kill):
        assert holder.process.returncode == -signal.SIGKILL


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_state_directory_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "step-0001"
    (tmp_path / "step-0001.part").mkdir()
    (tmp_path / "step-0001.part" / "torn").write_text("of a killed run")
    with atomic_directory(target) as part:
        (part / "deep").mkdir()
        (part / "deep" / "w").write_text("x")
        assert not target.exists()
    assert names(tmp_path) == ["step-0001"]
    assert names(target) == ["deep"]
    with pytest.raises(CannotCreate), atomic_directory(target):
        pytest.fail("the block must not run")
    with pytest.raises(IsADirectoryError), atomic_directory(tmp_path / "step-0002") as part:
        part.write_text("fails")
    assert names(tmp_path) == ["step-0001"]


def test_fsync_tree_syncs_files_before_the_directories_that_name_them(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    fsync_tree(tmp_path)
    assert synced == [str(tmp_path / "d" / "f"), str(tmp_path / "d"), str(tmp_path)]


# --- OutputDirectory ------------------------------------------------------------------------------------------------


def test_an_output_has_its_name_only_when_committed(tmp_path, umask_022):
    with OutputDirectory(tmp_path / "deep" / "out") as out:
        assert (out.resumed, out.finished) == (False, False)
        with atomic_directory(out.partial / "step-0001") as state:
            (state / "w").write_text("x")
        (out.partial / "model.safetensors").write_text("x")
        (out.partial / "model.safetensors").chmod(0o600)
        (out.partial / ".torn.1-0.part").write_text("x")
        (out.partial / "run.json").write_text("{}")
        assert not out.final.exists()
        out.commit()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["model.safetensors", "run.json"]
    assert mode(tmp_path / "deep" / "out" / "model.safetensors") == 0o644


def test_states_named_in_keep_stay(tmp_path):
    with OutputDirectory(tmp_path / "out") as out:
        for step in ("step-0001", "step-0002"):
            (out.partial / step).mkdir()
        (out.partial / "run.json").write_text("{}")
        out.commit(keep=["step-0002"])
    assert names(tmp_path / "out") == ["run.json", "step-0002"]


def test_a_commit_without_run_json_is_a_fault_of_ours(tmp_path):
    with pytest.raises(InternalError), OutputDirectory(tmp_path / "out") as out:
        out.commit()
    assert names(tmp_path) == []


def test_a_block_left_without_commit_leaves_nothing_unless_there_is_a_state(tmp_path):

    def fail():
        with OutputDirectory(tmp_path / "out") as out:
            (out.partial / "log").write_text("x")
            (out.partial / "step-0001.part").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []
    with OutputDirectory(tmp_path / "out") as out:
        (out.partial / "step-0001").mkdir()
    assert names(tmp_path) == ["out.partial"]


def test_existing_output_is_refused_with_both_ways_on_and_replaced_with_overwrite(tmp_path):
    make_output(tmp_path / "out")
    with pytest.raises(CannotCreate) as caught, OutputDirectory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert "--overwrite" in caught.value.advice
    assert "--resume" in caught.value.advice
    with pytest.raises(ZeroDivisionError), OutputDirectory(tmp_path / "out", overwrite=True) as out:
        raise ZeroDivisionError
    assert (tmp_path / "out" / "model").read_text() == "old"
    with OutputDirectory(tmp_path / "out", overwrite=True) as out:
        (out.partial / "run.json").write_text("{}")
        assert (tmp_path / "out" / "model").read_text() == "old"
        out.commit()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["run.json"]


def test_a_finished_output_is_not_touched_by_resume(tmp_path):
    make_output(tmp_path / "out")
    before = (tmp_path / "out").stat().st_mtime_ns
    for overwrite in (False, True):
        with OutputDirectory(tmp_path / "out", resume=True, overwrite=overwrite) as out:
            assert out.finished
            assert not out.resumed
    assert (tmp_path / "out").stat().st_mtime_ns == before
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("made", ["file", "foreign", "foreign partial", "partial file", "under a file"])
def test_what_is_not_ours_is_never_replaced(tmp_path, made):
    out = tmp_path / "out"
    match made:
        case "file":
            out.write_text("mine")
        case "foreign":
            out.mkdir()
            (out / "thesis.tex").write_text("mine")
        case "foreign partial":
            (tmp_path / "out.partial").mkdir()
            (tmp_path / "out.partial" / "thesis.tex").write_text("mine")
        case "partial file":
            (tmp_path / "out.partial").write_text("mine")
        case "under a file":
            out.write_text("mine")
            out = out / "deeper"
    before = sorted(tmp_path.rglob("*"))
    for overwrite, resume in [(False, False), (True, False), (False, True), (True, True)]:
        with pytest.raises(CannotCreate), OutputDirectory(out, overwrite=overwrite, resume=resume):
            pytest.fail("the block must not run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["/", ".", ".."])
def test_the_working_directory_and_the_root_are_safe(tmp_path, monkeypatch, path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("x")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CannotCreate), OutputDirectory(path, overwrite=True):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["here"]


def test_an_empty_directory_of_the_user_can_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    for resume in (True, False):
        with OutputDirectory(tmp_path / "out", overwrite=True, resume=resume) as out:
            assert not out.finished
    with OutputDirectory(tmp_path / "out", overwrite=True) as out:
        (out.partial / "run.json").write_text("{}")
        out.commit()
    assert names(tmp_path / "out") == ["run.json"]


RUN = """
import sys, time
from toolbox.shell.errors import top_level
from toolbox.shell.files import OutputDirectory, atomic_directory
with top_level("run"):
    with OutputDirectory("out", overwrite={overwrite}, resume={resume}) as out:
        (out.partial / "log").write_text("x")
        for step in range({states}):
            with atomic_directory(out.partial / f"step-{{step:04d}}") as state:
                (state / "w").write_text("x")
        (out.partial / "step-9999.part").mkdir()
        print("running", flush=True)
        time.sleep(60)
"""


def test_the_second_run_into_one_output_ends_with_73_and_leaves_the_first_alone(tmp_path, child):
    first = child(RUN.format(overwrite=False, resume=False, states=1))
    first.wait_for_line()
    before = names(tmp_path / "out.partial")
    for overwrite, resume in [(False, False), (True, False), (False, True)]:
        code, _, err = child(RUN.format(overwrite=overwrite, resume=resume, states=0)).finish()
        assert code == 73
        assert "another run is writing" in err
    assert first.process.poll() is None
    assert names(tmp_path / "out.partial") == before


def test_of_many_runs_that_start_at_once_exactly_one_gets_the_output(tmp_path):
    for _ in range(20):
        barrier, results = threading.Barrier(8), []

        def race(barrier=barrier, results=results):
            out = OutputDirectory(tmp_path / "out")
            barrier.wait()
            try:
                out.claim()
                results.append(out)
            except CannotCreate:
                results.append(None)

        racers = [threading.Thread(target=race) for _ in range(8)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        winners = [out for out in results if out is not None]
        assert len(results) == 8
        assert len(winners) == 1
        winners[0].release()
        assert names(tmp_path) == []


@pytest.mark.parametrize("ending", ["discarded", "committed"])
def test_a_run_that_ends_between_our_open_and_our_lock_is_noticed(tmp_path, monkeypatch, ending):
    """Then the lock that is got is one of a file that is gone, and protects nothing."""
    other = OutputDirectory(tmp_path / "out")
    other.claim()
    try_lock = files.try_lock

    def late(descriptor):
        monkeypatch.setattr(files, "try_lock", try_lock)
        if ending == "committed":
            (other.partial / "run.json").write_text("{}")
            other.commit()
        other.release()
        return try_lock(descriptor)

    monkeypatch.setattr(files, "try_lock", late)
    out = OutputDirectory(tmp_path / "out")
    if ending == "committed":
        with pytest.raises(CannotCreate, match="exists already"):
            out.claim()
        assert names(tmp_path) == ["out"]
    else:
        out.claim()
        with pytest.raises(CannotCreate, match="another run"):
            OutputDirectory(tmp_path / "out").claim()
        out.release()
        assert names(tmp_path) == []


@pytest.mark.parametrize("states", [0, 2])
def test_a_killed_run_is_recognised_continued_or_started_anew(tmp_path, child, states):
    run = child(RUN.format(overwrite=False, resume=False, states=states))
    run.wait_for_line()
    run.kill()
    assert "step-9999.part" in names(tmp_path / "out.partial")
    with pytest.raises(CannotCreate, match="interrupted") as caught, OutputDirectory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert "--resume" in caught.value.advice
    assert "--overwrite" in caught.value.advice
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert out.resumed == (states > 0)
        assert names(out.partial) == ([".lock", "log", "step-0000", "step-0001"] if states else [".lock"])
    with OutputDirectory(tmp_path / "out", overwrite=True) as out:
        assert not out.resumed
        assert names(out.partial) == [".lock"]


def test_a_left_over_of_a_command_that_cannot_go_on_gives_way(tmp_path, child):
    run = child(RUN.format(overwrite=False, resume=False, states=0))
    run.wait_for_line()
    run.kill()
    with OutputDirectory(tmp_path / "out", resumable=False) as out:
        assert names(out.partial) == [".lock"]


def test_an_interrupted_replacement_is_continued_only_when_both_are_asked_for(tmp_path, child):
    make_output(tmp_path / "out")
    run = child(RUN.format(overwrite=True, resume=False, states=1))
    run.wait_for_line()
    run.kill()
    with (
        pytest.raises(CannotCreate, match="was to replace it") as caught,
        OutputDirectory(tmp_path / "out", resume=True),
    ):
        pytest.fail("the block must not run")
    assert "--resume --overwrite" in caught.value.advice
    with OutputDirectory(tmp_path / "out", resume=True, overwrite=True) as out:
        assert out.resumed
        (out.partial / "run.json").write_text("{}")
        out.commit()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["log", "run.json"]


REPLACE = """
import os, signal, sys
from pathlib import Path
from toolbox.shell import files

calls = 0
def counted(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

with files.OutputDirectory("out", overwrite=True) as out:
    (out.partial / "step-0001").mkdir()
    (out.partial / "run.json").write_text("{}")
    (out.partial / "model").write_text("new")
    for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    out.commit()
print(calls)
"""


def run_killed_at(call, directory):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPLACE, str(call)]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def test_a_kill_at_any_system_call_of_a_replacement_loses_nothing(tmp_path):
    """Before ``.complete`` the old output is in place; after it the next claim finishes the job; never half of one."""
    (tmp_path / "dry").mkdir()
    make_output(tmp_path / "dry" / "out")
    calls = int(run_killed_at(0, tmp_path / "dry").stdout)
    assert calls > 15
    seen = set()
    for call in range(1, calls + 1):
        directory = tmp_path / str(call)
        directory.mkdir()
        make_output(directory / "out")
        assert run_killed_at(call, directory).returncode == -signal.SIGKILL
        whole = [
            (entry.name, (entry / "model").read_text())
            for entry in directory.iterdir()
            if (entry / "run.json").exists() and (entry / "model").exists()
        ]
        assert ("out", "old") in whole or ("out", "new") in whole or ("out.partial.replaced", "old") in whole
        with OutputDirectory(directory / "out", overwrite=True, resume=True) as out:
            content = (out.final / "model").read_text()
            seen.add((content, out.finished, out.resumed))
            assert content in ("old", "new")
            assert out.finished == (content == "new")
            assert out.resumed == (content == "old")
        with OutputDirectory(directory / "out", overwrite=True):
            pass
        assert names(directory) == ["out"]
    assert len(seen) == 2


def test_a_rename_that_fails_puts_the_old_output_back(tmp_path, monkeypatch):
    make_output(tmp_path / "out")
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "out.partial":
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", failing)

    def replace():
        with OutputDirectory(tmp_path / "out", overwrite=True) as out:
            (out.partial / "run.json").write_text("{}")
            (out.partial / "model").write_text("new")
            out.commit()

    with pytest.raises(OSError, match="broken disk"):
        replace()
    assert (tmp_path / "out" / "model").read_text() == "old"
    monkeypatch.undo()
    # The new one was complete: it stays, and gets its name as soon as that can be done.
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert out.finished
    assert (tmp_path / "out" / "model").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_a_forked_child_that_outlives_the_run_does_not_hold_the_output(tmp_path):
    read_end, write_end = os.pipe()
    with OutputDirectory(tmp_path / "out") as out:
        child = os.fork()
        if child == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        (out.partial / "step-0001").mkdir()
    with OutputDirectory(tmp_path / "out", resume=True) as again:
        assert again.resumed
    os.close(write_end)
    os.close(read_end)
    os.waitpid(child, 0)


def test_a_link_to_a_directory_elsewhere_stays_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "real")
    for content in ("one", "two"):
        with OutputDirectory(tmp_path / "out", overwrite=True) as out:
            (out.partial / "run.json").write_text(json.dumps(content))
            out.commit()
        assert json.loads((tmp_path / "scratch" / "real" / "run.json").read_text()) == content
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "scratch") == ["real"]


def test_the_module_needs_only_the_standard_library():
    code = "import sys, toolbox.shell.files; print(sorted({'torch', 'numpy', 'click', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
