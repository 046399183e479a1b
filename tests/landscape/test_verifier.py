"""The verifier's numbers know nothing of the label, its trees are scikit-learn's, its file gives it back."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.landscape.twins import SCORING, demo_features, path, question, random_features
from toolbox.landscape import verifier as module
from toolbox.landscape.features import Features, PathScores, assemble, write_features
from toolbox.landscape.verifier import (
    Forest,
    Logistic,
    Recipe,
    Verifier,
    fit,
    forest_of,
    n_features,
    path_features,
    read_verifier,
    training_free_scores,
    write_verifier,
)
from toolbox.shell.errors import BadData, MissingInput

SETS = ("states", "summary")


def by_hand(features: Features, own: np.ndarray, kind: str, points: int) -> list[list[float]]:
    """The numbers of each path with thoughts, one after the other, in plain Python."""
    result = []
    for number, n in enumerate(features.n_steps):
        rows = [row for row in range(len(features.path)) if features.path[row] == number]
        k = int(features.k[features.question[number]])
        shares = []
        for row in rows:
            distances = [float(one) for one in features.distance[row, :k]]
            shares.append([one / sum(distances) for one in distances])
        if not rows:
            continue
        nearest = [min(range(k), key=one.__getitem__) for one in shares]
        mine = int(own[number]) if own[number] >= 0 else nearest[-1]
        others = sorted((j for j in range(k) if j != mine), key=lambda j: (shares[-1][j], j))
        numbers: list[float] = []
        for stage in range(1, points + 1):
            at = math.ceil(stage * int(n) / points) - 1
            share = shares[at]
            if kind == "states":
                numbers += [share[mine], *(share[j] for j in others), float(nearest[at] == nearest[-1])]
            else:
                other = min(share[j] for j in others)
                entropy = -sum(one * math.log(one) for one in share) / math.log(k)
                tokens = int(features.thought_tokens[rows[at]])
                surprise = -float(features.thought_logprob[rows[at]]) / tokens
                numbers += [share[mine], other, other - share[mine], entropy, surprise]
        result.append(numbers)
    return result


def with_choices_moved(features: Features, own: np.ndarray, seed: int) -> tuple[Features, np.ndarray]:
    """The same states with each question's choices in another order, and the answers at their new places."""
    draw = np.random.default_rng(seed)
    columns = np.tile(np.arange(features.distance.shape[1]), (len(features.k), 1))
    for number, k in enumerate(features.k):
        columns[number, :k] = draw.permutation(k)
    of = columns[features.state_question]
    moved = {name: np.take_along_axis(getattr(features, name), of, axis=1) for name in ("distance", "logprob")}
    place = np.argsort(columns, axis=1)
    return dataclasses.replace(features, **moved), np.where(own < 0, -1, place[features.question, own])


# --- features ---


def test_own_answer_first_then_the_others_by_their_final_distance_then_the_consistency():
    features = assemble([question("q", [1, 1, 1])], [path("p", 0, [[5, 3, 2], [2, 4, 4], [1, 6, 3]])], SCORING)
    found = path_features(features, [1], points=3)
    # At the last state choice 2 is nearer than 0 is far: order 1, 0, 2 by final distances 6 | 1, 3.
    expected = [[0.3, 0.5, 0.2, 0], [0.4, 0.2, 0.4, 1], [0.6, 0.1, 0.3, 1]]
    np.testing.assert_allclose(found, [np.ravel(expected)], rtol=1e-14)


@pytest.mark.parametrize(("n", "states"), [(1, [1] * 10), (3, [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]), (20, range(2, 21, 2))])
def test_stage_b_is_state_b_n_over_ten_rounded_up(n: int, states):
    distances = [[1.0, float(step)] for step in range(1, n + 1)]
    features = assemble([question("q", [1, 1])], [path("p", 0, distances)], SCORING)
    shares = path_features(features, [1])[0].reshape(10, 3)[:, 0]
    np.testing.assert_allclose(shares / (1 - shares), list(states), rtol=1e-12)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("points", [1, 4, 10])
def test_all_paths_at_once_give_what_one_by_one_gives(kind, points):
    features = random_features(5, k=(4, 4, 4, 4), paths=7, shortest=0, longest=12)
    own = np.where(np.arange(28) % 5, features.pred, -1)
    found = path_features(features, own, kind, points)
    there = features.n_steps > 0
    assert 0 < there.sum() < 28
    assert found.shape == (28, n_features(kind, points, 4))
    np.testing.assert_allclose(found[there], by_hand(features, own, kind, points), rtol=1e-12)
    assert np.isnan(found[~there]).all()


