"""What the commands write to stdout, as records; importing this costs no numpy."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec


class Estimate(msgspec.Struct):
    """A mean over ``n`` states or paths with its interval over questions; bounds are null for fewer than two."""

    estimate: float
    low: float | None
    high: float | None
    n: int
    level: float


class BinLine(msgspec.Struct):
    """The states of one stage of progress, or (``bin`` null) whole paths: of one k, facet and outcome."""

    event: Literal["bin"]
    k: int
    facet: dict[str, str | None]
    outcome: Literal["wrong", "correct", "all"]
    bin: int | None
    progress: list[float] | None
    states: int
    paths: int
    questions: int
    metrics: dict[str, Estimate | None]


class DoneLine(msgspec.Struct):
    """The last line: how much there was. ``judged`` paths have a right answer to compare with, ``read`` an answer.

    ``k`` are the numbers of choices, ``figures`` the names of the pictures in the output directory.
    """

    event: Literal["done"]
    questions: int
    paths: int
    states: int
    k: list[int]
    without_thoughts: int
    single_thought: int
    read: int
    judged: int
    correct: int
    figures: list[str]


class ScoredPath(msgspec.Struct, kw_only=True):
    """A path as it came in, with the probability that its answer is right: the weight of its vote."""

    score: Annotated[float, msgspec.Meta(ge=0, le=1, description="null for a path without thoughts")] | None
    pred: Annotated[
        str | int | float | bool | None, msgspec.Meta(description="as it came in, else the answer that was read")
    ]
