"""The formulas: what they give by hand, what leaves them unchanged, and the released demo's features."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.landscape.twins import demo_features, demo_file
from toolbox.landscape import method
from toolbox.shell.errors import UsageProblem

DRAW = np.random.default_rng(7)
DISTANCES = DRAW.gamma(2, 5, (40, 5)) + 1
GOLD = DRAW.integers(0, 5, 40)


# --- states ---


def test_a_perplexity_is_one_over_the_geometric_mean_of_the_probabilities():
    probabilities = [0.5, 0.25, 0.1]
    found = method.perplexity(sum(map(math.log, probabilities)), 3)
    assert found == pytest.approx((0.5 * 0.25 * 0.1) ** (-1 / 3), rel=1e-14)


def test_the_mean_is_taken_before_exponentiating():
    """exp(20000) is no float, exp(20000/10000) is."""
    assert method.distance([-20_000.0], [10_000])[0] == pytest.approx(math.e**2, rel=1e-14)


def test_without_tokens_there_is_no_perplexity():
    assert np.isnan(method.perplexity([-1.0, 0.0], [0, 0])).all()
    assert np.isnan(method.distance([np.nan], [0])).all()


def test_features_add_up_to_one_and_forget_the_scale():
    features = method.l1_features(DISTANCES)
    np.testing.assert_allclose(features.sum(axis=1), 1, rtol=1e-14)
    np.testing.assert_allclose(method.l1_features(DISTANCES * 1e300), features, rtol=1e-14)
    np.testing.assert_array_equal(method.nearest(features), DISTANCES.argmin(axis=1))


def test_scaling_against_overflow_changes_no_bit():
    np.testing.assert_array_equal(method.l1_features(DISTANCES), DISTANCES / DISTANCES.sum(axis=1, keepdims=True))


def test_columns_beyond_k_change_nothing():
    wide = np.hstack([DISTANCES, np.full((40, 2), np.nan)])
    features, padded = method.l1_features(DISTANCES), method.l1_features(wide)
    np.testing.assert_array_equal(padded[:, :5], features)
    assert np.isnan(padded[:, 5:]).all()
    for quantity in (method.nearest, method.uncertainty, method.uncertainty_normalised):
        np.testing.assert_allclose(quantity(padded), quantity(features), rtol=1e-14)
    np.testing.assert_allclose(
        method.uncertainty_likelihood(wide), method.uncertainty_likelihood(DISTANCES), rtol=1e-14
    )
    np.testing.assert_array_equal(method.gold_first(padded, GOLD)[:, :5], method.gold_first(features, GOLD))


def test_gold_moves_to_the_front_and_the_others_keep_their_order():
    moved = method.gold_first(DISTANCES, GOLD)
    for row, before, gold in zip(moved, DISTANCES, GOLD, strict=True):
        assert row.tolist() == [before[gold], *np.delete(before, gold)]


def test_without_gold_nothing_moves():
    np.testing.assert_array_equal(method.gold_first(DISTANCES, np.full(40, -1)), DISTANCES)


# --- landmarks ---


@pytest.mark.parametrize("k", range(2, 9))
def test_a_landmark_lies_on_the_simplex_of_the_states_and_is_nearest_to_its_own_choice(k):
    points = method.landmarks(k)
    np.testing.assert_allclose(points.sum(axis=1), 1, rtol=1e-15)
    assert method.nearest(points).tolist() == list(range(k))
    np.testing.assert_allclose(points, method.l1_features(points + 1e-300), atol=1e-15)


def test_the_paper_and_the_released_code_have_other_constants():
    assert method.landmarks(5, "paper").tolist() == (0.2 * (1 - np.eye(5))).tolist()
    for k, entry in ((2, 1 / 3), (4, 1 / 4), (5, 1 / 4)):
        assert method.landmarks(k, "reference").tolist() == (entry * (1 - np.eye(k))).tolist()


def test_landmarks_that_do_not_exist_are_refused():
    with pytest.raises(UsageProblem, match="no landmarks for questions of 3 choices"):
        method.landmarks(3, "reference")
    with pytest.raises(ValueError, match="at least two"):
        method.landmarks(1)


# --- progress ---


@pytest.mark.parametrize("bins", [1, 2, 5, 7])
def test_a_stage_holds_the_states_between_its_ends(bins):
    for n in range(1, 60):
        found = method.progress_bins(np.arange(1, n + 1), np.full(n, n), bins)
        for i, stage in enumerate(found.tolist(), start=1):
            assert Fraction(stage - 1, bins) < Fraction(i, n) <= Fraction(stage, bins)
        assert found[-1] == bins


def test_the_released_stages_are_those_of_a_loop_over_paths():
    lengths = np.random.default_rng(8).integers(1, 15, 30)
    step = np.concatenate([np.arange(1, n + 1) for n in lengths])
    n_steps = np.repeat(lengths, lengths)
    positions = [np.linspace(0, 1, n) for n in lengths if n > 1]
    cuts = np.percentile(np.concatenate(positions), [20, 40, 60, 80])
    expected = []
    for n in lengths:
        expected += [0] if n == 1 else [1 + sum(place > cut for cut in cuts) for place in np.linspace(0, 1, n)]
    assert method.reference_bins(step, n_steps).tolist() == expected
    assert 0 in expected


def test_only_paths_of_one_thought_have_no_released_stage():
    assert method.reference_bins([1, 1], [1, 1]).tolist() == [0, 0]


# --- metrics ---


def test_consistency_compares_with_the_paths_own_last_state():
    last = np.array([2, 2, 2, 4, 4])
    assert method.consistency([1, 0, 1, 1, 0], last).tolist() == [True, False, True, False, True]
    assert method.consistency(method.nearest(DISTANCES), np.arange(40)).all()


def test_of_two_nearest_choices_the_first_counts():
    assert method.nearest([[0.4, 0.3, 0.3], [0.2, 0.4, 0.4]]).tolist() == [1, 0]


@pytest.mark.parametrize("k", range(2, 8))
def test_the_range_of_uncertainty(k):
    """No preference is ln k; certainty of one choice is ln(k − 1) for distances, and 0 for likelihoods."""
    even = np.full((1, k), 7.0)
    certain = np.where(np.arange(k) == 1, 1.0, 1e12)[None]
    assert method.uncertainty(method.l1_features(even)) == pytest.approx(math.log(k))
    assert method.uncertainty_normalised(method.l1_features(even)) == pytest.approx(1)
    assert method.uncertainty_likelihood(even) == pytest.approx(math.log(k))
    assert method.uncertainty(method.l1_features(certain)) == pytest.approx(math.log(k - 1), abs=1e-9)
    assert method.uncertainty_likelihood(certain) == pytest.approx(0, abs=1e-9)


def test_uncertainty_does_not_depend_on_the_order_of_the_choices():
    for quantity in (method.uncertainty, method.uncertainty_likelihood):
        shuffled = DISTANCES[:, [3, 1, 4, 0, 2]]
        np.testing.assert_allclose(
            quantity(method.l1_features(shuffled)), quantity(method.l1_features(DISTANCES)), rtol=1e-13
        )


def test_likelihood_uncertainty_needs_no_scale():
    np.testing.assert_allclose(
        method.uncertainty_likelihood(method.l1_features(DISTANCES)),
        method.uncertainty_likelihood(DISTANCES),
        rtol=1e-13,
    )


def test_a_paths_perplexity_weighs_thoughts_by_their_tokens():
    logprob, tokens, of = [-1.0, -6.0, -4.0], [2, 3, 1], [0, 0, 2]
    found = method.path_perplexity(logprob, tokens, of, 4)
    assert found[0] == pytest.approx(math.exp(7 / 5))
    assert found[2] == pytest.approx(math.exp(4))
    assert np.isnan(found[[1, 3]]).all()


def test_means_of_paths_leave_out_what_is_undefined():
    found = method.path_means([1.0, np.nan, 3.0, np.nan], [0, 0, 0, 1], 3)
    assert found[0] == 2
    assert np.isnan(found[1:]).all()


# --- density ---


@pytest.mark.parametrize("n", [20, 300])
def test_the_density_is_scipys_where_points_spread_wider_than_a_cell(n):
    from scipy.stats import gaussian_kde

    points = np.random.default_rng(n).normal(size=(n, 2)) @ np.array([[3.0, 1.0], [0.0, 0.7]]) + [100, -40]
    x, y = np.linspace(90, 110, 90), np.linspace(-46, -34, 80)
    expected = gaussian_kde(points.T)(np.stack(np.meshgrid(x, y)).reshape(2, -1)).reshape(80, 90)
    np.testing.assert_allclose(method.gaussian_density(points, x, y), expected, rtol=1e-8, atol=1e-13)


LINE = np.stack([np.linspace(-1, 1, 9), 0.5 * np.linspace(-1, 1, 9)], axis=1)


@pytest.mark.parametrize(
    "points",
    [[[0.2, 0.1]], [[0.2, 0.1]] * 12, [[-1, 0], [1, 0]], LINE, LINE * [1, 0], LINE + 1e-14],
    ids=["one", "equal", "two", "collinear", "level", "nearly equal offsets"],
)
def test_degenerate_points_have_a_finite_density_around_them(points):
    grid = np.linspace(-4, 4, 101)
    density = method.gaussian_density(points, grid, grid)
    assert np.isfinite(density).all()
    assert density.sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1, abs=0.01)
    columns, rows = np.searchsorted(grid, np.asarray(points)).T
    assert (density[rows, columns] > 0.3 * density.max()).all()
    levels = method.mass_levels(density)
    assert (np.diff(levels) > 0).all()
    assert 0 < levels[0] <= levels[-1] <= density.max()


def test_no_point_has_no_density():
    with pytest.raises(ValueError, match="at least one point"):
        method.gaussian_density(np.empty((0, 2)), np.arange(3), np.arange(3))


def test_levels_enclose_the_shares_of_the_mass_that_they_are_for():
    grid = np.linspace(-5, 5, 201)
    density = np.exp(-0.5 * (grid[:, None] ** 2 + grid**2))
    for mass, level in zip(method.MASSES, method.mass_levels(density), strict=True):
        assert density[density >= level].sum() / density.sum() == pytest.approx(mass, abs=0.01)
        assert level == pytest.approx(1 - mass, abs=0.02)  # of a round Gaussian, the share outside is the height


# --- the released demo ---


def test_the_demos_features_are_the_released_codes():
    features = demo_features()
    points = []
    for number in range(len(features.k)):
        states = features.distance[features.state_question == number]
        rows = np.concatenate([states, features.start_distance[number : number + 1]])
        points.append(method.gold_first(method.l1_features(rows), np.full(len(rows), features.gold[number])))
    found = np.concatenate(points)
    with np.load(demo_file("fixture_features.npz")) as stored:
        assert found.shape == stored["features"].shape == (666, 5)
        np.testing.assert_allclose(found, stored["features"], rtol=0, atol=1e-12)
    assert hashlib.sha256(np.round(found, 9).astype("<f8").tobytes()).hexdigest().startswith("ac88518ef8d78b7e")
