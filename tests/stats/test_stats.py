"""Intervals and tests against closed forms, slow loops, published numbers and the invariances they must have."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from toolbox import stats
from toolbox.stats import (
    Interval,
    auc,
    bootstrap_mean,
    bootstrap_weights,
    holm,
    ks,
    mcnemar_exact,
    paired_bootstrap,
    sign_flip,
    wilson,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


# --- Interval ---


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.97, 0.93, 1.0, 40), ".97 [.93, 1.00]"),
        (Interval(0.9712, 0.9688, 0.9741, 40), ".971 [.969, .974]"),
        (Interval(0.0, 0.0, 0.3244, 8), ".00 [.00, .32]"),
        (Interval(-0.05, -0.1, -0.0001, 8), "-.05 [-.10, .00]"),
        (Interval(-0.5, -1.25, 0.25, 8), "-.5 [-1.2, .2]"),
        (Interval(1234.4, 1200.2, 1270.1, 8), "1234 [1200, 1270]"),
        (Interval(12.5, 12.5, 12.5, 3), "12.50 [12.50, 12.50]"),
        (Interval(0.5, math.nan, math.nan, 1), ".50 [n/a]"),
    ],
)
def test_interval_prints_for_a_table(interval: Interval, text: str) -> None:
    assert str(interval) == text


def test_a_printed_interval_never_shows_digits_finer_than_a_fiftieth_of_its_width() -> None:
    for width in np.logspace(-5, 4, 60):
        printed = str(Interval(5 * width, 5 * width - width / 2, 5 * width + width / 2, 9))
        low, high = (float(part) for part in printed.split("[")[1].rstrip("]").split(","))
        assert high - low == pytest.approx(width, rel=0.2)
        decimals = len(printed.split(" ")[0].partition(".")[2])
        assert 10.0**-decimals >= width / 50 or decimals <= 2


def test_an_interval_without_bounds_is_null_in_a_record() -> None:
    record = bootstrap_mean([0.5]).as_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "estimate": 0.5,
        "low": None,
        "high": None,
        "n": 1,
        "level": 0.95,
    }
    assert wilson(3, 4).as_record()["low"] == wilson(3, 4).low


# --- Wilson ---


def test_wilson_equals_scipys() -> None:
    from scipy.stats import binomtest

    for successes, n, level in itertools.product((0, 1, 3, 8), (8, 40, 1000), (0.9, 0.95, 0.99)):
        interval = wilson(successes, n, level)
        reference = binomtest(successes, n).proportion_ci(level, method="wilson")
        assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-12)
        assert (interval.estimate, interval.n, interval.level) == (successes / n, n, level)


def test_wilson_bounds_solve_the_score_equation() -> None:
    for successes, n in ((1, 7), (58, 64), (199, 200)):
        interval = wilson(successes, n)
        for bound in (interval.low, interval.high):
            z = (successes / n - bound) / math.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.959964, abs=1e-6)


def test_wilson_swaps_sides_with_success_and_failure() -> None:
    for successes in range(12):
        here, there = wilson(successes, 11), wilson(11 - successes, 11)
        assert (here.low, here.high) == pytest.approx((1 - there.high, 1 - there.low), abs=1e-15)
    assert wilson(0, 11).low == 0.0
    assert wilson(11, 11).high == 1.0


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (2.5, 5), (1, -1), (1, 5, 1.0)])
def test_wilson_refuses_counts_that_are_none(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"wilson|level"):
        wilson(*arguments)


# --- bootstrap ---


def test_weights_are_multinomial_counts() -> None:
    weights = np.concatenate(list(bootstrap_weights(7, 20_000, seed=3)))
    assert weights.shape == (20_000, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.03)
    # Multinomial(7; 1/7): variance 7·(1/7)·(6/7), covariance -7/49.
    covariance = np.cov(weights.T)
    assert np.diag(covariance) == pytest.approx(np.full(7, 6 / 7), abs=0.05)
    assert covariance[~np.eye(7, dtype=bool)] == pytest.approx(np.full(42, -1 / 7), abs=0.03)


def test_the_bootstrap_equals_a_loop_over_draws() -> None:
    """The same picks, drawn one resample at a time and averaged row by row."""
    values = rng(1).normal(size=60)
    labels = rng(2).integers(0, 9, size=60)
    groups = list(dict.fromkeys(labels.tolist()))
    generator, means = rng(5), []
    for _ in range(300):
        rows: list[float] = []
        for group in generator.integers(0, len(groups), size=len(groups)):
            rows.extend(values[labels == groups[group]].tolist())
        means.append(math.fsum(rows) / len(rows))
    interval = bootstrap_mean(values, clusters=labels, draws=300, seed=5)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    assert interval.estimate == pytest.approx(math.fsum(values) / 60)
    assert interval.n == 60


def test_clusters_of_one_row_are_the_row_bootstrap() -> None:
    values = rng(1).random(37)
    rows = bootstrap_mean(values, seed=4)
    for labels in (range(37), [f"id-{position * 7 % 37}" for position in range(37)], rng(8).permutation(37)):
        assert bootstrap_mean(values, clusters=labels, seed=4) == rows


def test_the_names_of_clusters_do_not_matter_and_rows_of_a_cluster_need_not_be_neighbours() -> None:
    values = rng(1).normal(size=30)
    labels = np.arange(30) % 6
    numbered = bootstrap_mean(values, clusters=labels)
    assert bootstrap_mean(values, clusters=[("q", int(label)) for label in labels]) == numbered
    sorted_by_cluster = np.argsort(labels, kind="stable")
    again = bootstrap_mean(values[sorted_by_cluster], clusters=labels[sorted_by_cluster])
    assert (again.low, again.high) == pytest.approx((numbered.low, numbered.high), abs=1e-12)


def test_the_seed_decides_every_bit_and_the_block_size_none(monkeypatch: pytest.MonkeyPatch) -> None:
    values = rng(1).normal(size=50)
    first = bootstrap_mean(values, seed=7)
    flips = sign_flip(values, seed=7)
    assert bootstrap_mean(values, seed=7) == first
    assert bootstrap_mean(values, seed=8) != first
    for cells in (1, 777, 1 << 22):
        monkeypatch.setattr(stats, "_BLOCK_CELLS", cells)
        assert bootstrap_mean(values, seed=7) == first
        assert sign_flip(values, seed=7) == flips


def test_the_bootstrap_moves_and_scales_with_the_values() -> None:
    values = rng(1).normal(size=40)
    base, moved = bootstrap_mean(values), bootstrap_mean(3 * values + 10)
    assert (moved.low, moved.high) == pytest.approx((3 * base.low + 10, 3 * base.high + 10), rel=1e-12)


def test_the_bootstrap_of_a_normal_mean_has_the_textbook_width() -> None:
    values = rng(1).normal(size=2000)
    interval = bootstrap_mean(values, draws=4000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.05)


def test_copies_in_a_cluster_add_no_information() -> None:
    """Every row ten times over: rows pretend to know √10 more, clusters do not."""
    values = rng(1).normal(size=50)
    tenfold, labels = np.repeat(values, 10), np.repeat(np.arange(50), 10)
    honest = bootstrap_mean(values)
    clustered, naive = bootstrap_mean(tenfold, clusters=labels), bootstrap_mean(tenfold)
    assert (clustered.low, clustered.high) == pytest.approx((honest.low, honest.high), abs=1e-12)
    assert (naive.high - naive.low) == pytest.approx((honest.high - honest.low) / math.sqrt(10), rel=0.1)


def test_unequal_clusters_cover_the_mean_as_often_as_they_say() -> None:
    """400 data sets of 60 unequal clusters with a shared offset; rows alone cover far too rarely."""
    generator, covered, naive = rng(11), 0, 0
    for seed in range(400):
        sizes = generator.integers(1, 9, size=60)
        labels = np.repeat(np.arange(60), sizes)
        values = generator.normal(size=60)[labels] + 0.3 * generator.normal(size=len(labels))
        interval = bootstrap_mean(values, clusters=labels, draws=400, seed=seed)
        covered += interval.low <= 0 <= interval.high
        rows = bootstrap_mean(values, draws=200, seed=seed)
        naive += rows.low <= 0 <= rows.high
    assert 0.90 <= covered / 400 <= 0.98
    assert naive / 400 < 0.8


def test_one_group_determines_no_interval() -> None:
    for interval in (bootstrap_mean([0.4]), bootstrap_mean([0.2, 0.6], clusters=["a", "a"])):
        assert interval.estimate == pytest.approx(0.4)
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_paired_bootstrap_is_the_bootstrap_of_differences_and_narrower_than_unpaired() -> None:
    difficulty = rng(1).normal(size=100)
    a, b = difficulty + 0.1 * rng(2).normal(size=100) + 0.2, difficulty + 0.1 * rng(3).normal(size=100)
    paired = paired_bootstrap(a, b)
    assert paired == bootstrap_mean(a - b)
    assert paired.low > 0
    assert bootstrap_mean(a).low < bootstrap_mean(b).high  # what separate intervals cannot tell apart
    swapped = paired_bootstrap(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-paired.high, -paired.low), abs=1e-12)
    with pytest.raises(ValueError, match="equal lengths"):
        paired_bootstrap([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("values", "options", "what"),
    [
        ([], {}, "values is empty"),
        ([1.0, math.nan], {}, "NaN or infinity at position 1"),
        ([math.inf, 1.0], {}, "position 0"),
        ([[1.0, 2.0]], {}, "one row"),
        ([1.0, 2.0], {"clusters": ["a"]}, "1 cluster labels for 2 values"),
        ([1.0, 2.0], {"clusters": ["a", None]}, "position 1 is missing"),
        ([1.0, 2.0], {"clusters": [math.nan, 1.0]}, "position 0 is missing"),
        ([1.0, 2.0], {"draws": 0}, "at least one"),
        ([1.0, 2.0], {"level": 95}, "level"),
    ],
)
def test_the_bootstrap_refuses(values: list, options: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        bootstrap_mean(values, **options)


# --- paired tests ---


def test_mcnemar_is_twice_the_binomial_tail() -> None:
    for b, c in ((0, 5), (3, 9), (20, 11), (7, 7), (1, 0)):
        tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
        exact = min(Fraction(1), Fraction(2 * tail, 2 ** (b + c)))
        assert mcnemar_exact(b, c) == pytest.approx(float(exact), rel=1e-12)
        assert mcnemar_exact(b, c) == mcnemar_exact(c, b)
    assert mcnemar_exact(0, 0) == 1.0
    with pytest.raises(ValueError, match="counts"):
        mcnemar_exact(-1, 3)


def test_sign_flip_enumerates_few_groups_exactly() -> None:
    differences = rng(1).normal(0.4, 1, size=9)
    observed = abs(differences.sum())
    reached = sum(
        abs(math.fsum(sign * value for sign, value in zip(signs, differences, strict=True))) >= observed - 1e-9
        for signs in itertools.product((1, -1), repeat=9)
    )
    assert sign_flip(differences) == reached / 2**9
    assert sign_flip(differences, seed=5, draws=3) == reached / 2**9


def test_sign_flip_counts_ties_that_rounding_hides() -> None:
    """.1 + .2 + .3 and .3 + .2 + .1 differ in the last bit; all eight values share one sign, so p = 2/2^8."""
    assert sign_flip([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.7, 1e-3]) == 2 / 2**8
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0


def test_sign_flip_of_equal_differences_is_the_sign_test() -> None:
    differences = [1.0] * 14 + [-1.0] * 5
    p = sign_flip(differences, draws=50_000)
    assert p == pytest.approx(mcnemar_exact(14, 5), abs=0.004)
    flipped = sign_flip([-value for value in differences], draws=50_000)
    assert flipped == pytest.approx(p, abs=0.004)


def test_sign_flip_moves_clusters_as_one() -> None:
    sums = np.array([2.0, -0.5, 1.5, 1.0, 0.25])
    parts = np.repeat(sums / 4, 4)
    assert sign_flip(parts, clusters=np.repeat(np.arange(5), 4)) == sign_flip(sums)
    # Groups that sum to nothing add nothing.
    assert sign_flip([*sums, 1.0, -1.0], clusters=[0, 1, 2, 3, 4, "z", "z"]) == sign_flip(sums)
    # Nor do they end the exact enumeration, however many they are.
    assert sign_flip([*sums, *[0.0] * 20]) == sign_flip(sums)


def test_sign_flip_p_is_never_zero_and_is_right_under_the_null() -> None:
    assert sign_flip(np.ones(40), draws=99) == 0.01
    assert sign_flip(np.zeros(5)) == 1.0
    generator = rng(3)
    ps = np.array([sign_flip(generator.normal(size=20), draws=199, seed=seed) for seed in range(400)])
    assert (ps <= 0.1).mean() == pytest.approx(0.1, abs=0.045)
    assert (ps <= 0.5).mean() == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="differences is empty"):
        sign_flip([])
    with pytest.raises(ValueError, match="draw"):
        sign_flip([1.0], draws=0)


# --- Holm ---


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_rule_rejects() -> None:
    generator = rng(2)
    for _ in range(200):
        p = generator.random(6) ** 3
        alpha = generator.random() * 0.3
        rejected = set()
        for rank, position in enumerate(np.argsort(p)):
            if p[position] * (6 - rank) > alpha:
                break
            rejected.add(int(position))
        assert {position for position, value in enumerate(holm(p)) if value <= alpha} == rejected


def test_holm_does_not_depend_on_the_order() -> None:
    p = [0.2, 0.01, 0.01, 0.04, 0.5]
    adjusted = holm(p)
    for order in itertools.permutations(range(5)):
        assert holm([p[position] for position in order]) == [adjusted[position] for position in order]


@pytest.mark.parametrize("p", [[0.1, math.nan], [1.1], [-0.1]])
def test_holm_refuses_what_is_no_probability(p: list) -> None:
    with pytest.raises(ValueError, match="within"):
        holm(p)


# --- AUC ---


def test_auc_equals_the_count_over_all_pairs() -> None:
    generator = rng(4)
    for n_positive, n_negative, levels in ((1, 1, 2), (5, 40, 3), (60, 33, 10), (80, 80, 10**9)):
        positives, negatives = generator.integers(0, levels, n_positive), generator.integers(0, levels, n_negative)
        wins = sum((p > q) + 0.5 * (p == q) for p in positives.tolist() for q in negatives.tolist())
        assert auc(positives, negatives) == wins / (n_positive * n_negative)


def test_auc_is_the_mann_whitney_statistic() -> None:
    from scipy.stats import mannwhitneyu

    positives, negatives = rng(1).normal(0.5, 1, 300).round(1), rng(2).normal(size=200).round(1)
    assert auc(positives, negatives) == pytest.approx(mannwhitneyu(positives, negatives).statistic / 60_000, rel=1e-14)


def test_auc_sees_the_order_only() -> None:
    positives, negatives = rng(1).normal(0.5, 1, 50).round(1), rng(2).normal(size=70).round(1)
    area = auc(positives, negatives)
    assert auc(np.exp(positives), np.exp(negatives)) == area
    assert auc(positives**3, negatives**3) == area
    assert auc(-positives, -negatives) == pytest.approx(1 - area, abs=1e-15)
    assert auc(negatives, positives) == pytest.approx(1 - area, abs=1e-15)
    assert auc([2, 3], [0, 1]) == 1.0
    assert auc([1, 1], [1, 1, 1]) == 0.5
    assert auc([-math.inf, 0], [-math.inf, -1]) == 0.625
    with pytest.raises(ValueError, match="negatives is empty"):
        auc([1.0], [])
    with pytest.raises(ValueError, match="positives holds NaN at position 1"):
        auc([1.0, math.nan], [1.0])


# --- Kolmogorov-Smirnov ---


def equal_size_p(distance_times_n: int, n: int) -> float:
    """P(D ≥ h/n) for two samples of n: 2·Σ_k (-1)^(k+1)·C(2n, n - kh)/C(2n, n), in whole numbers (reflection)."""
    total = sum(
        (-1) ** (k + 1) * math.comb(2 * n, n - k * distance_times_n) for k in range(1, n // distance_times_n + 1)
    )
    return float(Fraction(2 * total, math.comb(2 * n, n)))


def shifted(n: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Two samples of n distinct values whose distribution functions are ``steps``/n apart at most."""
    grid = np.arange(n, dtype=float)
    return grid, grid + steps - 0.5


