"""Read weights from a safetensors file, a Hugging Face directory or a stream: checked first, then a tensor at a time.

The reference library checks a file too, but tells nothing about which file, tensor or byte is wrong, and knows neither
streams nor the index of a sharded checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.weights import provenance
from toolbox.weights.layout import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    Entry,
    Header,
    LazyTensor,
    header_length,
    parse_header,
    torch_dtype,
    wrong_length,
)

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}

_HEAD_BYTES = 512  # enough to see the first name in torch.save's archive
_CHUNK = 1 << 20
_MAX_INDEX_BYTES = 100_000_000


class _File:
    """One safetensors file: a descriptor, its checked header, and the library's reader once a tensor is asked for."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self.name = name
        self.header = _read_header(descriptor, name)
        self._reader: Any = None

    def tensor(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            if self._reader is None:
                # By descriptor: the file that was checked, also when its name is gone or is another file's by now.
                self._reader = safe_open(f"/dev/fd/{self.descriptor}", framework="pt", device="cpu")
            return self._reader.get_tensor(name)
        except SafetensorError as error:
            raise BadData(f"tensor {name!r}: {error}", "copy or download it again", file=self.name) from None

    def copy(self, name: str) -> torch.Tensor:
        import torch

        entry = self.header.entries[name]
        values = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        view = memoryview(values.numpy())
        start = PREFIX_BYTES + self.header.header_bytes + entry.begin
        done = 0
        while done < len(view):
            count = os.preadv(self.descriptor, [view[done:]], start + done)
            if count == 0:
                raise wrong_length(self.header.data_bytes, entry.begin + done, self.name)
            done += count
        return values.view(torch_dtype(entry.dtype)).reshape(entry.shape)

    def close(self) -> None:
        self._reader = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Weights:
    """Named tensors on disk. Nothing but headers is read until ``tensor(name)`` is called.

    A tensor is on the CPU, backed by a private map of the file: it may be changed, the file stays as it is, and it
    outlives ``close``.
    """

    def __init__(self, files: list[_File], where: str) -> None:
        self.where = where
        self._files = files
        self._home = {name: file for file in files for name in file.header.entries}

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._home)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type."""
        return torch_dtype(self._entry(name).dtype)

    def nbytes(self, name: str) -> int:
        """A tensor's size in bytes."""
        entry = self._entry(name)
        return entry.end - entry.begin

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises: BadData (65) when the weights have none of that name."""
        self._entry(name)
        return self._home[name].tensor(name)

    def copy(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own, which is free again with it.

        The pages of a map count as this process's memory until the file is closed: who streams through a checkpoint
        larger than memory reads copies. Raises: as ``tensor``; BadData (65) when the file has become shorter.
        """
        self._entry(name)
        return self._home[name].copy(name)

    def lazy(self) -> dict[str, LazyTensor]:
        """All tensors as the writer takes them: each is read when it is written."""
        return {
            name: LazyTensor(self.dtype(name), self.shape(name), lambda name=name: self.tensor(name))
            for name in self.names()
        }

    @property
    def metadata(self) -> dict[str, str]:
        """The header's strings; of a sharded checkpoint those of its first shard."""
        return dict(self._files[0].header.metadata)

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Which command made these weights and of what, None if the header does not say (see ``provenance.py``)."""
        return provenance.read_provenance(self.metadata, self.where)

    def sha256(self) -> str:
        """The digest of the weight files, as ``delta.sha256_weights`` gives it."""
        return digest_of([(PurePosixPath(file.name).name, file.descriptor) for file in self._files])

    def close(self) -> None:
        """Close the files; a stream's temporary copy is gone with that."""
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> Entry:
        if name not in self._home:
            raise BadData(f"has no tensor {name!r}", "is it the right model?", file=self.where)
        return self._home[name].header.entries[name]


