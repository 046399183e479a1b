"""Intervals and tests that figures are reported with.

An estimate never travels without its ``n`` and an interval. All randomness is ``Generator(PCG64(seed))``; weighted sums
go through loops of fixed order instead of BLAS, so that the same seed gives the same bytes whatever the number of
threads or the size of a block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK_CELLS = 1 << 18  # draws x groups held at once: 2 MiB a float64 matrix, which stays in cache
_EXACT_GROUPS = 12  # sign_flip enumerates up to 2**12 patterns
_ROUNDING = 1e-12  # share of the largest possible statistic within which two permuted sums count as equal


@dataclass(frozen=True)
class Interval:
    """An estimate over ``n`` units with the bounds of its two-sided interval.

    ``low`` and ``high`` are NaN where the data determine no interval (a single unit to resample).
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        """``.97 [.93, 1.00]``: as many decimals as the width supports, at least two for figures within [-1, 1]."""
        shown = [value for value in (self.estimate, self.low, self.high) if math.isfinite(value)]
        decimals = 2 if all(abs(value) <= 1 for value in shown) else 0
        width = self.high - self.low
        if math.isfinite(width) and width > 0:
            # The last digit shown is worth at most a fifth of the width; finer digits would be noise.
            decimals = min(6, max(decimals, math.ceil(-math.log10(width / 5))))
        elif decimals == 0:
            decimals = 2
        bounds = "n/a" if math.isnan(width) else f"{_short(self.low, decimals)}, {_short(self.high, decimals)}"
        return f"{_short(self.estimate, decimals)} [{bounds}]"

    def as_record(self) -> dict[str, float | int | None]:
        """The fields for a JSON line: a bound that is NaN becomes ``None``, since records hold no NaN."""
        low, high = (None if math.isnan(bound) else bound for bound in (self.low, self.high))
        return {"estimate": self.estimate, "low": low, "high": high, "n": self.n, "level": self.level}


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """Two-sample Kolmogorov-Smirnov: distance ``d``, two-sided ``p``, sample sizes, how p was computed."""

    d: float
    p: float
    n_a: int
    n_b: int
    method: str


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = successes/n.

    z is the (1 + level)/2 quantile of the standard normal. The low bound is exactly 0 without a success, the high bound
    exactly 1 without a failure. ValueError: n = 0, a count that is no integer or not within 0..n, level not in (0, 1).

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if n != int(n) or successes != int(successes):
        raise ValueError(f"wilson needs whole counts, got {successes} of {n}")
    if n <= 0:
        raise ValueError("wilson needs at least one trial, n is 0" if n == 0 else f"wilson: n is negative: {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes do not fit {n} trials")
    n, successes = int(n), int(successes)
    z = NormalDist().inv_cdf((1 + _level(level)) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - reach) / scale
    high = 1.0 if successes == n else (centre + reach) / scale
    return Interval(p, low, high, n, level)


