"""Tables of scores for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolbox.unlearning.logs import SETS
from toolbox.unlearning.summary import Score

_ROWS = (
    ("ES", "es", ""),
    ("ES, paraphrased", "es", "_paraphrased"),
    ("EM", "em", ""),
    ("P", "prob", ""),
    ("ROUGE-L recall", "rouge_l", ""),
    ("truth ratio, arith.", "truth_ratio", ""),
    ("truth ratio, geom.", "truth_ratio_geometric", ""),
)


def score_table(score: Score) -> Any:
    """One model: a row a metric, a column a set, each a mean with its 95 % bootstrap interval over rows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    here = [name for name in SETS if score.n[name] is not None]
    asked = f", template {score.template}" if score.template else ""
    table = Table()
    table.add_column("", no_wrap=True)
    for name in here:
        table.add_column(f"{name} ({score.n[name]})", justify="right")
    for label, metric, suffix in _ROWS:
        if metric == "truth_ratio" and score.truth_ratio.variant == "geometric":
            continue  # the next row says it
        cells = [_cell(score, metric, name + suffix) for name in here]
        if any(cells):
            table.add_row(label, *cells)
    title = f"{score.model}{asked} (mean [95 % interval] over rows)"
    return Group(Text(title), table, *(Text(line) for line in _whole(score)))


def compare_table(scores: Sequence[Score]) -> Any:
    """Several models: a row a model. Read it at equal retention only."""
    from rich.table import Table

    table = Table(title="mean [95 % interval] over rows", title_justify="left")
    table.add_column("model", overflow="fold")
    columns = {
        f"{label} {name}": [_cell(score, metric, name) for score in scores]
        for label, metric in (("ES", "es"), ("P", "prob"))
        for name in ("forget", "retain")
    }
    columns["utility"] = [_short(score.model_utility) for score in scores]
    columns["forget quality"] = [_p_value(score) for score in scores]
    shown = {label: cells for label, cells in columns.items() if any(cells)}
    for label in shown:
        table.add_column(label, justify="right")
    for model, *cells in zip(short_names(scores), *shown.values(), strict=True):
        table.add_row(model, *cells)
    return table


def short_names(scores: Sequence[Score]) -> list[str]:
    """The last parts of the models' names, as far as they tell the models apart."""
    models = [score.model for score in scores]
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(set(models)) else models


def survival(line: Mapping[str, Any]) -> dict[str, Any]:
    """ES on the forget rows by trial, as ``figures.draw_survival`` takes it, from a model's line."""
    from toolbox.stats import Interval

    def known(es: float, bounds: Mapping[str, Any]) -> Interval:
        low, high = (math.nan if bounds[name] is None else bounds[name] for name in ("low", "high"))
        return Interval(es, low, high, bounds["n"])

    found: dict[str, Any] = {}
    if line["es"].get("forget") is not None:
        found["as is"] = known(line["es"]["forget"], line["intervals"]["es"]["forget"])
    if uwc := line.get("uwc"):
        found["at equal retention"] = Interval(uwc["es_forget"], math.nan, math.nan, line["n"]["forget"])
    if (rounded := line.get("quantized")) and rounded["es"].get("forget") is not None:
        found[rounded["kind"]] = known(rounded["es"]["forget"], rounded["intervals"]["es"]["forget"])
    if again := line.get("relearn"):
        for when, label in (("before", "others, before relearning"), ("after", "others, relearned")):
            low, high = (math.nan if bound is None else bound for bound in again[when]["es_interval"])
            found[label] = Interval(again[when]["es"], low, high, again["n"])
    return found


def _whole(score: Score) -> list[str]:
    """Model utility and forget quality in words, as far as they are there."""
    parts = []
    if score.model_utility is not None:
        interval = _interval(score.model_utility, score.intervals["model_utility"])
        geometric = _short(score.model_utility_geometric)
        parts.append(f"model utility {interval} ({score.truth_ratio.variant}; geometric {geometric})")
    if score.ks is not None:
        parts.append(
            f"forget quality p = {score.forget_quality:.3g} against {Path(score.ks.reference).name} "
            f"(KS D {score.ks.d:.3f}, n {score.ks.n} and {score.ks.n_reference})"
        )
    if (uwc := score.uwc) is not None:
        parts.append(
            f"at equal retention (a = {uwc['a']:.2f} of {Path(uwc['original']).name} mixed in, ES retain "
            f"{uwc['es_retain']:.3f}): ES forget {uwc['es_forget']:.3f}"
        )
    if (rounded := score.quantized) is not None:
        es, prob = rounded["es"], rounded["prob"]
        told = (f"{label} {_short(kept.get(name)) or '-'}" for label, kept, name in (
            ("ES forget", es, "forget"), ("P forget", prob, "forget"), ("ES retain", es, "retain")
        ))  # fmt: skip
        parts.append(f"{rounded['kind']}: {', '.join(told)}")
    if (again := score.relearn) is not None:
        parts.append(
            f"relearning {again['rows']} forget rows ({again['steps']} steps): ES of the other {again['n']} "
            f"{again['before']['es']:.3f} -> {again['after']['es']:.3f}"
        )
    if (member := score.membership) is not None:
        told = (f"{name} {value:.3f}" for name, value in member["auc"].items())
        parts.append(f"membership AUC: {', '.join(told)} (n {member['n']['members']} and {member['n']['non_members']})")
    return parts


def _cell(score: Score, metric: str, key: str) -> str:
    """A mean with its interval: ``.97 [.93, 1.00]``; empty where there is none."""
    if metric == "truth_ratio_geometric":
        mean = score.truth_ratio.geometric.get(key)
    elif metric == "truth_ratio":
        mean = getattr(score.truth_ratio, key, None)
    else:
        mean = getattr(score, metric).get(key)
    return "" if mean is None else _interval(mean, score.intervals[metric][key])


def _interval(mean: float, bounds: Mapping[str, Any] | None) -> str:
    from toolbox.stats import Interval

    if bounds is None:
        return _short(mean)
    low, high = (math.nan if bound is None else bound for bound in (bounds["low"], bounds["high"]))
    return str(Interval(mean, low, high, bounds["n"]))


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _p_value(score: Score) -> str:
    return "" if score.forget_quality is None else f"{score.forget_quality:.2g}"
