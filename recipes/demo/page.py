"""The page of the tour: one HTML file with its style and pictures inside, which loads nothing and runs nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import platform
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from recipes.demo.runner import STDERR, Outcome
from recipes.demo.screen import took
from recipes.demo.step import Step
from toolbox.shell.atomic import atomic_file
from toolbox.shell.errors import BadData, clean

HERE = Path(__file__).resolve().parent
_WIDE = 720
"""Pixels from which a picture gets the whole width."""
_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Image:
    """A picture as a data URI, with its size in CSS pixels."""

    uri: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        return self.width > _WIDE


def write(path: Path, outcomes: Sequence[Outcome], missing: Sequence[Step], root: Path) -> None:
    """Write the page of these outcomes, and of the steps that were not run yet."""
    text = render(outcomes, missing, root)
    with atomic_file(path) as handle:
        handle.write(text.encode())


def render(outcomes: Sequence[Outcome], missing: Sequence[Step], root: Path) -> str:
    """The page as text. Whatever stands in the outcomes is shown as text and never as markup.

    Raises: BadData (65) for a picture that is none.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style = (HERE / "page.css").read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    pictures = {
        one.step.name: embed(root / one.step.name / one.step.picture.file) for one in outcomes if one.status == "done"
    }
    return environment.get_template("page.html.j2").render(
        style=style, style_hash=digest, outcomes=outcomes, missing=missing, root=root, pictures=pictures, took=took,
        size=in_words, clean=clean, stderr=STDERR, machine=machine(),
        done=sum(one.status == "done" for one in outcomes),
        seconds=sum(one.seconds for one in outcomes), cpu=sum(one.cpu_seconds for one in outcomes),
    )  # fmt: skip


def embed(path: Path) -> Image:
    """A picture's bytes as a data URI. Raises: BadData (65) for what is neither SVG nor PNG."""
    data = path.read_bytes()
    size = _svg_size(data) if path.suffix == ".svg" else _png_size(data) if path.suffix == ".png" else None
    if size is None:
        raise BadData(f"{path}: is not a picture", "a step's picture is an SVG or PNG file")
    uri = f"data:{_TYPES[path.suffix]};base64,{base64.b64encode(data).decode()}"
    return Image(uri, *size)


def _svg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in CSS pixels, from the root element's points."""
    head = data[:4000].decode("utf-8", "replace")
    found = [re.search(rf'<svg[^>]*\b{name}="([0-9.]+)pt"', head) for name in ("width", "height")]
    if not all(found):
        return None
    width, height = (round(float(one[1]) * 96 / 72) for one in found if one)
    return width, height


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in CSS pixels, at the house's 150 dots an inch."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return round(width * 96 / 150), round(height * 96 / 150)


def in_words(size: int) -> str:
    """``4 kB``, ``538 MB``."""
    for unit, worth in (("GB", 10**9), ("MB", 10**6), ("kB", 1000)):
        if size >= worth:
            return f"{size / worth:.1f} {unit}" if unit == "GB" else f"{size / worth:.0f} {unit}"
    return f"{size} B"


def machine() -> str:
    """What the figures were made on."""
    versions = []
    for name in ("torch", "transformers"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([f"{platform.system()} {platform.machine()}, {cores} cores", f"Python {platform.python_version()}",
                      *versions])  # fmt: skip
