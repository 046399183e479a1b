"""Landscapes against loops over single numbers, written from the formulas: states, paths, tables, resampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest

from tests.landscape.twins import demo_features, random_features
from toolbox.landscape.features import Features
from toolbox.landscape.method import gaussian_density
from toolbox.landscape.metrics import path_metrics, state_metrics, tables
from toolbox.landscape.project import map_rows, project, question_groups

DRAWS = 50


class State:
    """One state, everything computed from its log-probabilities by itself."""

    def __init__(self, features: Features, row: int) -> None:
        self.path = int(features.path[row])
        self.question = int(features.question[self.path])
        self.n, self.i = int(features.n_steps[self.path]), int(features.step[row])
        k, gold = int(features.k[self.question]), int(features.gold[self.question])
        self.outcome = ("unknown", "wrong", "correct")[int(features.correct[self.path]) + 1]
        logprob = [float(value) for value in features.logprob[row, :k]]
        tokens = [int(value) for value in features.n_tokens[row, :k]]
        distances = [math.prod([math.exp(-lp / n)]) for lp, n in zip(logprob, tokens, strict=True)]
        self.f = [d / math.fsum(distances) for d in distances]
        self.choice = self.f.index(min(self.f))
        likelihoods = [1 / d for d in distances]
        thought = math.exp(-float(features.thought_logprob[row]) / int(features.thought_tokens[row]))
        self.values = {
            "uncertainty": -math.fsum(f * math.log(f) for f in self.f),
            "uncertainty_normalised": -math.fsum(f * math.log(f, k) for f in self.f),
            "uncertainty_likelihood": -math.fsum(
                p / math.fsum(likelihoods) * math.log(p / math.fsum(likelihoods)) for p in likelihoods
            ),
            "thought_perplexity": thought,
            "gold_share": self.f[gold] if gold >= 0 else None,
        }


def slow_states(features: Features) -> list[State]:
    states = [State(features, row) for row in range(len(features.path))]
    for state in states:
        end = next(other for other in states if other.path == state.path and other.i == other.n)
        agrees = float(state.choice == end.choice)
        state.values["consistency"] = agrees if state.i < state.n else None
        state.values["consistency_incl_last"] = agrees if state.n > 1 else None
    return states


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known else math.nan


KINDS: dict[str, Callable[[], Features]] = {
    "mixed k": lambda: random_features(11, k=(2, 5, 3, 5), paths=5),
    "one k": lambda: random_features(12, k=(4,) * 5, paths=6, longest=12),
    "no gold": lambda: random_features(13, k=(3, 3), gold=False),
    "empty paths": lambda: random_features(14, k=(4, 4, 4), shortest=0, longest=3),
    "gaps": lambda: random_features(15, k=(4, 3, 4, 4, 4, 4), gaps=True),
    "demo": demo_features,
}


@pytest.fixture(params=KINDS, scope="module")
def features(request) -> Features:
    return KINDS[request.param]()


def test_states_and_paths(features: Features):
    slow = slow_states(features)
    fast = state_metrics(features)
    for name, values in fast.items():
        expected = [math.nan if (value := state.values[name]) is None else value for state in slow]
        np.testing.assert_allclose(values, expected, rtol=1e-10, atol=1e-13, err_msg=name)
    paths = path_metrics(features)
    for number in range(len(features.path_ids)):
        mine = [state for state in slow if state.path == number]
        for name in fast:
            expected = mean([state.values[name] for state in mine])
            assert paths[name][number] == pytest.approx(expected, rel=1e-10, nan_ok=True), name
        assert paths["uncertainty_last"][number] == pytest.approx(
            mine[-1].values["uncertainty"] if mine else math.nan, rel=1e-10, nan_ok=True
        )
        rows = np.flatnonzero(features.path == number).tolist()
        tokens = sum(int(features.thought_tokens[row]) for row in rows)
        total = math.fsum(float(features.thought_logprob[row]) for row in rows)
        expected = math.exp(-total / tokens) if tokens else math.nan
        assert paths["path_perplexity"][number] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_tables_are_means_over_rows_that_questions_carry_along(features: Features):
    """Each draw copies the rows of the questions it picked and takes their mean."""
    slow = slow_states(features)
    paths = path_metrics(features)
    variants = features.facets["variant"]
    for cell in tables(features, by=["variant"], draws=DRAWS, seed=3):
        inside = [
            number
            for number in range(len(features.path_ids))
            if variants[number] == cell.facet["variant"] and features.k[features.question[number]] == cell.k
        ]
        questions = list(dict.fromkeys(int(features.question[number]) for number in inside))
        picks = np.random.Generator(np.random.PCG64(3)).integers(0, len(questions), size=(DRAWS, len(questions)))
        counted = 0
        for name, found in cell.metrics.items():
            rows: dict[int, list[float]] = {one: [] for one in questions}
            if cell.bin is None:
                for number in inside:
                    outcome = ("unknown", "wrong", "correct")[int(features.correct[number]) + 1]
                    if cell.outcome in ("all", outcome):
                        rows[int(features.question[number])].append(float(paths[name][number]))
            else:
                low, high = Fraction(cell.bin - 1, 5), Fraction(cell.bin, 5)
                for state in slow:
                    here = state.path in inside and low < Fraction(state.i, state.n) <= high
                    if here and cell.outcome in ("all", state.outcome):
                        value = state.values[name]
                        rows[state.question].append(math.nan if value is None else value)
            known = {one: [value for value in values if not math.isnan(value)] for one, values in rows.items()}
            pooled = [value for values in known.values() for value in values]
            counted = max(counted, sum(map(len, rows.values())))
            assert (found is None) == (not pooled)
            if found is None:
                continue
            assert found.n == len(pooled)
            assert found.estimate == pytest.approx(fmean(pooled), rel=1e-10)
            if sum(bool(values) for values in known.values()) < 2:
                assert math.isnan(found.low)
                continue
            drawn = [[value for pick in draw for value in known[questions[pick]]] for draw in picks]
            means = sorted(fmean(values) for values in drawn if values)
            assert (found.low, found.high) == pytest.approx(
                (percentile(means, 0.025), percentile(means, 0.975)), rel=1e-9
            )
        assert counted == (cell.paths if cell.bin is None else cell.states)


def percentile(values: list[float], share: float) -> float:
    """Linear between order statistics."""
    place = share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def test_a_pca_is_that_of_the_covariances_eigenvectors():
    features = random_features(2, k=(5, 5, 5))
    rows = map_rows(features, question_groups(features)[0])
    centred = rows.matrix - rows.matrix.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    landscape = project(rows, "pca")
    for axis in (0, 1):
        expected = centred @ vectors[:, -1 - axis]
        sign = np.sign(expected @ landscape.xy[:, axis])
        np.testing.assert_allclose(landscape.xy[:, axis], sign * expected, rtol=1e-9, atol=1e-12)
    assert landscape.explained == pytest.approx(values[-2:].sum() / values.sum())


def test_a_density_is_a_sum_of_bells():
    """In one direction the bells are as wide as a cell, in the other as Scott's rule says."""
    points = [(0.1, 2.0), (0.4, 2.0), (0.9, 2.0), (0.7, 2.0)]
    x, y = np.linspace(0, 1, 21), np.linspace(0, 4, 41)
    centre = fmean(one for one, _ in points)
    variance = sum((one - centre) ** 2 for one, _ in points) / 3 * 4 ** (-1 / 3)
    cell = 0.1**2
    found = gaussian_density(points, x, y)
    for row in range(0, 41, 5):
        for column in range(0, 21, 4):
            bells = [math.exp(-((x[column] - a) ** 2) / 2 / variance - (y[row] - b) ** 2 / 2 / cell) for a, b in points]
            expected = fmean(bells) / (math.tau * math.sqrt(variance * cell))
            assert found[row, column] == pytest.approx(expected, rel=1e-9, abs=1e-15)
