"""Figures as ratios of sums over rows, with intervals over images; and of two sets of predictions, in pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolbox.stats import bootstrap_weights


@dataclass(frozen=True)
class Ratio:
    """Σ over / Σ under over rows, each with the ``image`` it belongs to."""

    over: Sequence[float]
    under: Sequence[float]
    images: Sequence[str]

    @property
    def value(self) -> float | None:
        """None over nothing."""
        total = math.fsum(self.under)
        return math.fsum(self.over) / total if total else None


def interval(one: Ratio, *, draws: int, seed: int, other: Ratio | None = None) -> list[float | None]:
    """The 95 % percentile bootstrap interval of a ratio, or of its difference from another's on the same rows.

    Whole images are drawn with replacement, the same ones for both. [None, None] where the data tell none.
    """
    names = sorted(set(one.images))
    if len(names) < 2:
        return [None, None]
    sums = [_by_image(part, one.images, names) for part in (one.over, one.under)]
    others = None if other is None else [_by_image(part, other.images, names) for part in (other.over, other.under)]
    found = []
    for weights in bootstrap_weights(len(names), draws, seed):
        drawn = _drawn(weights, sums)
        found.append(drawn if others is None else drawn - _drawn(weights, others))
    return _middle(np.concatenate(found))


def _middle(values: np.ndarray) -> list[float | None]:
    """The middle 95 % of what was drawn."""
    values = values[np.isfinite(values)]
    if not len(values):
        return [None, None]
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


Sides = tuple[Ratio, Ratio]
"""A ratio over held-out rows, and over rows that were learned from."""


def gap(sides: Sides) -> float | None:
    """The first less the second."""
    one, other = (side.value for side in sides)
    return None if one is None or other is None else one - other


def gap_interval(mine: Sides, *, draws: int, seed: int, theirs: Sides | None = None) -> list[float | None]:
    """The 95 % percentile bootstrap interval of a gap, or of its difference from another's on the same rows.

    Images of either side are drawn apart, the same ones for both gaps. [None, None] where the data tell none.
    """
    found = []
    for place, ratio in enumerate(mine):
        names = sorted(set(ratio.images))
        if len(names) < 2:
            return [None, None]
        compared = [ratio] if theirs is None else [ratio, theirs[place]]
        sums = [[_by_image(part, one.images, names) for part in (one.over, one.under)] for one in compared]
        drawn = [
            [_drawn(weights, one) for one in sums] for weights in bootstrap_weights(len(names), draws, 2 * seed + place)
        ]
        values = [np.concatenate(each) for each in zip(*drawn, strict=True)]
        found.append(values[0] if theirs is None else values[0] - values[1])
    return _middle(found[0] - found[1])


def _by_image(values: Sequence[float], images: Sequence[str], names: Sequence[str]) -> np.ndarray:
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros(len(names))
    np.add.at(sums, [place[image] for image in images], values)
    return sums


def _drawn(weights: np.ndarray, sums: Sequence[np.ndarray]) -> np.ndarray:
    over, under = (np.einsum("dg,g->d", weights, part) for part in sums)
    return np.divide(over, under, out=np.full(len(over), np.nan), where=under > 0)


def line(name: str, one: Ratio, *, draws: int, seed: int, other: Ratio | None = None, **more: Any) -> dict[str, Any]:
    """One line of lit-eval; with ``other`` the difference from it too."""
    found: dict[str, Any] = {
        "metric": name, "value": one.value, "n": len(one.over), "images": len(set(one.images)),
        "ci": interval(one, draws=draws, seed=seed), **more,
    }  # fmt: skip
    if other is not None:
        there = other.value
        gap = None if one.value is None or there is None else one.value - there
        found["compare"] = {"value": there, "difference": gap,
                            "ci": interval(one, draws=draws, seed=seed, other=other)}  # fmt: skip
    return found
