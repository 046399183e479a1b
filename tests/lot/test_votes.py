"""Votes over rows: accuracy, agreement, ties."""

from __future__ import annotations

import pytest

from toolbox.lot.lines import Item, Row
from toolbox.lot.metrics import Resampling
from toolbox.lot.votes import hold, polls, tally, vote_column

HOW = Resampling(draws=50, seed=0)


def rows(name: str, answers: str, gold: str | None, model: str | None = None) -> list[Row]:
    return [
        Row(Item(name), "cot", model, None if one == "-" else one, correct=None if gold is None else one == gold)
        for one in answers
    ]


def test_accuracy_agreement_and_ties_are_over_questions():
    found = tally("plurality", [*rows("1", "aab", "a"), *rows("2", "ab", "b"), *rows("3", "--", "a")], HOW)
    assert (found.n, found.accuracy.estimate, found.accuracy.n) == (3, pytest.approx(1 / 3), 3)
    assert found.ties == pytest.approx(1 / 3)
    assert found.decided == pytest.approx(2 / 3)
    assert found.agreement == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_each_model_votes_for_itself():
    both = [*rows("1", "aab", "a", "m"), *rows("1", "bb", "a", "n")]
    assert [len(part) for part in polls(both)["1"]] == [3, 2]
    found = tally("plurality", both, HOW)
    assert (found.n, found.accuracy.n, found.accuracy.estimate) == (2, 1, 0.5)
    assert not vote_column("plurality", both).whole


def test_without_a_gold_there_is_agreement_only():
    found = tally("plurality", rows("1", "aab", None), HOW)
    assert (found.accuracy, found.agreement) == (None, pytest.approx(2 / 3))
    assert vote_column("plurality", rows("1", "aab", None)).ids == ()
    with pytest.raises(ValueError, match="nothing to vote on"):
        tally("plurality", [], HOW)


def test_a_blank_that_wins_is_wrong():
    blank = rows("1", "--a", "a")
    assert hold("plurality", blank).winner == "a"
    assert tally("plurality", blank, HOW, blank=True).accuracy.estimate == 0
    assert tally("plurality", blank, HOW, blank=True).decided == 0
