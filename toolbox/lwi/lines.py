"""What lwi-fuse reads and writes, line by line."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class ModelRow(msgspec.Struct, kw_only=True):
    """One model to fuse; the first row is the oldest."""

    needs: ClassVar[tuple[str, ...]] = ("model",)
    model: Annotated[
        str, msgspec.Meta(min_length=1, description="directory, .safetensors file, or smollm2; relative to --root")
    ]
    k: Annotated[Share | None, msgspec.Meta(description="weight of all models before this one")] = None
    task: str | None = None
    id: str | int | None = None


class GroupLine(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="event", tag="group"):
    """One permutation group. Costs (in the chosen metric) and cosines are over all weights that carry it."""

    group: str
    size: int
    tensors: int
    mode: Literal["similar", "dissimilar", "identity"]
    solver: str
    cost_identity: float
    cost: float
    moved: Annotated[float, msgspec.Meta(description="share of its channels that get another number")]
    cos_before: float
    cos_after: float
    recovered: Annotated[
        float | None, msgspec.Meta(description="--shuffle-seed: share of its channels that came back")
    ] = None
    step: Annotated[int | None, msgspec.Meta(description="more than two models: which one was added")] = None


class DoneLine(msgspec.Struct, kw_only=True, tag_field="event", tag="done"):
    """The whole fusion."""

    groups: int
    sweeps: int
    k: list[float]
    lossy: bool
    recalibrated: bool
    verified: Literal["full", "shrunk", "off"]
    verified_max_rel: float | None
    out: str


class PlanLine(msgspec.Struct, kw_only=True, tag_field="event", tag="plan"):
    """--dry-run: what would be done."""

    command: str
    models: int
    spec: str | None
    groups: int
    moving: int
    deep: list[str]
    parameters: int
    flops_per_sweep: float
    memory_mib: float
    output_bytes: int
    skipped: int
    settings: dict
