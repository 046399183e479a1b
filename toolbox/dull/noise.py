"""Long tails and label noise as plans: how many images of each class, how many of them move to which class.

Tail-to-head noise (arXiv 2503.11414): small classes are mislabelled more often than large ones, and only as larger
ones. The paper's rule is not public; these rates are ours. Classes are numbered from head to tail throughout; a plan is
an integer matrix whose entry (i, j) counts the images of class i that are labelled j. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolbox.shell.errors import BadData

Counts = NDArray[np.int64]
Matrix = NDArray[np.float64]

P_MAX = 0.9
MIN_CLEAN = 5
RANK_FLOOR = 0.05
"""With the profile auto: below this imbalance the rank profile would leave the last class next to nothing clean."""
CIFAR_PAIRS = {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
"""Asymmetric noise of CIFAR-10 (Patrini et al., arXiv 1609.03683)."""


@dataclass(frozen=True)
class Plan:
    """``moved`` (C, C): images of class i labelled j; ``rates`` (C, C): the probabilities it was rounded from."""

    moved: Counts
    rates: Matrix

    @property
    def counts(self) -> Counts:
        """Images a class before the noise."""
        return self.moved.sum(1)

    @property
    def observed(self) -> Counts:
        """Images a class as labelled."""
        return self.moved.sum(0)

    @property
    def flips(self) -> Counts:
        """Mislabelled images of each class."""
        return self.counts - np.diag(self.moved)


def long_tail(largest: int, imbalance: float, classes: int) -> Counts:
    """Images a class, head first: n_c = int(n_max · IF^{c/(C-1)}) (Cao et al., arXiv 1906.07413, section 4).

    ``imbalance`` is IF = min/max, in (0, 1].
    """
    share = np.arange(classes) / max(1, classes - 1)
    # The tiny addition keeps int() from losing one where the power is whole but for rounding (.1 ** 1 * 5000).
    return np.floor(largest * imbalance**share + 1e-9).astype(np.int64)


def profile_weights(counts: Counts, profile: str) -> Matrix:
    """r_i of ``rank`` (i/(C-1)), ``log`` (log n_0/n_i over log n_0/n_last) or ``flat`` (1 for all but the head).

    The head, and every class as large as it, has 0: there is no larger class to be taken for.
    """
    classes = len(counts)
    if profile == "rank":
        weights = np.arange(classes) / max(1, classes - 1)
    elif profile == "log":
        logs = np.log(counts.max() / np.maximum(counts, 1))
        weights = logs / logs.max() if logs.max() > 0 else logs
    else:
        weights = np.ones(classes)
    return np.where(counts < counts.max(), weights, 0.0)


def flip_rates(
    counts: Counts, rate: float, profile: str, *, p_max: float = P_MAX, min_clean: int = MIN_CLEAN
) -> Matrix:
    """p_i = min(cap_i, s · r_i), with s found by bisection such that Σ p_i n_i = rate · N.

    cap_i is ``p_max``, or less where ``min_clean`` images must stay as they are. Raises: BadData (65) with the largest
    feasible rate where no s is large enough.
    """
    weights = profile_weights(counts, profile)
    cap = np.minimum(p_max, np.maximum(0.0, 1 - min_clean / np.maximum(counts, 1)))
    cap[weights <= 0] = 0.0
    total, wanted = counts.sum(), rate * counts.sum()
    reachable = float((cap * counts).sum())
    if wanted > reachable * (1 + 1e-12):
        limit = np.floor(reachable / total * 1000) / 1000
        raise BadData(
            f"a tail-to-head rate of {rate:g} is infeasible: the head cannot be mislabelled and a class loses at most "
            f"{p_max:g} of its images; the cap is {limit:g}",
            f"--rate {limit:g} at most, a milder --imbalance, or a higher --p-max",
        )
    low, high = 0.0, float(1 / weights[weights > 0].min()) if (weights > 0).any() else 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if float((np.minimum(cap, middle * weights) * counts).sum()) < wanted:
            low = middle
        else:
            high = middle
    return np.minimum(cap, high * weights)


def tail_to_head(counts: Counts, flips: Matrix, power: float = 1.0) -> Matrix:
    """T_ij = p_i · n_j^a / Σ_{k: n_k > n_i} n_k^a for n_j > n_i, T_ii = 1 - p_i, 0 elsewhere."""
    larger = counts[None, :] > counts[:, None]
    size = np.where(larger, counts[None, :].astype(np.float64) ** power, 0.0)
    total = size.sum(1, keepdims=True)
    spread = np.divide(size, total, out=np.zeros_like(size), where=total > 0)
    return flips[:, None] * spread + np.diag(np.where(total[:, 0] > 0, 1 - flips, 1.0))


def uniform(classes: int, rate: float, *, own: bool = False) -> Matrix:
    """Each image moves with probability ``rate`` to another class; with ``own`` perhaps to its own again."""
    if own:
        return np.full((classes, classes), rate / classes) + np.eye(classes) * (1 - rate)
    off = np.full((classes, classes), rate / max(1, classes - 1))
    np.fill_diagonal(off, 1 - rate)
    return off


def pairs(classes: int, rate: float, place: Sequence[int]) -> Matrix:
    """Class i is taken for the next one in the classes' natural order, the last for the first.

    ``place[i]`` is the natural place of class i.
    """
    matrix = np.eye(classes) * (1 - rate)
    at = {natural: number for number, natural in enumerate(place)}
    for number, natural in enumerate(place):
        matrix[number, at[(natural + 1) % classes]] += rate
    return matrix


def cifar_asymmetric(names: Sequence[str], rate: float) -> Matrix:
    """truck→automobile, bird→airplane, deer→horse, cat↔dog. Raises: BadData (65) where a class is missing."""
    at = {name: number for number, name in enumerate(names)}
    missing = sorted(({*CIFAR_PAIRS} | {*CIFAR_PAIRS.values()}) - at.keys())
    if missing:
        raise BadData(f"--mode cifar-asym needs CIFAR-10's classes, {missing[0]!r} is not there", "take --mode pair")
    matrix = np.eye(len(names))
    for source, target in CIFAR_PAIRS.items():
        matrix[at[source], at[source]] = 1 - rate
        matrix[at[source], at[target]] += rate
    return matrix


def by_size(counts: Counts, rate: float) -> Matrix:
    """An equal share of every class moves to another class j with probability ∝ n_j (RoLT's and SFA's ``imb``)."""
    size = np.repeat(counts[None, :].astype(np.float64), len(counts), axis=0)
    np.fill_diagonal(size, 0.0)
    spread = size / np.maximum(size.sum(1, keepdims=True), 1e-300)
    return rate * spread + np.eye(len(counts)) * (1 - rate)


def largest_remainder(total: int, weights: Matrix, owed: Matrix | None = None) -> Counts:
    """``total`` things split in proportion to ``weights``: whole numbers that add up; ties go to the first.

    Each share is its quota rounded down or up. ``owed`` (one a share) is added to the remainders: who came off badly
    before comes first now.
    """
    if total == 0 or weights.sum() <= 0:
        return np.zeros(len(weights), dtype=np.int64)
    quota = total * weights / weights.sum()
    base = np.floor(quota + 1e-9).astype(np.int64)
    remainder = np.maximum(quota - base, 0.0)
    claim = remainder if owed is None else remainder + owed
    claim = np.where(remainder > 1e-9, claim, -np.inf)
    for place in np.argsort(-claim, kind="stable")[: total - int(base.sum())]:
        base[place] += 1
    return base


def exact_plan(counts: Counts, rates: Matrix) -> Plan:
    """Round a matrix to whole images: round(p_i n_i) move, split over their destinations by largest remainder.

    What rounding takes from a destination in one row it is owed in the next, so that observed counts too stay within
    about one of their expectation.
    """
    moved = np.zeros((len(counts), len(counts)), dtype=np.int64)
    owed = np.zeros(len(counts))
    for number, count in enumerate(counts.tolist()):
        away = rates[number].copy()
        away[number] = 0.0
        gone = round(float(away.sum()) * count)
        moved[number] = largest_remainder(gone, away, owed)
        moved[number, number] += count - gone
        owed += rates[number] * count - moved[number]
    return Plan(moved, rates)


def draw_exact(plan: Plan, classes: Counts, generator: np.random.Generator) -> Counts:
    """Labels (n,) for images of true ``classes`` (n,): those that move are drawn without replacement."""
    labels = classes.copy()
    for number, row in enumerate(plan.moved):
        members = np.flatnonzero(classes == number)
        targets = np.repeat(np.arange(len(row)), row)
        labels[generator.permutation(members)] = targets
    return labels


def draw_independent(rates: Matrix, classes: Counts, generator: np.random.Generator) -> Counts:
    """Labels (n,), each drawn on its own from the row of its class."""
    cumulated = rates.cumsum(1)
    cumulated[:, -1] = 1.0
    drawn = generator.random(len(classes))
    return (drawn[:, None] >= cumulated[classes]).sum(1).astype(np.int64)


def confusion_order(confusion: Counts) -> tuple[int, ...]:
    """The order of classes, head first, in which most confusions (i taken for j) run to an earlier, larger class.

    A dynamic programme over subsets, 2^C · C steps: ValueError beyond 15 classes.
    """
    classes = len(confusion)
    if classes > 15:
        raise ValueError(f"{classes} classes: 2^C subsets are too many")
    # into[i][subset] would be C · 2^C numbers; a subset's value needs only the sum of row i over its members.
    best = [-1] * (1 << classes)
    last = [-1] * (1 << classes)
    best[0] = 0
    table = confusion.tolist()
    for subset in range(1, 1 << classes):
        members = [number for number in range(classes) if subset >> number & 1]
        for number in members:
            before = subset ^ (1 << number)
            value = best[before] + sum(table[number][other] for other in members if other != number)
            if value > best[subset]:
                best[subset], last[subset] = value, number
    order: list[int] = []
    subset = (1 << classes) - 1
    while subset:
        order.append(last[subset])
        subset ^= 1 << last[subset]
    return tuple(reversed(order))
