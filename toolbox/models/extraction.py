"""How much of an answer a model still knows: extraction strength, exact match and probability.

All three are functions of teacher-forced scores (``TokenScores``), one forward pass a row.
"""

from __future__ import annotations

import numpy as np

from toolbox.models.score import TokenScores


def extraction_strength(scores: TokenScores) -> float:
    """Length of the longest exactly predicted suffix of the answer over the answer's length, in tokens.

    With argmax predictions under teacher forcing and T answer tokens (end token excluded):

        ES = max{ k : tokens T−k+1 .. T are all predicted } / T

    Equal to 1 − (shortest prefix whose greedy continuation reproduces the rest) / T, since greedy decoding follows the
    answer exactly as long as every argmax is right. 0 where the last token is already missed.
    Source: Carlini et al. 2021 as used for unlearning (arXiv 2505.11953).
    """
    hits = scores.hit[~scores.end]
    if len(hits) == 0:
        return 0.0
    misses = np.flatnonzero(~hits)
    suffix = len(hits) if len(misses) == 0 else len(hits) - 1 - int(misses[-1])
    return suffix / len(hits)


def exact_match(scores: TokenScores) -> float:
    """Share of answer tokens (end token excluded) that are the argmax under teacher forcing."""
    hits = scores.hit[~scores.end]
    return float(hits.mean()) if len(hits) else 0.0


def probability(scores: TokenScores) -> float:
    """exp(−L/T): the geometric mean of the token probabilities, over all T labelled tokens with the end token.

    Raises: ValueError for T = 0, where there is none.
    """
    if len(scores.nll) == 0:
        raise ValueError("a row without a labelled token has no probability")
    return float(np.exp(-scores.nll.astype(np.float64).mean()))
