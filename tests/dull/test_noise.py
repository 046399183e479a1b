"""Plans of tail-to-head noise: exact counts, never to a class of equal or smaller size, the published-style tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from toolbox.dull.noise import (
    by_size,
    cifar_asymmetric,
    confusion_order,
    draw_exact,
    draw_independent,
    exact_plan,
    flip_rates,
    largest_remainder,
    long_tail,
    pairs,
    profile_weights,
    tail_to_head,
    uniform,
)
from toolbox.shell.errors import BadData

TABLE = [
    (0.1, "rank", 0.2, [0, 0.08, 0.15, 0.23, 0.31, 0.39, 0.46, 0.54, 0.62, 0.69],
     [6606, 4584, 3161, 2163, 1466, 981, 645, 415, 258, 153]),
    (0.1, "rank", 0.4, [0, 0.18, 0.35, 0.53, 0.70, 0.88, 0.9, 0.9, 0.9, 0.9],
     [8353, 5264, 3196, 1830, 943, 381, 208, 127, 79, 50]),
    (0.1, "flat", 0.2, [0] + [0.26] * 9, [7233, 3781, 2660, 1939, 1441, 1084, 821, 626, 478, 368]),
    (0.01, "flat", 0.2, [0] + [0.34] * 9, [6790, 2464, 1342, 765, 445, 263, 156, 93, 55, 33]),
]  # fmt: skip
"""Imbalance, profile, rate: p_i and observed counts for 5000 images in the head of 10 classes, computed apart."""


@pytest.mark.parametrize(("imbalance", "profile", "rate", "flips", "observed"), TABLE)
def test_the_table_is_reproduced_and_the_realised_matrix_is_the_plan(imbalance, profile, rate, flips, observed):
    counts = long_tail(5000, imbalance, 10)
    rates = flip_rates(counts, rate, profile, min_clean=0)
    assert rates == pytest.approx(flips, abs=0.006)
    plan = exact_plan(counts, tail_to_head(counts, rates))
    assert np.abs(plan.observed - observed).max() <= 1
    assert abs(int(plan.flips.sum()) - round(rate * counts.sum())) <= 10
    assert plan.flips[0] == 0
    assert not np.tril(plan.moved.T, -1).any(), "nothing moves to a class of equal or smaller size"
    classes = np.repeat(np.arange(10), counts)
    labels = draw_exact(plan, classes, np.random.default_rng(3))
    realised = np.zeros((10, 10), dtype=int)
    np.add.at(realised, (classes, labels), 1)
    assert (realised == plan.moved).all()
    assert (draw_exact(plan, classes, np.random.default_rng(3)) == labels).all()
    assert (draw_exact(plan, classes, np.random.default_rng(4)) != labels).any()


@pytest.mark.parametrize(("imbalance", "cap"), [(0.1, 0.68), (0.01, 0.54)])
def test_an_infeasible_rate_is_refused_with_the_cap(imbalance, cap):
    counts = long_tail(5000, imbalance, 10)
    share = 0.9 * (1 - counts[0] / counts.sum())
    assert share == pytest.approx(cap, abs=0.006)
    with pytest.raises(BadData, match=rf"the cap is {np.floor(share * 1000) / 1000:g}"):
        flip_rates(counts, cap + 0.02, "rank", min_clean=0)
    assert flip_rates(counts, share - 1e-9, "flat", min_clean=0)[1:] == pytest.approx([0.9] * 9, abs=1e-6)


def test_every_class_keeps_a_few_clean_images():
    counts = np.array([100, 40, 12, 6, 3])
    plan = exact_plan(counts, tail_to_head(counts, flip_rates(counts, 0.2, "rank", min_clean=5)))
    assert (np.diag(plan.moved) >= np.minimum(counts, 5)).all()
    assert plan.flips[-1] == 0


def test_equal_classes_neither_give_to_nor_take_from_one_another():
    counts = np.array([50, 50, 20, 20, 20])
    for profile in ("rank", "log", "flat"):
        plan = exact_plan(counts, tail_to_head(counts, flip_rates(counts, 0.1, profile)))
        assert not plan.moved[2:, 2:][~np.eye(3, dtype=bool)].any()
        assert not plan.moved[:2, :2][~np.eye(2, dtype=bool)].any()
    assert profile_weights(np.array([8, 4, 2]), "log") == pytest.approx([0, 0.5, 1])


def test_power_sends_the_noise_to_the_largest():
    counts = np.array([100, 50, 10])
    flips = np.array([0, 0, 0.6])
    assert tail_to_head(counts, flips)[2] == pytest.approx([0.4, 0.2, 0.4])
    assert tail_to_head(counts, flips, 0.0)[2] == pytest.approx([0.3, 0.3, 0.4])
    assert tail_to_head(counts, flips, 2.0)[2] == pytest.approx([0.48, 0.12, 0.4])


def test_largest_remainder_against_the_definition():
    draw = np.random.default_rng(0)
    for _ in range(200):
        weights = draw.random(draw.integers(1, 6))
        total = int(draw.integers(0, 40))
        shares = largest_remainder(total, weights)
        quota = total * weights / weights.sum()
        assert shares.sum() == total
        assert (shares >= np.floor(quota) - 1e-9).all()
        assert (shares <= np.floor(quota) + 1).all()
        up, down = quota[shares > np.floor(quota)] % 1, quota[shares == np.floor(quota)] % 1
        assert not (len(up) and len(down)) or up.min() >= down.max() - 1e-9
    assert not largest_remainder(3, np.zeros(2)).any()


@pytest.mark.parametrize("name", ["uniform", "own", "pair", "imb", "asym"])
def test_other_noise_is_within_three_sigma_of_its_matrix_and_exact_where_asked(name):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    counts = long_tail(3000, 0.1, 10)
    rates = {
        "uniform": uniform(10, 0.4),
        "own": uniform(10, 0.4, own=True),
        "pair": pairs(10, 0.4, range(10)),
        "imb": by_size(counts, 0.4),
        "asym": cifar_asymmetric(names, 0.4),
    }[name]
    assert rates.sum(1) == pytest.approx(1)
    away = 1 - np.diag(rates)
    assert away.max() == pytest.approx(0.36 if name == "own" else 0.4)
    classes = np.repeat(np.arange(10), counts)
    realised = np.zeros((10, 10))
    np.add.at(realised, (classes, draw_independent(rates, classes, np.random.default_rng(1))), 1)
    sigma = np.sqrt(rates * (1 - rates) * counts[:, None])
    assert (np.abs(realised - rates * counts[:, None]) <= 4 * sigma + 1e-9).all()
    assert (np.abs(realised - rates * counts[:, None]) <= 3 * sigma + 1e-9).mean() > 0.97
    assert (np.abs(exact_plan(counts, rates).moved - rates * counts[:, None]) < 1.5).all()


def test_pairs_follow_the_natural_order_whatever_the_sizes():
    matrix = pairs(3, 0.3, [2, 0, 1])
    assert matrix == pytest.approx(np.array([[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]))


def test_the_order_by_confusion_is_the_best_of_all_orders():
    draw = np.random.default_rng(5)
    table = draw.integers(0, 50, (6, 6))

    def value(order):
        return sum(table[i, j] for place, i in enumerate(order) for j in order[:place])

    assert value(confusion_order(table)) == max(map(value, itertools.permutations(range(6))))
    with pytest.raises(ValueError, match="too many"):
        confusion_order(np.zeros((16, 16), dtype=int))
