"""dull-eval: predictions of a classifier, accuracy by shot group, and how well a list of doubts finds wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.classify.classifier import Pixels, find_classifier, load_classifier, stored_pixels
from toolbox.classify.shots import shot_groups
from toolbox.dull.lines import SampleRow
from toolbox.dull.options import shot_bounds
from toolbox.plots import plot_format
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import RecordReader, parse_map, read_records
from toolbox.shell.streams import JsonlWriter, display_name, process_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from toolbox.classify.images import Images
    from toolbox.classify.manifest import Manifest
    from toolbox.models.load import ModelSource

DEFAULT = Pixels(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""For a model directory that does not say how its pixels are made: ImageNet's."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """dull-eval's options."""

    source: str = "-"
    model: str = ""
    trust_remote_code: bool = False
    image_size: int | None = None
    root: str | None = None
    samples: str | None = None
    clean_field: str = "dull.label_clean"
    summary_only: bool = False
    shots: str = "auto"
    batch_size: int = 256
    plot: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None


def run(options: Options, call: Invocation) -> None:
    """Write the rows with their predictions, and one line that sums up."""
    for path in options.plot:
        plot_format(path)
    bounds = shot_bounds(options.shots)
    renames = parse_map(options.map_fields)
    source = find_classifier(options.model, trust_remote_code=options.trust_remote_code)
    if source is None:
        raise UsageProblem(f"--model {options.model}: a trained model is expected", "the --out of dull-train is one")
    if process_rank() != 0:
        return
    from toolbox.dull.data import decode, read_rows, report_skipped

    manifest, rejected = read_rows(
        options.source, call.streams, root=options.root, renames=renames, on_bad=options.on_bad, least=1
    )
    doubted = _read_samples(options, call)
    labels = stored_labels(source, manifest.labels, options.trust_remote_code)
    _known(manifest, labels, options.model)
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        report_skipped(rejected, options.rejects, call.reporter.warn, True)
        writer.write({"event": "plan", "command": call.command, "settings": call.settings,
                      "rows": len(manifest.samples), "classes": list(labels)})  # fmt: skip
        writer.close()
        return
    pixels = stored_pixels(source, options.image_size, DEFAULT)
    with call.reporter.progress("image", len(manifest.samples)) as bar:
        images = decode(manifest, pixels.size, options.on_bad, rejected, lambda: bar.advance(1))
    report_skipped(rejected, options.rejects, call.reporter.warn, False)
    model, _ = load_classifier(options.model, source, labels, image_size=pixels.size, seed=0,
                               trust_remote_code=options.trust_remote_code)  # fmt: skip
    _judge(options, call, writer, images, model, labels, pixels, bounds, doubted)


def stored_labels(source: ModelSource, found: Sequence[str], trust_remote_code: bool) -> tuple[str, ...]:
    """The classes of the model, in the order of its outputs; by number where it has no names of its own."""
    from transformers import AutoConfig

    import toolbox.classify.backbones  # noqa: F401 - registers our model types

    try:
        config = AutoConfig.from_pretrained(
            str(source.path or source.name),
            trust_remote_code=trust_remote_code,
            local_files_only=source.path is not None,
        )
        labels = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    except (ValueError, KeyError, OSError) as error:
        raise BadData(
            f"--model {source.name}: no image classifier ({str(error).splitlines()[0][:160]})", None
        ) from None
    unnamed = labels == tuple(f"LABEL_{number}" for number in range(len(labels)))
    return tuple(str(number) for number in range(len(labels))) if unnamed else labels


def _known(manifest: Manifest, labels: Sequence[str], model: str) -> None:
    classes = set(labels)
    for sample in manifest.samples:
        if sample.label not in classes:
            shown = ", ".join(list(labels)[:5])
            raise BadData(
                f"{sample.place}: $.label: {sample.label[:80]!r} is no class of {model}", f"it has {shown} ..."
            )


def _read_samples(options: Options, call: Invocation) -> dict[str, SampleRow] | None:
    """``samples.jsonl`` by id."""
    if options.samples is None:
        return None
    reader = RecordReader([SampleRow])
    found = {record.id: record.value for record in read_records(options.samples, call.streams, reader, "--samples")}
    if not found:
        raise BadData("is empty", "the samples.jsonl of dull-train is expected", file=display_name(options.samples))
    return found


