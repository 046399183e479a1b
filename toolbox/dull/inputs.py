"""What dull-train reads: rows, images, and the plan that ``--dry-run`` shows of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toolbox.classify.classifier import Pixels, stored_pixels
from toolbox.classify.learned import tasks_with
from toolbox.dull.options import Options
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.streams import JsonlWriter, display_name

if TYPE_CHECKING:
    from toolbox.classify.images import Images
    from toolbox.classify.manifest import Manifest
    from toolbox.models.load import ModelSource

CIFAR10 = Pixels(32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Inputs:
    """What rank 0 has read: training images and, for reporting only, others."""

    train: Images
    held: Images | None


def choose_pixels(options: Options, source: ModelSource | None) -> Pixels:
    """How bytes become pixels: as the model stores it, CIFAR-10's mean and deviation for a network of ours."""
    if source is None:
        return replace(CIFAR10, size=options.image_size or CIFAR10.size)
    return stored_pixels(source, options.image_size, replace(CIFAR10, size=224))


def read_inputs(
    options: Options, call: Invocation, renames: dict[str, str], source: ModelSource | None = None
) -> tuple[Manifest, Manifest | None, list[bytes]]:
    """Training rows, those to report on, and bad rows as they came. BadData (65): a class that training has not.

    Classes that the model of ``source`` has learned come first, in its order.
    """
    from toolbox.dull.data import read_rows

    train, rejected = read_rows(
        options.source, call.streams, root=options.root, renames=renames, on_bad=options.on_bad, limit=options.limit
    )
    train = replace(train, labels=tuple(label for task in tasks_behind(source, train.labels) for label in task))
    held = None
    if options.eval_ is not None:
        held, _ = read_rows(options.eval_, call.streams, root=options.root, renames=renames, on_bad="fail")
        unknown = next((sample for sample in held.samples if sample.label not in train.labels), None)
        if unknown is not None:
            raise BadData(f"{unknown.place}: $.label: {unknown.label[:80]!r} is no class of the training rows",
                          "both need the same classes")  # fmt: skip
    return train, held, rejected


def tasks_behind(source: ModelSource | None, labels: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The tasks that a model will have learned behind this run: those of ``source``, then one of its new classes."""
    if source is None or source.path is None:
        return (tuple(labels),)
    return tasks_with(json.loads((source.path / "config.json").read_bytes()), labels, str(source.path))


def decode_inputs(
    options: Options, call: Invocation, train: Manifest, held: Manifest | None, size: int, rejected: list[bytes]
) -> Inputs:
    """All images in memory. BadData (65): some cannot be had, or a class has lost all of its."""
    from toolbox.dull.data import decode, report_skipped

    total = len(train.samples) + (len(held.samples) if held is not None else 0)
    with call.reporter.progress("image", total) as bar:
        images = decode(train, size, options.on_bad, rejected, lambda: bar.advance(1))
        if len(set(images.targets.tolist())) < len(images.labels):
            raise BadData("a class has lost all its images", "check --root", file=display_name(options.source))
        others = None
        if held is not None:
            others = decode(replace(held, labels=train.labels), size, "fail", [], lambda: bar.advance(1))
    report_skipped(rejected, options.rejects, call.reporter.warn, call.dry_run)
    return Inputs(images, others)


def show_plan(
    options: Options, call: Invocation, train: Manifest, held: Manifest | None, pixels: Pixels, skipped: int
) -> None:
    """``--dry-run``: counts, imbalance, steps, memory. Images are not opened."""
    if skipped:
        call.reporter.warn(f"{skipped} bad rows left out")
    place = {label: number for number, label in enumerate(train.labels)}
    counts = [0] * len(place)
    for sample in train.samples:
        counts[place[sample.label]] += 1
    learned = len(train.samples) - sum(
        max(1, round(options.holdout * n)) for n in counts if n >= 20 and options.holdout
    )
    steps = options.epochs * -(-learned // options.batch_size)
    images = len(train.samples) + (len(held.samples) if held is not None else 0)
    table = 2 * learned * (len(place) if len(place) <= 256 else 48)
    found = {
        "rows": len(train.samples), "holdout": len(train.samples) - learned, "classes": list(train.labels),
        "counts": counts, "imbalance": max(counts) / min(counts), "steps": steps, "warmup_epochs": options.warm,
        "memory_bytes": images * 3 * pixels.size**2 + table,
    }  # fmt: skip
    writer = JsonlWriter(call.streams)
    writer.write({"event": "plan", "command": call.command, "settings": call.settings, **found})
    writer.close()
    call.reporter.note(
        f"{found['rows']} images in {len(counts)} classes of {max(counts)} to {min(counts)}, {found['holdout']} held "
        f"out; {steps} steps; images and posteriors take {found['memory_bytes'] / 2**20:.0f} MiB"
    )
