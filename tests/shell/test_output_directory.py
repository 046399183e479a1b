"""A run's directory has its name when it is finished and not before, whatever kills its maker."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.server import ROOT
from tests.shell.places import mode, names
from toolbox.shell import files
from toolbox.shell.errors import CannotCreate, InternalError
from toolbox.shell.files import OutputDirectory, atomic_directory


def make_output(path, content="old"):
    """A finished output directory."""
    with OutputDirectory(path) as out:
        (out.partial / "run.json").write_text("{}")
        (out.partial / "model").write_text(content)
        out.commit()


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


def test_the_marks_of_a_run_killed_behind_its_renaming_go(tmp_path):
    make_output(tmp_path / "out")
    before = names(tmp_path / "out")
    for mark in (".complete", ".lock"):
        (tmp_path / "out" / mark).write_text("[]")
    with OutputDirectory(tmp_path / "out", resume=True) as out:
        assert out.finished
    assert names(tmp_path / "out") == before


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
