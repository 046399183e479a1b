"""Columns of numbers on disk: one safetensors file, written from numpy and mapped into memory when read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.weights.layout import PREFIX_BYTES, header_length, parse_header, plan

_NAMES = {"int64": "I64", "int32": "I32", "uint8": "U8", "float32": "F32"}
_TYPES = {name: np.dtype(numpy) for numpy, name in _NAMES.items()}


class Columns(dict[str, np.ndarray]):
    """The columns of one file by name; to ask for one that it does not have is BadData (65) with the file's name."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, name: str) -> np.ndarray:
        raise BadData(f"has no column {name!r}", "make it anew: longer-prep, or longer-train", file=self.file)


def write_columns(path: Path, columns: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write 1-D columns of int64, int32, uint8 or float32; equal columns give equal bytes."""
    described = {name: (_NAMES[str(one.dtype)], one.shape) for name, one in columns.items()}
    prefix, order = plan(described, metadata or {})
    with atomic_file(path) as handle:
        handle.write(prefix)
        for name in order:
            handle.write(memoryview(np.ascontiguousarray(columns[name])).cast("B"))


def read_columns(path: Path) -> Columns:
    """The columns of a file, mapped: nothing is read before it is used. BadData (65) where it is not such a file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = header_length(handle.read(PREFIX_BYTES), str(path))
            raw = handle.read(length)
    except FileNotFoundError:
        raise BadData("the file is missing", "make the dataset anew with longer-prep", file=str(path)) from None
    header = parse_header(raw, str(path), size - PREFIX_BYTES - length)
    columns = Columns(str(path))
    for name, entry in header.entries.items():
        if entry.dtype not in _TYPES or len(entry.shape) != 1:
            raise BadData(f"column {name!r} is {entry.dtype} of shape {entry.shape}", "longer-prep", file=str(path))
        offset = PREFIX_BYTES + length + entry.begin
        if entry.shape[0]:
            columns[name] = np.memmap(path, _TYPES[entry.dtype], "r", offset, entry.shape)
        else:
            columns[name] = np.zeros(0, _TYPES[entry.dtype])
    return columns
