"""Every failure is one line, one line of advice and its own exit code; no text that it quotes can move a terminal."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.server import environment
from toolbox.shell import errors
from toolbox.shell.errors import AlreadyReported, BadData, TryAgain, clean, from_os_error, say, tell, top_level

CODES = {
    "UsageProblem": 2,
    "BadData": 65,
    "MissingInput": 66,
    "Unavailable": 69,
    "InternalError": 70,
    "CannotCreate": 73,
    "IoFailure": 74,
    "TryAgain": 75,
    "NoPermission": 77,
    "BadRecipe": 78,
}


def python(code, **more):
    """Run ``code`` with the module's names in a Python of its own."""
    code = "import os, signal, sys\nfrom toolbox.shell.errors import *\n" + code
    more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, **more)


def end_of(error, capfd, **more):
    """The exit code and what stderr says when ``error`` leaves a command's body."""
    with pytest.raises(SystemExit) as left, top_level("lm-tune", **more):
        raise error
    return left.value.code, capfd.readouterr().err


# --- exit codes -----------------------------------------------------------------------------------------------------


def test_every_class_has_its_code():
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    found = {name: kind.exit_code for name, kind in classes.items() if name not in ("ToolboxError", "AlreadyReported")}
    assert found == CODES


@pytest.mark.parametrize("name", CODES)
def test_a_failure_is_one_line_and_one_of_advice(name, capfd):
    code, said = end_of(getattr(errors, name)("out: exists", "choose another"), capfd)
    assert (code, said) == (CODES[name], "lm-tune: out: exists\n  choose another\n")
    assert end_of(getattr(errors, name)("out: exists"), capfd) == (CODES[name], "lm-tune: out: exists\n")


def test_bad_data_has_its_place():
    assert BadData("what").what == "what"
    assert BadData("what", file="f").what == "f: what"
    assert BadData("what", file="f", line=3).what == "f:3: what"
    assert BadData("what", file="f", line=3, field="$.x").what == "f:3: $.x: what"
    assert BadData("what", file="f", field="$[2].x").what == "f: $[2].x: what"


def test_what_a_worker_has_said_is_not_said_again(capfd):
    assert end_of(AlreadyReported(65), capfd) == (65, "")


def test_the_unexpected_is_our_fault_and_does_not_show_a_traceback_unless_asked(capfd):
    code, said = end_of(KeyError("a\nb"), capfd)
    assert code == 70
    assert said.splitlines()[0] == r"lm-tune: unexpected KeyError: 'a\nb'"
    assert len(said.splitlines()) == 2
    code, said = end_of(KeyError("x"), capfd, debug=True)
    assert code == 70
    assert said.startswith("Traceback")
    assert said.splitlines()[-2].startswith("lm-tune: unexpected KeyError")


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["python", "gpu", "cpu", "system"],
)
def test_out_of_memory_is_try_again(error, capfd):
    code, said = end_of(error, capfd)
    assert code == 75
    assert said.startswith("lm-tune: out of memory\n  ")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOENT, 66),
        (errno.ENOTDIR, 66),
        (errno.ENAMETOOLONG, 66),
        (errno.ELOOP, 66),
        (errno.EISDIR, 2),
        (errno.EACCES, 77),
        (errno.EPERM, 77),
        (errno.EROFS, 77),
        (errno.EEXIST, 73),
        (errno.ENOSPC, 74),
        (errno.EDQUOT, 74),
        (errno.EFBIG, 74),
        (errno.EIO, 74),
        (errno.EMFILE, 74),
        (errno.EAGAIN, 74),
        (errno.ECONNREFUSED, 69),
        (errno.ECONNRESET, 69),
        (errno.EHOSTUNREACH, 69),
        (errno.ENETUNREACH, 69),
        (errno.ETIMEDOUT, 69),
        (errno.ENOMEM, 75),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if value < 60 or value > 100 else str(value),
)
def test_the_system_s_errors_have_their_codes_and_name_the_file(number, code, capfd):
    found, said = end_of(OSError(number, os.strerror(number), "some/file"), capfd)
    assert found == code
    if code != 75:
        assert said.startswith(f"lm-tune: some/file: {os.strerror(number)}\n  ")
    assert len(said.splitlines()) == 2


def test_errors_of_the_system_without_a_file_or_a_number(capfd):
    assert from_os_error(OSError(errno.EIO, "Input/output error")).what == "Input/output error"
    assert end_of(socket.gaierror(socket.EAI_NONAME, "Name or service not known"), capfd)[0] == 69
    assert end_of(OSError("a library's own words"), capfd)[0] == 70


def test_real_failures_of_the_system(tmp_path):
    with pytest.raises(OSError, match="too long") as failed:
        (tmp_path / ("x" * 300)).read_bytes()
    assert from_os_error(failed.value).exit_code == 66
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links") as failed:
        (tmp_path / "loop").read_bytes()
    assert from_os_error(failed.value).exit_code == 66


@pytest.mark.parametrize(
    ("error", "number"), [("BrokenPipeError()", signal.SIGPIPE), ("KeyboardInterrupt", signal.SIGINT)]
)
def test_a_closed_pipe_and_ctrl_c_end_the_process_by_their_signals(error, number):
    code = f"with top_level('lm-tune', debug=True):\n    raise {error}"
    done = python(code)
    assert (done.returncode, done.stderr) == (-number, b"")
    blocked = python(f"signal.pthread_sigmask(signal.SIG_BLOCK, {{{int(number)}}})\n{code}")
    assert (blocked.returncode, blocked.stderr) == (-number, b"")
    immune = python(f"os.kill = lambda *a: None  # as for the first process of a container\n{code}")
    assert (immune.returncode, immune.stderr) == (128 + number, b"")


