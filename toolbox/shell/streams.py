"""stdin and stdout as data channels, kept apart from whatever libraries print or read.

``claim`` moves the real stdin and stdout to private descriptors before anything heavy is imported; afterwards
fd 0 is /dev/null and fd 1 is stderr, so that no library can eat a data line or print into the data.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from toolbox.shell.errors import BadData, IoFailure, UsageProblem

MAX_LINE = 16 << 20
"""Longest accepted line in bytes; a longer one is an error instead of an out-of-memory kill."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


@dataclass
class Streams:
    """This process's private stdin and stdout; on ranks other than 0 both are /dev/null."""

    stdin_fd: int
    stdout_fd: int
    _taken: str | None = field(default=None, repr=False)

    def take_stdin(self, user: str) -> BinaryIO:
        """The private stdin for the input called ``user``; a second taker is a usage error."""
        if self._taken is not None:
            raise UsageProblem(
                f"{self._taken} and {user} cannot both be read from stdin", "name a file for one of them"
            )
        self._taken = user
        return os.fdopen(os.dup(self.stdin_fd), "rb")

    def open_stdout(self) -> BinaryIO:
        """The private stdout as a buffered binary handle."""
        return os.fdopen(os.dup(self.stdout_fd), "wb")

    def stdin_is_terminal(self) -> bool:
        return os.isatty(self.stdin_fd)


def process_rank() -> int:
    """The rank of this process under a launcher, 0 without one; known before torch is imported."""
    return int(os.environ.get("RANK", "0"))


def _duplicate(fd: int, null: int) -> int:
    try:
        return os.dup(fd)
    except OSError as error:
        if error.errno == errno.EBADF:  # started with the stream closed (`<&-`)
            return os.dup(null)
        raise


def claim() -> Streams:
    """Take fd 0 and fd 1 away from every library of this process; call once, before heavy imports."""
    null = os.open(os.devnull, os.O_RDWR)
    leader = process_rank() == 0
    streams = Streams(
        stdin_fd=_duplicate(0, null) if leader else os.dup(null),
        stdout_fd=_duplicate(1, null) if leader else os.dup(null),
    )
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:
        os.dup2(null, 2)
        os.dup2(null, 1)
    os.close(null)
    return streams


def open_source(name: str, streams: Streams, role: str = "the input") -> BinaryIO:
    """Open the file ``name``, or stdin for ``-``; gzip and zstd are recognised by their first bytes.

    Raises FileNotFoundError and friends as the operating system does, and UsageProblem when stdin is a terminal.
    """
    if name == "-":
        if streams.stdin_is_terminal():
            raise UsageProblem(f"{role} is read from stdin, which is a terminal", "pipe data in or name a file")
        raw: Any = streams.take_stdin(role)
    else:
        raw = open(name, "rb")  # noqa: SIM115 - the caller closes what this returns
    buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    magic = buffered.peek(4)[:4]
    if magic.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=buffered))  # type: ignore[arg-type]
    if magic.startswith(_ZSTD):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True))
    return buffered


def display_name(name: str) -> str:
    """How messages call an input: ``-`` is stdin."""
    return "stdin" if name == "-" else name


@contextlib.contextmanager
def damaged_is_bad_data(name: str) -> Iterator[None]:
    """Turn the exceptions of the decompressors into one of ours."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"damaged gzip data: {error}", "make the file anew", file=name) from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise BadData(f"damaged zstd data: {error}", "make the file anew", file=name) from None


def iter_lines(handle: BinaryIO, name: str, max_line: int = MAX_LINE) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line number, line)`` without line ends; blank lines are skipped but counted.

    A byte-order mark and CRLF are accepted. A line beyond ``max_line`` bytes is BadData, read no further.
    """
    number = 0
    with damaged_is_bad_data(name):
        while line := handle.readline(max_line + 2):
            number += 1
            if number == 1:
                if line[:2] in _UTF16:
                    raise BadData("the text is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8", file=name)
                line = line.removeprefix(_BOM)
            line = line.rstrip(b"\r\n")
            if len(line) > max_line:
                raise BadData(f"line longer than {max_line:,} bytes", "one record a line", file=name, line=number)
            if line.strip():
                yield number, line


class JsonlWriter:
    """Rows to stdout, whole lines only, in the order of their index however late each one is ready.

    With ``trainer`` a closed pipe is warned about once and the run goes on; otherwise BrokenPipeError leaves here
    and ends the process by SIGPIPE.
    """

    def __init__(self, streams: Streams, *, trainer: bool = False) -> None:
        import msgspec

        self._encode = msgspec.json.Encoder().encode
        self._handle: BinaryIO | None = streams.open_stdout()
        self._trainer = trainer
        self._waiting: dict[int, list[Any]] = {}
        self._next = 0

    def write(self, row: Any) -> None:
        """Write one row now."""
        if self._handle is None:
            return
        try:
            self._handle.write(self._encode(row) + b"\n")
            if self._trainer:
                self._handle.flush()
        except BrokenPipeError:
            self._closed()
        except OSError as error:
            self._drop()
            raise IoFailure(f"stdout: {error.strerror}", "free some space where stdout goes") from None

    def put(self, index: int, rows: list[Any]) -> None:
        """Hand in the rows of input ``index``; written as soon as all inputs before it are."""
        self._waiting[index] = rows
        while self._next in self._waiting:
            for row in self._waiting.pop(self._next):
                self.write(row)
            self._next += 1

    def flush(self) -> None:
        if self._handle is None:
            return
        try:
            self._handle.flush()
        except BrokenPipeError:
            self._closed()
        except OSError as error:
            self._drop()
            raise IoFailure(f"stdout: {error.strerror}", "free some space where stdout goes") from None

    def close(self) -> None:
        """Flush and close; call at the end so that a full disk is an error and not a silent loss."""
        self.flush()
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _drop(self) -> None:
        # Closing a buffered handle flushes once more: point it at /dev/null first, so that nothing is raised twice.
        if self._handle is not None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._handle.fileno())
            os.close(null)
            self._handle.close()
            self._handle = None

    def _closed(self) -> None:
        self._drop()
        if not self._trainer:
            raise BrokenPipeError(errno.EPIPE, "stdout was closed")
        print("stdout was closed by its reader; the run goes on without it", file=sys.stderr)
