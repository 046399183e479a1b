"""The shapes of lines that the commands read and write, as ``--schema`` shows them. No numpy, no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from toolbox.training.events import ResumeEvent

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


class Figures(msgspec.Struct, kw_only=True):
    """How a split was ranked; None where the data do not determine a figure."""

    n: int
    positives: int
    auc: float | None
    logloss: float
    gauc: float | None
    coverage: dict[str, float] | None


class TrainPlan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: what the run would read and cost."""

    command: str
    settings: dict[str, Any]
    requests: int
    labels: int
    steps: int
    parameters: dict[str, Any]


class TrainStart(msgspec.Struct, tag="start", tag_field="event"):
    """First event: settings in force and counts."""

    command: str
    settings: dict[str, Any]
    requests: int
    labels: int
    parameters: dict[str, int]
    steps: int
    processes: int


class TrainStep(msgspec.Struct, tag="step", tag_field="event"):
    """One step: its labels, history events, mean loss, learning rate of the dense part, speed."""

    step: int
    epoch: int
    lr: float
    loss: float
    labels: int
    tokens: int
    grad_norm: float
    seconds: float
    labels_per_s: float
    tokens_per_s: float


class TrainEval(msgspec.Struct, tag="eval", tag_field="event"):
    """The validation split after ``step`` steps."""

    step: int
    sets: dict[str, Figures]
    seconds: float


class TrainDone(msgspec.Struct, tag="done", tag_field="event"):
    """Last event: both splits, what the model is made of, what a label costs (training, FLOPs), peak memory."""

    model: str
    steps: int
    stopped: str
    labels: int
    valid: Figures
    test: Figures
    params: dict[str, int]
    flops_per_label: float | None
    seed: int
    seconds: float
    peak_mem_mb: float


TRAINED: tuple[type[msgspec.Struct], ...] = (
    TrainPlan, TrainStart, ResumeEvent, TrainStep, TrainEval, TrainDone,
)  # fmt: skip


class ScoredRequest(msgspec.Struct, kw_only=True):
    """A request with its scores and labels, as longer-score writes it."""

    needs: ClassVar[tuple[str, ...]] = ("labels", "scores")
    labels: list[int | float | bool]
    scores: Annotated[list[float], msgspec.Meta(description="probabilities")]
    user: Name | None = None
    hist_len: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None


class ScoredRow(msgspec.Struct, kw_only=True):
    """One scored candidate."""

    needs: ClassVar[tuple[str, ...]] = ("label", "score")
    label: int | float | bool
    score: Annotated[float, msgspec.Meta(description="a probability")]
    user: Name | None = None
    request: Name | None = None
    hist_len: Annotated[int, msgspec.Meta(ge=0, le=2**53)] | None = None


class Judged(msgspec.Struct, kw_only=True):
    """The figures of all rows; null where the data do not determine one."""

    n: int
    positives: int
    auc: float | None
    logloss: float
    gauc: float | None
    avg_auc: float | None
    coverage: Annotated[
        dict[str, float] | None, msgspec.Meta(description="shares of rows and of groups that GAUC is over")
    ]
    calibration: Annotated[float | None, msgspec.Meta(description="mean score over share of positives")]
    ece10: float
    by_length: list[dict[str, float | None]]
    notes: list[str]
    auc_ci: list[float] | None = None
    difference: Annotated[
        dict[str, Any] | None, msgspec.Meta(description="these figures minus those of --compare, paired intervals")
    ] = None


SCORED_ROWS: tuple[type[msgspec.Struct], ...] = (ScoredRequest, ScoredRow)
JUDGED: tuple[type[msgspec.Struct], ...] = (Judged,)
