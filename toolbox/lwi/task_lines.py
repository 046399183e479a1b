"""What lwi-train and lwi-eval write to stdout, one JSON object a line; the shapes behind --schema."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

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


class ResumeEvent(msgspec.Struct, tag="resume", tag_field="event"):
    """The run goes on behind this step."""

    step: int


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
