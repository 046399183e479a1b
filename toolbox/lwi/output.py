"""Where a fusion goes: a directory like NEW's, one bare file, or a stream."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolbox.lwi.align import Aligned
from toolbox.lwi.checkpoint import Checkpoint
from toolbox.shell.errors import IoFailure
from toolbox.weights.layout import LazyTensor
from toolbox.weights.write import write_file, write_sharded

PERMUTATIONS = "permutations.safetensors"

_COMPANIONS = re.compile(
    r"config\.json|generation_config\.json|.*tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|.*\.jinja|(pre)?processor_config\.json|image_processor.*\.json|.*\.tiktoken"
)
"""Files of a Hugging Face directory that belong to the model beside its weights."""


def lazy_tensors(like: Checkpoint, values: Callable[[str], Tensor]) -> dict[str, LazyTensor]:
    """What is written: the keys, types and shapes of ``like``, each tensor made when its turn comes."""

    def one(key: str) -> LazyTensor:
        kind = like.weights.dtype(key)
        return LazyTensor(kind, like.shape(key), lambda: values(key).to("cpu", kind))

    return {key: one(key) for key in like.names()}


def check_space(where: Path, needed: int) -> None:
    """Raise IoFailure (74) when the file system of ``where`` has less room than ``needed`` bytes."""
    folder = where.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        problem = f"{where}: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free"
        raise IoFailure(f"{problem} ({errno.errorcode[errno.ENOSPC]})", "free some space, or choose another --out")


def write_directory(
    directory: Path, like: Checkpoint, tensors: Mapping[str, LazyTensor], metadata: dict[str, str], shard_bytes: int
) -> None:
    """Weights in shards, and the companions of ``like``'s directory as they are."""
    write_sharded(directory, tensors, metadata, max_shard_bytes=shard_bytes)
    assert like.directory is not None
    for path in sorted(like.directory.iterdir()):
        if path.is_file() and _COMPANIONS.fullmatch(path.name):
            shutil.copyfile(path, directory / path.name)


def write_permutations(directory: Path, steps: list[Aligned], metadata: dict[str, str]) -> None:
    """The permutations of every step, ``0/layers.3.ff``: aligned = old[perm], a row for each member of a parent."""
    tensors = {
        f"{number}/{name}": perm.to(torch.int32)
        for number, step in enumerate(steps)
        for name, perm in step.perms.items()
    }
    with (directory / PERMUTATIONS).open("wb") as handle:
        write_file(handle, tensors, metadata)


def output_bytes(like: Checkpoint) -> int:
    """Bytes of all tensors of the output."""
    return sum(like.weights.nbytes(key) for key in like.names())


def run_record(command: str, settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The content of run.json."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"command": command, "settings": dict(settings), **more, "peak_memory_mib": round(peak, 1)}
