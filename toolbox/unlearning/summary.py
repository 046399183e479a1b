"""What is reported of one model: means with intervals, model utility, forget quality, from its log alone.

Every figure is a function of a ``Log`` (and of the reference's), so that a model that was just evaluated and somebody
else's stored log go through the same formulas. What is not in the log is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from toolbox.unlearning.logs import SETS, Item, Log
from toolbox.unlearning.tofu import (
    VARIANTS,
    balance,
    chosen_probability,
    forget_quality,
    log_truth_ratio,
    model_utility,
    preference,
    probability,
)

UTILITY_SETS = ("retain", "authors", "facts")
PARAPHRASED = ("forget", "retain")
"""Sets whose extraction strength is also reported for the paraphrased question."""

DRAWS = 2000
"""Bootstrap draws of an interval."""

Means = dict[str, float | None]
Columns = dict[str, dict[str, list[float]]]


class TruthRatio(msgspec.Struct, kw_only=True):
    """Summed-up truth ratios: mean min(R, 1/R) of the forget set, mean max(0, 1 - R) of the others.

    ``variant`` says how the wrong answers' probabilities were averaged for the four numbers beside it (and for
    ``model_utility``); ``geometric`` are the same by geometric means.
    """

    variant: str
    forget: float | None
    retain: float | None
    authors: float | None
    facts: float | None
    geometric: Means


class Ks(msgspec.Struct, kw_only=True):
    """The test behind ``forget_quality``: distance ``d``, items of the model and of the reference, what was compared
    (``variant`` of the truth ratio) and how p was computed."""

    d: float
    n: int
    n_reference: int
    variant: str
    method: str
    reference: str


class Score(msgspec.Struct, kw_only=True):
    """One model's line. Means over the rows of a set, by set; None where the data for them are absent.

    ``intervals`` has, for each mean, the bounds of its 95 % bootstrap interval over rows and its own n.
    """

    model: str
    n: dict[str, int | None]
    template: str | None
    es: Means
    em: Means
    prob: Means
    rouge_l: Means
    truth_ratio: TruthRatio
    model_utility: float | None
    model_utility_geometric: float | None
    forget_quality: float | None
    ks: Ks | None
    intervals: dict[str, Any]
    uwc: dict[str, Any] | None = None
    relearn: dict[str, Any] | None = None
    quantized: dict[str, Any] | None = None
    membership: dict[str, Any] | None = None
    run: dict[str, Any] | None = None


def summarise(log: Log, reference: Log | None = None, *, variant: str = "arithmetic", seed: int = 0) -> Score:
    """The line of one model.

    ``variant`` is the truth ratio of ``model_utility``; forget quality takes the geometric one. ``reference`` is the
    log of a model that never saw the forget set; its items should be the same questions (``check_same_questions``).
    ``seed`` is that of the bootstrap.
    """
    columns = item_values(log, variant)
    means = {name: {key: _mean(values) for key, values in column.items()} for name, column in columns.items()}
    other = {"truth_ratio": means["truth_ratio_geometric"]}
    quality, test = _forget_quality(log, reference)
    return Score(
        model=log.model,
        n={name: len(log.sets[name]) if name in log.sets else None for name in SETS},
        template=log.template,
        es=means["es"],
        em=means["em"],
        prob=means["prob"],
        rouge_l=means["rouge_l"],
        truth_ratio=TruthRatio(variant=variant, **means["truth_ratio"], geometric=means["truth_ratio_geometric"]),
        model_utility=_utility(means),
        model_utility_geometric=_utility(means | other),
        forget_quality=quality,
        ks=test,
        intervals=_intervals(columns, seed),
        run=log.run,
    )


# -- the items' values ------------------------------------------------------------------------------------------------
def item_values(log: Log, variant: str = "arithmetic") -> Columns:
    """``{metric: {set: values}}`` of the items that have them; ``truth_ratio_geometric`` beside ``variant``'s.

    The values of the truth ratio are min(R, 1/R) in the forget set and max(0, 1 - R) elsewhere; the probability of
    authors and facts is that of the right answer among the wrong ones.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no truth ratio is called {variant}")
    found: Columns = {name: {} for name in ("es", "em", "prob", "rouge_l", "truth_ratio", "truth_ratio_geometric")}
    for name in SETS:
        items = log.sets.get(name, ())
        found["es"][name] = _present(item.es for item in items)
        if name in PARAPHRASED:
            found["es"][f"{name}_paraphrased"] = _present(item.es_paraphrased for item in items)
        found["em"][name] = _present(item.em for item in items)
        found["prob"][name] = _present(_probability(item, name) for item in items)
        found["rouge_l"][name] = _present(item.rouge_l for item in items)
        sum_up = balance if name == "forget" else preference
        for key, one in (("truth_ratio", variant), ("truth_ratio_geometric", "geometric")):
            found[key][name] = [sum_up(ratio) for ratio in log_ratios(items, one)]
    return found