def test_questions_of_several_k_share_a_summary_and_no_states():
    features = random_features(3, k=(2, 5, 3), paths=4)
    np.testing.assert_allclose(
        path_features(features, features.pred, "summary"), by_hand(features, features.pred, "summary", 10), rtol=1e-12
    )
    with pytest.raises(BadData, match="questions of 2, 3 and 5 choices do not share states") as caught:
        path_features(features, features.pred)
    assert "summary" in caught.value.advice


def test_a_question_that_no_path_answers_does_not_widen_the_states():
    lonely = assemble(
        [question("q", [1, 1]), question("nobody", [1, 1, 1, 1])], [path("p", 0, [[1, 2], [3, 1]])], SCORING
    )
    alone = assemble([question("q", [1, 1])], [path("p", 0, [[1, 2], [3, 1]])], SCORING)
    np.testing.assert_array_equal(path_features(lonely, [0]), path_features(alone, [0]))


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("seed", range(3))
def test_neither_the_label_nor_the_letter_of_an_answer_enters(kind, seed):
    features = random_features(seed, k=(5,) * 4, paths=6)
    own = np.where(np.arange(24) % 4, features.pred, -1)
    found = path_features(features, own, kind)
    unlabelled = dataclasses.replace(features, gold=np.full(4, -1, np.int8), correct=np.full(24, -1, np.int8))
    np.testing.assert_array_equal(path_features(unlabelled, own, kind), found)
    other_gold = dataclasses.replace(features, gold=(features.gold + 1) % 5)
    np.testing.assert_array_equal(path_features(other_gold, own, kind), found)
    np.testing.assert_allclose(path_features(*with_choices_moved(features, own, seed), kind), found, rtol=1e-12)


def test_without_an_answer_the_choice_that_the_last_state_is_nearest_to_is_the_paths_own():
    features = assemble([question("q", [1, 1, 1])], [path("p", 0, [[1, 5, 9], [4, 2, 3]])], SCORING)
    for kind in SETS:
        np.testing.assert_array_equal(path_features(features, [-1], kind), path_features(features, [1], kind))
        assert not np.array_equal(path_features(features, [-1], kind), path_features(features, [0], kind))


def test_a_thought_without_tokens_is_no_surprise():
    one = dataclasses.replace(
        path("p", 0, [[1, 2], [3, 1]]), thought_logprob=np.array([-3.0, 0.0]), thought_tokens=np.array([2, 0])
    )
    found = path_features(assemble([question("q", [1, 1])], [one], SCORING), [0], "summary", points=2)
    np.testing.assert_allclose(found.reshape(2, 5)[:, 4], [1.5, 0])


def test_training_free_scores_are_higher_for_certain_fluent_and_short_paths():
    none = PathScores("none", 0, 1, {}, np.empty((0, 2)), np.empty((0, 2)), np.empty(0), np.empty(0))
    features = assemble(
        [question("q", [1, 1]), question("r", [1, 1, 1])],
        [path("a", 0, [[1, 1], [1, 3]]), path("b", 1, [[2, 2, 2]]), none],
        SCORING,
    )
    certain, fluent, short = training_free_scores(features).values()
    np.testing.assert_allclose(certain, [(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2), -1, math.nan])
    np.testing.assert_allclose(fluent, [-2, -2, math.nan])
    np.testing.assert_array_equal(short, [-2, -1, math.nan])


# --- models ---


def task(n: int = 200, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, width))
    return x, x[:, 0] + 0.5 * x[:, 1] + draw.normal(size=n) > 0


def sklearn_forest(x, correct, trees: int = 40, seed: int = 3):
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(trees, min_samples_leaf=5, max_features="sqrt", random_state=seed).fit(x, correct)


@pytest.mark.parametrize("width", [1, 12])
def test_the_traversal_is_scikit_learns(width):
    x, correct = task(width=width + 1)
    x = x[:, :width]
    theirs = sklearn_forest(x, correct)
    new = np.random.default_rng(1).normal(size=(500, width))
    for rows in (x, new):
        np.testing.assert_allclose(
            forest_of(theirs).predict(rows), theirs.predict_proba(rows)[:, 1], atol=1e-12, rtol=0
        )
    np.testing.assert_array_equal(fit(x, correct, seed=3, trees=40).predict(new), forest_of(theirs).predict(new))


