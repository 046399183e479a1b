"""How a ranker is judged: AUC, LogLoss, grouped AUC, calibration, by length of history, with intervals over users.

Numpy alone. Scores are probabilities, labels 0 or 1; a figure that the data do not determine is None, never .5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolbox.stats import auc as pair_auc
from toolbox.stats import bootstrap_weights

_CLIP = 1e-7
_BINS = 10
LENGTHS = (0, 50, 200, 500, 1000, 4000)
"""Lower ends of the buckets of history length (events before the request, before truncation)."""


@dataclass(frozen=True)
class Scores:
    """Scored rows. ``user`` and ``group`` are whole numbers or None; ``length`` is -1 where it is not known."""

    label: np.ndarray
    score: np.ndarray
    user: np.ndarray | None = None
    group: np.ndarray | None = None
    length: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    def where(self, mask: np.ndarray) -> Scores:
        """Some of the rows."""
        parts = (self.user, self.group, self.length)
        return Scores(self.label[mask], self.score[mask], *(None if p is None else p[mask] for p in parts))


def log_losses(label: np.ndarray, score: np.ndarray) -> np.ndarray:
    """-(y ln p + (1 - y) ln(1 - p)) a row, p within [1e-7, 1 - 1e-7]; nats."""
    p = np.clip(score.astype(np.float64), _CLIP, 1 - _CLIP)
    return -np.where(label == 1, np.log(p), np.log1p(-p))


def auc(label: np.ndarray, score: np.ndarray) -> float | None:
    """Pooled AUC, ties ½; None with one class."""
    positive = label == 1
    if positive.all() or not positive.any():
        return None
    return pair_auc(score[positive], score[~positive])


@dataclass(frozen=True)
class GroupAuc:
    """AUC of each group that has both classes: ``of`` the groups' numbers, ``value``, ``rows`` of each.

    ``groups`` counts all groups, also those without both classes, which are in no mean.
    """

    of: np.ndarray
    value: np.ndarray
    rows: np.ndarray
    groups: int

    @property
    def gauc(self) -> float | None:
        """Σ n_g AUC_g / Σ n_g."""
        return float((self.rows * self.value).sum() / self.rows.sum()) if len(self.of) else None

    @property
    def avg_auc(self) -> float | None:
        """Σ AUC_g / groups with both classes."""
        return float(self.value.mean()) if len(self.of) else None


def group_auc(label: np.ndarray, score: np.ndarray, group: np.ndarray) -> GroupAuc:
    """AUC within groups by average ranks: (Σ ranks of positives - n₊(n₊+1)/2) / (n₊ n₋)."""
    order = np.lexsort((score, group))
    label, score, group = label[order].astype(np.int64), score[order], group[order]
    new_group = np.ones(len(group), bool)
    new_group[1:] = group[1:] != group[:-1]
    new_tie = new_group.copy()
    new_tie[1:] |= score[1:] != score[:-1]
    first = np.flatnonzero(new_group)
    number = np.cumsum(new_group) - 1
    tie_first = np.flatnonzero(new_tie)
    tie_size = np.diff(np.append(tie_first, len(group)))
    within = np.arange(len(group)) - first[number]
    rank = np.repeat(within[tie_first] + (tie_size + 1) / 2, tie_size)
    rows = np.bincount(number)
    positives = np.bincount(number, weights=label)
    negatives = rows - positives
    ranks = np.bincount(number, weights=rank * label)
    both = (positives > 0) & (negatives > 0)
    u = ranks[both] - positives[both] * (positives[both] + 1) / 2
    return GroupAuc(group[first][both], u / (positives[both] * negatives[both]), rows[both], len(rows))


def ece(label: np.ndarray, score: np.ndarray, bins: int = _BINS) -> float:
    """Expected calibration error over bins of equal mass: Σ_b n_b/n |mean p - mean y|."""
    order = np.argsort(score, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return float(sum(len(p) / len(order) * abs(score[p].mean() - label[p].mean()) for p in parts))


def measure(rows: Scores) -> dict[str, Any]:
    """The figures of some rows, without intervals."""
    found: dict[str, Any] = {
        "n": len(rows),
        "positives": int(rows.label.sum()),
        "auc": auc(rows.label, rows.score),
        "logloss": float(log_losses(rows.label, rows.score).mean()),
        "gauc": None,
        "avg_auc": None,
        "coverage": None,
    }
    if rows.group is not None:
        groups = group_auc(rows.label, rows.score, rows.group)
        found |= {"gauc": groups.gauc, "avg_auc": groups.avg_auc}
        found["coverage"] = {"rows": float(groups.rows.sum() / len(rows)), "groups": len(groups.of) / groups.groups}
    rate = float(rows.label.mean())
    found["calibration"] = float(rows.score.mean() / rate) if rate else None
    found["ece10"] = ece(rows.label, rows.score)
    return found


def by_length(rows: Scores) -> list[dict[str, Any]]:
    """``measure`` of each bucket of history length that has rows; empty where no length is known."""
    if rows.length is None:
        return []
    found = []
    for low, high in zip(LENGTHS, [*LENGTHS[1:], None], strict=True):
        inside = (rows.length >= low) & (rows.length < (high if high is not None else np.inf))
        if inside.any():
            part = measure(rows.where(inside))
            keys = ("n", "positives", "auc", "logloss", "gauc")
            found.append({"from": low, "below": high, **{key: part[key] for key in keys}})
    return found


class Resampler:
    """Figures under resampled users. A draw weighs each user's rows by how often the user was drawn.

    Rows are sorted once; a draw is then sums of weights in that order. Without users every row is one.
    """

    def __init__(self, rows: Scores) -> None:
        user = rows.user if rows.user is not None else np.arange(len(rows))
        self.users, self._user = np.unique(user, return_inverse=True)
        order = np.argsort(rows.score, kind="stable")
        score = rows.score[order]
        self._sorted_user = self._user[order]
        self._sorted_label = rows.label[order].astype(np.float64)
        ties = np.ones(len(score), bool)
        ties[1:] = score[1:] != score[:-1]
        self._ties = np.flatnonzero(ties)
        count = len(self.users)
        self._n = np.bincount(self._user, minlength=count).astype(np.float64)
        self._losses = self._sum(log_losses(rows.label, rows.score))
        self._p, self._y = self._sum(rows.score), self._sum(rows.label)
        self._gauc = self._weight = self._value = self._both = np.zeros(count)
        if rows.group is not None:
            groups = group_auc(rows.label, rows.score, rows.group)
            # A group lies within one user: its first row tells which.
            _, first = np.unique(rows.group, return_index=True)
            owner = self._user[first][np.searchsorted(rows.group[first], groups.of)]
            sums = [np.bincount(owner, weights=w, minlength=count) for w in (
                groups.rows * groups.value, groups.rows, groups.value, np.ones(len(owner)))]  # fmt: skip
            self._gauc, self._weight, self._value, self._both = sums

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self._user, weights=values, minlength=len(self.users))

    def figures(self, weight: np.ndarray) -> dict[str, float]:
        """Figures of one draw, ``weight`` (users,); NaN where a draw does not determine one."""
        rows = weight[self._sorted_user]
        positive = rows * self._sorted_label
        above = np.add.reduceat(positive, self._ties)
        below = np.add.reduceat(rows - positive, self._ties)
        total = above.sum() * below.sum()
        halves = np.cumsum(below) - below / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "auc": float((above * halves).sum() / total) if total else float("nan"),
                "logloss": float(weight @ self._losses / (weight @ self._n)),
                "gauc": float(np.divide(weight @ self._gauc, weight @ self._weight)),
                "avg_auc": float(np.divide(weight @ self._value, weight @ self._both)),
                "calibration": float(np.divide(weight @ self._p, weight @ self._y)),
            }


Figures = dict[str, list[float]]


def bootstrap(rows: Scores, draws: int, seed: int, other: Scores | None = None) -> tuple[Figures, Figures]:
    """Percentile 95 % intervals ``{figure: [low, high]}`` of ``rows``, and of paired differences to ``other``.

    Users are resampled with replacement, the same ones for both. A figure that no draw determines is left out; a
    single user determines nothing.
    """
    one = Resampler(rows)
    two = Resampler(other) if other is not None else None
    if len(one.users) < 2:
        return {}, {}
    mine: list[dict[str, float]] = []
    apart: list[dict[str, float]] = []
    for block in bootstrap_weights(len(one.users), draws, seed):
        for weight in block:
            mine.append(one.figures(weight))
            if two is not None:
                theirs = two.figures(weight)
                apart.append({name: mine[-1][name] - theirs[name] for name in theirs})
    return _percentiles(mine), _percentiles(apart)


def _percentiles(draws: list[dict[str, float]]) -> Figures:
    found: Figures = {}
    take: Callable[[str], np.ndarray] = lambda name: np.asarray([draw[name] for draw in draws])  # noqa: E731
    for name in draws[0] if draws else ():
        values = take(name)
        values = values[np.isfinite(values)]
        if len(values):
            found[name] = [float(end) for end in np.quantile(values, (0.025, 0.975))]
    return found
