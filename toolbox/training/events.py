"""What trainers write to stdout, one JSON object a line; the shapes behind ``--schema``."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec


class Metrics(msgspec.Struct):
    """One set of rows at one step: rows scored, extraction strength and answer probability with 95 % intervals."""

    n: int
    es: float
    es_interval: tuple[float | None, float | None]
    prob: float
    prob_interval: tuple[float | None, float | None]


class PlanEvent(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: what the run would do."""

    command: str
    steps: int
    parameters: int
    settings: dict[str, Any]


class StartEvent(msgspec.Struct, tag="start", tag_field="event"):
    """First event: the settings in force, counts, the resolved learning rate."""

    command: str
    settings: dict[str, Any]
    rows: dict[str, int]
    parameters: int
    trainable: int
    lr: float
    steps: int
    processes: int
    template: str
    parts: dict[str, int] | None = None  # trained numbers by part, where a module beside the model is trained


class ResumeEvent(msgspec.Struct, tag="resume", tag_field="event"):
    """The run goes on behind this step; events after it replace those of the interrupted part."""

    step: int


class StepEvent(msgspec.Struct, tag="step", tag_field="event"):
    """One optimiser step; objectives add fields (``loss_forget``, ``tokens_retain``, ...)."""

    step: int
    epoch: int
    lr: float
    loss: float
    grad_norm: float
    seconds: float


class EvalEvent(msgspec.Struct, tag="eval", tag_field="event"):
    """The watched sets after ``step`` steps."""

    step: int
    sets: dict[str, Metrics]
    seconds: float


class DoneEvent(msgspec.Struct, tag="done", tag_field="event"):
    """Last event: where the model is and what the run did to the watched sets."""

    model: str
    steps: int
    stopped: Annotated[str, msgspec.Meta(description="epochs, or the --stop-when expression that held")]
    before: dict[str, Metrics]
    after: dict[str, Metrics]
    seconds: float


def trainer_schema() -> dict[str, Any]:
    """JSON Schemas of the rows that a trainer of language models reads and of the events that it writes."""
    from toolbox.shell.records import TRAINING_SHAPES, json_schema

    return {"input": json_schema(TRAINING_SHAPES), "output": json_schema(EVENTS)}


EVENTS: tuple[type[msgspec.Struct], ...] = (PlanEvent, StartEvent, ResumeEvent, StepEvent, EvalEvent, DoneEvent)
