"""Scores of a split, and their figures, over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from toolbox.longer.data import Requests
from toolbox.longer.metrics import Scores, measure
from toolbox.longer.objective import AUTO_LENGTH, cost
from toolbox.longer.ranker import Ranker
from toolbox.training.processes import gather_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

_FIGURES = ("n", "positives", "auc", "logloss", "gauc", "coverage")


def batches(requests: Requests, arch: str) -> list[np.ndarray]:
    """All pieces in groups of like length that fit into memory together."""
    order = np.lexsort((requests.candidates, requests.length))
    found: list[np.ndarray] = []
    begin, longest = 0, 0
    for place, piece in enumerate(order):
        longest = max(longest, 1 + cost(arch, int(requests.length[piece]), int(requests.candidates[piece])))
        if longest * (place - begin + 1) > 2 * AUTO_LENGTH and place > begin:
            found.append(order[begin:place])
            begin, longest = place, 1 + cost(arch, int(requests.length[piece]), int(requests.candidates[piece]))
    return [*found, order[begin:]]


def split_scores(accelerator: Accelerator, model: Ranker, requests: Requests) -> np.ndarray:
    """P(label) of every sample of a split, float32, in its order; on every rank."""
    scores = np.full(len(requests.samples["user"]), np.nan, np.float32)
    rank, world = accelerator.process_index, accelerator.num_processes
    mine: list[np.ndarray] = []
    model.eval()
    with torch.no_grad(), accelerator.autocast():
        groups = batches(requests, model.config.arch)
        for place in range(rank, -(-len(groups) // world) * world, world):
            # Sharded tables are looked up by all processes together: one without a group of its own takes part.
            batch = requests.batch(groups[place] if place < len(groups) else groups[0][:1])
            assert batch.labelled is not None
            logits = model(batch.to(accelerator.device)).float().cpu()
            if place < len(groups):
                mine.append(torch.sigmoid(logits)[batch.labelled].numpy())
    payload = np.concatenate(mine).tobytes() if mine else b""
    for number, part in enumerate(gather_bytes(accelerator, payload)):
        values, at = np.frombuffer(part, np.float32), 0
        for pieces in groups[number::world]:
            for piece in pieces:
                begin, end = int(requests.first[piece]), int(requests.first[piece + 1])
                scores[begin:end] = values[at : at + end - begin]
                at += end - begin
    return scores


def judged(accelerator: Accelerator, model: Ranker, requests: Requests) -> dict[str, Any]:
    """AUC, LogLoss, GAUC by user of a split; FloatingPointError where a score is not finite."""
    scores = split_scores(accelerator, model, requests)
    if not np.isfinite(scores).all():
        raise FloatingPointError("a score of the evaluation is not finite")
    user = np.asarray(requests.samples["user"])
    found = measure(Scores(np.asarray(requests.samples["label"]), scores, user, user))
    return {key: found[key] for key in _FIGURES}
