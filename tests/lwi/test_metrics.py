"""Averages and forgetting against hand-written loops; intervals against a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from toolbox.lwi.metrics import averages, forgetting, macro_interval, mean_forgetting, overlap, weighted_averages

TABLE = {0: [0.9], 1: [0.6, 0.8], 2: [0.7, 0.5, 0.85], 3: [0.3, 0.55, 0.6, 1.0]}
CLASSES = [5, 3, 2, 2]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], [2]])
def test_the_figures_equal_hand_written_loops(rows):
    table = {t: TABLE[t] for t in rows}
    for t in rows:
        plain = weighted = 0.0
        lost = []
        for u in range(t + 1):
            plain += TABLE[t][u]
            weighted += CLASSES[u] * TABLE[t][u]
            best = None
            for s in rows:
                if s < t and u <= s and (best is None or TABLE[s][u] > best):
                    best = TABLE[s][u]
            told = forgetting(table)[t][u]
            assert told == (None if best is None else pytest.approx(best - TABLE[t][u]))
            if best is not None:
                lost.append(best - TABLE[t][u])
        assert averages(table)[t] == pytest.approx(plain / (t + 1))
        assert weighted_averages(table, CLASSES)[t] == pytest.approx(weighted / sum(CLASSES[: t + 1]))
        assert mean_forgetting(table)[t] == (pytest.approx(sum(lost) / len(lost)) if lost else None)


def test_intervals_are_those_of_resampling_images_within_each_task():
    random = np.random.default_rng(1)
    groups = [random.integers(-1, 2, size) for size in (40, 90)]
    found = macro_interval(groups, draws=4000, seed=2)
    assert found.estimate == pytest.approx(np.mean([values.mean() for values in groups]))
    drawn = [np.mean([random.choice(values, len(values)).mean() for values in groups]) for _ in range(4000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.012)
    assert macro_interval(groups, draws=9, seed=2) == macro_interval(groups, draws=9, seed=2)


def test_overlap_is_one_for_the_same_use_and_zero_for_none_in_common():
    one = np.array([1.0, 0.0, 2.0])
    assert overlap(one, one) == 1
    assert overlap(one, np.array([0.0, 3.0, 0.0])) == 0
    assert overlap(one, np.array([2.0, 0.0, 1.0])) == pytest.approx(2 / 4)
    assert overlap(np.zeros(2), np.zeros(2)) is None
