"""The watched sets of a run: extraction strength and probability, scored by all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.models.chat import Encoded
from toolbox.models.extraction import extraction_strength, probability
from toolbox.models.score import score_rows
from toolbox.stats import bootstrap_mean
from toolbox.training.processes import gather_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

_DRAWS = 1000
"""Bootstrap draws of one interval: enough for two digits, cheap at every evaluation."""


def evaluate_sets(
    accelerator: Accelerator, model: Any, sets: Mapping[str, Sequence[Encoded]], pad_id: int, seed: int
) -> dict[str, dict[str, Any]]:
    """``{set: {"n", "es", "es_interval", "prob", "prob_interval"}}``: means over rows with 95 % bootstrap intervals.

    Rows are dealt to the ranks; where parameters are sharded every rank scores all rows, since forward passes must
    stay in step. All ranks return the same.
    """
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.eval()
    sharded = any(hasattr(p, "to_local") for p in unwrapped.parameters())
    rank, world = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
    mine: dict[str, list[tuple[float, float]]] = {}
    for name, rows in sets.items():
        with accelerator.autocast():
            scores = score_rows(unwrapped, rows[rank::world], device=accelerator.device, pad_id=pad_id)
        mine[name] = [(extraction_strength(one), probability(one)) for one in scores]
    payload = msgspec.msgpack.encode(mine)  # JSON has no NaN
    parts = [msgspec.msgpack.decode(part) for part in ([payload] if world == 1 else gather_bytes(accelerator, payload))]
    return {name: _summary(_deal_back([part[name] for part in parts]), seed) for name in sets}


def _deal_back(parts: list[list[list[float]]]) -> list[list[float]]:
    """Undo ``rows[rank::world]``."""
    rows: list[list[float]] = [[] for _ in range(sum(len(part) for part in parts))]
    for rank, part in enumerate(parts):
        rows[rank :: len(parts)] = part
    return rows


def _summary(rows: list[list[float]], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(rows)}
    for place, name in enumerate(("es", "prob")):
        if not all(math.isfinite(row[place]) for row in rows):
            raise FloatingPointError(f"the {name} of a watched row is not finite")
        interval = bootstrap_mean([row[place] for row in rows], draws=_DRAWS, seed=seed)
        found[name] = interval.estimate
        # One row has no interval: null in JSON, not NaN.
        found[f"{name}_interval"] = [interval.low, interval.high] if len(rows) > 1 else [None, None]
    return found
