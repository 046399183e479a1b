"""How scores are judged: folds that never divide a question, AUC within questions, fair votes, honest verdicts."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
from collections.abc import Hashable, Iterable

import numpy as np
import pytest

from tests.landscape.twins import demo_features, demo_file
from toolbox.landscape.judge import (
    Control,
    Evaluation,
    Polls,
    controls,
    evaluate,
    grouped_folds,
    out_of_fold,
    quality,
    relabelled,
    shuffled,
    vote_outcomes,
    within_aucs,
)
from toolbox.landscape.verifier import fit, path_features

NO = math.nan


def numbered(names: Iterable[Hashable]) -> np.ndarray:
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])


def polls(*parts: str, gold: str = "a", questions: Iterable[int] | None = None) -> Polls:
    """A poll a word of answers, ``-`` for none: ``polls("aab", "b-")``. Each is of a question of its own."""
    unit = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    answers = "".join(parts)
    of = np.arange(len(parts)) if questions is None else np.array(list(questions))
    return Polls(
        unit,
        of[unit],
        np.array(["-abcdef".index(one) - 1 for one in answers]),
        np.array([one == gold for one in answers]).astype(np.int8),
    )


# --- folds ---


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided_and_folds_are_even(seed):
    draw = np.random.default_rng(seed)
    groups = [f"q{one}" for one in draw.integers(0, 23, 400)]
    fold = grouped_folds(groups, 5, seed)
    for group in set(groups):
        assert len({int(one) for one, of in zip(fold, groups, strict=True) if of == group}) == 1
    sizes = np.bincount(fold)
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= max(groups.count(group) for group in set(groups))
    np.testing.assert_array_equal(grouped_folds(groups, 5, seed), fold)


def test_there_are_no_more_folds_than_groups_and_no_fewer_than_two():
    assert sorted(grouped_folds(["a", "b", "c", "a"], 5).tolist()) in ([0, 0, 1, 2], [0, 1, 1, 2], [0, 1, 2, 2])
    for groups, folds in ((["a", "a"], 5), (["a", "b"], 1), ([], 3)):
        with pytest.raises(ValueError, match="do not make"):
            grouped_folds(groups, folds)


def test_the_seed_draws_which_equal_groups_share_a_fold():
    groups = [one for one in range(12) for _ in range(3)]
    assert len({tuple(grouped_folds(groups, 4, seed)) for seed in range(6)}) > 1


def test_a_score_is_of_a_model_that_never_saw_a_path_of_the_question():
    fold = grouped_folds([1, 2, 3, 4, 5, 6] * 4, 3)
    x = np.arange(24.0)[:, None]
    correct = np.arange(24) % 3 == 0
    seen: list[set[float]] = []

    class Remembers:
        def __init__(self, rows: np.ndarray, outcomes: np.ndarray):
            self.rows = set(rows[:, 0])
            assert outcomes.tolist() == (rows[:, 0] % 3 == 0).tolist()  # rows and outcomes stay together
            seen.append(self.rows)

        def predict(self, rows: np.ndarray) -> np.ndarray:
            assert not self.rows & set(rows[:, 0])
            assert len(self.rows) + len(rows) == 24
            return rows[:, 0]

    np.testing.assert_array_equal(out_of_fold(x, correct, fold, Remembers), x[:, 0])
    assert len(seen) == 3


# --- votes ---


def test_accuracies_of_one_poll_by_hand():
    given = polls("aab--bb-", gold="a")
    score = np.array([0.9, 0.8, 0.5, 0.7, NO, 0.3, NO, 0.95])
    found, questions = vote_outcomes(score, given)
    assert {name: values.tolist() for name, values in found.items()} == {
        "mean path": [2 / 8],
        "plurality": [0.0],  # b: 3, a: 2
        "plurality, blanks vote": [0.0],  # b: 3, none: 3; the first seen of these is b
        "weighted": [1.0],  # a: 1.7, b: .8
        "best of r": [0.0],  # the path without an answer has the highest score
        "oracle": [1.0],
    }
    assert questions.tolist() == [0]


def test_blanks_that_vote_may_win_and_are_wrong():
    found, _ = vote_outcomes(np.full(4, 0.5), polls("a--b"))
    assert (found["plurality"].tolist(), found["plurality, blanks vote"].tolist()) == ([1.0], [0.0])


def test_questions_without_a_right_answer_are_left_out():
    given = polls("ab", "ab", "bb")
    unknown = dataclasses.replace(given, correct=np.where(given.unit == 1, -1, given.correct).astype(np.int8))
    score = np.array([0.9, 0.1, 0.1, 0.9, 0.5, 0.5])
    found = evaluate(score, unknown)
    assert (found.paths, found.scored, found.polls, found.questions) == (4, 4, 2, 2)
    assert found.verifier.within.estimate == 1.0
    assert found.accuracies["plurality"].estimate == 0.5


# --- AUC ---


def test_the_auc_is_taken_inside_polls_of_both_outcomes():
    given = polls("aabb", "ab", "aa", "bb-", questions=[0, 0, 1, 2])
    score = np.array([0.9, 0.2, 0.5, 0.1, 0.3, 0.3, 1.0, 1.0, 0.0, 0.0, 0.0])
    values, questions = within_aucs(score, given)
    assert values.tolist() == [3 / 4, 1 / 2]
    assert questions.tolist() == [0, 0]
    found = quality("score", score, given)
    assert (found.within.estimate, found.within.n, found.questions) == (5 / 8, 2, 1)
    assert math.isnan(found.within.low)  # one question determines no interval
    assert found.brier is None


def test_paths_without_a_score_take_no_part():
    given = polls("abab")
    values, _ = within_aucs(np.array([0.9, 0.1, NO, NO]), given)
    assert values.tolist() == [1.0]
    assert within_aucs(np.array([NO, 0.1, NO, 0.2]), given)[0].tolist() == []
    nothing = quality("none", np.full(4, NO), given, probability=True)
    assert (nothing.within, nothing.p, nothing.pooled, nothing.brier) == (None, None, None, None)
    assert nothing.best.estimate == 0


def test_a_score_that_only_tells_questions_apart_has_no_auc_within_them():
    """Easy questions score .8 and hard ones .3, whatever the path: good when pooled, worth nothing for a vote."""
    given = polls(*["aaab"] * 10, *["abbb"] * 10)
    score = np.where(given.unit < 10, 0.8, 0.3)
    found = quality("difficulty", score, given, probability=True)
    assert (found.within.estimate, found.p) == (0.5, 1.0)
    assert found.pooled == 0.75
    assert found.brier == pytest.approx((0.75 * 0.2**2 + 0.25 * 0.8**2 + 0.25 * 0.7**2 + 0.75 * 0.3**2) / 2)
    assert not evaluate(score, given).has_skill


def test_intervals_resample_questions_not_polls():
    """Twenty polls of two questions are two questions."""
    given = polls(*["ab"] * 20, questions=[0] * 10 + [1] * 10)
    score = np.where(given.question == 0, np.tile([0.9, 0.1], 20), np.tile([0.1, 0.9], 20))
    found = quality("score", score, given)
    assert (found.within.low, found.within.high, found.questions) == (0, 1, 2)


def test_where_all_are_right_the_interval_has_a_width():
    found = evaluate(np.full(20, 0.5), polls(*["aa"] * 10))
    assert found.accuracies["plurality"].estimate == 1
    assert 0.6 < found.accuracies["plurality"].low < 0.8
    assert found.verifier.within is None
    assert not found.has_skill


# --- the control ---


@pytest.mark.parametrize("seed", range(3))
def test_shuffling_moves_labels_inside_polls_only(seed):
    draw = np.random.default_rng(seed)
    unit = draw.integers(0, 12, 300)
    correct = draw.random(300) < unit / 12
    found = shuffled(correct, unit, draw)
    np.testing.assert_array_equal(np.bincount(unit, found), np.bincount(unit, correct))
    assert (found != correct).any()


def test_every_order_of_the_labels_of_a_poll_is_as_likely():
    draw = np.random.default_rng(0)
    unit, correct = np.array([0, 1, 0, 1, 0]), np.array([True, True, False, True, False])
    counts = np.mean([shuffled(correct, unit, draw) for _ in range(3000)], axis=0)
    np.testing.assert_allclose(counts, [1 / 3, 1, 1 / 3, 1, 1 / 3], atol=0.03)


def test_a_verifier_that_learns_shuffled_labels_is_at_chance_where_the_real_one_is_not():
    draw = np.random.default_rng(1)
    given = polls(*["aaabbb"] * 12)
    x = np.column_stack([given.correct + 0.5 * draw.normal(size=72), draw.normal(size=(72, 3))])
    fold = grouped_folds(given.question.tolist(), 4)
    learn = functools.partial(fit, kind="logreg")
    found = list(controls(x, given, fold, learn, 20))
    assert list(controls(x, given, fold, learn, 20)) == found
    assert len(set(found)) == 20
    assert abs(np.mean([within for within, _ in found]) - 0.5) < 0.1
    score = out_of_fold(x, given.correct == 1, fold, learn)
    evaluation = evaluate(score, given, control=Control.of(found))
    assert evaluation.verifier.within.estimate > 0.9
    assert evaluation.has_skill
    fixed = list(relabelled(score, given, 20))
    assert abs(np.mean([within for within, _ in fixed]) - 0.5) < 0.1


def test_nothing_comes_of_shuffling_polls_of_one_outcome():
    given = polls("aaa", "bbb")
    x = np.random.default_rng(0).normal(size=(6, 2))
    assert list(controls(x, given, given.question, functools.partial(fit, kind="logreg"), 5)) == []
    assert list(relabelled(x[:, 0], given, 5)) == []
    assert Control.of([]) is None


# --- verdicts ---


def perfect(questions: int) -> Evaluation:
    """Scores that are right within every question, and turn no vote."""
    given = polls(*["aab"] * questions)
    return evaluate(np.tile([0.9, 0.8, 0.1], questions), given)


def test_five_questions_show_no_skill_however_right_the_scores_are():
    assert perfect(5).verifier.within.estimate == 1
    assert perfect(5).verifier.p == 2 / 2**5
    assert not perfect(5).has_skill
    assert perfect(6).has_skill


def test_skill_has_to_exceed_every_control():
    found = perfect(30)
    assert found.has_skill
    assert dataclasses.replace(found, control=Control((0.4, 0.99), (0.5, 0.5))).has_skill
    assert not dataclasses.replace(found, control=Control((0.4, 1.0), (0.5, 0.5))).has_skill


def test_scores_that_are_wrong_within_questions_are_no_skill():
    given = polls(*["ab"] * 30)
    found = evaluate(np.tile([0.1, 0.9], 30), given)
    assert found.verifier.p < 0.001
    assert not found.has_skill


@pytest.mark.parametrize(("right", "gain"), [(0.9, True), (0.1, False)])
def test_gain_and_loss_against_the_plurality(right, gain):
    # Plurality b is wrong where gold is a, and right where gold is b; the score turns the vote to a.
    given = polls(*["abb"] * 20, gold="a" if gain else "b")
    found = evaluate(np.tile([0.9, 0.1, 0.1], 20), given)
    assert found.gain.estimate == (1 if gain else -1)
    assert found.has_gain is gain
    few = evaluate(np.tile([0.9, 0.1, 0.1], 5), polls(*["abb"] * 5, gold="a" if gain else "b"))
    assert few.has_gain is None
    assert perfect(30).has_gain is None
    assert perfect(30).gain.estimate == 0


# --- the released outputs, and the demo ---


def released() -> tuple[np.ndarray, Polls, list[dict]]:
    """The authors' saved scores, without StrategyQA (its gold answers are all A) and misaligned questions."""
    with gzip.open(demo_file("verifier_votes.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["aligned"] and row["dataset"] != "strategyqa"]
    given = Polls(
        numbered((row["id"], row["model"], row["variant"]) for row in rows),
        numbered(row["id"] for row in rows),
        np.array([-1 if row["pred"] is None else "ABCDE".index(row["pred"]) for row in rows]),
        np.array([row["pred"] == row["answer"] for row in rows]).astype(np.int8),
    )
    return np.array([NO if row["score"] is None else row["score"] for row in rows]), given, rows


def test_the_gain_on_the_authors_own_outputs_is_about_zero():
    score, given, _ = released()
    found = evaluate(score, given)
    assert (found.polls, found.paths, found.questions) == (2338, 23380, 150)
    assert {name: round(one.estimate, 4) for name, one in found.accuracies.items()} == {
        "mean path": 0.5030,
        "plurality": 0.6189,
        "plurality, blanks vote": 0.5941,
        "weighted": 0.6146,
        "best of r": 0.5372,
        "oracle": 0.8700,
    }
    assert round(found.verifier.within.estimate, 4) == 0.5534
    assert round(found.verifier.pooled, 4) == 0.6828
    assert round(found.gain.estimate, 4) == -0.0043
    assert (round(found.gain.low, 3), round(found.gain.high, 3)) == (-0.014, 0.005)
    assert found.has_gain is None


def test_on_questions_that_were_not_trained_on_neither():
    score, given, rows = released()
    unseen = np.array([int(row["id"].rpartition("/")[2]) >= 20 for row in rows])
    found = evaluate(score[unseen], given.only(unseen))
    assert found.polls == 1400
    assert round(found.accuracies["plurality"].estimate, 3) == 0.594
    assert round(found.accuracies["weighted"].estimate, 3) == 0.597
    assert (found.gain.low, found.gain.high) == pytest.approx((-0.008, 0.014), abs=0.002)


def demo() -> tuple[np.ndarray, Polls]:
    features = demo_features()
    of = features.question.astype(np.int64)
    return path_features(features, features.pred), Polls(of, of, features.pred.astype(np.int64), features.correct)


def test_on_the_five_demo_questions_neither_model_has_skill():
    x, given = demo()
    fold = grouped_folds(given.question.tolist(), 5)
    for kind, expected in (("rf", 0.37), ("logreg", 0.53)):
        score = out_of_fold(x, given.correct == 1, fold, functools.partial(fit, kind=kind))
        found = evaluate(score, given)
        assert found.verifier.within.estimate == pytest.approx(expected, abs=0.03)
        assert not found.has_skill
        assert found.has_gain is None
        assert found.verifier.questions == 4  # all paths of one question are right


def test_shuffled_labels_are_at_chance_on_the_demo_and_pooled_below_it():
    x, given = demo()
    fold = grouped_folds(given.question.tolist(), 5)
    found = Control.of(controls(x, given, fold, functools.partial(fit, kind="logreg"), 20))
    assert len(found.within) == 20
    assert abs(np.mean(found.within) - 0.5) < 0.1
    assert np.mean(found.pooled) < 0.4  # useless scores, and yet: cross-validation over few questions