def bootstrap_weights(groups: int, draws: int = 2000, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Resampling counts in blocks of shape (block, groups): how often each group occurs in each bootstrap draw.

    A row is one draw from Multinomial(groups; 1/groups, ..., 1/groups), so it sums to ``groups``. Any statistic that is
    a function of per-group sums is resampled by multiplying these with the sums. Memory is bounded by the block; the
    draws do not depend on how they are cut into blocks. ValueError: groups or draws below 1.
    """
    if groups < 1 or draws < 1:
        raise ValueError(f"a bootstrap needs at least one group and one draw, got {groups} and {draws}")
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, _BLOCK_CELLS // groups)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        picked = generator.integers(0, groups, size=(rows, groups))
        picked += np.arange(0, rows * groups, groups)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * groups).reshape(rows, groups).astype(np.float64)


def bootstrap_mean(
    values: ArrayLike,
    *,
    clusters: Iterable[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values`` (rows,).

    Without ``clusters`` rows are resampled with replacement. With ``clusters`` (a label a row) whole clusters are,
    since rows that share a question, a user or an image are not independent; a draw is then the ratio of sums
    Σ_g w_g S_g / Σ_g w_g N_g over clusters of sum S_g and size N_g, w multinomial. Clusters of one row give the row
    bootstrap, byte for byte. Cost: draws x groups.

    A single group determines no interval: both bounds are NaN (a width of zero would claim certainty). Equal values
    give a width of zero, which is the percentile method's answer and too good to be true for a rate at 0 or 1: use
    ``wilson`` there. ValueError: no values, NaN or infinity, labels of another length or missing, draws < 1, level not
    in (0, 1).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; clusters: Field and Welsh,
    "Bootstrapping clustered data", JRSS B 69 (2007).
    """
    rows = _finite(values, "values")
    sums, sizes = _group(rows, clusters)
    _level(level)
    estimate = float(rows.mean())
    if len(sums) == 1:
        return Interval(estimate, math.nan, math.nan, len(rows), level)
    means = [
        np.einsum("dg,g->d", weights, sums) / np.einsum("dg,g->d", weights, sizes)
        for weights in bootstrap_weights(len(sums), draws, seed)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), len(rows), level)


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    clusters: Iterable[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of mean(a - b), rows paired by position: ``bootstrap_mean`` of the differences.

    Resampling pairs keeps what a and b share (the same questions), so it is narrower than two separate intervals
    wherever they are positively correlated. ValueError: lengths that differ, and everything ``bootstrap_mean`` refuses.
    """
    first, second = _paired(a, b)
    return bootstrap_mean(first - second, clusters=clusters, draws=draws, seed=seed, level=level)


def mcnemar_exact(b: int, c: int) -> float:
    """McNemar's exact two-sided p of discordant pairs: b where only the first is right, c where only the second is.

    p = 2·P(X ≤ min(b, c)), at most 1, X ~ Binomial(b + c, 1/2). Without a discordant pair nothing speaks against
    equality: p = 1. ValueError: a count that is negative or no integer.

    Source: McNemar, Psychometrika 12 (1947); the exact form conditions on b + c.
    """
    if b < 0 or c < 0 or b != int(b) or c != int(c):
        raise ValueError(f"mcnemar_exact needs counts, got {b} and {c}")
    if b + c == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(int(b), int(b + c), 0.5).pvalue)


def sign_flip(
    differences: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided sign-flip permutation p of "the differences are symmetric about 0", flipping whole clusters.

    Statistic T = |Σ_g s_g D_g| with D_g the sum of group g, observed at s = 1. Sampled: p = (1 + #{T* ≥ T})/(1 +
    draws); the +1 counts the observed arrangement, so p is never 0. With at most 12 groups that differ from 0, all 2^G
    patterns are enumerated and p = #{T* ≥ T}/2^G is exact (draws and seed then do not matter). Differences that are all
    zero give p = 1. ValueError: no differences, NaN or infinity, labels of another length or missing, draws < 1.

    Source: Phipson and Smyth, "Permutation p-values should never be zero", SAGMB 9 (2010).
    """
    sums, _ = _group(_finite(differences, "differences"), clusters)
    if draws < 1:
        raise ValueError(f"sign_flip needs at least one draw, got {draws}")
    sums = sums[sums != 0]  # a group at 0 stays where it is under both signs
    if not len(sums):
        return 1.0
    bound = abs(sums.sum()) - _ROUNDING * np.abs(sums).sum()
    if len(sums) <= _EXACT_GROUPS:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return int(_at_least(patterns, sums, bound)) / 2 ** len(sums)
    generator = np.random.Generator(np.random.PCG64(seed))
    block = max(1, _BLOCK_CELLS // len(sums))
    reached = 0
    for start in range(0, draws, block):
        size = (min(block, draws - start), len(sums))
        reached += int(_at_least(generator.integers(0, 2, size=size), sums, bound))
    return (1 + reached) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given.

    With p sorted upwards, adjusted_(i) = max over j ≤ i of min(1, (m - j + 1)·p_(j)): rejecting where adjusted ≤ α
    keeps the family-wise error at α under any dependence. No p value gives an empty list. ValueError: NaN, or a value
    outside [0, 1].

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979).
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError("holm needs p values within [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return adjusted.tolist()


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """Area under the ROC curve: P(positive > negative) + P(positive = negative)/2 over all pairs.

    The Mann-Whitney statistic U/(n₊n₋), U counted in whole halves by binary search in the sorted negatives, O(n log n)
    and exact. Scores may be infinite (log-probabilities). ValueError: one side empty, or NaN.

    Source: Hanley and McNeil, Radiology 143 (1982).
    """
    above, below = _scores(positives, "positives"), np.sort(_scores(negatives, "negatives"))
    halves = int(np.searchsorted(below, above, side="left").sum() + np.searchsorted(below, above, side="right").sum())
    return halves / (2 * len(above) * len(below))


def ks(a: ArrayLike, b: ArrayLike, method: str = "auto") -> KolmogorovSmirnov:
    """Two-sample Kolmogorov-Smirnov test, two-sided: d = max |F_a - F_b| of the empirical distribution functions.

    p from scipy's ``ks_2samp``: ``exact`` counts lattice paths, ``asymp`` is the limit law, ``auto`` is exact up to
    10,000 values a side. ``method`` in the result is the one that was used. p depends on the sample sizes: only tests
    of equal sizes compare. TOFU's forget quality is the p of two models' truth ratios. ValueError: one side empty, NaN.

    Source: Hodges, "The significance probability of the Smirnov two-sample test", Ark. Mat. 3 (1958); Maini et al.,
    "TOFU" (2024), section 2.2.
    """
    first, second = _scores(a, "a"), _scores(b, "b")
    from scipy.stats import ks_2samp

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ks_2samp(first, second, alternative="two-sided", method=method)
    # Where scipy cannot count exactly it falls back, saying so only by a warning.
    fell_back = any("asymp" in str(warning.message) for warning in caught)
    if method == "auto":
        method = "exact" if max(len(first), len(second)) <= 10_000 else "asymp"
    return KolmogorovSmirnov(
        float(result.statistic), float(result.pvalue), len(first), len(second), "asymp" if fell_back else method
    )


def _short(value: float, decimals: int) -> str:
    """``value`` with ``decimals`` digits and neither a leading zero nor a negative zero."""
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a confidence level lies between 0 and 1, got {level}")
    return level


def _vector(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one row of numbers, got shape {array.shape}")
    if not len(array):
        raise ValueError(f"{name} is empty: there is nothing to estimate from")
    return array


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = _vector(values, name)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity at position {int(np.argmin(np.isfinite(array)))}")
    return array


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = _vector(values, name)
    if np.isnan(array).any():
        raise ValueError(f"{name} holds NaN at position {int(np.argmax(np.isnan(array)))}")
    return array


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _finite(a, "a"), _finite(b, "b")
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths, got {len(first)} and {len(second)}")
    return first, second


def _group(
    values: NDArray[np.float64], clusters: Iterable[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(sum, size) a group, groups in order of first appearance, which makes groups of one equal to rows."""
    if clusters is None:
        return values, np.ones_like(values)
    labels = clusters.tolist() if isinstance(clusters, np.ndarray) else list(clusters)
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} cluster labels for {len(values)} values")
    numbers: dict[Hashable, int] = {}
    for position, label in enumerate(labels):
        if label is None or label != label:
            raise ValueError(f"the cluster label at position {position} is missing")
        numbers.setdefault(label, len(numbers))
    index = np.fromiter((numbers[label] for label in labels), dtype=np.int64, count=len(labels))
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)


def _at_least(flips: NDArray[np.int64], sums: NDArray[np.float64], bound: float) -> int:
    """How many rows of ``flips`` (patterns, groups; 0 or 1) reach |Σ ± sums| ≥ bound."""
    return np.count_nonzero(np.abs(np.einsum("pg,g->p", 1.0 - 2.0 * flips, sums)) >= bound)
