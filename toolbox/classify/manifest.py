"""Labelled images as rows: a JSONL manifest, a folder a class, scikit-learn's digits, or files in MNIST's format.

A row is {"image": ..., "label": "cat" or 3, "id"?, "split"?, "task"?}; other fields pass through. ``image`` is a path
below the root, ``data:image/png;base64,...``, ``digits:17``, or ``idx:FILE.gz#17``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from toolbox.classify.idx import idx_pair
from toolbox.classify.rows import IMAGE_SHAPES
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.records import RecordReader, read_records
from toolbox.shell.streams import Streams, display_name

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
"""What counts as an image in a folder."""

DIGITS = 1797
"""Images of scikit-learn's digits."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: ``label`` as text, ``data`` what came in, ``place`` where it stands for messages."""

    id: str
    image: str
    label: str
    data: dict[str, Any] = field(repr=False)
    place: str
    split: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Manifest:
    """All rows in their order; ``labels`` are the classes, numbers by value and words by letter; ``root`` is where
    relative paths start."""

    samples: tuple[Sample, ...]
    labels: tuple[str, ...]
    root: Path
    skipped: int = 0


def read_manifest(
    source: str, streams: Streams, reader: RecordReader | None = None, *, root: str | None = None, least: int = 2
) -> Manifest:
    """Read ``-``, a manifest FILE, a DIR in image-folder layout, ``digits`` (``digits#train``, ``digits#test``), or
    ``idx:DIR`` (``idx:DIR#test``).

    No image is opened. Raises: MissingInput (66); BadData (65) for no rows, an id that is there twice, less than
    ``least`` classes, or a path that leaves the root.
    """
    reader = reader if reader is not None else RecordReader(IMAGE_SHAPES)
    samples, where = iter_samples(source, streams, reader, root=root)
    kept = tuple(samples)
    name = display_name(source)
    if not kept:
        raise BadData("is empty: holds no images", "one row, or one file, an image is expected", file=name)
    labels = sorted_labels(sample.label for sample in kept)
    if len(labels) < least:
        raise BadData(f"has one class only, {labels[0]!r}", "two or more are needed to tell apart", file=name)
    return Manifest(kept, labels, where, reader.skipped)


def iter_samples(
    source: str, streams: Streams, reader: RecordReader, *, root: str | None = None
) -> tuple[Iterator[Sample], Path]:
    """The rows of ``read_manifest`` one after another, as they are read, and the folder that their paths start from.

    Raises: as ``read_manifest``, but for what only all rows can tell (none at all, one class).
    """
    where = Path(root) if root is not None else None
    if source in ("digits", "digits#train", "digits#test"):
        samples = _digits(source.partition("#")[2])
    elif source.startswith("idx:"):
        samples = _idx_folder(source.removeprefix("idx:"))
    elif source != "-" and Path(source).is_dir():
        where, samples = where or Path(source), _folder(Path(source), where)
    else:
        where = where or (Path(".") if source == "-" else Path(source).parent)
        samples = _rows(source, streams, reader)
    return _checked(samples, reader), where or Path(".")


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The classes: by value where all are whole numbers, else by letter."""
    found = set(labels)
    numeric = all(label.removeprefix("-").isascii() and label.removeprefix("-").isdigit() for label in found)
    return tuple(sorted(found, key=int if numeric else str))


def _rows(source: str, streams: Streams, reader: RecordReader) -> Iterator[Sample]:
    for record in read_records(source, streams, reader, "the manifest"):
        value = record.value
        place = record.file if record.line is None else f"{record.file}:{record.line}"
        try:
            _check_path(value.image, record.bad)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        task = None if value.task is None else str(value.task)
        yield Sample(record.id, value.image, str(value.label), record.data, place, value.split, task)


def _check_path(image: str, bad: Any) -> None:
    """Paths stay below the root, whatever a manifest says."""
    if image.startswith(("data:", "digits:")):
        return
    path = PurePosixPath(image.removeprefix("idx:"))
    if path.is_absolute() or ".." in path.parts or "\0" in image:
        raise bad(f"the path {image[:80]!r} leaves the root", "name files below --root", "$.image")


def _checked(samples: Iterable[Sample], reader: RecordReader) -> Iterator[Sample]:
    places: dict[str, str] = {}
    for sample in samples:
        if sample.id in places:
            what = f"the id {sample.id!r} stands at {places[sample.id]} already"
            reader.bad(BadData(f"{sample.place}: {what}", "give every row an id of its own"),
                       msgspec.json.encode(sample.data))  # fmt: skip
            continue
        places[sample.id] = sample.place
        yield sample


def _folder(folder: Path, root: Path | None) -> Iterator[Sample]:
    """One sub-folder a class; images at any depth below it. Ids are the paths, in sorted order."""
    base = root or folder
    found = False
    for kind in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        for parent, folders, names in os.walk(kind):
            folders.sort()
            for name in sorted(names):
                if Path(name).suffix.lower() not in SUFFIXES:
                    continue
                found = True
                path = Path(parent, name)
                shown = path.relative_to(folder).as_posix()
                image = os.path.relpath(path, base)
                yield Sample(shown, image, kind.name, {"id": shown, "image": image, "label": kind.name}, str(path))
    if not found:
        raise BadData("holds no images in sub-folders", "one sub-folder a class is expected", file=str(folder))


def _digits(split: str) -> Iterator[Sample]:
    """All digits, or without and with every fifth: scikit-learn tells no split of its own."""
    from sklearn.datasets import load_digits

    for number, label in enumerate(load_digits().target):
        if split and (split == "test") != (number % 5 == 4):
            continue
        data = {"id": str(number), "image": f"digits:{number}", "label": str(label)}
        yield Sample(data["id"], data["image"], data["label"], data, f"digits:{number}")


def _idx_folder(text: str) -> Iterator[Sample]:
    """A folder of MNIST's four files, plain or gzipped; ``#test`` takes the t10k pair."""
    name, _, split = text.partition("#")
    folder = Path(name)
    if not folder.is_dir():
        raise MissingInput(f"idx:{name}: no such directory", "a folder of MNIST's four files is expected")
    if split not in ("", "train", "test"):
        raise BadData(f"idx:{text}: the split is train or test", "as in idx:DIR#test")
    images, labels = idx_pair(folder, "t10k" if split == "test" else "train")
    for number, label in enumerate(labels):
        reference = f"idx:{images}#{number}"
        data = {"id": str(number), "image": reference, "label": int(label)}
        yield Sample(str(number), reference, str(int(label)), data, reference, split or "train")
