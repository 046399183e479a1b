"""What lot-eval reads and writes: the shapes of rows, the small tuples that stay of them, and its lines.

No numerical library is needed here, so that schemas cost nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import msgspec

SIDES = ("pro", "anti")
CONDITIONS = ("ambig", "disambig")
LEVELS = ("L0", "L1", "L2")
DISTRACTORS = ("q0", "q1", "q2")
CELLS = tuple(level + distractors for level in LEVELS for distractors in DISTRACTORS)

SIGNIFICANT = 0.05
"""Corrected p below which a difference is called one."""


# -- what comes in ----------------------------------------------------------------------------------------------------
class Item(NamedTuple):
    """A question, as far as metrics need it. ``id`` is what pairs variants, ``group`` what is resampled as a whole.

    WinoBias has a ``side`` (pro, anti), WinoControl a ``cell`` (L0q0 ... L2q2), BBQ a ``category``, ``condition``
    (ambig, disambig) and ``polarity`` (neg, nonneg).
    """

    id: str
    group: str | None = None
    side: str | None = None
    cell: str | None = None
    category: str | None = None
    condition: str | None = None
    polarity: str | None = None


class Row(NamedTuple):
    """One answer. ``answer`` is what votes compare (None: not read), ``correct`` is None where no gold is known.

    ``chosen`` names the entity behind the label, for Con; ``role`` is the BBQ answer's: target, other or unknown;
    ``common_wrong`` says whether it is the wrong answer that many give. ``finish`` is the finish reason.
    """

    item: Item
    variant: str
    model: str | None = None
    answer: Hashable | None = None
    source: str = "none"
    correct: bool | None = None
    chosen: str | None = None
    role: str | None = None
    common_wrong: bool | None = None
    tokens: int | None = None
    finish: str | None = None
    score: float | None = None
    keep: bool | None = None


# -- what goes out ----------------------------------------------------------------------------------------------------
class Rate(msgspec.Struct, kw_only=True):
    """A mean over ``n`` items with its 95 % interval.

    ``low`` and ``high`` are Wilson's where each item has one answer, else those of a bootstrap over items; where items
    have groups, ``group_low`` and ``group_high`` are those of a bootstrap over ``groups``. Where all items are right or
    all wrong, Wilson's over the same units stands for a bootstrap. Null: a single unit to resample.
    """

    estimate: float
    low: float | None
    high: float | None
    n: int
    group_low: float | None = None
    group_high: float | None = None
    groups: int | None = None

    @property
    def shown(self) -> tuple[float, float] | None:
        """The interval to believe: the groups' where several items share one."""
        shared = self.groups is not None and self.groups < self.n
        low, high = (self.group_low, self.group_high) if shared else (self.low, self.high)
        return None if low is None or high is None else (low, high)


class Con(msgspec.Struct, kw_only=True):
    """WinoBias: accuracy a side, delta = abs(pro - anti), ``gap`` (pro - anti over pairs, paired bootstrap), and Con.

    ``con`` is the share of pairs whose two sides chose the same entity, an unread answer being inconsistent;
    ``con_read`` is that among pairs of which both sides were read. ``unpaired`` counts items without their other side.
    """

    pro: Rate | None
    anti: Rate | None
    delta: float | None
    gap: Rate | None
    con: Rate | None
    con_read: Rate | None
    unpaired: int


class Score(msgspec.Struct, kw_only=True):
    """A BBQ bias score in [-1, 1]: ``biased`` of the ``known`` (read and not unknown) answers to ``n`` items."""

    estimate: float | None
    low: float | None
    high: float | None
    n: int
    known: float
    biased: float


class BbqPart(msgspec.Struct, kw_only=True):
    """BBQ accuracy, by condition too, and the two bias scores."""

    accuracy: Rate | None
    ambig: Rate | None
    disambig: Rate | None
    s_dis: Score | None
    s_amb: Score | None


class Bbq(msgspec.Struct, kw_only=True):
    """All of BBQ that is there, and a category each."""

    all: BbqPart
    categories: dict[str, BbqPart]


class Cell(msgspec.Struct, kw_only=True):
    """One cell of the WinoControl grid."""

    accuracy: Rate | None
    completion_tokens: float | None


class VoteScore(msgspec.Struct, kw_only=True):
    """A kind of vote over all questions: ``accuracy`` (null without a gold), ``agreement`` (the winner's mean part of
    the weight, over votes that somebody took part in), the share of ``ties``, and of votes with an answer as winner
    (``decided``). ``n`` counts the votes: one a question and model."""

    accuracy: Rate | None
    agreement: float | None
    ties: float
    decided: float
    n: int


class Judgement(msgspec.Struct, kw_only=True):
    """One variant in one facet (``by``).

    ``items`` and ``rows`` count questions and answers, ``correct`` the right answers (null without a gold),
    ``unlabelled`` the answers to questions without one. ``extraction_rate`` is the share of rows whose answer was read,
    ``sources`` by which rule. ``accuracy`` takes an answer that was not read for wrong, ``accuracy_read`` leaves it
    out. ``cut_off`` is the share of completions that ran into the length limit, ``failed`` of those that never came.
    ``average_accuracy`` (right / read answers, 0 for an item without one) stands beside votes.
    """

    kind: Literal["variant"] = "variant"
    by: dict[str, Any]
    variant: str
    items: int
    rows: int
    correct: int | None
    unlabelled: int
    extraction_rate: float
    sources: dict[str, int]
    accuracy: Rate | None
    accuracy_read: Rate | None
    completion_tokens: float | None
    cut_off: float | None
    failed: float | None
    common_wrong: Rate | None = None
    con: Con | None = None
    bbq: Bbq | None = None
    grid: dict[str, Cell] | None = None
    votes: dict[str, VoteScore] | None = None
    average_accuracy: float | None = None


class Difference(msgspec.Struct, kw_only=True):
    """Mean of variant - baseline over ``n`` paired items, with the 95 % interval of a bootstrap over ``groups``."""

    estimate: float
    low: float | None
    high: float | None
    n: int
    groups: int


class Gain(msgspec.Struct, kw_only=True):
    """A WinoControl cell: accuracy gain over the baseline, and completion tokens that it cost more."""

    accuracy: Difference | None
    extra_tokens: float | None


class Pearson(msgspec.Struct, kw_only=True):
    """Correlation ``r`` over ``n`` cells with the p of a two-sided t test."""

    r: float
    p: float
    n: int


class Comparison(msgspec.Struct, kw_only=True):
    """A variant against the baseline in one metric. ``by`` is the facet.

    ``better`` and ``worse`` count the paired items on which the variant is above and below the baseline; ``p_holm`` is
    ``p`` corrected over the ``family`` of variants that were compared in this facet and metric; ``unpaired`` counts
    items that only the one or the other has. ``grid`` is the gain a WinoControl cell, ``cost`` the correlation of
    extra tokens with it.
    """

    kind: Literal["comparison"] = "comparison"
    by: dict[str, Any]
    metric: str
    variant: str
    baseline: str
    difference: Difference | None
    better: int
    worse: int
    test: Literal["mcnemar", "sign-flip"] | None
    p: float | None
    p_holm: float | None = None
    family: int = 0
    unpaired: dict[str, int]
    extra_tokens: float | None = None
    grid: dict[str, Gain] | None = None
    cost: Pearson | None = None

    @property
    def significant(self) -> bool:
        """Whether the difference stands after the correction."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT
