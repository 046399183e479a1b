"""The shapes of lines that the commands read and write, as ``--schema`` shows them. No numpy, no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

Name = str | int


class Event(msgspec.Struct, kw_only=True):
    """Who touched what and when; further fields serve as features."""

    needs: ClassVar[tuple[str, ...]] = ("user", "item", "ts")
    user: Name
    item: Name
    ts: Annotated[int | float, msgspec.Meta(description="a whole number after --ts-scale; the unit is yours")]
    label: Annotated[int | float | bool | None, msgspec.Meta(description="0 or 1; none: history only")] = None
    request: Name | None = None


class ItemRow(msgspec.Struct, kw_only=True):
    """Features of an item."""

    needs: ClassVar[tuple[str, ...]] = ("item",)
    item: Name


class PreparedPlan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: the dataset as it would be, without its files."""

    schema: str
    samples: dict[str, int]
    requests: dict[str, int]
    positive_rate: dict[str, float]


class Prepared(msgspec.Struct, tag="done", tag_field="event"):
    """The dataset that was made: the manifest without the hashes of its files."""

    schema: str
    samples: dict[str, int]
    requests: dict[str, int]
    positive_rate: dict[str, float]


class Verified(msgspec.Struct, tag="verify", tag_field="event"):
    """``--verify``: what is wrong with a dataset."""

    ok: bool
    problems: list[str]


EVENTS: tuple[type[msgspec.Struct], ...] = (Event,)
PREPARED: tuple[type[msgspec.Struct], ...] = (PreparedPlan, Prepared, Verified)


class HistoryEvent(msgspec.Struct, kw_only=True):
    """An event of a request's own history, with the features that the model was trained with."""

    item: Name
    ts: int | float
    label: int | float | bool | None = None


class Candidate(msgspec.Struct, kw_only=True):
    """A candidate with features; a bare item is a candidate too."""

    item: Name


class Request(msgspec.Struct, kw_only=True):
    """Candidates to be ranked for a user at a time."""

    needs: ClassVar[tuple[str, ...]] = ("user", "ts", "candidates")
    user: Name
    ts: Annotated[int | float, msgspec.Meta(description="the request's own time, in the unit of the data")]
    candidates: list[Name | dict[str, Any]]
    history: list[dict[str, Any]] | None = None
    labels: list[int | float | bool] | None = None
    id: Name | None = None


class Scored(msgspec.Struct, kw_only=True):
    """A request with its scores: probabilities, one a candidate."""

    scores: list[float]
    oov: int
    hist_len: int
    cache: Literal["hit", "miss", "off"]
    top: list[tuple[Name, float]] | None = None
    prefill_ms: float | None = None
    score_ms: float | None = None


REQUESTS: tuple[type[msgspec.Struct], ...] = (Request,)
SCORED: tuple[type[msgspec.Struct], ...] = (Scored,)
