"""One variant against another on the same items: paired differences, tests, and the WinoControl gain.

Items are paired by id; those that only one side has are counted and left out. Whole groups are resampled and flipped,
since items that share a sentence or a template are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from toolbox.lot.lines import CELLS, Comparison, Difference, Gain, Pearson, Row
from toolbox.lot.metrics import Column, Resampling, accuracy_column, by_cell, known, mean_tokens
from toolbox.stats import holm, mcnemar_exact, paired_bootstrap, sign_flip

FLIPS = 10_000


def paired(ours: Column, base: Column) -> tuple[Column, Column]:
    """Both columns on the items that both have, in the order of ``ours``; clusters are those of ``ours``."""
    there = {name: place for place, name in enumerate(base.ids)}
    first = ours.only([name in there for name in ours.ids])
    places = [there[name] for name in first.ids]
    second = Column(first.ids, first.clusters, base.values[places], base.whole, base.grouped)
    return first, second


def difference(ours: Column, base: Column, how: Resampling) -> Difference | None:
    """The mean difference over paired items; None without any."""
    first, second = paired(ours, base)
    if not first.ids:
        return None
    found = paired_bootstrap(first.values, second.values, clusters=first.clusters, draws=how.draws, seed=how.seed)
    return Difference(
        estimate=found.estimate,
        low=known(found.low),
        high=known(found.high),
        n=found.n,
        groups=len(set(first.clusters)),
    )


def compare(
    ours: Column, base: Column, how: Resampling, *, by: dict[str, Any], metric: str, variant: str, baseline: str
) -> Comparison:
    """Difference and p of two columns.

    p is McNemar's exact one on the discordant items where every group has one item and each item one answer a side;
    else that of a sign-flip permutation over groups (exact up to 12 groups that differ, 10,000 draws beyond).
    """
    first, second = paired(ours, base)
    n = len(first.ids)
    deltas = first.values - second.values
    better, worse = int((deltas > 0).sum()), int((deltas < 0).sum())
    test: Literal["mcnemar", "sign-flip"] | None = None
    p = None
    if n and first.whole and second.whole and len(set(first.clusters)) == n:
        test, p = "mcnemar", mcnemar_exact(better, worse)
    elif n:
        test, p = "sign-flip", sign_flip(deltas, first.clusters, FLIPS, how.seed)
    return Comparison(
        by=by,
        metric=metric,
        variant=variant,
        baseline=baseline,
        difference=difference(ours, base, how),
        better=better,
        worse=worse,
        test=test,
        p=p,
        unpaired={"variant": len(ours.ids) - n, "baseline": len(base.ids) - n},
    )


def correct(family: Sequence[Comparison]) -> None:
    """Put Holm-corrected p values into the comparisons of one facet and metric, over those that have a p."""
    tested = [one for one in family if one.p is not None]
    for one, p in zip(tested, holm([one.p for one in tested if one.p is not None]), strict=True):
        one.p_holm, one.family = p, len(tested)


def grid_gain(ours: Sequence[Row], base: Sequence[Row], how: Resampling) -> dict[str, Gain]:
    """The gain of each WinoControl cell that both sides have."""
    sides = by_cell(ours), by_cell(base)
    found = {}
    for cell in sides[0].keys() & sides[1].keys():
        columns = [accuracy_column(side[cell]) for side in sides]
        tokens = [mean_tokens(side[cell]) for side in sides]
        found[cell] = Gain(accuracy=difference(*columns, how), extra_tokens=extra(*tokens))
    return {cell: found[cell] for cell in CELLS if cell in found}


def extra(tokens: float | None, base: float | None) -> float | None:
    """How many tokens more; None where one side tells none."""
    return None if tokens is None or base is None else tokens - base


def token_cost(gains: Mapping[str, Gain]) -> Pearson | None:
    """Pearson's r between a cell's mean extra completion tokens and its gain: do longer answers explain the gain?

    None for fewer than three cells with both, and where either does not vary.

    Source: Liu et al. 2025, arXiv 2505.12896, WinoControl.
    """
    both = [
        (gain.extra_tokens, gain.accuracy.estimate)
        for gain in gains.values()
        if gain.extra_tokens is not None and gain.accuracy is not None
    ]
    if len(both) < 3 or any(len(set(side)) == 1 for side in zip(*both, strict=True)):
        return None
    from scipy.stats import pearsonr

    tokens, gained = np.asarray(both).T
    found = pearsonr(tokens, gained)
    r, p = float(found.statistic), float(found.pvalue)
    return None if math.isnan(r) else Pearson(r=r, p=p, n=len(both))
