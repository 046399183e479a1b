"""The rows that dull-noise, dull-train and dull-eval read and write; the shapes behind ``--schema``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec

from toolbox.classify.rows import IMAGE_SHAPES as IMAGES
from toolbox.training.events import ResumeEvent


class Noise(msgspec.Struct):
    """What dull-noise adds to a row."""

    label_clean: str | int
    flipped: bool


class NoisyRow(msgspec.Struct, kw_only=True):
    """An image row whose ``label`` may be wrong."""

    image: str
    label: str | int
    id: str | int
    dull: Noise


class NoisePlan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: classes head first, counts before and after, rates."""

    command: str
    settings: dict[str, Any]
    classes: list[str]
    n: int
    counts: list[int]
    observed: list[int]
    rate: Annotated[float, msgspec.Meta(description="mislabelled share of all images")]
    rate_nonhead: float
    moved: list[list[int]]


class TrainPlan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: classes, counts, steps, memory of images and posteriors."""

    command: str
    settings: dict[str, Any]
    rows: int
    holdout: int
    classes: list[str]
    counts: list[int]
    imbalance: float
    steps: int
    warmup_epochs: int
    memory_bytes: int


class Start(msgspec.Struct, tag="start", tag_field="event"):
    """First event."""

    command: str
    settings: dict[str, Any]
    rows: int
    holdout: int
    classes: list[str]
    counts: list[int]
    imbalance: float
    shots: dict[str, list[str]]
    shots_by: str
    parameters: int
    steps: int
    warmup_epochs: int
    processes: int


class Step(msgspec.Struct, tag="step", tag_field="event"):
    """One optimiser step; losses are means over its images."""

    step: int
    epoch: int
    lr: float
    loss: float
    images: int
    grad_norm: float
    seconds: float
    loss_ce: float | None = None
    loss_ifd: float | None = None
    loss_keep: float | None = None
    loss_unlearn: float | None = None


class Epoch(msgspec.Struct, tag="epoch", tag_field="event"):
    """Behind an epoch: means of its losses, the gate, accuracy where --eval is given, detection where clean labels
    are known. ``gate_open`` and ``acting_share`` are those of the epoch to come."""

    step: int
    epoch: int
    lr: float
    loss: float
    seconds: float
    loss_ce: float | None = None
    loss_ifd: float | None = None
    loss_keep: float | None = None
    loss_unlearn: float | None = None
    gate_density: float | None = None
    gate_open: list[str] | None = None
    gate: Annotated[str | None, msgspec.Meta(description="the verdict: kept, opened, closed or tripped")] = None
    flagged_share: float | None = None
    acting_share: float | None = None
    dprime: list[float | None] | None = None
    agreement: list[float | None] | None = None
    evidence: Annotated[float | None, msgspec.Meta(description="gain of T over none on the hold-out, in nats")] = None
    evidence_error: float | None = None
    holdout_loglik: float | None = None
    rarest: Annotated[float | None, msgspec.Meta(description="least share of a class as predicted over its π")] = None
    acc: float | None = None
    acc_ci: list[float] | None = None
    n: int | None = None
    macro_f1: float | None = None
    recall: list[float | None] | None = None
    predicted: list[int] | None = None
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    auc: float | None = None
    auc_by_class: list[float | None] | None = None
    flag_precision: float | None = None
    flag_recall: float | None = None
    noise_before: float | None = None
    noise_after: float | None = None


class Tripped(msgspec.Struct, tag="gate_tripped", tag_field="event"):
    """The circuit breaker: weights of the last good epoch are back, labels are as given, the gate is shut for good."""

    step: int
    epoch: int


class Warned(msgspec.Struct, tag="warning", tag_field="event"):
    """Something that a reader of the list of doubts should know."""

    step: int
    text: str


class Done(msgspec.Struct, tag="done", tag_field="event"):
    """Last event: the last epoch's averaged weights on --eval, and the detection figures."""

    model: str
    method: str
    steps: int
    stopped: str
    gate_open: list[str]
    gate_tripped: bool
    samples: int
    seed: int
    seconds: float
    acc: float | None = None
    acc_ci: list[float] | None = None
    n: int | None = None
    predicted: list[int] | None = None
    acc_last10: float | None = None
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    macro_f1: float | None = None
    recall: list[float | None] | None = None
    detection: dict[str, Any] | None = None


class Doubt(msgspec.Struct):
    """What dull-train says of a sample."""

    suggested: str
    labels: list[str]
    p_clean: float
    q_given: float
    q_top: float
    flagged: bool
    acted: bool = False
    held_out: bool = False


class SampleRow(msgspec.Struct, kw_only=True):
    """A line of samples.jsonl."""

    needs: ClassVar[tuple[str, ...]] = ("id", "label", "dull")
    id: str
    label: str
    dull: Doubt


class Predicted(msgspec.Struct):
    """What dull-eval adds to a row: the class it takes it for, and its probability."""

    pred: str
    p: float


class PredictedRow(msgspec.Struct, kw_only=True):
    """An image row with its prediction."""

    id: str | int
    image: str
    label: str | int
    dull: Predicted


class JudgePlan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``: how many rows, and the model's classes."""

    command: str
    settings: dict[str, Any]
    rows: int
    classes: list[str]


class Judged(msgspec.Struct, tag="done", tag_field="event"):
    """The last line: accuracy with its 95 % interval, by shot group and by class; with --samples detection."""

    model: str
    classes: list[str]
    acc: float
    acc_ci: list[float]
    n: int
    macro_f1: float
    recall: list[float | None]
    predicted: list[int]
    shots: dict[str, list[str]]
    shots_by: str
    many: float | None = None
    medium: float | None = None
    few: float | None = None
    detection: dict[str, Any] | None = None


JUDGED: tuple[type[msgspec.Struct], ...] = (PredictedRow, JudgePlan, Judged)

TRAINED: tuple[type[msgspec.Struct], ...] = (TrainPlan, Start, ResumeEvent, Step, Epoch, Tripped, Warned, Done)

NOISED: tuple[type[msgspec.Struct], ...] = (NoisyRow, NoisePlan)

__all__ = ["IMAGES", "JUDGED", "NOISED", "TRAINED"]
