"""What linear and non-linear readers find in hidden states, before and after erasure, on rows they were not fitted on.

Three disjoint parts: the eraser is fitted on the first, fresh readers on the second (erased), and they are judged on
the third (erased). An eraser and a reader fitted on the same rows say nothing: after LEACE a linear one reads chance
there by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolbox.coca.erase import Eraser, Moments, distortion, inlp, leace, mean_difference, projected_off
from toolbox.stats import auc

C = 0.05
"""Inverse strength of the logistic reader's penalty, on standardised states."""
UNTIL = 0.55
"""INLP counts directions until a linear reader is at most this good."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts; ``kind`` is disjoint, in-sample (the first two are the same), or transfer."""

    eraser: Rows
    probe: Rows
    score: Rows
    kind: str


def _cut(rows: Rows, labels: Rows, shares: Sequence[float], seed: int) -> list[Rows]:
    """``rows`` in parts of these shares, each class apart, so that every part has the classes in proportion."""
    draw = np.random.Generator(np.random.PCG64(seed))
    parts: list[list[Rows]] = [[] for _ in shares]
    edges = np.cumsum(shares)[:-1]
    for name in np.unique(labels[rows]):
        members = draw.permutation(rows[labels[rows] == name])
        for part, some in zip(parts, np.split(members, np.rint(edges * len(members)).astype(int)), strict=True):
            part.append(some)
    return [np.sort(np.concatenate(part)) for part in parts]


def make_split(
    labels: Rows, seed: int, parts: int = 3, groups: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
) -> Split:
    """A seeded split. ``parts`` 3: 60, 20 and 20 per cent; 2: eraser and reader share 80 per cent.

    ``groups`` (rows to fit on, rows to test on): the eraser is fitted on 60 per cent of the first, readers on one half
    of the second and judged on the other.
    """
    everything = np.arange(len(labels))
    if groups is not None:
        fitted, _ = _cut(everything[groups[0]], labels, (0.6, 0.4), seed)
        probe, score = _cut(everything[groups[1]], labels, (0.5, 0.5), seed)
        return Split(fitted, probe, score, "transfer")
    if parts == 2:
        both, score = _cut(everything, labels, (0.8, 0.2), seed)
        return Split(both, both, score, "in-sample")
    return Split(*_cut(everything, labels, (0.6, 0.2, 0.2), seed), "disjoint")


# -- readers ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reading:
    """How well one reader does: accuracy, and area under the ROC curve of two classes (NaN for more)."""

    acc: float
    auc: float