@pytest.mark.parametrize(
    ("steps", "distance", "p"),
    [
        # TOFU's committed logs, fine-tuned model against retain90, the first 300 rows of forget10:
        (119, 0.396667, 1.834066e-21),  # Llama-2-7B
        (104, 0.346667, 2.194274e-16),  # Phi-1.5
    ],
)
def test_ks_gives_tofus_published_p(steps: int, distance: float, p: float) -> None:
    result = ks(*shifted(300, steps))
    assert result.d == pytest.approx(distance, abs=1e-6)
    assert result.p == pytest.approx(p, rel=1e-6)
    assert (result.n_a, result.n_b, result.method) == (300, 300, "exact")


@pytest.mark.parametrize(("n", "steps"), [(4, 2), (40, 5), (40, 17), (300, 40), (400, 119)])
def test_ks_equals_the_closed_form(n: int, steps: int) -> None:
    assert ks(*shifted(n, steps)).p == pytest.approx(equal_size_p(steps, n), rel=1e-9)


def test_ks_depends_on_n_at_the_same_distance() -> None:
    assert ks(*shifted(40, 10)).d == ks(*shifted(400, 100)).d
    assert ks(*shifted(40, 10)).p > 1e6 * ks(*shifted(400, 100)).p


def test_ks_sees_the_order_only_and_has_no_sides() -> None:
    a, b = rng(1).normal(size=80), rng(2).normal(0.4, 1, size=60)
    result = ks(a, b)
    assert (ks(np.exp(a), np.exp(b)).p, ks(b, a).p) == (result.p, result.p)
    assert ks(a, a).p == 1.0
    assert ks([0.0, math.inf], [1.0, 2.0]).d == 0.5


def test_ks_says_which_method_gave_p() -> None:
    a, b = rng(1).normal(size=10_001), rng(2).normal(size=50)
    assert ks(a, b).method == "asymp"
    assert ks(a[:10_000], b).method == "exact"
    assert ks(a[:100], b, method="asymp").method == "asymp"
    d = ks(a[:100], b).d
    limit = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * d) ** 2 * 100 / 3) for k in range(1, 100))
    assert ks(a[:100], b, method="asymp").p == pytest.approx(limit, abs=0.06)


def test_ks_that_scipy_cannot_count_exactly_says_asymp_and_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    # 50,000 and 49,999 have no common divisor: the lattice is larger than scipy counts.
    result = ks(rng(1).random(50_000), rng(2).random(49_999), method="exact")
    assert result.method == "asymp"
    assert not len(recwarn)


def test_ks_refuses() -> None:
    with pytest.raises(ValueError, match="a is empty"):
        ks([], [1.0])
    with pytest.raises(ValueError, match="b holds NaN"):
        ks([1.0], [math.nan])
    with pytest.raises(ValueError, match=r"mode|method"):
        ks([1.0], [2.0], method="guess")
