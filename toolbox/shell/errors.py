"""Exception classes that are exit codes, and the one place that turns any exception into one line on stderr.

Every message has the form ``command: [file:line: [$.field:]] what is wrong`` followed by one line of advice.
Codes follow sysexits.h where it has one: scripts can tell bad data (65) from a full disk (74).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

_BREAK = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
_ESCAPE = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"  # titles, links
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # controls; reversals of the reading direction
)
_LONGEST = 1000
"""Characters of a message: it may quote a value of megabytes."""

_NOT_REACHED = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT,
}  # fmt: skip


class ToolboxError(Exception):
    """An expected failure: ``what`` is wrong, ``advice`` is what to do about it (one line each)."""

    exit_code = 70

    def __init__(self, what: str, advice: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


class UsageProblem(ToolboxError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class BadData(ToolboxError):
    """A record or a file does not hold what it should.

    ``where`` is put before the message as ``file:line: $.field``.
    """

    exit_code = 65

    def __init__(
        self,
        what: str,
        advice: str | None = None,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.file, self.line, self.field, self.reason = file, line, field, what
        place = ":".join(str(part) for part in (file, line) if part is not None)
        super().__init__(": ".join(part for part in (place, field, what) if part), advice)


class MissingInput(ToolboxError):
    """A file that was named does not exist."""

    exit_code = 66


class Unavailable(ToolboxError):
    """A model, a hub, an endpoint or a device cannot be reached."""

    exit_code = 69


class InternalError(ToolboxError):
    """A broken promise of our own code."""

    exit_code = 70


class CannotCreate(ToolboxError):
    """An output exists already, is in use, or cannot be made."""

    exit_code = 73


class IoFailure(ToolboxError):
    """Reading or writing failed: a full disk, a broken device."""

    exit_code = 74


class TryAgain(ToolboxError):
    """Stopped with the last good state kept: interrupted, out of memory, or a loss that is not finite."""

    exit_code = 75


class NoPermission(ToolboxError):
    """The operating system refused access."""

    exit_code = 77


class BadRecipe(ToolboxError):
    """A recipe file is not valid."""

    exit_code = 78


class AlreadyReported(ToolboxError):
    """Ends with a code that a worker process has explained already: nothing more is printed."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def clean(text: str) -> str:
    """``text`` on one line, without terminal escapes and control characters: data may quote anything."""
    return without_escapes(_BREAK.sub(" ", text))


def without_escapes(text: str) -> str:
    """``text`` without what a terminal would obey; lines stay lines."""
    return _ESCAPE.sub("", text)


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def tell(text: str) -> None:
    """Write ``text`` to stderr for people; a stderr that is gone is not an error.

    When its reader has left or its disk is full, fd 2 becomes /dev/null, and so does fd 1 where it is the same file:
    what libraries print afterwards must not end the run either.
    """
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(1), os.fstat(2)):
                os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)


def from_os_error(error: OSError) -> ToolboxError:
    """The house's exception for an operating-system error."""
    name = f"{error.filename}: " if error.filename is not None else ""
    text = f"{name}{error.strerror or error}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR | errno.ENAMETOOLONG | errno.ELOOP:
            return MissingInput(text, "check the path")
        case errno.EEXIST:
            return CannotCreate(text, "choose another name")
        case code if code in _NOT_REACHED or code < 0:  # below 0 are getaddrinfo's
            return Unavailable(text, "check the address and the network, then run again")
        case errno.ENOMEM:
            return _out_of_memory()
        case errno.EISDIR:
            return UsageProblem(text, "a file is expected here")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return NoPermission(text, "check who owns the path and its mode")
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return IoFailure(text, "free some space, then run again; what was finished before is intact")
        case _:
            return IoFailure(text, "the system could not read or write; run again when it can")


def _as_toolbox_error(error: BaseException) -> ToolboxError | None:
    if isinstance(error, ToolboxError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return from_os_error(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _out_of_memory()
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return _out_of_memory()
    return None


def _out_of_memory() -> TryAgain:
    return TryAgain("out of memory", "try a smaller --micro-batch, --grad-checkpointing, or --lora-r 8")


def say(command: str, error: ToolboxError, stream: int = 2) -> None:
    """Print ``error`` as one line and its advice as another; a stderr that is gone is not an error."""
    lines = f"{command}: {_shorten(clean(error.what))}\n"
    if error.advice:
        lines += f"  {_shorten(clean(error.advice))}\n"
    with contextlib.suppress(OSError):
        os.write(stream, lines.encode("utf-8", "backslashreplace"))


def die_of(signum: int) -> NoReturn:
    """End the process as an unhandled signal would, so that the caller's shell sees the usual status.

    A blocked signal is unblocked first. The first process of a container cannot be ended by its own signal: it leaves
    with the status that a shell would report.
    """
    signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)


def _not_lost(found: Any) -> None:
    """Python drops what is raised in a destructor; a Ctrl-C that came just then is sent once more, a moment later."""
    if found.exc_type is None or not issubclass(found.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(found)
        return
    import threading

    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()


@contextlib.contextmanager
def top_level(command: str, debug: bool = False) -> Iterator[None]:
    """Run a command's body; every exception leaves here as one line on stderr and an exit code.

    A closed stdout ends the process by SIGPIPE, Ctrl-C by SIGINT. With ``debug`` the traceback is shown.
    """
    before, sys.unraisablehook = sys.unraisablehook, _not_lost
    try:
        yield
    except BrokenPipeError:
        die_of(signal.SIGPIPE)
    except KeyboardInterrupt:
        die_of(signal.SIGINT)
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        known = _as_toolbox_error(error)
        if known is None:
            known = InternalError(
                f"unexpected {type(error).__name__}: {clean(str(error))[:300]}",
                "this is a fault of the tool: run again with --debug and report the traceback",
            )
        if not isinstance(known, AlreadyReported):
            say(command, known)
        _leave_unwritten()
        sys.exit(known.exit_code)
    finally:
        sys.unraisablehook = before


def _leave_unwritten() -> None:
    """Send nowhere what stdout could not take: the interpreter would try it again at its end, and exit with 120."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # none, full or gone, closed
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