def open_weights(source: str | Path | BinaryIO) -> Weights:
    """Open a .safetensors file, a Hugging Face directory (one file, shards with an index, or an adapter) or a stream.

    A stream, or a path that is a pipe, is copied to an unnamed temporary file after its header was checked.

    Raises: MissingInput (66) for a path or a shard that does not exist; BadData (65) naming file and fault for what is
    truncated, inconsistent, pointing outside its directory, or a pickle; UsageProblem (2) for a terminal.
    """
    if not isinstance(source, str | Path):
        return Weights([_spool(source, getattr(source, "name", None))], _stream_name(getattr(source, "name", None)))
    path = Path(source)
    if not path.exists():
        raise MissingInput(f"{path}: no such file or directory", "check the path")
    if not path.is_dir() and not path.is_file():
        with open(path, "rb") as handle:
            return Weights([_spool(handle, str(path))], str(path))
    files: list[_File] = []
    try:
        shards, index = _locate(path)
        for shard in shards:
            files.append(_open_file(shard))
        if index is not None:
            _check_index(index, files, path)
    except BaseException:
        for file in files:
            file.close()
        raise
    return Weights(files, str(path))


def weight_files(path: str | Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, sorted by name; errors as ``open_weights``."""
    path = Path(path)
    if not path.exists():
        raise MissingInput(f"{path}: no such file or directory", "check the path")
    return _locate(path)[0]


def digest_of(files: list[tuple[str, int]]) -> str:
    """SHA-256 of weight files given as (name, descriptor).

    Of one file, its own digest; of shards, that of the lines which ``sha256sum`` prints for them, sorted by name.
    """
    import hashlib

    digests = []
    for name, descriptor in sorted(files):
        with open(f"/dev/fd/{descriptor}", "rb") as handle:
            digests.append((hashlib.file_digest(handle, "sha256").hexdigest(), name))
    if len(digests) == 1:
        return digests[0][0]
    return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in digests).encode()).hexdigest()


# --- finding the files ----------------------------------------------------------------------------------------------


def _locate(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint, and the index's weight map when it is sharded.

    In a directory transformers' order of preference holds, so that both read the same weights.
    """
    if path.is_file():
        if path.name.endswith(INDEX_SUFFIX):
            return _read_index(path)
        return [path], None
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE], None
    if (path / f"model{INDEX_SUFFIX}").exists():
        return _read_index(path / f"model{INDEX_SUFFIX}")
    if (path / ADAPTER_FILE).exists():
        return [path / ADAPTER_FILE], None
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise _pickle_refused(f"{path / pickles[0]}")
    raise MissingInput(f"{path}: holds no weights ({SINGLE_FILE}, its index, or {ADAPTER_FILE})", "check the path")


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    file = str(path)
    advice = "copy or download the checkpoint again"
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise BadData(f"is larger than {_MAX_INDEX_BYTES} bytes", advice, file=file)
    try:
        weight_map = json.loads(path.read_bytes().decode("utf-8"))["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        what = f"is not an index: {type(error).__name__}: {error}"
        raise BadData(what, advice, file=file, field="weight_map") from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise BadData("must map names to file names", advice, file=file, field="weight_map")
    if not weight_map:
        raise BadData("names no tensor", advice, file=file, field="weight_map")
    for shard in sorted(set(weight_map.values())):
        parts = PurePosixPath(shard).parts
        # Lexically: in the Hugging Face cache every file is a link that leads out of its directory.
        if not parts or PurePosixPath(shard).is_absolute() or ".." in parts or "\0" in shard:
            raise BadData(f"shard {shard!r} lies outside the directory", advice, file=file, field="weight_map")
        if not (path.parent / shard).is_file():
            raise MissingInput(f"{path.parent / shard}: a shard that {path.name} names is missing", advice)
    weight_map = {name: str(PurePosixPath(shard)) for name, shard in weight_map.items()}
    return [path.parent / shard for shard in sorted(set(weight_map.values()))], weight_map


def _check_index(weight_map: dict[str, str], files: list[_File], path: Path) -> None:
    """Every tensor must be in the one shard where the index says, or different readers would see different weights."""
    directory = path.parent if path.is_file() else path
    for file in files:
        shard = Path(file.name).relative_to(directory).as_posix()
        promised = {name for name, home in weight_map.items() if home == shard}
        for name in sorted(promised ^ set(file.header.entries)):
            what = "is missing, the index promises it" if name in promised else "is not where the index says"
            raise BadData(f"tensor {name!r} {what}", "copy or download the checkpoint again", file=file.name)


# --- opening one file -----------------------------------------------------------------------------------------------


def _open_file(path: Path) -> _File:
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_refused(str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _File(descriptor, str(path))
    except BaseException:
        os.close(descriptor)
        raise


def _read_header(descriptor: int, name: str) -> Header:
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _HEAD_BYTES, 0)
    _refuse_pickle(head, name)
    length = header_length(head[:PREFIX_BYTES], name)
    if PREFIX_BYTES + length > size:
        raise _wrong_header_length(length, size - PREFIX_BYTES, name)
    return parse_header(_pread_all(descriptor, length, PREFIX_BYTES), name, size - PREFIX_BYTES - length)


def _wrong_header_length(declared: int, present: int, file: str) -> BadData:
    """The error for a file that ends inside its header."""
    what = f"is truncated inside its header: {present} of {declared} bytes are there"
    return BadData(what, "is the file whole, and is it a .safetensors file?", file=file)


def _pread_all(descriptor: int, length: int, offset: int) -> bytes:
    parts = bytearray()
    while len(parts) < length and (block := os.pread(descriptor, length - len(parts), offset + len(parts))):
        parts += block
    return bytes(parts)


def _spool(handle: BinaryIO, name: object) -> _File:
    """Copy a safetensors stream to a temporary file without a name; its header is checked before a byte is copied."""
    file = _stream_name(name)
    if handle.isatty():
        raise UsageProblem(f"{file}: weights cannot be typed in", "redirect or pipe a .safetensors file into it")
    head = _read_up_to(handle, _HEAD_BYTES)
    _refuse_pickle(head, file)
    length = header_length(head[:PREFIX_BYTES], file)
    head += _read_up_to(handle, PREFIX_BYTES + length - len(head))
    raw, data = head[PREFIX_BYTES : PREFIX_BYTES + length], head[PREFIX_BYTES + length :]
    if len(raw) < length:
        raise _wrong_header_length(length, len(raw), file)
    declared = parse_header(raw, file).data_bytes
    with tempfile.TemporaryFile(buffering=0) as spool:
        try:
            _write_all(spool.fileno(), head)
            copied = len(data)
            while copied < declared and (block := handle.read(min(_CHUNK, declared - copied))):
                _write_all(spool.fileno(), block)
                copied += len(block)
        except OSError as error:
            if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                error.filename = tempfile.gettempdir()
            raise
        if copied < declared:
            raise wrong_length(declared, copied, file)
        if copied > declared or handle.read(1):
            raise BadData("has bytes after its last tensor", "send one safetensors file, alone", file=file)
        descriptor = os.dup(spool.fileno())
    try:
        return _File(descriptor, file)
    except BaseException:
        os.close(descriptor)
        raise


def _stream_name(name: object) -> str:
    return "<stdin>" if name in (0, "<stdin>") else name if isinstance(name, str) else "<stream>"


def _read_up_to(handle: BinaryIO, length: int) -> bytes:
    """Read ``length`` bytes or to the end, in pieces: a hostile length must not allocate before bytes arrive."""
    parts = bytearray()
    while len(parts) < length and (block := handle.read(min(_CHUNK, length - len(parts)))):
        parts += block
    return bytes(parts)


def _write_all(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]


# --- pickles --------------------------------------------------------------------------------------------------------


def _refuse_pickle(head: bytes, file: str) -> None:
    """Refuse by content: torch.save's zip archive, or a bare pickle of protocol 2 to 5.

    A safetensors header of, say, 640 bytes starts with the two bytes of a pickle as well; its ninth byte tells.
    """
    if len(head) > PREFIX_BYTES:
        (length,) = struct.unpack("<Q", head[:PREFIX_BYTES])
        if length <= MAX_HEADER_BYTES and head[PREFIX_BYTES : PREFIX_BYTES + 1] == b"{":
            return
    is_pickle = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if is_pickle or (head[:4] == b"PK\x03\x04" and b"data.pkl" in head):
        raise _pickle_refused(file)


def _pickle_refused(file: str) -> BadData:
    what = "is a pickle, which can run any program when it is read"
    return BadData(what, "convert it to safetensors where its origin is trusted, and give that file", file=file)
