"""Write safetensors a tensor at a time: files, sharded Hugging Face directories, streams.

The reference library wants all tensors in memory at once, refuses those that share it, writes files of mode 0600 and
leaves a part behind when it is killed. The layout is the library's own, so the bytes are too (see ``layout.plan``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from toolbox.shell.errors import BadData, InternalError, UsageProblem
from toolbox.shell.files import atomic_file
from toolbox.weights.layout import LazyTensor, format_name, n_bytes, plan
from toolbox.weights.read import INDEX_SUFFIX, Weights

if TYPE_CHECKING:
    import torch

    Tensors = Weights | Mapping[str, torch.Tensor | LazyTensor]

MAX_SHARD_BYTES = 5_000_000_000
_CHUNK = 16 << 20


def write_file(handle: BinaryIO, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file to an open binary handle.

    ``tensors``: names to tensors, or to ``LazyTensor`` (type, shape, function): then at most one is in memory. Tensors
    may lie on any device, be transposed or share memory; what shares memory is written under each of its names.

    Raises: BadData (65) for a type or layout that the format cannot hold.
    """
    lazy = _as_lazy(tensors)
    prefix, order = plan({name: _described(name, item) for name, item in lazy.items()}, metadata or {})
    _write_all(handle, memoryview(prefix))
    for name in order:
        _write_tensor(handle, name, lazy[name])


def write_stream(handle: BinaryIO, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """``write_file`` to standard output (``-o -``); UsageProblem (2) when that is a terminal."""
    if handle.isatty():
        raise UsageProblem("weights are not written to a terminal", "redirect: -o - > FILE, or pipe them on")
    write_file(handle, tensors, metadata)
    handle.flush()


def write_sharded(
    directory: str | Path,
    tensors: Tensors,
    metadata: Mapping[str, str] | None = None,
    *,
    stem: str = "model",
    max_shard_bytes: float = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write weights as transformers does, and return the files written.

    What fits into ``max_shard_bytes`` becomes ``model.safetensors``; else shards ``model-00001-of-0000N.safetensors``,
    filled in the order of ``tensors`` (a larger tensor has one alone), and ``model.safetensors.index.json``.
    Each file is whole or not there; files of the same stem from an earlier write are removed first.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lazy = _as_lazy(tensors)
    sizes = {name: n_bytes(*_described(name, item)) for name, item in lazy.items()}
    shards = _assign(sizes, max_shard_bytes)
    ours = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for old in list(directory.iterdir()):
        if ours.fullmatch(old.name):
            old.unlink()
    paths: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = directory / f"{stem}{part}.safetensors"
        with atomic_file(path) as handle:
            write_file(handle, {name: lazy[name] for name in names}, metadata)
        weight_map.update(dict.fromkeys(names, path.name))
        paths.append(path)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        with atomic_file(directory / f"{stem}{INDEX_SUFFIX}") as handle:
            handle.write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
        paths.append(directory / f"{stem}{INDEX_SUFFIX}")
    return paths


def _assign(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    """Cut the names, in their order, into runs of at most ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _as_lazy(tensors: Tensors) -> dict[str, LazyTensor]:
    if isinstance(tensors, Weights):
        return tensors.lazy()
    return {
        name: item
        if isinstance(item, LazyTensor)
        else LazyTensor(item.dtype, tuple(item.shape), lambda item=item: item)
        for name, item in tensors.items()
    }


def _described(name: str, item: LazyTensor) -> tuple[str, tuple[int, ...]]:
    """Format type and shape of a tensor to be written."""
    dtype = format_name(item.dtype)
    if dtype is None:
        raise BadData(f"tensor {name!r}: safetensors has no type {item.dtype}", "convert it to another type first")
    return dtype, tuple(item.shape)


def _write_tensor(handle: BinaryIO, name: str, item: LazyTensor) -> None:
    import torch

    tensor = item.load().detach()
    if tensor.dtype != item.dtype or tuple(tensor.shape) != tuple(item.shape):
        found, told = f"{tensor.dtype} {tuple(tensor.shape)}", f"{item.dtype} {tuple(item.shape)}"
        raise InternalError(f"tensor {name!r} was announced as {told} and is {found}")
    if tensor.layout != torch.strided:
        raise BadData(f"tensor {name!r} is sparse", "make it dense first")
    # Conjugation and negation may be flags on a view: materialise them, the bytes are what is written.
    tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.numel():
        _write_all(handle, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))


def _write_all(handle: BinaryIO, view: memoryview) -> None:
    """Write everything, also to a raw handle, which may take less than it is given."""
    while view:
        view = view[handle.write(view[:_CHUNK]) :]
