"""Small safetensors files of numpy arrays: tables of numbers that no model loads, read and checked without torch.

Models and whatever is large go through ``read`` and ``write``, which hold one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.weights.layout import PREFIX_BYTES, header_length, parse_header, plan

NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
"""The element types of such files: format name to numpy's, little-endian as the format has it."""


def write_arrays(
    path: str | Path,
    arrays: Mapping[str, Any],
    kinds: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = True,
) -> None:
    """Write ``arrays`` as one safetensors file, whole or not at all; equal content gives equal bytes.

    ``kinds``: name to format type, a key of ``NUMPY``, for every array to be written. ``metadata``: strings for the
    header. CannotCreate (73): the file exists and ``overwrite`` is false.
    """
    laid = {name: np.ascontiguousarray(arrays[name], NUMPY[kind]) for name, kind in kinds.items()}
    prefix, order = plan({name: (kinds[name], array.shape) for name, array in laid.items()}, metadata or {})
    with atomic_file(path, overwrite=overwrite) as handle:
        handle.write(prefix)
        for name in order:
            handle.write(laid[name].tobytes())


class ArrayFile:
    """A file of arrays, read whole: its ``metadata``, and its arrays by name and type.

    Raises: MissingInput (66) for a file that is not there, BadData (65) for one that is not whole or not safetensors.
    ``advice`` goes with every message about what the file lacks.
    """

    def __init__(self, path: str | Path, advice: str | None = None) -> None:
        self.file, self._advice = str(path), advice
        raw = Path(path).read_bytes()
        length = header_length(raw[:PREFIX_BYTES], self.file)
        self._data = memoryview(raw)[PREFIX_BYTES + length :]
        header = parse_header(raw[PREFIX_BYTES : PREFIX_BYTES + length], self.file, len(self._data))
        self._entries, self.metadata = header.entries, header.metadata

    def arrays(self, kinds: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        """The arrays of these names, read-only, each of the format type wanted; BadData (65) where one is not."""
        found = {}
        for name, kind in kinds.items():
            entry = self._entries.get(name)
            if entry is None or entry.dtype != kind:
                told = "is missing" if entry is None else f"is of type {entry.dtype}"
                raise BadData(f"array {name!r} of type {kind} {told}", self._advice, file=self.file)
            found[name] = np.frombuffer(self._data[entry.begin : entry.end], NUMPY[kind]).reshape(entry.shape)
        return found
