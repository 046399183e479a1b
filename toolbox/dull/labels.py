"""Adaptive multi-labelling (AML): which labels a sample may have, and how far its given one is to be believed.

q is the moving average of a sample's predictions without the prior term. Numpy in float64; rows are samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

BETA = 0.7
LEAST = 50
"""Samples that a class needs for a mixture of its own; below, all its labels count as clean."""
TINY = 1e-4
_VARIANCE_FLOOR = 1e-6


def moving_average(q: Array, p: Array, beta: float = BETA) -> Array:
    """q ← β q + (1 − β) p."""
    return beta * q + (1 - beta) * p


def thresholds(q: Array) -> Array:
    """τ_c: the mean of max q over samples whose arg-max is c (C,); infinite for a class that is nobody's arg-max.

    Tail classes, whose posteriors are lower, get a lower bar.
    """
    top = q.argmax(1)
    counts = np.bincount(top, minlength=q.shape[1])
    sums = np.bincount(top, weights=q.max(1), minlength=q.shape[1])
    return np.divide(sums, counts, out=np.full(q.shape[1], np.inf), where=counts > 0)


def label_sets(q: Array, given: Labels, tau: Array) -> NDArray[np.bool_]:
    """S_i = {y~_i} ∪ {c : q_ic ≥ τ_c} as (n, C)."""
    sets = q >= tau
    sets[np.arange(len(given)), given] = True
    return sets


def given_losses(q: Array, given: Labels) -> Array:
    """−log q_i[y~_i], (n,): what the mixtures are fitted to."""
    return -np.log(np.maximum(q[np.arange(len(given)), given], TINY))


@dataclass(frozen=True)
class Mixture:
    """Two normal distributions of a class's losses; the first is the one of lower mean, the clean samples."""

    weights: Array
    means: Array
    variances: Array

    @property
    def separation(self) -> float:
        """d' = |μ₁ − μ₂| / sqrt((σ₁² + σ₂²) / 2)."""
        return float(abs(self.means[0] - self.means[1]) / np.sqrt(self.variances.mean()))

    def clean(self, losses: Array) -> Array:
        """P(clean | loss), (n,). On the far side of both means it stays at what it is there: a lower loss never makes
        a label less believable, which two unequal variances would otherwise say."""
        inside = np.clip(losses, *self.means)
        return np.exp(_log_parts(inside, self)[0] - np.logaddexp.reduce(_log_parts(inside, self), axis=0))


def _log_parts(losses: Array, mixture: Mixture) -> Array:
    """log w_k N(loss; μ_k, σ_k²), (2, n)."""
    weights, means, variances = (values[:, None] for values in (mixture.weights, mixture.means, mixture.variances))
    return np.log(weights) - 0.5 * (np.log(2 * np.pi * variances) + (losses - means) ** 2 / variances)


def fit_mixture(losses: Array, *, rounds: int = 300, tolerance: float = 1e-7) -> Mixture | None:
    """Expectation maximisation from the lower and the upper half; None where the losses do not differ.

    Variances get 1e-6 more than their estimate, as in scikit-learn, so that no component can shrink to a point.
    """
    if np.ptp(losses) < 1e-9:
        return None
    middle = np.median(losses)
    low, high = losses[losses <= middle], losses[losses >= middle]
    start = np.full(2, losses.var() + _VARIANCE_FLOOR)
    mixture = Mixture(np.full(2, 0.5), np.array([low.mean(), high.mean()]), start)
    before = -np.inf
    for _ in range(rounds):
        parts = _log_parts(losses, mixture)
        total = np.logaddexp.reduce(parts, axis=0)
        share = np.exp(parts - total)
        sizes = share.sum(1) + 1e-15
        means = (share @ losses) / sizes
        variances = (share * (losses - means[:, None]) ** 2).sum(1) / sizes + _VARIANCE_FLOOR
        mixture = Mixture(sizes / len(losses), means, variances)
        now = float(total.mean())
        if abs(now - before) < tolerance:
            break
        before = now
    order = np.argsort(mixture.means, kind="stable")
    return Mixture(mixture.weights[order], mixture.means[order], mixture.variances[order])


def fit_by_class(losses: Array, given: Labels, classes: int, least: int = LEAST) -> list[Mixture | None]:
    """A mixture for each given class: one for all would throw whole tail classes out, whose losses are all high."""
    members = [losses[given == number] for number in range(classes)]
    return [fit_mixture(one) if len(one) >= least else None for one in members]


def clean_probabilities(losses: Array, given: Labels, mixtures: list[Mixture | None]) -> Array:
    """w_i, (n,); 1 where the class has no mixture."""
    clean = np.ones(len(losses))
    for number, mixture in enumerate(mixtures):
        if mixture is not None:
            clean[given == number] = mixture.clean(losses[given == number])
    return clean


def with_prior(q: Array, prior: Array) -> Array:
    """q_c π_c, normalised: the posterior among images as they are met, from one among balanced classes."""
    weighted = q * prior
    return weighted / np.maximum(weighted.sum(1, keepdims=True), 1e-300)


def transition(posterior: Array, given: Labels) -> Array:
    """T̂[r, y~] ∝ Σ_i p_i[r] [y~_i = y~], rows of soft counts that add up to 1; a row without counts is that of I."""
    classes = posterior.shape[1]
    counts = np.zeros((classes, classes))
    for number in range(classes):
        counts[:, number] = posterior[given == number].sum(0)
    totals = counts.sum(1, keepdims=True)
    return np.where(totals > 1e-12, counts / np.maximum(totals, 1e-12), np.eye(classes))


def wrong_share(posterior: Array, given: Labels) -> Array:
    """What T̂'s soft counts say of each given class: the share of its samples that belong elsewhere, (C,)."""
    classes = posterior.shape[1]
    own = posterior[np.arange(len(given)), given]
    sizes = np.bincount(given, minlength=classes)
    kept = np.bincount(given, weights=own, minlength=classes)
    return np.where(sizes > 0, 1 - kept / np.maximum(sizes, 1), 0.0)


def soft_targets(q: Array, given: Labels, clean: Array, sets: NDArray[np.bool_]) -> Array:
    """t_i = w_i onehot(y~_i) + (1 − w_i) q_i restricted to S_i without y~_i and normalised; one-hot where S_i = {y~_i}.

    (n, C), rows that add up to 1.
    """
    rows = np.arange(len(given))
    others = np.where(sets, q, 0.0)
    others[rows, given] = 0.0
    total = others.sum(1)
    targets = np.zeros_like(q)
    targets[rows, given] = 1.0
    several = total > 0
    targets[several] *= clean[several, None]
    targets[several] += (1 - clean[several, None]) * others[several] / total[several, None]
    return targets
