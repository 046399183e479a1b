"""Figures equal scikit-learn's and plain loops; intervals cover; nothing is invented where a class is missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from toolbox.longer.metrics import Scores, auc, bootstrap, by_length, ece, group_auc, log_losses, measure


def rows(n: int = 400, users: int = 12, seed: int = 0) -> Scores:
    draw = np.random.default_rng(seed)
    user = draw.integers(0, users, n)
    score = np.round(draw.random(n), 2)  # ties
    label = (draw.random(n) < 0.2 + 0.6 * score).astype(np.int8)
    label[user == 0] = 1  # a user of one class
    return Scores(label, score, user, user, draw.integers(0, 6000, n))


def test_auc_and_logloss_equal_scikit_learn():
    from sklearn.metrics import log_loss, roc_auc_score

    one = rows()
    assert auc(one.label, one.score) == pytest.approx(roc_auc_score(one.label, one.score), abs=1e-12)
    clipped = np.clip(one.score, 1e-7, 1 - 1e-7)
    assert log_losses(one.label, one.score).mean() == pytest.approx(log_loss(one.label, clipped), abs=1e-9)


def test_grouped_auc_equals_a_plain_loop_and_leaves_one_class_users_out():
    one = rows()
    weighted = total = plain = counted = 0.0
    for user in range(12):
        mine = one.user == user
        positive, negative = one.score[mine & (one.label == 1)], one.score[mine & (one.label == 0)]
        if not len(positive) or not len(negative):
            continue
        pairs = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
        value = pairs / (len(positive) * len(negative))
        weighted, total, plain, counted = weighted + mine.sum() * value, total + mine.sum(), plain + value, counted + 1
    found = group_auc(one.label, one.score, one.user)
    assert found.gauc == pytest.approx(weighted / total, abs=1e-12)
    assert found.avg_auc == pytest.approx(plain / counted, abs=1e-12)
    assert (len(found.of), found.groups) == (counted, 12)
    assert 0 not in found.of
    assert measure(one)["coverage"] == {"rows": total / 400, "groups": counted / 12}


def test_figures_that_the_data_do_not_determine_are_none():
    ones = Scores(np.ones(3, np.int8), np.asarray([0.1, 0.2, 0.3]), np.arange(3), np.arange(3))
    found = measure(ones)
    assert (found["auc"], found["gauc"], found["avg_auc"]) == (None, None, None)
    zeros = Scores(np.zeros(3, np.int8), np.asarray([0.0, 0.2, 1.0]))
    assert measure(zeros)["calibration"] is None
    assert measure(zeros)["logloss"] == pytest.approx((0 - math.log(0.8) - math.log(1e-7)) / 3, abs=1e-6)


def test_calibration_error_by_hand():
    label = np.asarray([0, 0, 1, 1])
    assert ece(label, np.asarray([0.0, 0.5, 0.5, 1.0]), bins=2) == pytest.approx(0.5 * 0.25 + 0.5 * 0.25)
    assert ece(label, label.astype(float)) == 0


def test_buckets_of_history_length_are_half_open_and_hold_all_rows():
    one = rows()
    parts = by_length(one)
    assert sum(part["n"] for part in parts) == 400
    for part in parts:
        inside = (one.length >= part["from"]) & (one.length < (part["below"] or np.inf))
        assert part["auc"] == auc(one.label[inside], one.score[inside])
    edge = Scores(one.label[:2], one.score[:2], length=np.asarray([49, 50]))
    assert [part["from"] for part in by_length(edge)] == [0, 50]


def test_a_draw_equals_the_figures_of_repeated_rows():
    from toolbox.longer.metrics import Resampler

    one = rows(120, 5)
    weight = np.asarray([2, 0, 1, 1, 1], float)
    found = Resampler(one).figures(weight)
    place = np.concatenate([np.flatnonzero(one.user == user) for user in (0, 0, 2, 3, 4)])
    copy = np.concatenate([np.full((one.user == user).sum(), n) for n, user in enumerate((0, 0, 2, 3, 4))])
    whole = measure(Scores(one.label[place], one.score[place], copy, copy))
    for name in ("auc", "logloss", "gauc", "avg_auc", "calibration"):
        assert found[name] == pytest.approx(whole[name], abs=1e-9), name


def test_intervals_cover_and_paired_ones_are_narrow():
    covered = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        user = np.repeat(np.arange(60), 8)
        label = draw.integers(0, 2, 480)
        score = 1 / (1 + np.exp(-(draw.normal(size=480) + label)))  # AUC Φ(1/√2) = .7602
        low, high = bootstrap(Scores(label, score, user, user), 120, seed)[0]["auc"]
        covered += low <= 0.76025 <= high
    assert covered >= 33
    one = rows()
    other = Scores(one.label, np.clip(one.score + 0.001, 0, 1), one.user, one.group)
    mine, apart = bootstrap(one, 100, 0, other)
    assert apart["auc"][1] - apart["auc"][0] < 0.2 * (mine["auc"][1] - mine["auc"][0])
    assert bootstrap(one, 50, 3) == bootstrap(one, 50, 3)
    assert bootstrap(Scores(one.label, one.score, np.zeros(400, int)), 10, 0) == ({}, {})  # one user tells nothing


def test_groups_of_requests_are_resampled_with_their_users():
    draw = np.random.default_rng(1)
    user = np.repeat(np.arange(20), 10)
    one = Scores(draw.integers(0, 2, 200), draw.random(200), user, np.repeat(np.arange(40), 5))
    low, high = bootstrap(one, 100, 0)[0]["gauc"]
    assert low < measure(one)["gauc"] < high
