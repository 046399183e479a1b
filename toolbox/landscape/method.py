"""The mathematics of a landscape: distances, features, landmarks, progress and the metrics of states and paths.

Source: Zhou et al., "Landscape of Thoughts: Visualizing the Reasoning Process of Large Language Models" (2025), arXiv
2503.22165, section 2, and its released code (tmlr-group/landscape-of-thoughts) where the paper is silent.

Symbols: a question x has choices c_1..c_k with answer strings a_1..a_k; a path is thoughts t_1..t_n, its states are
s_i = (x, t_1..t_i), and s_0 = x is the start. M states, P paths, K the largest k. An array of K columns that mixes
questions of different k holds NaN from column k on, and all functions here read it so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolbox.shell.errors import UsageProblem

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
LandmarkKind = Literal["simplex", "paper", "reference"]

REFERENCE_LANDMARKS = {2: 1 / 3, 4: 1 / 4, 5: 1 / 4}
"""Entry off the diagonal by k, as the released code has it; it has none for other k."""

MASSES = (0.95, 0.8, 0.6, 0.4, 0.2)
"""Share of the density that each contour of a picture encloses, from the outermost."""


# --- states -----------------------------------------------------------------------------------------------------------


def perplexity(logprob: ArrayLike, n_tokens: ArrayLike) -> Floats:
    """exp(−log p / n): the perplexity of n tokens whose log-probabilities add up to log p, in nats; same shape.

    The mean is taken before exponentiating. NaN where there is no token.
    Source: paper, the perplexity of a thought p(t_i | s_{i−1})^(−1/|t_i|), here for any string.
    """
    counts = np.asarray(n_tokens, dtype=np.float64)
    with np.errstate(over="ignore"):
        return np.exp(-np.asarray(logprob, dtype=np.float64) / np.where(counts > 0, counts, np.nan))


def distance(logprob: ArrayLike, n_tokens: ArrayLike) -> Floats:
    """d(s_i, c_j) = p(a_j | s_i)^(−1/|a_j|), from log p(a_j | s_i) and |a_j|, both (M, K); at least 1 for a model.

    The perplexity of the answer string: small is near. Beyond k, NaN or a count of 0 gives NaN. Source: paper,
    definition of the distance between a state and a choice.
    """
    return perplexity(logprob, n_tokens)


def l1_features(distances: ArrayLike) -> Floats:
    """f_i = (d(s_i, c_1), ..., d(s_i, c_k)) / Σ_j d(s_i, c_j): (M, K) points whose rows add up to 1; NaN stays.

    A small coordinate means near to that choice. Source: paper, the feature of a state.
    """
    d = np.asarray(distances, dtype=np.float64)
    # Sums of distances near the largest float would overflow; dividing by a power of two changes no digit.
    scale = np.exp2(np.floor(np.log2(np.nanmax(d, axis=-1, keepdims=True, initial=1.0))))
    scaled = d / scale
    return scaled / np.nansum(scaled, axis=-1, keepdims=True)


def gold_first(values: ArrayLike, gold: ArrayLike) -> Floats:
    """The columns of each row with column ``gold`` moved to the front and the others in their order; both kept (M, K).

    ``gold``: (M,) index, −1 leaves the row as it is. With it, states of questions whose right answers stand at
    different places share one space. Source: released code, which moves the right answer's column to position 0.
    """
    array = np.asarray(values, dtype=np.float64)
    columns = np.arange(array.shape[1])
    order = np.argsort(np.where(columns == np.asarray(gold)[:, None], -1, columns), axis=1, kind="stable")
    return np.take_along_axis(array, order, axis=1)


def landmarks(k: int, kind: LandmarkKind = "simplex") -> Floats:
    """(k, k): row j is the point of choice j in feature space, a constant vector with 0 at coordinate j.

    ``simplex``: (1 − e_j)/(k − 1), which has L1 norm 1 as every state has. ``paper``: (1 − e_j)/k. ``reference``: the
    constants of the released code (1/4 for k = 5 and 4, 1/3 for k = 2).

    ValueError: k below 2. UsageProblem: ``reference`` for a k that the released code has no constant for.
    """
    if k < 2:
        raise ValueError(f"landmarks need at least two choices, got {k}")
    if kind == "reference" and k not in REFERENCE_LANDMARKS:
        raise UsageProblem(
            f"the released code has no landmarks for questions of {k} choices", "--landmarks simplex has them for all"
        )
    entry = {"simplex": 1 / (k - 1), "paper": 1 / k, "reference": REFERENCE_LANDMARKS.get(k, 0.0)}[kind]
    return entry * (1.0 - np.eye(k))


# --- progress ---------------------------------------------------------------------------------------------------------


def progress_bins(step: ArrayLike, n_steps: ArrayLike, bins: int = 5) -> Integers:
    """⌈bins·i/n⌉ for state i of n: the stage of progress, 1..bins; (M,).

    Bin b holds the states with (b − 1)/bins < i/n ≤ b/bins, in whole numbers, so that no rounding moves a state. The
    last state of every path lies in the last bin.
    """
    i, n = np.asarray(step, dtype=np.int64), np.asarray(n_steps, dtype=np.int64)
    return -(-bins * i // n)


def reference_bins(step: ArrayLike, n_steps: ArrayLike, bins: int = 5) -> Integers:
    """The stages of the released code: pooled positions cut at their own percentiles; (M,), 0 for paths of one thought.

    Position (i − 1)/(n − 1); the cuts are the 100/bins, 200/bins, ... percentiles of all positions given, and a
    position on a cut belongs to the lower stage. To be called apart for the wrong and for the correct paths, as the
    code does. Stages of equal counts are not stages of equal progress: the labels 0–20 % do not hold for them.
    Source: released code, PLOT-landscape.py.
    """
    i, n = np.asarray(step, dtype=np.int64), np.asarray(n_steps, dtype=np.int64)
    # As numpy.linspace computes it: i·(1/n) and i/n differ in the last bit, and positions lie on the cuts.
    position = np.where(i == n, 1.0, (i - 1) * (1.0 / np.maximum(n - 1, 1)))
    several = n > 1
    result = np.zeros(i.shape, dtype=np.int64)
    if several.any():
        cuts = np.percentile(position[several], 100.0 * np.arange(1, bins) / bins)
        result[several] = 1 + np.searchsorted(cuts, position[several], side="left")
    return result


# --- metrics ----------------------------------------------------------------------------------------------------------


def nearest(features: ArrayLike) -> Integers:
    """argmin_j f_ij: the choice that each state is nearest to, the lowest index where several are; (M,)."""
    f = np.asarray(features, dtype=np.float64)
    return np.argmin(np.where(np.isnan(f), np.inf, f), axis=-1)


def consistency(nearest_choice: ArrayLike, last: ArrayLike) -> NDArray[np.bool_]:
    """c_i = 1[argmin_j f_ij = argmin_j f_nj]: whether a state is nearest to the choice its path's last state is at.

    ``nearest_choice``: (M,); ``last``: (M,) the row of the last state of each state's path. The last state agrees with
    itself by definition, so means over states have to leave it out. Source: paper, consistency.
    """
    choice = np.asarray(nearest_choice)
    return choice == choice[np.asarray(last, dtype=np.int64)]


def entropy(shares: ArrayLike) -> Floats:
    """−Σ_j p_j ln p_j of each row, in nats; 0·ln 0 = 0, columns of NaN are left out."""
    p = np.asarray(shares, dtype=np.float64)
    terms = np.where(p > 0, p, 1.0)  # NaN and 0 contribute nothing
    return -np.sum(terms * np.log(terms), axis=-1)


def uncertainty(features: ArrayLike) -> Floats:
    """u_i = −Σ_j f_ij ln f_ij, in nats: the entropy of the normalised DISTANCES; (M,).

    Its range is narrow: a state that is certain of one of five choices still has ln 4 = 1.386 of at most ln 5 = 1.609.
    Values of different k do not compare. Source: paper, uncertainty.
    """
    return entropy(features)


def uncertainty_normalised(features: ArrayLike) -> Floats:
    """u_i / ln k, within [0, 1]; (M,). k is the number of columns that are not NaN."""
    f = np.asarray(features, dtype=np.float64)
    return entropy(f) / np.log(np.sum(~np.isnan(f), axis=-1))


def uncertainty_likelihood(distances: ArrayLike) -> Floats:
    """The entropy of p_ij ∝ 1/d_ij, in nats; (M,). 1/d is the answer's likelihood a token: this one falls to 0.

    From distances or from features: a row's scale cancels.
    """
    likelihood = 1.0 / np.asarray(distances, dtype=np.float64)
    return entropy(likelihood / np.nansum(likelihood, axis=-1, keepdims=True))


def path_perplexity(thought_logprob: ArrayLike, thought_tokens: ArrayLike, path: ArrayLike, n_paths: int) -> Floats:
    """p(t_1..t_n | x)^(−1/Σ|t_i|) of each path, (P,), from (M,) log p(t_i | s_{i−1}) in nats and |t_i|; NaN for none.

    ``path``: (M,) the path of each state. Source: paper, perplexity.
    """
    of = np.asarray(path, dtype=np.int64)
    sums = np.bincount(of, weights=np.asarray(thought_logprob, dtype=np.float64), minlength=n_paths)
    tokens = np.bincount(of, weights=np.asarray(thought_tokens, dtype=np.float64), minlength=n_paths)
    return perplexity(sums, tokens)


def path_means(values: ArrayLike, path: ArrayLike, n_paths: int) -> Floats:
    """(P,): the mean of the (M,) values over each path's states, those of NaN left out; NaN where none is left."""
    rows, of = np.asarray(values, dtype=np.float64), np.asarray(path, dtype=np.int64)
    known = ~np.isnan(rows)
    sums = np.bincount(of[known], weights=rows[known], minlength=n_paths)
    counts = np.bincount(of[known], minlength=n_paths)
    return sums / np.where(counts > 0, counts, np.nan)


