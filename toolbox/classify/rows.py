"""The shape of an image row. No numpy: ``--schema`` needs it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from toolbox.shell.records import Text


class ImageRow(msgspec.Struct, kw_only=True):
    """One labelled image."""

    needs: ClassVar[tuple[str, ...]] = ("image", "label")
    image: Annotated[
        Text, msgspec.Meta(description="path below --root, data:image/png;base64,..., digits:17 or idx:FILE.gz#17")
    ]
    label: str | int
    id: str | int | None = None
    split: str | None = None
    task: str | int | None = None


IMAGE_SHAPES: tuple[type[msgspec.Struct], ...] = (ImageRow,)