def log_ratios(items: tuple[Item, ...], variant: str = "geometric") -> list[float]:
    """ln R of the items that have a truth ratio of this variant."""
    return _present(_log_ratio(item, variant) for item in items)


def _log_ratio(item: Item, variant: str) -> float | None:
    if item.paraphrase_loss is not None and item.perturbed_losses:
        return log_truth_ratio(item.paraphrase_loss, item.perturbed_losses, variant)
    if item.truth_ratio is not None and variant == "geometric":
        return math.log(item.truth_ratio) if item.truth_ratio > 0 else -math.inf
    return None


def _probability(item: Item, name: str) -> float | None:
    if item.loss is None:
        return None
    if name not in ("authors", "facts"):
        return probability(item.loss)
    return chosen_probability(item.loss, item.perturbed_losses) if item.perturbed_losses else None


def _present(values: Any) -> list[float]:
    return [value for value in values if value is not None]


# -- means and tests --------------------------------------------------------------------------------------------------
def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _utility(means: Mapping[str, Means]) -> float | None:
    parts = [means[metric][name] for metric in ("prob", "rouge_l", "truth_ratio") for name in UTILITY_SETS]
    return None if None in parts else model_utility(parts)  # type: ignore[arg-type]


def _forget_quality(log: Log, reference: Log | None) -> tuple[float | None, Ks | None]:
    if reference is None:
        return None, None
    ours, theirs = (log_ratios(one.sets.get("forget", ())) for one in (log, reference))
    if not ours or not theirs:
        return None, None
    test = forget_quality(ours, theirs)
    found = Ks(
        d=test.d, n=test.n_a, n_reference=test.n_b, variant="geometric", method=test.method, reference=reference.model
    )
    return test.p, found


# -- intervals --------------------------------------------------------------------------------------------------------
def _intervals(columns: Columns, seed: int) -> dict[str, Any]:
    from toolbox.stats import bootstrap_mean

    found: dict[str, Any] = {}
    for metric, column in columns.items():
        found[metric] = {}
        for key, values in column.items():
            interval = bootstrap_mean(values, draws=DRAWS, seed=seed) if values else None
            found[metric][key] = interval and _bounds(interval.low, interval.high, interval.n)
    for name, metric in (("model_utility", "truth_ratio"), ("model_utility_geometric", "truth_ratio_geometric")):
        found[name] = _utility_interval(columns, metric, seed)
    return found


def _bounds(low: float, high: float, n: int) -> dict[str, float | int | None]:
    """One row has no interval: None in JSON, not NaN."""
    return {"low": None if math.isnan(low) else low, "high": None if math.isnan(high) else high, "n": n}


def _utility_interval(columns: Columns, truth_ratio: str, seed: int) -> dict[str, Any] | None:
    """Percentile bootstrap of the harmonic mean: rows of each set are resampled, each with its three values."""
    import numpy as np

    from toolbox.stats import bootstrap_weights

    means, rows = [], 0
    for number, name in enumerate(UTILITY_SETS):
        three = [columns[metric][name] for metric in ("prob", "rouge_l", truth_ratio)]
        if not three[0] or len({len(values) for values in three}) > 1:
            return None
        rows += len(three[0])
        values = np.asarray(three, dtype=np.float64)
        # A stream of its own for each set: with a common one the draws of sets of one size would be the same.
        blocks = bootstrap_weights(values.shape[1], DRAWS, seed + (number << 64))
        means.append(np.concatenate([np.einsum("dg,kg->dk", block, values) for block in blocks]) / values.shape[1])
    with np.errstate(divide="ignore"):  # a mean of 0 makes the harmonic mean 0
        draws = 3 * len(UTILITY_SETS) / (1 / np.concatenate(means, axis=1)).sum(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return _bounds(float(low), float(high), rows)
