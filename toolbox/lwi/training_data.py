"""What lwi-train learns from: the images of one task, decoded on rank 0 and handed to all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.classify.manifest import Manifest, read_manifest
from toolbox.classify.rows import IMAGE_SHAPES
from toolbox.lwi.tasks import Split, class_order, split_by_field, split_classes
from toolbox.lwi.training_options import Options
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import display_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Images as bytes (n, 3, size, size) and their classes (n,), counted within the task."""

    pixels: Tensor
    targets: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of both."""
        found = hashlib.sha256(self.pixels.numpy().tobytes())
        found.update(self.targets.numpy().tobytes())
        return found.hexdigest()


class Source:
    """The manifest of a call, its rows checked; bad ones are counted and kept for --rejects."""

    def __init__(self, options: Any, call: Invocation) -> None:
        """``options`` has manifest, root, map_fields, on_bad and rejects."""
        self.options, self.call = options, call
        self.rejected: list[bytes] = []
        self.reader = RecordReader(
            IMAGE_SHAPES, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self.rejected.append(raw),
        )  # fmt: skip
        self.name = display_name(options.manifest)
        self.manifest = read_manifest(options.manifest, call.streams, self.reader, root=options.root)

    def images(self, manifest: Manifest, size: int) -> Any:
        """``load_images`` of (a part of) the manifest, by this call's --on-bad."""
        from toolbox.classify.images import load_images

        return load_images(manifest, size, skip=self._skip if self.options.on_bad == "skip" else None)

    def _skip(self, raw: bytes, problem: BadData) -> None:
        self.reader.bad(problem, raw)

    def close(self) -> None:
        """Tell how many rows were left out, and write them down."""
        if self.reader.skipped:
            self.call.reporter.warn(f"{self.reader.skipped} bad rows left out")
        if self.options.rejects is not None:
            write_rejects(self.options.rejects, self.rejected)


def find_split(source: Source, options: Options) -> Split:
    """The tasks of a manifest, by --task-field or --tasks and --class-order. Raises: as the splits do."""
    if options.task_field is None:
        assert options.tasks is not None
        order = class_order(source.manifest.labels, options.class_order, options.seed)
        return split_classes(order, options.tasks, source.name)
    split = split_by_field(source.manifest.samples, options.task_field, source.name)
    if options.tasks not in (None, len(split.tasks)):
        what = f"its field {options.task_field!r} tells {len(split.tasks)} tasks, --tasks {options.tasks}"
        raise BadData(what, "leave --tasks out", file=source.name)
    return split


def only(manifest: Manifest, labels: Sequence[str]) -> Manifest:
    """The rows of these classes, counted in this order."""
    kept = tuple(sample for sample in manifest.samples if sample.label in set(labels))
    return replace(manifest, samples=kept, labels=tuple(labels))


def validation(options: Options, call: Invocation, labels: Sequence[str], size: int) -> Pictures | None:
    """The images of --val that are of the task's classes. Raises: BadData (65) where there are none."""
    from toolbox.classify.images import load_images

    if options.val is None:
        return None
    root = None if Path(options.val).is_dir() else options.root
    part = only(read_manifest(options.val, call.streams, root=root), labels)
    if not part.samples:
        raise BadData("--val holds no image of the task's classes", f"as in {labels[0]!r}", file=options.val)
    images = load_images(part, size)
    return Pictures(images.pixels, images.targets)


def pack(pictures: Pictures | None) -> bytes:
    """For the other processes; no pickle."""
    if pictures is None:
        return b""
    pixels, targets = pictures.pixels.numpy(), pictures.targets.numpy()
    return msgspec.msgpack.encode([list(pixels.shape), pixels.tobytes(), targets.tobytes()])


def unpack(payload: bytes) -> Pictures | None:
    """What ``pack`` made."""
    if not payload:
        return None
    import numpy as np
    import torch

    shape, pixels, targets = msgspec.msgpack.decode(payload, type=tuple[list[int], bytes, bytes])
    return Pictures(
        torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(shape).copy()),
        torch.from_numpy(np.frombuffer(targets, np.int64).copy()),
    )
