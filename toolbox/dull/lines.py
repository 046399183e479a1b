"""The rows that dull-noise, dull-train and dull-eval read and write; the shapes behind ``--schema``."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from toolbox.classify.rows import IMAGE_SHAPES as IMAGES


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


NOISED: tuple[type[msgspec.Struct], ...] = (NoisyRow, NoisePlan)

__all__ = ["IMAGES", "NOISED"]
