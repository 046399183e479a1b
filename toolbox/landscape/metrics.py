"""How paths behave, in numbers: metrics of states and paths, and tables by facet, outcome and stage of progress.

Every figure has a 95 % interval from a bootstrap over questions, since paths of one question are not independent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.landscape import method
from toolbox.landscape.features import Features
from toolbox.landscape.method import Floats, Integers
from toolbox.shell.errors import UsageProblem
from toolbox.stats import Interval, bootstrap_weights

STATE_METRICS = (
    "consistency",
    "uncertainty",
    "uncertainty_normalised",
    "uncertainty_likelihood",
    "thought_perplexity",
    "gold_share",
)
"""Reported for each stage of progress, as means over its states."""

PATH_METRICS = (
    "consistency",
    "consistency_incl_last",
    "uncertainty",
    "uncertainty_last",
    "uncertainty_normalised",
    "uncertainty_likelihood",
    "thought_perplexity",
    "path_perplexity",
    "gold_share",
    "correct",
)
"""Reported in total, as means over paths; ``correct`` is the accuracy."""

OUTCOMES = ("wrong", "correct", "all")
"""Outcome 0, outcome 1, and every path, also those of questions without a right answer."""

Facet = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table: the states of one stage (``bin`` from 1) or, with ``bin`` None, whole paths.

    ``progress``: the ends of the stage, None for whole paths and for the released code's stages, which are not stages
    of progress. ``metrics``: name to mean and interval over states (in a stage) or over paths, None where there is
    nothing to take a mean of; bounds are NaN where fewer than two questions have a value.
    """

    k: int
    facet: Facet
    outcome: str
    bin: int | None
    progress: tuple[float, float] | None
    states: int
    paths: int
    questions: int
    metrics: Mapping[str, Interval | None]

    def as_record(self) -> dict[str, Any]:
        """The JSON object; an undefined metric and an undefined bound are None."""
        return {
            "event": "bin",
            "k": self.k,
            "facet": dict(self.facet),
            "outcome": self.outcome,
            "bin": self.bin,
            "progress": self.progress and list(self.progress),
            "states": self.states,
            "paths": self.paths,
            "questions": self.questions,
            "metrics": {name: found and found.as_record() for name, found in self.metrics.items()},
        }


# --- states and paths -------------------------------------------------------------------------------------------------


def state_metrics(features: Features) -> dict[str, Floats]:
    """Name to (M,) values, NaN where undefined: ``STATE_METRICS`` and ``consistency_incl_last``.

    ``consistency`` is undefined for the last state of a path, which agrees with itself by definition, and both are for
    paths of one thought. ``gold_share`` is f_{i,gold}, undefined without a right answer. Units: ``toolbox.landscape
    .method``.
    """
    points = method.l1_features(features.distance)
    agrees = method.consistency(method.nearest(points), features.last).astype(np.float64)
    n_steps, gold = features.n_steps[features.path], features.gold.astype(np.int64)[features.state_question]
    share = np.take_along_axis(points, np.maximum(gold, 0)[:, None], axis=1)[:, 0]
    return {
        "consistency": np.where(features.step == n_steps, np.nan, agrees),
        "consistency_incl_last": np.where(n_steps == 1, np.nan, agrees),
        "uncertainty": method.uncertainty(points),
        "uncertainty_normalised": method.uncertainty_normalised(points),
        "uncertainty_likelihood": method.uncertainty_likelihood(features.distance),
        "thought_perplexity": method.perplexity(features.thought_logprob, features.thought_tokens),
        "gold_share": np.where(gold < 0, np.nan, share),
    }


def path_metrics(features: Features) -> dict[str, Floats]:
    """Name to (P,) values, NaN where undefined: means over each path's states, and ``uncertainty_last`` (of its last
    state), ``path_perplexity``, ``correct`` (1, 0, NaN where the right answer is not known)."""
    n_paths = len(features.path_ids)
    states = state_metrics(features)
    result = {name: method.path_means(values, features.path, n_paths) for name, values in states.items()}
    is_last = features.step == features.n_steps[features.path]
    result["uncertainty_last"] = np.full(n_paths, np.nan)
    result["uncertainty_last"][features.path[is_last]] = states["uncertainty"][is_last]
    result["path_perplexity"] = method.path_perplexity(
        features.thought_logprob, features.thought_tokens, features.path, n_paths
    )
    result["correct"] = np.where(features.correct < 0, np.nan, features.correct)
    return {name: result[name] for name in PATH_METRICS}


