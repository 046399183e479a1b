"""Votes over rows: who votes together, and what the votes of a whole table come to.

A vote is taken over the answers of one question, one variant and one model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from toolbox.lot.lines import Row, VoteScore
from toolbox.lot.metrics import Column, Resampling, column, rate
from toolbox.models.votes import Outcome, vote


def polls(rows: Iterable[Row]) -> dict[str, list[list[Row]]]:
    """The rows that vote together, by item: one list a model."""
    found: dict[str, dict[str | None, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.item.id, {}).setdefault(row.model, []).append(row)
    return {item: list(models.values()) for item, models in found.items()}


def hold(kind: str, rows: Sequence[Row], *, blank: bool = False) -> Outcome:
    """One vote over rows, their own scores and keeps being the weights."""
    return vote(
        kind,
        [row.answer for row in rows],
        scores=[row.score for row in rows],
        keeps=[row.keep for row in rows],
        blank=blank,
    )


def vote_column(kind: str, rows: Iterable[Row], *, blank: bool = False) -> Column:
    """Whether the winner is right, an item each (the mean over models); a vote without a winner is wrong."""
    return _column({item: [(part, hold(kind, part, blank=blank)) for part in p] for item, p in polls(rows).items()})


def _column(votes: Mapping[str, Sequence[tuple[Sequence[Row], Outcome]]]) -> Column:
    items, values = [], []
    whole = True
    for parts in votes.values():
        right = [_is_right(rows, outcome) for rows, outcome in parts if any(row.correct is not None for row in rows)]
        if right:
            items.append(parts[0][0][0].item)
            values.append(sum(right) / len(right))
            whole &= len(right) == 1
    return column(items, values, whole=whole)


def _is_right(rows: Sequence[Row], outcome: Outcome) -> bool:
    return outcome.winner is not None and any(row.correct for row in rows if row.answer == outcome.winner)


def tally(kind: str, rows: Iterable[Row], how: Resampling, *, blank: bool = False) -> VoteScore:
    """All votes of one kind. ValueError: no rows, and as ``vote``."""
    votes = {item: [(part, hold(kind, part, blank=blank)) for part in parts] for item, parts in polls(rows).items()}
    outcomes = [outcome for parts in votes.values() for _, outcome in parts]
    if not outcomes:
        raise ValueError("there is nothing to vote on")
    shares = [outcome.share for outcome in outcomes if outcome.voters]
    return VoteScore(
        accuracy=rate(_column(votes), how),
        agreement=math.fsum(shares) / len(shares) if shares else None,
        ties=sum(outcome.tied for outcome in outcomes) / len(outcomes),
        decided=sum(outcome.winner is not None for outcome in outcomes) / len(outcomes),
        n=len(outcomes),
    )
