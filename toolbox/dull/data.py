"""What a run learns from: images in memory, their given labels, a hold-out of them; the same on every process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolbox.classify.images import Images, load_images
from toolbox.classify.manifest import Manifest, Sample, read_manifest, sorted_labels
from toolbox.classify.rows import IMAGE_SHAPES
from toolbox.shell.errors import BadData, InternalError
from toolbox.shell.records import RecordReader, write_rejects
from toolbox.shell.streams import Streams, display_name
from toolbox.training.processes import broadcast_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

Rows = NDArray[np.int64]

UNKNOWN = -1
"""A clean label that is not told."""
_BLOCK = 2048


class Facts(msgspec.Struct):
    """Everything about the rows but their pixels, as it travels between processes."""

    ids: list[str]
    labels: list[str]
    given: list[int]
    clean: list[int] | None


@dataclass(frozen=True)
class Corpus:
    """``pixels`` uint8 (n, 3, size, size), ``given`` labels (n,). ``train`` and ``holdout`` are rows.

    ``clean`` labels, where known, serve figures only: nothing that is learned may see them.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    pixels: Tensor
    given: Rows
    clean: Rows | None
    train: Rows
    holdout: Rows

    @property
    def counts(self) -> Rows:
        """Training images a class, as labelled."""
        return np.bincount(self.given[self.train], minlength=len(self.labels))

    def digest(self) -> str:
        """SHA-256 of what decides the weights: ids, given labels, pixels. Not of clean labels."""
        found = hashlib.sha256(msgspec.json.encode([self.ids, self.labels, self.given.tolist()]))
        found.update(self.pixels.numpy().tobytes())
        return found.hexdigest()


def read_rows(
    source: str,
    streams: Streams,
    *,
    root: str | None,
    renames: dict[str, str],
    on_bad: str,
    limit: int | None = None,
    least: int = 2,
) -> tuple[Manifest, list[bytes]]:
    """The manifest, its first ``limit`` rows; and the rows left out by ``--on-bad skip``.

    ``least``: how many classes it must have.
    """
    rejected: list[bytes] = []
    reader = RecordReader(IMAGE_SHAPES, renames=renames, on_bad=on_bad, rejects=lambda raw, _: rejected.append(raw))
    manifest = read_manifest(source, streams, reader, root=root, least=least)
    if limit is not None and limit < len(manifest.samples):
        samples = manifest.samples[:limit]
        labels = sorted_labels(sample.label for sample in samples)
        if len(labels) < 2:
            raise BadData(f"--limit {limit} leaves one class only", "take more rows", file=display_name(source))
        manifest = Manifest(samples, labels, manifest.root, manifest.skipped)
    return manifest, rejected


def decode(manifest: Manifest, size: int, on_bad: str, rejected: list[bytes], advance: Callable[[], None]) -> Images:
    """The images; those that cannot be had are an error or, with ``--on-bad skip``, go to ``rejected``."""
    skip = None if on_bad == "fail" else lambda raw, _: rejected.append(raw)
    return load_images(manifest, size, skip=skip, advance=advance)


def report_skipped(rejected: Sequence[bytes], path: str | None, warn: Callable[[str], None], dry_run: bool) -> None:
    """Say how many rows were left out, and keep them where asked for."""
    if rejected:
        warn(f"{len(rejected)} bad rows left out")
        if path is not None and not dry_run:
            write_rejects(path, rejected)


def clean_labels(samples: Sequence[Sample], labels: Sequence[str], field: str) -> list[int] | None:
    """Clean labels from a field (dots lead into objects), None where no row has any; unknown classes count as none."""
    place = {label: number for number, label in enumerate(labels)}
    found = []
    for sample in samples:
        value: Any = sample.data
        for part in field.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        plain = isinstance(value, str | int) and not isinstance(value, bool)
        found.append(place.get(str(value), UNKNOWN) if plain else UNKNOWN)
    return found if any(one != UNKNOWN for one in found) else None


def split_holdout(given: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows never trained on: a stratified share of the noisy labels.

    At least one of every class of 20 or more; none of smaller classes, which cannot spare any.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 11])))
    held = []
    for number in range(int(given.max()) + 1):
        members = np.flatnonzero(given == number)
        count = max(1, round(share * len(members))) if len(members) >= 20 and share > 0 else 0
        held.append(generator.permutation(members)[:count])
    holdout = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(given)), holdout), holdout


def make_corpus(facts: Facts, pixels: Tensor, holdout: float, seed: int) -> Corpus:
    """The corpus of these rows, its hold-out drawn by ``seed``."""
    given = np.array(facts.given, dtype=np.int64)
    train, held = split_holdout(given, holdout, seed)
    clean = None if facts.clean is None else np.array(facts.clean, dtype=np.int64)
    return Corpus(tuple(facts.ids), tuple(facts.labels), pixels, given, clean, train, held)


def gather_facts(images: Images, field: str) -> Facts:
    """What rank 0 tells the others of the rows."""
    ids = [sample.id for sample in images.samples]
    clean = clean_labels(images.samples, images.labels, field)
    return Facts(ids, list(images.labels), images.targets.tolist(), clean)


def share_pixels(accelerator: Accelerator, pixels: Tensor | None) -> Tensor:
    """Rank 0's images on every rank, sent in blocks: each image is decoded once."""
    if accelerator.num_processes == 1:
        if pixels is None:
            raise InternalError("no images on the only process")
        return pixels
    shape = msgspec.json.decode(
        broadcast_bytes(accelerator, None if pixels is None else msgspec.json.encode(list(pixels.shape)))
    )
    whole = torch.empty(shape, dtype=torch.uint8) if pixels is None else pixels
    for block in whole.split(_BLOCK):
        travelling = block.to(accelerator.device).contiguous()
        torch.distributed.broadcast(travelling, 0)
        if pixels is None:
            block.copy_(travelling)
    return whole
