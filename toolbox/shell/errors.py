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

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


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
    return _CONTROL.sub("", text.replace("\r", " ").replace("\n", " "))


def from_os_error(error: OSError) -> ToolboxError:
    """The house's exception for an operating-system error."""
    name = f"{error.filename}: " if error.filename is not None else ""
    text = f"{name}{error.strerror or error}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return MissingInput(text, "check the path")
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
        return TryAgain("out of memory", "try a smaller --micro-batch, --grad-checkpointing, or --lora-r 8")
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return TryAgain("out of memory", "try a smaller --micro-batch, --grad-checkpointing, or --lora-r 8")
    return None


def say(command: str, error: ToolboxError, stream: int = 2) -> None:
    """Print ``error`` as one line and its advice as another; a stderr that is gone is not an error."""
    lines = f"{command}: {clean(error.what)}\n"
    if error.advice:
        lines += f"  {clean(error.advice)}\n"
    with contextlib.suppress(OSError):
        os.write(stream, lines.encode("utf-8", "backslashreplace"))


def die_of(signum: int) -> None:
    """End the process as an unhandled signal would, so that the caller's shell sees the usual status."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


@contextlib.contextmanager
def top_level(command: str, debug: bool = False) -> Iterator[None]:
    """Run a command's body; every exception leaves here as one line on stderr and an exit code.

    A closed stdout ends the process by SIGPIPE, Ctrl-C by SIGINT. With ``debug`` the traceback is shown.
    """
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
        sys.exit(known.exit_code)