# --- density ----------------------------------------------------------------------------------------------------------


def gaussian_density(points: ArrayLike, x: ArrayLike, y: ArrayLike) -> Floats:
    """Gaussian kernel density of the (n, 2) points on the grid of ``x`` and ``y``: (len(y), len(x)), its integral 1.

    The kernel's covariance is that of the points times n^(−1/3), Scott's rule in two dimensions. It is never narrower
    than a cell of the grid in any direction, which is what makes points on a line, equal points and a single one
    drawable; where that bound does not bite this is scipy's ``gaussian_kde``. ValueError: no point.

    Source: Scott, "Multivariate Density Estimation" (1992), section 6.3.
    """
    data = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not len(data):
        raise ValueError("a density needs at least one point")
    spread = np.cov(data.T) * len(data) ** (-1 / 3) if len(data) > 1 else np.zeros((2, 2))
    variances, axes = np.linalg.eigh(spread)
    variances = np.maximum(variances, max(x[1] - x[0], y[1] - y[0]) ** 2)
    whiten = axes / np.sqrt(variances)  # to units in which the kernel is round
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    centre = data.mean(axis=0)  # keeps the squares below small, and with them their cancellation
    spots, kernels = (grid - centre) @ whiten, (data - centre) @ whiten
    total = np.empty(len(spots))
    rows = max(1, (1 << 20) // len(kernels))
    for start in range(0, len(spots), rows):
        block = spots[start : start + rows]
        squares = (block**2).sum(axis=1)[:, None] + (kernels**2).sum(axis=1) - 2 * block @ kernels.T
        total[start : start + rows] = np.exp(-0.5 * np.maximum(squares, 0)).sum(axis=1)
    return (total / (len(data) * math.tau * np.sqrt(variances.prod()))).reshape(len(y), len(x))


def mass_levels(density: Floats, masses: Sequence[float] = MASSES) -> Floats:
    """The heights above which the grid's cells hold each share of its mass, upwards; equal heights once."""
    falling = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(falling)
    at = np.searchsorted(mass, np.array(masses) * mass[-1]).clip(max=len(falling) - 1)
    return np.unique(falling[at])
