"""A trained classifier as a Hugging Face directory, and DULL's own state beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.classify.learned import TASKS_KEY
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file

if TYPE_CHECKING:
    from torch import nn

    from toolbox.classify.classifier import Pixels
    from toolbox.dull.data import Corpus
    from toolbox.dull.objective import DullObjective

STATE_FILE = "dull_state.safetensors"
CONFIG_KEY = "dull"
"""In config.json: the training counts that shot groups come from, and the method."""


def save_model(
    directory: Path, model: nn.Module, corpus: Corpus, pixels: Pixels, metadata: Mapping[str, str], method: str,
    tasks: Sequence[Sequence[str]],
) -> None:  # fmt: skip
    """Write averaged weights, configuration with ``id2label`` and ``tasks``, and the image processor's settings."""
    from transformers.core_model_loading import revert_weight_conversion

    from toolbox.weights.write import write_sharded

    setattr(model.config, TASKS_KEY, [list(task) for task in tasks])
    model.config.dull = {"method": method, "counts": corpus.counts.tolist()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    write_sharded(directory, revert_weight_conversion(model, dict(model.state_dict())), metadata)
    pixels.write(directory)


def save_state(directory: Path, objective: DullObjective, metadata: Mapping[str, str]) -> None:
    """Write G (K, C), q in half precision (rows are training rows in input order) and π."""
    import torch

    from toolbox.weights.write import write_file

    tensors = {"gates": objective.model.gates.detach().cpu(), **objective.table.state()}
    tensors["prior"] = torch.from_numpy(objective.labels.prior.copy())
    with atomic_file(directory / STATE_FILE) as handle:
        write_file(handle, tensors, metadata)


def save_samples(directory: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the list of doubts, a line a sample."""
    with atomic_file(directory / "samples.jsonl") as handle:
        handle.writelines(msgspec.json.encode(row) + b"\n" for row in rows)


def stored_counts(config: Any, classes: int, directory: str) -> list[int] | None:
    """Training counts from a model's config; None where it was not trained here. BadData (65) where they do not fit."""
    stored = getattr(config, CONFIG_KEY, None)
    if stored is None:
        return None
    counts = stored.get("counts") if isinstance(stored, dict) else None
    good = isinstance(counts, list) and len(counts) == classes
    if not good or not all(isinstance(one, int) and one >= 0 for one in counts):
        raise BadData("holds no training counts of its classes", "was it edited?", file=f"{directory}/config.json",
                      field=f"$.{CONFIG_KEY}")  # fmt: skip
    return counts