def test_ctrl_c_in_a_destructor_is_not_lost():
    """Python would say "Exception ignored" and go on."""
    done = python(
        "import time\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        time.sleep(1)\n"
        "with top_level('x'):\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    Slow()\n"
        "    time.sleep(20)\n"
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")


def test_what_else_a_destructor_raises_is_told():
    done = python("class Bad:\n    def __del__(self):\n        1 / 0\nwith top_level('x'):\n    Bad()\n")
    assert done.returncode == 0
    assert b"ZeroDivisionError" in done.stderr


def test_printing_into_a_pipe_that_was_closed_is_silent():
    code = "with top_level('lm-tune'):\n    print('x' * 100_000)\n    sys.stdout.flush()"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = python(code, stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_the_code_survives_a_stderr_that_is_gone():
    code = "with top_level('lm-tune'):\n    raise BadData('x', 'y')"
    read_end, write_end = os.pipe()
    os.close(read_end)
    assert python(code, stderr=write_end).returncode == 65
    os.close(write_end)
    with open("/dev/full", "w") as full:
        assert python(code, stderr=full).returncode == 65
    shell = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", "from toolbox.shell.errors import *\n" + code],
        env=environment(),
    )
    assert shell.returncode == 65


# --- messages -------------------------------------------------------------------------------------------------------

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "private mode": "\x1b[?25lred",
    "colours with colons": "\x1b[38:2:1:2:3mred",
    "title": "\x1b]0;owned\x07red",
    "title, other end": "\x1b]2;owned\x1b\\red",
    "link": "\x1b]8;;http://evil\x1b\\red\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07red",
    "device control": "\x1bP$qm\x1b\\red",
    "private message": "\x1b^secret\x1b\\\x1b_secret\x1b\\\x1bXsecret\x1b\\red",
    "eight-bit colour": "\x9b31mred",
    "eight-bit title": "\x9d0;owned\x9cred",
    "reset": "\x1bcred",
    "character set": "\x1b(0red\x1b(B",
    "screen test": "\x1b#8red",
    "bell, backspace": "re\x07\x08d",
    "escape, alone": "red\x1b",
    "escapes in escapes": "\x1b\x1b[0m\x1b[\x1b[31mred",
    "delete": "r\x7fed",
    "reversed": "\u202ered\u202c\u2066\u2069",
    "nul": "r\0ed",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_terminal_escapes_leave_nothing(text):
    assert clean(text) == "red"


def test_an_unfinished_title_does_not_swallow_the_message():
    assert clean("\x1b]0;red") == "0;red"
    assert clean("\x1b]0;red\nmore\x1b") == "0;red more"


@pytest.mark.parametrize(
    "end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"], ids=repr
)
def test_a_message_is_one_line(end):
    assert clean(f"a{end}b") == "a b"


def test_no_text_gets_a_control_character_through():
    source = random.Random(0)
    alphabet = "\x1b\x1b\x1b[]P\\;0mA\x07\x9b\x9c\x9d\n\r\t\u202eé漢🙂 ~"
    for _ in range(20_000):
        text = clean("".join(source.choices(alphabet, k=source.randrange(12))))
        assert all(character.isprintable() or character == "\t" for character in text), repr(text)
    plain = "'plain' text: é 漢字 🙂 \t [0m ]0; ~/x\\y"
    assert clean(plain) == plain


@pytest.mark.parametrize("opening", ["\x1b]", "\x9d", "\x1b[", "\x9b", "\x1bP0", "\x1b", "\x1b("], ids=repr)
def test_many_openings_take_linear_time(opening):
    began = time.process_time()
    clean(opening * 200_000)
    clean(opening + "0" * 200_000)
    assert time.process_time() - began < 2  # quadratic would be minutes


def test_a_message_that_quotes_megabytes_is_cut_and_keeps_its_place(capfd):
    code, said = end_of(BadData("x" * 1_000_000, "y" * 1_000_000, file="rows.jsonl", line=7), capfd)
    assert code == 65
    what, advice = said.splitlines()
    assert what.startswith("lm-tune: rows.jsonl:7: xxx")
    assert what.endswith("x…")
    assert len(what) < 1100 > len(advice)


def test_names_that_are_no_utf_8_can_be_complained_about(capfd):
    say("lm-tune", TryAgain(os.fsdecode(b"caf\xe9: gone\x1b[2J")))
    assert capfd.readouterr().err == "lm-tune: caf\\udce9: gone\n"


# --- telling --------------------------------------------------------------------------------------------------------


def test_telling_a_stderr_that_is_gone_changes_nothing():
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "tell('one\\n')\ntell('two\\n')\nprint(os.readlink('/proc/self/fd/2'))"
    done = python(code, stderr=write_end)
    assert (done.returncode, done.stdout) == (0, b"/dev/null\n")
    both = python("tell('one\\n')\nprint('library', flush=True)\ntell('two\\n')", stdout=write_end, stderr=write_end)
    assert both.returncode == 0
    os.close(write_end)
    with open("/dev/full", "w") as full:
        done = python(code, stderr=full)
    assert (done.returncode, done.stdout) == (0, b"/dev/null\n")
    assert python("sys.stderr = None\ntell('one\\n')").returncode == 0


def test_telling_writes_at_once(capfd):
    tell("a note\n")
    assert capfd.readouterr().err == "a note\n"