def test_values_next_to_a_threshold_take_the_branch_that_scikit_learn_takes():
    """A float64 just above the threshold 1.5 is 1.5 as float32, and goes to the left."""
    x = np.repeat([1.0, 2.0], 50)[:, None]
    correct = np.repeat([False, True], 50)
    theirs = sklearn_forest(x, correct)
    ours = forest_of(theirs)
    assert set(ours.threshold[ours.left >= 0]) == {1.5}
    above = np.array([[np.nextafter(1.5, 2)]])
    assert theirs.predict_proba(above)[0, 1] == ours.predict(above)[0] == ours.predict(np.array([[1.0]]))[0]
    assert ours.predict(above)[0] < 0.1 < 0.9 < ours.predict(np.array([[1.5001]]))[0]


def test_rows_may_come_in_any_blocks(monkeypatch):
    x, correct = task()
    forest = fit(x, correct, trees=10)
    whole = forest.predict(x)
    monkeypatch.setattr(module, "_BLOCK", 70)
    np.testing.assert_array_equal(forest.predict(x), whole)
    np.testing.assert_array_equal(np.concatenate([forest.predict(x[:1]), forest.predict(x[1:])]), whole)
    assert forest.predict(x[:0]).shape == (0,)


def test_logistic_regression_is_scikit_learns_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, correct = task()
    x[:, 3] = 7.0  # a feature without variance
    x[:, 4] *= 1e6
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(x, correct)
    ours = fit(x, correct, "logreg")
    np.testing.assert_allclose(ours.predict(x), theirs.predict_proba(x)[:, 1], atol=1e-12, rtol=0)
    assert ours.predict(1e9 * x).max() <= 1
    assert ours.predict(-1e9 * x).min() >= 0


@pytest.mark.parametrize("kind", ["rf", "logreg"])
@pytest.mark.parametrize(("right", "score"), [(4, 5 / 6), (0, 1 / 6)])
def test_of_one_outcome_nothing_is_learned(kind, right, score):
    x = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(fit(x, [right == 4] * 4, kind).predict(x[:2]), score)
    with pytest.raises(ValueError, match="at least one path"):
        fit(x[:0], [], kind)


def test_a_forest_learns_what_there_is_to_learn_and_its_seed_decides_it():
    x, correct = task(400)
    forest = fit(x[:300], correct[:300], trees=60)
    scores = forest.predict(x[300:])
    assert scores[correct[300:]].mean() > scores[~correct[300:]].mean() + 0.15
    np.testing.assert_array_equal(fit(x[:300], correct[:300], trees=60).predict(x[300:]), scores)
    assert not np.array_equal(fit(x[:300], correct[:300], trees=60, seed=1).predict(x[300:]), scores)


# --- the file ---


def made(kind: str = "rf", feature_set: str = "states") -> tuple[Verifier, np.ndarray]:
    features = random_features(2, k=(4,) * 5, paths=8)
    x = path_features(features, features.pred, feature_set)
    model = fit(x, features.correct == 1, kind, trees=20)
    seen = np.arange(40, dtype=np.uint8).reshape(5, 8)
    recipe = Recipe(kind, feature_set, 10, 4 if feature_set == "states" else None)
    return Verifier(recipe, model, SCORING, 40, int((features.correct == 1).sum()), seen), x


@pytest.mark.parametrize("feature_set", SETS)
@pytest.mark.parametrize("kind", ["rf", "logreg"])
def test_saved_and_loaded_it_scores_the_same_to_the_last_bit(kind, feature_set, tmp_path: Path):
    verifier, x = made(kind, feature_set)
    for name in "ab":
        write_verifier(tmp_path / name, verifier, {"toolbox": "{}", "format": "pt"})
    found = read_verifier(tmp_path / "a")
    np.testing.assert_array_equal(found.model.predict(x), verifier.model.predict(x))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (found.recipe, found.scoring, found.paths, found.right) == (verifier.recipe, SCORING, 40, verifier.right)
    assert found.has_seen(bytes(range(8, 16)))
    assert not found.has_seen(bytes(range(9, 17)))


def test_the_file_is_plain_safetensors_with_one_array_a_part(tmp_path: Path):
    from safetensors import safe_open

    verifier, _ = made()
    write_verifier(tmp_path / "v", verifier)
    with safe_open(tmp_path / "v", framework="np") as stored:
        kinds = {name: str(stored.get_tensor(name).dtype) for name in stored.keys()}  # noqa: SIM118
        assert kinds == {
            "start": "int32", "left": "int32", "right": "int32", "feature": "int32", "threshold": "float64",
            "probability": "float64", "seen": "uint8",
        }  # fmt: skip
        assert set(stored.metadata()) == {"landscape-verifier"}


