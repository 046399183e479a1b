"""Log-probabilities of given tokens under a model (teacher forcing), in length-sorted batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss, collate

SCORE_TOKENS = 2048
"""Padded tokens of one scoring batch."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One row's labelled tokens: ``nll`` (T,) float32 in nats, ``hit`` (T,) whether the token is the argmax,
    ``end`` (T,) whether it is an end-of-turn token."""

    nll: np.ndarray
    hit: np.ndarray
    end: np.ndarray


def score_batches(lengths: Sequence[int], max_tokens: int = SCORE_TOKENS) -> list[list[int]]:
    """Row numbers in batches of at most ``max_tokens`` padded tokens, rows of like length together."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@torch.no_grad()  # not inference_mode: buffers that a sharding engine makes in it cannot be trained with later
def score_rows(
    model: TokenLoss,
    rows: Sequence[Encoded],
    *,
    device: torch.device | str = "cpu",
    pad_id: int = 0,
    max_tokens: int = SCORE_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> list[TokenScores]:
    """Score each row's labelled tokens; results in the order of ``rows``.

    Scored in eval mode, without dropout; a model in training goes on training. ``on_batch`` is told how many rows each
    finished batch had.
    """
    training = model.model.training  # not that of the wrapper, which begins as if it were trained
    model.eval()
    try:
        return _score(model, rows, device, pad_id, max_tokens, on_batch)
    finally:
        model.train(training)


def _score(
    model: TokenLoss,
    rows: Sequence[Encoded],
    device: torch.device | str,
    pad_id: int,
    max_tokens: int,
    on_batch: Callable[[int], None] | None,
) -> list[TokenScores]:
    scores: list[TokenScores | None] = [None] * len(rows)
    for members in score_batches([len(row.ids) for row in rows], max_tokens):
        batch = collate([rows[index] for index in members], pad_id).to(device)
        nll, hit = model(batch.ids, batch.where, batch.labels)
        counts = torch.bincount(batch.row, minlength=len(members)).tolist()
        parts = (nll.cpu().numpy(), hit.cpu().numpy(), batch.end.cpu().numpy())
        edges = np.cumsum(counts)[:-1]
        for index, one in zip(members, zip(*(np.split(part, edges) for part in parts), strict=True), strict=True):
            scores[index] = TokenScores(*one)
        if on_batch is not None:
            on_batch(len(members))
    return scores  # type: ignore[return-value]
