"""Several answers to one question made one: plurality, weighted and masked votes.

A vote is taken over the answers of one question, one variant and one model. An answer is any hashable, None where none
could be read (a blank).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from toolbox.lot.lines import VOTES, Row, VoteScore
from toolbox.lot.metrics import Column, Resampling, column, rate

_ROUNDING = 1e-12  # share of the largest weight within which two sums of scores count as equal


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a vote went.

    ``winner`` is None where nobody voted and where blanks won; ``tied``: another answer had as much weight;
    ``voters`` is the number of answers that voted and ``share`` the winner's part of their weight (0 without any).
    """

    winner: Hashable | None
    tied: bool
    voters: int
    share: float


def vote(
    kind: str,
    answers: Sequence[Hashable | None],
    *,
    scores: Sequence[float | None] = (),
    keeps: Sequence[bool | None] = (),
    blank: bool = False,
) -> Outcome:
    """The answer with the most weight; ties go to the one that was seen first.

    ``plurality`` gives each answer the weight 1 (self-consistency: Wang et al., "Self-Consistency Improves Chain of
    Thought Reasoning", ICLR 2023); ``weighted`` its score, where a null score does not vote; ``mask`` 1 where ``keep``
    is true, and no vote otherwise. Blanks do not vote unless ``blank``: then they are an answer like any other.

    ValueError: an unknown kind, scores or keeps of another length than the answers, a score below 0.
    """
    weights = _weights(kind, len(answers), scores, keeps)
    sums: dict[Hashable | None, float] = {}
    voters = 0
    for answer, weight in zip(answers, weights, strict=True):
        if weight is None or (answer is None and not blank):
            continue
        sums[answer] = sums.get(answer, 0.0) + weight
        voters += 1
    if not sums:
        return Outcome(None, False, 0, 0.0)
    total, most = sum(sums.values()), max(sums.values())
    first, *others = (answer for answer, weight in sums.items() if weight >= most * (1 - _ROUNDING))
    return Outcome(first, bool(others), voters, sums[first] / total if total else 1 / len(sums))


def _weights(kind: str, n: int, scores: Sequence[float | None], keeps: Sequence[bool | None]) -> Sequence[float | None]:
    match kind:
        case "plurality":
            return [1.0] * n
        case "weighted":
            if any(score is not None and score < 0 for score in scores):
                raise ValueError("a weighted vote needs scores of at least 0")
            return scores
        case "mask":
            return [1.0 if keep else None for keep in keeps]
    raise ValueError(f"no vote is called {kind}: any of {', '.join(VOTES)}")


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