def path_records(features: Features) -> list[dict[str, Any]]:
    """A JSON object a path: ids, n, the indices of the answer given and the right one (None where there is none), and
    the path's metrics, None where undefined."""
    metrics = path_metrics(features)
    known = {0: False, 1: True}
    records = []
    for number, path_id in enumerate(features.path_ids):
        question, pred = int(features.question[number]), int(features.pred[number])
        gold = int(features.gold[question])
        values = {name: float(column[number]) for name, column in metrics.items() if name != "correct"}
        records.append(
            {
                "path_id": path_id,
                "id": features.question_ids[question],
                "n": int(features.n_steps[number]),
                "pred": pred if pred >= 0 else None,
                "gold": gold if gold >= 0 else None,
                "correct": known.get(int(features.correct[number])),
                **{name: None if math.isnan(value) else value for name, value in values.items()},
            }
        )
    return records


# --- facets and stages ------------------------------------------------------------------------------------------------


def facet_masks(features: Features, by: Sequence[str] = ()) -> list[tuple[dict[str, str | None], NDArray[np.bool_]]]:
    """The combinations of values of the facets ``by`` in order of appearance, each with its (P,) paths; all in one
    without ``by``. UsageProblem (2): a facet that no path has."""
    for name in by:
        if all(value is None for value in features.facets.get(name, ())):
            there = [facet for facet, values in features.facets.items() if any(value is not None for value in values)]
            raise UsageProblem(f"--by {name}: no path has one", f"there are: {', '.join(there) or 'none'}")
    if not by:
        return [({}, np.ones(len(features.path_ids), dtype=bool))]
    rows = list(zip(*(features.facets[name] for name in by), strict=True))
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    of = np.array([numbers[row] for row in rows])
    return [(dict(zip(by, row, strict=True)), of == number) for row, number in numbers.items()]


def facet_name(facet: Facet) -> str:
    """``cot``, or ``cot, aqua`` for several; empty without facets."""
    return ", ".join("none" if value is None else value for value in facet.values())


def stages(features: Features, paths: NDArray[np.bool_], bins: int = 5, compat: bool = False) -> Integers:
    """(M,) the stage of progress of each state of ``paths``, 1..bins, 0 for all others.

    With ``compat`` as the released code cuts, apart for the wrong and the correct of ``paths``, and paths of one
    thought are dropped (0).
    """
    result = np.zeros(len(features.path), dtype=np.int64)
    n_steps = features.n_steps[features.path]
    mine = paths[features.path]
    if not compat:
        result[mine] = method.progress_bins(features.step[mine], n_steps[mine], bins)
        return result
    outcome = features.correct[features.path]
    for value in np.unique(outcome[mine]):
        rows = mine & (outcome == value)
        result[rows] = method.reference_bins(features.step[rows], n_steps[rows], bins)
    return result


def panel_counts(features: Features, paths: NDArray[np.bool_], bins: int = 5, compat: bool = False) -> Integers:
    """(2, bins) states of the wrong and of the correct ``paths`` in each stage."""
    stage, outcome = stages(features, paths, bins, compat), features.correct[features.path]
    return np.stack([np.bincount(stage[outcome == value], minlength=bins + 1)[1:] for value in (0, 1)])


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(
    features: Features,
    *,
    by: Sequence[str] = (),
    bins: int = 5,
    compat: bool = False,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Cell]:
    """k × facet × outcome × stage, and whole paths after the stages of each outcome.

    Questions of different k are never mixed: entropies and shares of different k do not compare. Without right answers
    there is the outcome ``all`` alone. Every facet resamples its own questions with the same seed, so facets of the
    same questions are resampled alike. Accuracy is in the paths' line of ``all``.
    """
    of_path = features.k[features.question]
    state_values = _columns(state_metrics(features), STATE_METRICS)
    path_values = _columns(path_metrics(features), PATH_METRICS)
    cells: list[Cell] = []
    for k in np.unique(of_path):
        for facet, members in facet_masks(features, by):
            paths = members & (of_path == k)
            if paths.any():
                stage = stages(features, paths, bins, compat)
                units = _units(features, paths, stage, state_values, path_values)
                ends = [None if compat else ((stage - 1) / bins, stage / bins) for stage in range(1, bins + 1)]
                cells += _facet_cells(int(k), facet, ends, units, (draws, seed, level))
    return cells


def _columns(values: Mapping[str, Floats], names: Sequence[str]) -> Floats:
    return np.stack([values[name] for name in names], axis=1)


