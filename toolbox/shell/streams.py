"""stdin and stdout as data channels, kept apart from whatever libraries print or read.

``claim`` moves the real stdin and stdout to private descriptors before anything heavy is imported; afterwards
fd 0 is /dev/null and fd 1 is stderr, so that no library can eat a data line or print into the data.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from toolbox.shell.errors import BadData, InternalError, IoFailure, UsageProblem, tell

MAX_LINE = 16 << 20
"""Longest accepted line in bytes; a longer one is an error instead of an out-of-memory kill."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_STDIN = {"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"}
_ZSTD_BITE = 1 << 10
"""Compressed bytes fed at once: a block of 4 may become 128 KiB, so this bounds what one bite becomes by 43 MiB."""


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
    """The rank of this process under a launcher, 0 without one; known before torch is imported.

    A RANK without the LOCAL_RANK that every launcher sets beside it is somebody else's variable: to believe it would
    silence a lone process.
    """
    rank = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    try:
        return int(rank)
    except ValueError:
        raise UsageProblem(f"RANK={rank} in the environment is not a number", "unset it, or use a launcher") from None


def open_closed_streams() -> None:
    """Put /dev/null where the caller closed stdin, stdout or stderr (``<&-``), and give Python its three objects.

    Otherwise the next file that anyone opens becomes fd 0, 1 or 2, and is read or printed into.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(null, True)
    os.close(null)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode, buffering = ("w", 1) if fd else ("r", -1)
            setattr(sys, name, open(fd, mode, buffering, errors="backslashreplace", closefd=False))  # noqa: SIM115


def claim() -> Streams:
    """Take fd 0 and fd 1 away from every library of this process; call once, before heavy imports."""
    open_closed_streams()
    for fd in range(3):  # read(2) on a non-blocking stdin says "nothing yet", which Python takes for the end
        os.set_blocking(fd, True)
    null = os.open(os.devnull, os.O_RDWR)
    leader = process_rank() == 0
    streams = Streams(stdin_fd=os.dup(0 if leader else null), stdout_fd=os.dup(1 if leader else null))
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return streams


class _Prepended(io.RawIOBase):
    """``head`` and then what is left of ``rest``."""

    def __init__(self, head: bytes, rest: io.BufferedReader) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._head:
            return self._rest.readinto1(buffer)
        size = min(len(buffer), len(self._head))
        buffer[:size], self._head = self._head[:size], self._head[size:]
        return size

    def close(self) -> None:
        self._rest.close()
        super().close()


class _ZstdFrames(io.RawIOBase):
    """The content of zstd frames one after another.

    The package's own ``stream_reader`` takes a frame that is cut off for the end of the data; here it is an error.
    """

    def __init__(self, source: io.BufferedReader) -> None:
        import zstandard

        self._source, self._zstandard = source, zstandard
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            bite = self._source.read1(_ZSTD_BITE)
            if not bite:
                if self._frame is not None:
                    raise self._zstandard.ZstdError("the last frame is cut off")
                return 0
            self._ready = memoryview(self._decompress(bite))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _decompress(self, bite: bytes) -> bytes:
        parts = []
        while bite:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            parts.append(self._frame.decompress(bite))
            bite = b""
            if self._frame.eof:
                bite, self._frame = self._frame.unused_data, None
        return b"".join(parts)

    def close(self) -> None:
        self._source.close()
        super().close()


def open_source(name: str, streams: Streams, role: str = "the input") -> BinaryIO:
    """Open the file ``name``, or stdin for ``-``; gzip and zstd are recognised by their first bytes.

    Raises FileNotFoundError and friends as the operating system does, and UsageProblem when stdin is a terminal.
    """
    try:
        raw: Any = _take(streams, role) if name in _STDIN else open(name, "rb")  # noqa: SIM115
        head = raw.peek(4)[:4]
        if any(magic.startswith(head) for magic in (_GZIP, _ZSTD, _BOM)) and 0 < len(head) < 4:
            head = raw.read(4)  # a pipe's first write was shorter than a magic number
            raw = io.BufferedReader(_Prepended(head, raw))
    except OSError as error:  # a directory as stdin: the system knows a number for it at best
        if not isinstance(error.filename, str):
            error.filename = display_name(name)
        raise
    if head.startswith(_GZIP):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if head.startswith(_ZSTD):
        return io.BufferedReader(_ZstdFrames(raw), 1 << 16)
    return raw


def _take(streams: Streams, role: str) -> BinaryIO:
    # By any of its names: to open /dev/stdin would give the /dev/null that fd 0 is by now.
    if streams.stdin_is_terminal():
        raise UsageProblem(f"{role} is read from stdin, which is a terminal", "pipe data in or name a file")
    return streams.take_stdin(role)


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
    except OSError as error:
        error.filename = error.filename or name
        raise
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise BadData(f"damaged zstd data: {error}", "make the file anew", file=name) from None


def iter_lines(handle: BinaryIO, name: str, max_line: int = MAX_LINE, passed: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line number, line)`` without line ends; blank lines are skipped but counted.

    A byte-order mark and CRLF are accepted. A line beyond ``max_line`` bytes is BadData, read no further. ``passed``
    is the number of lines read from ``handle`` before.
    """
    number = passed
    limit = len(_BOM) + max_line + 2
    with damaged_is_bad_data(name):
        while line := handle.readline(limit):
            number += 1
            cut = len(line) == limit and not line.endswith(b"\n")
            if number == 1:
                if line[:2] in _UTF16:
                    raise BadData("the text is UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8", file=name)
                line = line.removeprefix(_BOM)
            line = line.rstrip(b"\r\n")
            if cut or len(line) > max_line:
                raise BadData(f"line longer than {max_line:,} bytes", "one record a line", file=name, line=number)
            if line.strip():
                yield number, line


