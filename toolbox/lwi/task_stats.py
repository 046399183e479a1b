"""lwi-eval --stats: how each task uses the channels of each permutation group, as tensors and as overlaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from toolbox.lwi.activations import readers, task_use
from toolbox.lwi.checkpoint import open_checkpoint
from toolbox.lwi.choices import Options as FuseOptions
from toolbox.lwi.inputs import find_spec
from toolbox.lwi.metrics import overlap
from toolbox.lwi.task_model import Start
from toolbox.shell.command import Invocation
from toolbox.shell.files import atomic_file
from toolbox.weights.provenance import header
from toolbox.weights.write import write_file


def write_stats(
    path: str, state: Start, model: nn.Module, rows: Sequence[Sequence[int]], images: Any, call: Invocation
) -> Iterator[dict[str, Any]]:
    """Write ``task0/GROUP/mean_abs`` and so on to ``path``; give an event for each group and pair of tasks.

    Raises: BadData (65) for a model that no permutation spec knows.
    """
    checkpoint = open_checkpoint(state.name)
    _, plan = find_spec(checkpoint, FuseOptions())
    read = readers(model, plan)
    uses = []
    for task in rows[: len(state.learned)]:
        index = torch.isin(images.targets, torch.tensor(list(task)))
        uses.append(task_use(model, read, images.pixels[index], state.pixels.prepare))
    tensors = {
        f"task{number}/{group}/{name}": value
        for number, use in enumerate(uses)
        for group, one in use.items()
        for name, value in one.tensors().items()
    }
    metadata = header(call.command, {}, None, {"model": checkpoint.weights.sha256()})
    with atomic_file(path) as handle:
        write_file(handle, tensors, metadata)
    for group in read:
        means = [tensors[f"task{number}/{group}/mean_abs"].double().numpy() for number in range(len(uses))]
        for v in range(len(means)):
            for u in range(v):
                yield {"event": "overlap", "group": group, "u": u, "v": v, "overlap": overlap(means[u], means[v])}