@dataclass(frozen=True, eq=False, slots=True)
class _Units:
    """What means are taken over: U rows of (U, V) ``values``, with question, path, outcome and stage of each."""

    values: Floats
    question: Integers
    path: Integers
    outcome: Integers
    stage: Integers


def _units(
    features: Features, paths: NDArray[np.bool_], stage: Integers, state_values: Floats, path_values: Floats
) -> tuple[_Units, _Units]:
    """The states that have a stage, and the paths; questions numbered in order of appearance among ``paths``."""
    number = np.flatnonzero(paths)
    _, first, of = np.unique(features.question[number], return_index=True, return_inverse=True)
    question = np.full(len(paths), -1)
    question[number] = np.argsort(np.argsort(first))[of]
    rows = np.flatnonzero(stage > 0)
    at, outcome = features.path[rows].astype(np.int64), features.correct.astype(np.int64)
    states = _Units(state_values[rows], question[at], at, outcome[at], stage[rows])
    whole = _Units(path_values[number], question[number], number, outcome[number], np.ones(len(number), dtype=np.int64))
    return states, whole


def _facet_cells(
    k: int,
    facet: Facet,
    ends: Sequence[tuple[float, float] | None],
    units: tuple[_Units, _Units],
    resampling: tuple[int, int, float],
) -> list[Cell]:
    states, whole = units
    kinds = [(states, stage, STATE_METRICS) for stage in range(1, len(ends) + 1)] + [(whole, None, PATH_METRICS)]
    outcomes = OUTCOMES if np.any(whole.outcome >= 0) else ("all",)
    n_questions = int(whole.question.max()) + 1
    # One column of sums and counts a figure, so that all figures share one resampling.
    chosen, sums, counts = [], [], []
    for outcome in outcomes:
        for kind, stage, _ in kinds:
            here = (kind.stage == (stage or 1)) & ((outcome == "all") | (kind.outcome == OUTCOMES.index(outcome)))
            chosen.append(np.flatnonzero(here))
            totals = _by_question(kind.values[here], kind.question[here], n_questions)
            sums.append(totals[0])
            counts.append(totals[1])
    found = iter(_intervals(np.concatenate(sums, axis=1), np.concatenate(counts, axis=1), *resampling))
    cells = []
    for rows, (outcome, (kind, stage, names)) in zip(chosen, itertools.product(outcomes, kinds), strict=True):
        metrics = {name: next(found) for name in names}
        if outcome != "all":
            metrics.pop("correct", None)  # 0 or 1 by definition
        n_paths, n_asked = len(np.unique(kind.path[rows])), len(np.unique(kind.question[rows]))
        n_states = len(rows) if stage else int(np.isin(states.path, kind.path[rows]).sum())
        progress = ends[stage - 1] if stage else None
        cells.append(Cell(k, facet, outcome, stage, progress, n_states, n_paths, n_asked, metrics))
    return cells


def _by_question(values: Floats, question: Integers, n_questions: int) -> tuple[Floats, Floats]:
    """(G, V) sums and counts of the values that are not NaN, question by question."""
    sums, counts = np.zeros((n_questions, values.shape[1])), np.zeros((n_questions, values.shape[1]))
    np.add.at(sums, question, np.nan_to_num(values))
    np.add.at(counts, question, ~np.isnan(values))
    return sums, counts


def _intervals(sums: Floats, counts: Floats, draws: int, seed: int, level: float) -> list[Interval | None]:
    """Percentile intervals of the C ratios Σ_g S_g / Σ_g N_g from (G, C) sums and counts of the G questions.

    As ``toolbox.stats.bootstrap_mean`` with clusters, for all columns in the same draws of questions. A draw in which
    no question has a value for a column says nothing about that column and is left out of its quantiles.
    """
    n = counts.sum(axis=0)
    draws_of: list[Floats] = []
    for weights in bootstrap_weights(len(sums), draws, seed):
        # einsum without BLAS, as in toolbox.stats: the same bytes for any number of threads.
        drawn = np.einsum("dg,gc->dc", weights, counts)
        draws_of.append(np.einsum("dg,gc->dc", weights, sums) / np.where(drawn > 0, drawn, np.nan))
    ratios = np.concatenate(draws_of)
    result: list[Interval | None] = []
    for column, total in enumerate(n):
        if total == 0:
            result.append(None)
            continue
        known = ratios[:, column][~np.isnan(ratios[:, column])]
        low = high = math.nan
        if np.count_nonzero(counts[:, column]) > 1:
            low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]).tolist()
        result.append(Interval(float(sums[:, column].sum() / total), low, high, int(total), level))
    return result