class JsonlWriter:
    """Rows to stdout, whole lines only, in the order of their index however late each one is ready.

    With ``trainer`` a closed pipe is warned about once and the run goes on; otherwise BrokenPipeError leaves here
    and ends the process by SIGPIPE. Rows that wait for an earlier one are held as the bytes they will be.
    """

    def __init__(self, streams: Streams, *, trainer: bool = False) -> None:
        import msgspec

        self._encode = msgspec.json.Encoder().encode
        self._handle: BinaryIO | None = streams.open_stdout()
        self._trainer = trainer
        self._waiting: dict[int, bytes] = {}
        self._next = 0

    def write(self, row: Any) -> None:
        """Write one row now."""
        self._write(self._encode(row) + b"\n")

    def put(self, index: int, rows: list[Any]) -> None:
        """Hand in the rows of input ``index`` (from 0, each once); written as soon as all inputs before it are."""
        if index < self._next or index in self._waiting:
            raise InternalError(f"the rows of input {index} came twice")
        self._waiting[index] = b"".join(self._encode(row) + b"\n" for row in rows)
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        with self._failing():
            if self._handle is not None:
                self._handle.flush()

    def close(self) -> None:
        """Flush and close; call at the end so that a full disk is an error and not a silent loss."""
        self.flush()
        with self._failing():
            if self._handle is not None:
                self._handle.close()
                self._handle = None
        if self._waiting:
            raise InternalError(f"the rows of input {self._next} never came, {len(self._waiting)} later ones wait")

    def _write(self, lines: bytes) -> None:
        with self._failing():
            if self._handle is not None:
                self._handle.write(lines)
                if self._trainer:
                    self._handle.flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._drop()
            if not self._trainer:
                raise
            tell("stdout was closed by its reader; the run goes on without it\n")
        except OSError as error:
            self._drop()
            raise IoFailure(f"stdout: {error.strerror}", "free some space where stdout goes") from None

    def _drop(self) -> None:
        # Closing a buffered handle flushes once more: point it at /dev/null first, so that nothing is raised twice.
        handle, self._handle = self._handle, None
        if handle is not None and not handle.closed:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, handle.fileno())
            os.close(null)
            handle.close()