def test_reading_and_scoring_need_neither_scikit_learn_nor_torch(tmp_path: Path):
    verifier, x = made()
    write_verifier(tmp_path / "v", verifier)
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, numpy\nfrom toolbox.landscape.verifier import read_verifier\n"
        "found = read_verifier(sys.argv[1]).model.predict(numpy.load(sys.argv[2]))\n"
        "assert not {'torch', 'sklearn', 'scipy'} & set(sys.modules)\nprint(found.sum().hex())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "v"), str(tmp_path / "x.npy")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == float(verifier.model.predict(x).sum()).hex()


def forest_with(name: str, place: object, value: object):
    def change(verifier: Verifier) -> Verifier:
        array = np.array(getattr(verifier.model, name))
        array[place] = value
        return dataclasses.replace(verifier, model=dataclasses.replace(verifier.model, **{name: array}))

    return change


def shortened(verifier: Verifier) -> Verifier:
    return dataclasses.replace(verifier, model=dataclasses.replace(verifier.model, feature=verifier.model.feature[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forest_with("left", 0, 0), "children are not nodes behind it"),  # a descent without end
        (forest_with("right", 0, 10**6), "children are not nodes behind it"),
        (forest_with("right", 0, -1), "children are not nodes behind it"),  # half a leaf
        (forest_with("left", -1, -2), "children are not nodes behind it"),
        (forest_with("feature", 0, 50), "a feature that is none of the 50"),
        (forest_with("feature", 0, -1), "a feature that is none of the 50"),
        (forest_with("threshold", 0, np.nan), "a threshold is not finite"),
        (forest_with("probability", -1, 1.5), "a probability does not lie"),
        (forest_with("probability", -1, np.nan), "a probability does not lie"),
        (forest_with("start", 0, 1), "start does not divide"),
        (forest_with("start", -1, 3), "start does not divide"),
        (shortened, "arrays of nodes differ in length"),
        (lambda v: dataclasses.replace(v, recipe=Recipe("rf", "states", 3, 4)), "none of the 15"),
        (lambda v: dataclasses.replace(v, recipe=Recipe("rf", "states", 10, None)), "recipe of features"),
        (lambda v: dataclasses.replace(v, recipe=Recipe("rf", "states", 0, 4)), "recipe of features"),
        (lambda v: dataclasses.replace(v, seen=np.zeros((2, 3), np.uint8)), r"seen has shape \(2, 3\)"),
    ],
)
def test_trees_that_lead_nowhere_are_refused(change, message, tmp_path: Path):
    verifier, _ = made()
    write_verifier(tmp_path / "v", change(verifier))
    with pytest.raises(BadData, match=message):
        read_verifier(tmp_path / "v")


@pytest.mark.parametrize(("name", "value"), [("scale", 0.0), ("coefficient", np.inf), ("mean", np.nan)])
def test_weights_that_do_not_weigh_are_refused(name, value, tmp_path: Path):
    verifier, _ = made("logreg")
    write_verifier(tmp_path / "v", forest_with(name, 2, value)(verifier))
    with pytest.raises(BadData, match=f"{name} does not hold 50 usable numbers"):
        read_verifier(tmp_path / "v")


def test_other_files_are_refused(tmp_path: Path):
    write_features(tmp_path / "f", random_features())
    with pytest.raises(BadData, match="is not a verifier of landscape-verify"):
        read_verifier(tmp_path / "f")
    verifier, _ = made()
    write_verifier(tmp_path / "v", verifier)
    raw = (tmp_path / "v").read_bytes()
    for bad, message in (
        (raw[:-5], "truncated"),
        (raw.replace(b'\\"version\\":1', b'\\"version\\":7'), "is of version 7"),
        (raw.replace(b'\\"kind\\":\\"rf\\"', b'\\"kind\\":\\"xx\\"'), "cannot be read"),
        (raw.replace(b'"threshold"', b'"treshholt"'), "array 'threshold' of type F64 is missing"),
    ):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(BadData, match=message):
            read_verifier(tmp_path / "bad")
    with pytest.raises((MissingInput, FileNotFoundError)):
        read_verifier(tmp_path / "none")


# --- the demo ---


def test_the_demo_has_sixty_numbers_a_path_and_models_that_score_within_bounds():
    features = demo_features()
    x = path_features(features, features.pred)
    assert x.shape == (50, 60)
    for model in (fit(x, features.correct == 1, trees=20), fit(x, features.correct == 1, "logreg")):
        assert isinstance(model, Forest | Logistic)
        assert 0 <= model.predict(x).min() <= model.predict(x).max() <= 1


def test_the_traversal_is_scikit_learns_on_the_demo():
    features = demo_features()
    x = path_features(features, features.pred)
    theirs = sklearn_forest(x, features.correct == 1, trees=100)
    np.testing.assert_allclose(forest_of(theirs).predict(x), theirs.predict_proba(x)[:, 1], atol=1e-12, rtol=0)
