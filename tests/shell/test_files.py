"""Files are whole or not there, whatever kills the writer; left-overs of the dead go, those of the living stay."""

import io
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from tests.server import ROOT
from tests.shell.places import mode, names
from toolbox.shell.errors import CannotCreate, UsageProblem, from_os_error
from toolbox.shell.files import OutputDirectory, atomic_directory, atomic_file, fsync_tree, lock, sha256_file

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


def test_the_module_needs_only_the_standard_library():
    code = "import sys, toolbox.shell.files; print(sorted({'torch', 'numpy', 'click', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
