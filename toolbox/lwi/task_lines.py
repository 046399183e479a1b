"""What lwi-train and lwi-eval write to stdout, one JSON object a line; the shapes behind --schema."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from toolbox.training.events import ResumeEvent

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class PlanEvent(msgspec.Struct, tag="plan", tag_field="event"):
    """--dry-run of lwi-train: what would be learned."""

    command: str
    task: int
    classes: list[str]
    learned: Annotated[int, msgspec.Meta(description="classes of all earlier tasks")]
    images: int
    steps: int
    parameters: int
    memory_bytes: int
    settings: dict[str, Any]


class StartEvent(msgspec.Struct, tag="start", tag_field="event"):
    """First event: settings in force and counts."""

    command: str
    settings: dict[str, Any]
    task: int
    classes: list[str]
    learned: int
    images: int
    val: int
    parameters: int
    steps: int
    processes: int


class StepEvent(msgspec.Struct, tag="step", tag_field="event"):
    """One step over ``n`` images: loss = ce + λ kd, and the share that the new head got right."""

    step: int
    epoch: int
    lr: float
    loss: float
    ce: float
    kd: float
    right: Share
    n: int
    grad_norm: float
    seconds: float


class EpochEvent(msgspec.Struct, tag="epoch", tag_field="event"):
    """One epoch: means over its images while they were learned; TAw, TAg and loss of --val at its end."""

    epoch: int
    step: int
    loss: float
    ce: float
    kd: float
    right: Share
    taw: Share | None
    tag: Share | None
    val_loss: float | None
    lr: float
    seconds: float


class DoneEvent(msgspec.Struct, tag="done", tag_field="event"):
    """Last event: the model, the classes of its head, and its figures on --val."""

    model: str
    task: int
    classes: int
    steps: int
    stopped: str
    taw: Share | None
    tag: Share | None
    val_loss: float | None
    seed: int
    seconds: float


TRAINED: tuple[type[msgspec.Struct], ...] = (PlanEvent, StartEvent, ResumeEvent, StepEvent, EpochEvent, DoneEvent)


class EvalPlan(msgspec.Struct, tag="plan", tag_field="event"):
    """--dry-run of lwi-eval: the states (their last task's number), the tasks, and the images of each."""

    command: str
    series: dict[str, list[int]]
    tasks: list[list[str]]
    images: list[int]
    settings: dict[str, Any]


class CellEvent(msgspec.Struct, tag="cell", tag_field="event"):
    """The state after task t on the n images of task u: TAw, TAg, Wilson intervals, F[t, u] of both."""

    name: str
    model: str
    t: int
    u: int
    taw: Share
    tag: Share
    n: int
    ci: tuple[float, float]
    tag_ci: tuple[float, float]
    forgetting: float | None
    forgetting_tag: float | None


class OverlapEvent(msgspec.Struct, tag="overlap", tag_field="event"):
    """--stats: how much tasks u and v use the same channels of a group, Σ min / Σ max of mean |activation|."""

    group: str
    u: int
    v: int
    overlap: float | None


class _Summary(msgspec.Struct, kw_only=True):
    """Of each state of a series: its t, averages over tasks, averages weighted by classes, mean forgetting."""

    name: str
    t: list[int]
    avg_taw: list[Share]
    wavg_taw: list[Share]
    avg_taw_ci: Annotated[tuple[float, float], msgspec.Meta(description="of the last state, by bootstrap")]
    avg_tag: list[Share]
    wavg_tag: list[Share]
    avg_tag_ci: tuple[float, float]
    forgetting: list[float | None]
    forgetting_tag: list[float | None]


class BaselineEvent(_Summary, tag="baseline", tag_field="event", kw_only=True):
    """Another series; ``difference``: the last state of the first series minus this one's, paired by image."""

    difference: dict[str, Any] | None


class EvalDone(_Summary, tag="done", tag_field="event", kw_only=True):
    """Last line: the series of the command line."""

    tasks: int
    n: int


EVALUATED: tuple[type[msgspec.Struct], ...] = (EvalPlan, CellEvent, OverlapEvent, BaselineEvent, EvalDone)
