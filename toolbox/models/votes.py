"""Several answers to one question made one: plurality, weighted and masked votes.

An answer is any hashable, None where none could be read (a blank). Nothing here needs a numerical library.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

VOTES = ("plurality", "weighted", "mask")
"""The kinds of votes."""

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