def _standard(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    spread = rows.std(axis=0)
    return rows.mean(axis=0), np.where(spread > 0, spread, 1.0)


def _logistic(x: NDArray[np.float64], y: Rows) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
    """A fitted logistic reader of standardised rows, and the mean and spread they were standardised with."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = _standard(x)
    return LogisticRegression(C=C, max_iter=2000).fit((x - mean) / spread, y), mean, spread


def read_linear(fit: tuple[Tensor, Rows], test: tuple[Tensor, Rows]) -> Reading:
    """Logistic regression on standardised states, C = .05."""
    model, mean, spread = _logistic(fit[0].double().numpy(), fit[1])
    return _judge(model, (test[0].double().numpy() - mean) / spread, test[1])


def read_rbf(fit: tuple[Tensor, Rows], test: tuple[Tensor, Rows]) -> Reading:
    """A support-vector machine with a Gaussian kernel on standardised states (C 1, gamma 1/(d · variance))."""
    from sklearn.svm import SVC

    rows = fit[0].double().numpy()
    mean, spread = _standard(rows)
    model = SVC(kernel="rbf", C=1.0, gamma="scale").fit((rows - mean) / spread, fit[1])
    return _judge(model, (test[0].double().numpy() - mean) / spread, test[1])


def _judge(model: Any, x: NDArray[np.float64], y: Rows) -> Reading:
    right = float((model.predict(x) == y).mean())
    if len(model.classes_) != 2:
        return Reading(right, math.nan)
    values, positive = model.decision_function(x), y == model.classes_[1]
    return Reading(right, auc(values[positive], values[~positive]))


# -- erasers ----------------------------------------------------------------------------------------------------------
Fitted = tuple[Eraser, int | None]
"""An eraser, and for INLP how many directions it took (None: more than it was allowed)."""


def fit_eraser(
    name: str, x: Tensor, labels: Rows, fit: Rows, held_out: Rows, *, classes: int, shrinkage: bool
) -> Fitted:
    """The eraser ``name`` from the rows ``fit`` of ``x`` (n, d); INLP judges its readers on ``held_out``."""
    rows, z = x[torch.from_numpy(fit)].double(), torch.from_numpy(labels[fit])
    if name == "none":
        eraser = projected_off([], rows.mean(0))
        return eraser, eraser.rank
    if name == "inlp":
        return _inlp(rows, x[torch.from_numpy(held_out)].double(), labels[fit], labels[held_out])
    moments = Moments(x.shape[1], classes).update(rows, z)
    eraser = leace(moments, shrinkage=shrinkage) if name == "leace" else mean_difference(moments)
    return eraser, eraser.rank


def _inlp(rows: Tensor, held_out: Tensor, labels: Rows, held_labels: Rows) -> Fitted:
    mean = rows.mean(0)
    directions: list[Tensor] = []

    def reader(erased: Tensor) -> tuple[Tensor, float]:
        model, centre, spread = _logistic(erased.numpy(), labels)
        test = projected_off(directions, mean)(held_out).numpy()
        weights = torch.from_numpy(model.coef_ / spread)  # of the states as they are, not standardised
        directions.extend(weights)
        return weights, float((model.predict((test - centre) / spread) == held_labels).mean())

    return inlp(rows, mean, reader, until=UNTIL)


@dataclass
class Figures:
    """What was found for one layer and eraser, a value a split."""

    linear: list[Reading] = field(default_factory=list)
    rbf: list[Reading] = field(default_factory=list)
    carried: list[float] = field(default_factory=list)
    distortion: list[float] = field(default_factory=list)
    rank: list[int | None] = field(default_factory=list)

    def add(self, x: Tensor, labels: Rows, split: Split, fitted: Fitted, on_fit: Rows | None) -> None:
        """Read one split with one eraser; ``on_fit``: rows of the groups to fit on, for a reader carried over."""
        eraser, rank = fitted
        parts = [(eraser(x[torch.from_numpy(rows)].double()), labels[rows]) for rows in (split.probe, split.score)]
        self.linear.append(read_linear(*parts))
        self.rbf.append(read_rbf(*parts))
        if on_fit is not None:
            source = eraser(x[torch.from_numpy(on_fit)].double()), labels[on_fit]
            self.carried.append(read_linear(source, parts[1]).acc)
        self.distortion.append(distortion(eraser, x[torch.from_numpy(split.score)]))
        self.rank.append(rank)

    def summary(self) -> dict[str, Any]:
        """Means and standard deviations over the splits."""
        found: dict[str, Any] = {}
        for name, values in (
            ("linear_acc", [one.acc for one in self.linear]), ("linear_auc", [one.auc for one in self.linear]),
            ("rbf_acc", [one.acc for one in self.rbf]), ("rbf_auc", [one.auc for one in self.rbf]),
            ("gap", [two.acc - one.acc for one, two in zip(self.linear, self.rbf, strict=True)]),
            ("distortion", self.distortion), ("carried_acc", self.carried),
        ):  # fmt: skip
            if values:
                found[name], found[f"{name}_sd"] = _mean(values), _deviation(values)
        known = [rank for rank in self.rank if rank is not None]
        found["rank"] = _mean([float(rank) for rank in known]) if known else None
        found["rank_unreached"] = len(self.rank) - len(known)
        return found


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values))
    return digits(mean) if math.isfinite(mean) else None


def _deviation(values: Sequence[float]) -> float | None:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return digits(spread) if math.isfinite(spread) else None


def digits(value: float) -> float:
    """Six significant digits: what is behind them depends on the number of threads."""
    return float(f"{value:.6g}")


def read_layer(
    x: Tensor,
    labels: Rows,
    splits: Sequence[Split],
    erasers: Sequence[str],
    *,
    classes: int,
    shrinkage: bool,
    on_fit: NDArray[np.bool_] | None = None,
) -> dict[str, dict[str, Any]]:
    """All figures of one layer's states ``x`` (n, d), by eraser. ``on_fit`` marks the rows of the groups to fit on."""
    found = {name: Figures() for name in erasers}
    for split in splits:
        rest = None if on_fit is None else np.setdiff1d(np.flatnonzero(on_fit), split.eraser)
        held_out = split.probe if rest is None else rest
        for name, figures in found.items():
            fitted = fit_eraser(name, x, labels, split.eraser, held_out, classes=classes, shrinkage=shrinkage)
            figures.add(x, labels, split, fitted, rest)
    return {name: figures.summary() for name, figures in found.items()}
