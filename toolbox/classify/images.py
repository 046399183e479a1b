"""Images into memory: decoded by Pillow, RGB, one size, kept as bytes.

Sixty thousand small JPEGs take about twenty seconds to decode and 180 MB at 32 x 32: read once, not once an epoch.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from toolbox.classify.idx import read_idx
from toolbox.classify.manifest import DIGITS, Manifest, Sample
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What Pillow may try: image formats, no documents, no external programs."""

MOST_PIXELS = 64_000_000
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_NAMED = 5


class Unreadable(Exception):
    """An image that is missing or cannot be decoded; the text says why."""


def load_image(reference: str, root: Path) -> Image:
    """The image of a reference as RGB, whatever mode it is stored in. Raises: Unreadable."""
    from PIL import Image as images

    if reference.startswith("digits:"):
        return images.fromarray(_digit(reference)).convert("RGB")
    if reference.startswith("idx:"):
        return images.fromarray(_idx(reference, root)).convert("RGB")
    if reference.startswith("data:"):
        header = _DATA_URI.match(reference)
        if header is None:
            raise Unreadable("a data URI must be image/...;base64")
        try:
            source: io.BytesIO | Path = io.BytesIO(base64.b64decode(reference[header.end() :], validate=True))
        except (binascii.Error, ValueError):
            raise Unreadable("its base64 is damaged") from None
    else:
        source = root / reference
    try:
        with images.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels")
            return image.convert("RGB")
    except FileNotFoundError:
        raise Unreadable("is missing") from None
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError, EOFError) as error:
        raise Unreadable(f"cannot be decoded ({str(error)[:80]})") from None


def _number(text: str, count: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= count:
        raise Unreadable(f"{text!r} is not a number below {count}")
    return int(text)


@functools.cache
def _digits() -> np.ndarray:
    """scikit-learn's images, whose values are 0 to 16, as bytes (1797, 8, 8)."""
    from sklearn.datasets import load_digits

    return (load_digits().images * (255 / 16)).round().astype(np.uint8)


def _digit(reference: str) -> np.ndarray:
    return _digits()[_number(reference.removeprefix("digits:"), DIGITS)]


def _idx(reference: str, root: Path) -> np.ndarray:
    name, _, number = reference.removeprefix("idx:").rpartition("#")
    values = read_idx(str(root / name))
    if values.ndim != 3:
        raise Unreadable(f"{name} holds no images")
    return values[_number(number, len(values))]


def to_bytes(image: Image, size: int | None) -> Tensor:
    """uint8 (3, height, width); with ``size`` the shorter side is brought to it and the middle square is kept."""
    if size is not None and image.size != (size, size):
        from PIL import Image as images

        scale = size / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale))), images.Resampling.BILINEAR
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(image, dtype=np.uint8).copy()).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Images:
    """Decoded images beside their rows: ``pixels`` uint8 (n, 3, size, size), ``targets`` int64 (n,) into ``labels``."""

    samples: tuple[Sample, ...]
    pixels: Tensor
    targets: Tensor
    labels: tuple[str, ...]

    def take(self, keep: Sequence[int]) -> Images:
        """The rows at these places."""
        index = torch.as_tensor(list(keep), dtype=torch.int64)
        return Images(tuple(self.samples[i] for i in keep), self.pixels[index], self.targets[index], self.labels)


def load_images(
    manifest: Manifest,
    size: int,
    *,
    skip: Callable[[bytes, BadData], None] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Images:
    """Decode every image of a manifest at one size.

    ``skip`` is given the row and the complaint of each image that cannot be had; without it they are an error that
    counts them and names the first five. Raises: BadData (65), also when nothing is left.
    """
    pixels = torch.empty(len(manifest.samples), 3, size, size, dtype=torch.uint8)
    kept: list[Sample] = []
    failed: list[tuple[Sample, str]] = []
    for sample in manifest.samples:
        try:
            pixels[len(kept)] = to_bytes(load_image(sample.image, manifest.root), size)
            kept.append(sample)
        except Unreadable as reason:
            failed.append((sample, str(reason)))
        advance()
    if failed and skip is None:
        named = ", ".join(f"{sample.image[:80]} {why}" for sample, why in failed[:_NAMED])
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        what = f"{failed[0][0].place}: {len(failed)} of {len(manifest.samples)} images: {named}{more}"
        raise BadData(what, "check --root, or leave them out with --on-bad skip")
    for sample, why in failed:
        assert skip is not None
        skip(msgspec.json.encode(sample.data), BadData(f"{sample.place}: {why}"))
    if not kept:
        raise BadData("no image could be read", "check --root")
    place = {label: number for number, label in enumerate(manifest.labels)}
    targets = torch.tensor([place[sample.label] for sample in kept])
    return Images(tuple(kept), pixels[: len(kept)], targets, manifest.labels)
