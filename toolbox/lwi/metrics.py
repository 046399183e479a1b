"""How continual learning is judged: accuracies after each task, their averages, forgetting. Pure functions.

A[t, u] is the accuracy on the images of task u of the state after task t (u <= t), rows keyed by t. TAw takes the
arg-max over task u's classes, TAg over all classes seen so far. Source: FACIL (M. Masana et al., arXiv 2010.15277).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from toolbox.stats import Interval

Accuracies = Mapping[int, Sequence[float]]
"""t -> A[t, 0..t]."""


def averages(found: Accuracies) -> dict[int, float]:
    """avg[t] = mean over u <= t of A[t, u]."""
    return {t: float(np.mean(row)) for t, row in found.items()}


def weighted_averages(found: Accuracies, classes: Sequence[int]) -> dict[int, float]:
    """wavg[t] = Σ_{u<=t} c_u A[t, u] / Σ_{u<=t} c_u, with c_u the number of classes of task u."""
    return {t: float(np.average(row, weights=classes[: len(row)])) for t, row in found.items()}


def forgetting(found: Accuracies) -> dict[int, list[float | None]]:
    """F[t, u] = max_{s<t} A[s, u] - A[t, u] for u < t, over the states s that are given.

    None for u = t, and where no earlier state that has learned u is given. Negative: later tasks helped.
    """
    result: dict[int, list[float | None]] = {}
    for t, row in found.items():
        result[t] = []
        for u, value in enumerate(row):
            before = [found[s][u] for s in found if u <= s < t]
            result[t].append(max(before) - value if before else None)
    return result


def mean_forgetting(found: Accuracies) -> dict[int, float | None]:
    """The mean of F[t, u] over the tasks that have one; None for a state without."""
    told = {t: [value for value in row if value is not None] for t, row in forgetting(found).items()}
    return {t: float(np.mean(values)) if values else None for t, values in told.items()}


def macro_interval(
    groups: Sequence[NDArray[np.int64]], *, draws: int, seed: int, weights: Sequence[float] | None = None
) -> Interval:
    """The mean over tasks of mean values in {-1, 0, 1}, with a percentile bootstrap within each task.

    Values are 1 for an image that was classified right, or differences of two such marks on the same image (paired).
    Resampling n values with replacement is a multinomial draw of how often each of the three comes. ``weights``: of the
    tasks (equal ones by default).
    """
    random = np.random.default_rng(seed)
    shares = np.full(len(groups), 1 / len(groups)) if weights is None else np.asarray(weights) / np.sum(weights)
    estimate, drawn = 0.0, np.zeros(draws)
    for share, values in zip(shares, groups, strict=True):
        counts = np.array([(values == -1).sum(), (values == 0).sum(), (values == 1).sum()])
        sample = random.multinomial(len(values), counts / len(values), size=draws)
        estimate += float(share * values.mean())
        drawn += share * (sample[:, 2] - sample[:, 0]) / len(values)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), sum(map(len, groups)), 0.95)


def overlap(one: NDArray[np.float64], two: NDArray[np.float64]) -> float | None:
    """How much two tasks use the same channels: Σ_c min(a_c, b_c) / Σ_c max(a_c, b_c) of their mean |activation|.

    1: the same use of every channel, 0: no channel in common; None where nothing fires.
    """
    most = float(np.maximum(one, two).sum())
    return float(np.minimum(one, two).sum()) / most if most > 0 else None
