"""The safetensors format: its element types, its header, and every way in which a hostile header may lie.

A file is an 8-byte little-endian length N, N bytes of JSON, then the tensors' bytes without gaps. The JSON maps each
name to ``dtype``, ``shape`` and ``data_offsets`` [begin, end) counted from the end of the header; ``__metadata__`` maps
strings to strings. Source: the format's description in huggingface/safetensors, README, section "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    import torch

# In the order in which the reference library lays tensors out: wide types first, so that every tensor stays aligned.
# Format name -> (name in torch, bytes an element).
DTYPES: dict[str, tuple[str, int]] = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The reference library's own bound; a larger length means another kind of file."""
MAX_DIMENSIONS = 64

_NOT_SAFETENSORS = "is the file whole, and is it a .safetensors file?"


class LazyTensor(NamedTuple):
    """A tensor that is made when it is written: its type and shape are known before, its values only by ``load()``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class Entry(NamedTuple):
    """One tensor of a file: format name of its type, shape, and its bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A checked header: entries by name in the order of their bytes, metadata, bytes of header and of tensors."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    header_bytes: int
    data_bytes: int


def format_name(dtype: torch.dtype) -> str | None:
    """The format's name for a torch type, None where it has none (quantised types, complex128)."""
    wanted = str(dtype).removeprefix("torch.")
    return next((name for name, (in_torch, _) in DTYPES.items() if in_torch == wanted), None)


def torch_dtype(name: str) -> torch.dtype:
    """The torch type for a format name."""
    import torch

    return getattr(torch, DTYPES[name][0])


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of a format type."""
    return prod(shape) * DTYPES[dtype][1]


def header_length(prefix: bytes, file: str) -> int:
    """N from the first eight bytes of a file; BadData (65) when there are fewer, or N cannot be a header's length."""
    if len(prefix) < PREFIX_BYTES:
        raise BadData(f"holds only {len(prefix)} bytes", _NOT_SAFETENSORS, file=file)
    (length,) = struct.unpack("<Q", prefix)
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise BadData(f"is not in safetensors format (header of {length} bytes)", _NOT_SAFETENSORS, file=file)
    return length


def parse_header(raw: bytes, file: str, data_bytes: int | None = None) -> Header:
    """Check a header's JSON and, when the number of bytes behind it is known, that the tensors fill exactly those.

    Raises: BadData (65) naming ``file``, the tensor and what is wrong with it.
    """
    try:
        # Hostile JSON: duplicate keys hide tensors, deep nesting overflows the stack, huge numbers cost minutes.
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BadData(f"its header is not valid JSON ({error})", _NOT_SAFETENSORS, file=file) from None
    if not isinstance(content, dict):
        raise BadData("its header is not a JSON object", _NOT_SAFETENSORS, file=file)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadData("must map strings to strings", _NOT_SAFETENSORS, file=file, field="__metadata__")
    entries = {name: _parse_entry(name, entry, file) for name, entry in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    end = 0
    for name, entry in entries.items():
        if entry.begin != end:
            problem = "overlaps the tensor before it" if entry.begin < end else f"leaves a gap after byte {end}"
            raise BadData(f"tensor {name!r} {problem}", _NOT_SAFETENSORS, file=file)
        end = entry.end
    if data_bytes is not None and data_bytes != end:
        raise wrong_length(end, data_bytes, file)
    return Header(entries, metadata, len(raw), end)


def wrong_length(declared: int, present: int, file: str) -> BadData:
    """The error for a file whose tensors do not end where the file ends."""
    if present < declared:
        what = f"is truncated: its tensors take {declared} bytes, of which {present} are there"
    else:
        what = f"has bytes after its last tensor: {present} where its header tells of {declared}"
    return BadData(what, "copy or download it again", file=file)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _parse_entry(name: str, entry: object, file: str) -> Entry:
    def bad(what: str) -> BadData:
        return BadData(f"tensor {name!r}: {what}", _NOT_SAFETENSORS, file=file)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"type {str(dtype)[:40]!r} is not known")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise bad(f"its shape must be at most {MAX_DIMENSIONS} counts")
    # Also without its zeros: [2**62, 2**62, 0] holds nothing, but overflows where strides are computed.
    if prod(size or 1 for size in shape) >= 2**63:
        raise bad("its shape is too large")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise bad("data_offsets must be two counts")
    begin, end = offsets
    if end - begin != n_bytes(dtype, tuple(shape)):
        raise bad(
            f"{dtype} of shape {shape} takes {n_bytes(dtype, tuple(shape))} bytes, its offsets give {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def plan(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """Lay tensors out as the reference library does, from names, format types and shapes alone.

    Returns the file's bytes up to the first tensor, and the names in the order in which their bytes follow.
    The same content in any order of the mappings gives the same bytes: the metadata is sorted.
    """
    order = sorted(tensors, key=lambda name: (_RANK[tensors[name][0]], name))
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + n_bytes(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % PREFIX_BYTES)
    return struct.pack("<Q", len(raw)) + raw, order