def _judge(
    options: Options,
    call: Invocation,
    writer: JsonlWriter,
    images: Images,
    model: PreTrainedModel,
    labels: tuple[str, ...],
    pixels: Pixels,
    bounds: tuple[int, int] | None,
    doubted: dict[str, SampleRow] | None,
) -> None:
    import numpy as np
    import torch

    from toolbox.classify.evaluate import predict
    from toolbox.dull.files import stored_counts
    from toolbox.dull.metrics import judged

    if torch.cuda.is_available():
        model.to("cuda")
    logits = predict(model, images.pixels, batch_size=options.batch_size, prepare=pixels.prepare)
    place = {label: number for number, label in enumerate(labels)}
    truth = np.array([place[sample.label] for sample in images.samples])
    predicted = logits.argmax(1).numpy()
    counts = stored_counts(model.config, len(labels), options.model)
    groups, how = shot_groups(counts, bounds) if counts is not None else ({}, "not known: the model tells no counts")
    if not options.summary_only:
        for sample, row, best in zip(images.samples, logits.softmax(1), predicted.tolist(), strict=True):
            earlier = sample.data.get("dull")
            kept = earlier if isinstance(earlier, dict) else {}
            added = {"pred": labels[best], "p": float(row[best])}
            writer.write({**sample.data, "id": sample.data.get("id", sample.id), "dull": {**kept, **added}})
    figures = judged(predicted, truth, groups, len(labels))
    done: dict[str, Any] = {"event": "done", "model": options.model, "classes": list(labels), **figures,
                            "shots": {name: [labels[n] for n in members] for name, members in groups.items()},
                            "shots_by": how}  # fmt: skip
    if doubted is not None:
        done["detection"] = _detection(options, images, doubted, place, groups)
    writer.write(done)
    writer.close()
    _show(call, done, labels)
    if options.plot:
        from toolbox.dull.figures import draw_confusion

        table = np.bincount(truth * len(labels) + predicted, minlength=len(labels) ** 2)
        draw_confusion(table.reshape(len(labels), -1), labels, counts, options.plot, Path(options.model).name)


def _detection(
    options: Options, images: Images, doubted: dict[str, SampleRow], place: dict[str, int], groups: dict[str, list[int]]
) -> dict[str, Any]:
    """Detection figures over the rows at hand: given labels from the samples, clean ones from the rows."""
    import numpy as np

    from toolbox.dull.data import UNKNOWN, clean_labels
    from toolbox.dull.metrics import detection

    found = clean_labels(images.samples, list(place), options.clean_field)
    # Rows without that field are taken at their word: a clean manifest of the training images.
    truth = [place[sample.label] for sample in images.samples] if found is None else found
    rows = []
    for sample, clean in zip(images.samples, truth, strict=True):
        one = doubted.get(sample.id)
        if one is not None and clean != UNKNOWN and one.label in place and one.dull.suggested in place:
            rows.append((one.dull.q_given, one.dull.flagged, place[one.dull.suggested], place[one.label], clean))
    if not rows:
        raise BadData("has no id of the rows at hand", "give the manifest that was trained on", file=options.samples)
    given_q, flagged, suggested, given, clean = (np.array(column) for column in zip(*rows, strict=True))
    doubt = -np.log(np.maximum(given_q, 1e-6))
    return {"n": len(rows), **detection(doubt, flagged.astype(bool), suggested, given, clean, groups)}


def _show(call: Invocation, done: dict[str, Any], labels: tuple[str, ...]) -> None:
    if call.reporter.silent:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("class", "recall", "predicted"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for label, recall, said in zip(labels, done["recall"], done["predicted"], strict=True):
        if recall is not None or said:
            table.add_row(label, "" if recall is None else f"{recall:.3f}", str(said))
    call.reporter.show(table)
    low, high = done["acc_ci"]
    parts = [f"{name} {done[name]:.3f}" for name in ("many", "medium", "few") if done.get(name) is not None]
    shown = ", ".join([f"accuracy {done['acc']:.3f} [{low:.3f}, {high:.3f}] on {done['n']} images", *parts,
                       f"macro-F1 {done['macro_f1']:.3f}"])  # fmt: skip
    call.reporter.note(shown)
    if "detection" in done and done["detection"]["flagged"]:
        one = done["detection"]
        call.reporter.note(
            f"{one['flagged']} of {one['n']} labels flagged, {one['flag_precision']:.3f} of them wrong, against "
            f"{one['noise_before']:.3f} of all"
        )
