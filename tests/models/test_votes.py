"""Votes: who wins, who may vote, what a tie is."""

from __future__ import annotations

import itertools

import pytest

from toolbox.models.votes import vote


def test_the_most_frequent_answer_wins():
    found = vote("plurality", ["b", "a", "b", None])
    assert (found.winner, found.tied, found.voters, found.share) == ("b", False, 3, 2 / 3)


@pytest.mark.parametrize("order", list(itertools.permutations(["a", "a", "b", "b", "c"]))[::7])
def test_ties_go_to_whoever_was_seen_first(order):
    found = vote("plurality", order)
    assert found.tied
    assert found.winner == next(answer for answer in order if answer != "c")


def test_blanks_do_not_vote_unless_they_count():
    answers = [None, "a", None, "b", None, "b"]
    assert vote("plurality", answers).winner == "b"
    counted = vote("plurality", answers, blank=True)
    assert (counted.winner, counted.voters, counted.share) == (None, 6, 0.5)
    assert vote("plurality", ["a", None], blank=True).winner == "a"  # a tie with a blank, seen first


def test_nobody_votes():
    for found in (vote("plurality", [None, None]), vote("mask", ["a"], keeps=[False]), vote("plurality", [])):
        assert (found.winner, found.tied, found.voters, found.share) == (None, False, 0, 0)


def test_scores_are_summed_and_a_null_score_does_not_vote():
    found = vote("weighted", ["a", "b", "b", "c"], scores=[0.8, 0.5, 0.4, None])
    assert (found.winner, found.voters) == ("b", 3)
    assert found.share == pytest.approx(0.9 / 1.7)
    # .1 + .2 is not .3 in binary, but it is as much.
    assert vote("weighted", ["a", "b", "b"], scores=[0.3, 0.1, 0.2]).tied
    assert vote("weighted", ["a", "b"], scores=[0, 0]).winner == "a"


def test_a_mask_lets_only_kept_rows_vote():
    assert vote("mask", ["a", "a", "b"], keeps=[False, None, True]).winner == "b"


def test_what_is_no_vote():
    with pytest.raises(ValueError, match="no vote is called borda"):
        vote("borda", ["a"])
    with pytest.raises(ValueError, match="at least 0"):
        vote("weighted", ["a"], scores=[-1])
    with pytest.raises(ValueError, match="shorter"):
        vote("weighted", ["a", "b"], scores=[1])
