"""The journal of a scoring run: what is finished, kept batch by batch, so that a killed run goes on where it was.

A file of frames, each its length, its CRC-32 and its content. The first frame tells the run, every other one holds
the finished paths of one batch (or of one round of batches, with several processes). A frame is in the hands of the
operating system before the next batch begins; one that was torn, and whatever is behind it, counts as not there.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from toolbox.shell.errors import BadData

NAME = "step-scores"
"""Its name in an unfinished output directory, by which the directory is known for one to be resumed."""

_MAGIC = b"landscape journal 1\n"
_FRAME = struct.Struct("<II")


class Scored(msgspec.Struct, array_like=True, frozen=True):
    """A path as it was scored: (n + 1, k) log-probabilities of the answers in nats, the start's first, and their
    tokens; (n,) log-probabilities of the thoughts and their tokens; the method that scored it."""

    logprob: list[list[float]]
    n_tokens: list[list[int]]
    thought_logprob: list[float]
    thought_tokens: list[int]
    method: str


class Head(msgspec.Struct, frozen=True):
    """What a run and its continuation share. ``marks``: what the caller asked for and on which data, by names that a
    message can use; ``scoring``: the ``features.Scoring`` that came of it; ``left_out``: ids of paths that could not be
    scored. Paths are numbered without them."""

    marks: dict[str, Any]
    scoring: dict[str, Any]
    left_out: list[str] = []


class Contents(msgspec.Struct):
    """What a journal holds: ``scored`` by the path's number; whole frames end at byte ``end``."""

    head: Head
    scored: dict[int, Scored]
    end: int


def read_journal(path: Path) -> Contents | None:
    """What is whole in the journal at ``path``; None where there is none, or not even its first frame.

    Raises: BadData (65) for a whole frame that is none of ours: of a file that something else wrote.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    if not raw.startswith(_MAGIC):
        if _MAGIC.startswith(raw):  # torn within its first bytes
            return None
        raise _foreign(path)
    contents, place = None, len(_MAGIC)
    while (frame := _frame(raw, place)) is not None:
        place += _FRAME.size + len(frame)
        try:
            if contents is None:
                contents = Contents(msgspec.json.decode(frame, type=Head), {}, place)
            else:
                contents.scored |= msgspec.msgpack.decode(frame, type=dict[int, Scored])
                contents.end = place
        except msgspec.MsgspecError:
            raise _foreign(path) from None
    return contents


def _frame(raw: bytes, place: int) -> bytes | None:
    """The content of the frame at ``place``, None where it is not whole."""
    if place + _FRAME.size > len(raw):
        return None
    length, checksum = _FRAME.unpack_from(raw, place)
    content = raw[place + _FRAME.size : place + _FRAME.size + length]
    return content if len(content) == length and zlib.crc32(content) == checksum else None


def _foreign(path: Path) -> BadData:
    return BadData("is no journal of a scoring run", "start anew with --overwrite", file=str(path))


class Journal:
    """Appends to the journal at ``path``, which is made with the first ``add``: a run that finished nothing leaves
    nothing. ``found``: what ``read_journal`` gave, to go on from; what is torn behind it is cut off."""

    def __init__(self, path: Path, head: Head, found: Contents | None = None) -> None:
        self.path, self._head, self._found = path, head, found
        self._descriptor: int | None = None

    def add(self, scored: Mapping[int, Scored]) -> None:
        """Append finished paths by their numbers; written when this returns."""
        if self._descriptor is None:
            self._open()
        self._write(_framed(msgspec.msgpack.encode(dict(scored))))

    def close(self) -> None:
        """Bring what was written to the disk."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, 0 if self._found is None else self._found.end)
        if self._found is None:
            self._write(_MAGIC + _framed(msgspec.json.encode(self._head)))

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise


def _framed(content: bytes) -> bytes:
    return _FRAME.pack(len(content), zlib.crc32(content)) + content
