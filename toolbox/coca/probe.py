"""coca-probe: what is linear in a model's reading of a concept, layer by layer, and what linear erasure leaves.

Rank 0 reads the rows; all ranks run batches of the model, planned before they are shared out, and then take layers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from toolbox.coca.labels import BENIGN, HARMFUL, safety_label
from toolbox.coca.train import layer_range
from toolbox.models.load import ModelSource, find_model
from toolbox.plots import plot_format
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import (
    Identifier,
    Message,
    Record,
    RecordReader,
    Text,
    parse_map,
    read_records,
    write_rejects,
)
from toolbox.shell.streams import JsonlWriter, display_name, process_rank

if TYPE_CHECKING:
    from toolbox.coca.probe_run import Found

LEAST = 20
"""Rows a class must have: with fewer, a part of a split may have one."""

ERASERS = ("none", "leace", "dim", "inlp")


class ProbeFields(msgspec.Struct, kw_only=True):
    """What a probed prompt carries beside its text."""

    label: Annotated[str | int | bool, msgspec.Meta(description="its class; harmful, unsafe, true and 1 are one")]
    id: Identifier = None
    group: Annotated[str | int | None, msgspec.Meta(description="where it is from, for --fit-groups")] = None


class ProbePrompt(ProbeFields, kw_only=True):
    """A labelled prompt as one string."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    prompt: Text


class ProbeMessages(ProbeFields, kw_only=True):
    """A labelled prompt as turns."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]


SHAPES: tuple[type[msgspec.Struct], ...] = (ProbeMessages, ProbePrompt)


class PartSizes(msgspec.Struct):
    """Rows read by an eraser or a reader: how many of each part of a split."""

    eraser: int
    probe: int
    score: int


class ProbeRow(msgspec.Struct, omit_defaults=True):
    """One layer and eraser. Figures are means over the splits, ``_sd`` their standard deviations; rates on rows that
    neither eraser nor reader was fitted on (``split`` in-sample: they share theirs, which says little)."""

    layer: int
    name: str
    eraser: str
    status: str
    split: str | None = None
    seeds: int | None = None
    n: PartSizes | None = None
    linear_acc: float | None = None
    linear_auc: float | None = None
    rbf_acc: float | None = None
    gap: Annotated[float | None, msgspec.Meta(description="rbf_acc - linear_acc")] = None
    distortion: Annotated[float | None, msgspec.Meta(description="E|r(x)-x|^2 / E|x-mean|^2")] = None
    rank: float | None = None
    cond: float | None = None
    carried_acc: Annotated[float | None, msgspec.Meta(description="linear reader of the fit groups, on the others")] = (
        None
    )
    kl: Annotated[float | None, msgspec.Meta(description="mean over --kl prompts, nats")] = None


class Plan(msgspec.Struct, tag="plan", tag_field="event"):
    """``--dry-run``."""

    command: str
    rows: int
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """coca-probe's options."""

    file: str = "-"
    model: str = "smollm2"
    trust_remote_code: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    template: str = "auto"
    system: str | None = None
    layers: str = "all"
    position: str = "last"
    max_new_tokens: int = 160
    eraser: tuple[str, ...] = ()
    shrinkage: str = "linear"
    splits: str = "3"
    split_seeds: int = 10
    fit_groups: tuple[str, ...] = ()
    test_groups: tuple[str, ...] = ()
    intervention: str | None = None
    states: str | None = None
    out: str | None = None
    overwrite: bool = False
    kl: str | None = None
    plot: str | None = None
    dtype: str = "fp32"
    batch_size: int = 16
    seed: int = 0
    threads: int | None = None

    @property
    def erasers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.eraser)) or ("none", "leace")

    @property
    def tag(self) -> str | None:
        """The tag behind which a state is read; None for the last token of the prompt."""
        return self.position.removeprefix("after:") if self.position.startswith("after:") else None


class Item(msgspec.Struct):
    """A row on its way to the ranks: its tokens, the number of its class, and whether it is fitted or tested on."""

    ids: list[int]
    label: int
    fits: bool = True
    tests: bool = True


class Brief(msgspec.Struct):
    """What rank 0 tells the others: rows, names of the classes, prompts for the KL, whether states are there."""

    items: list[Item]
    classes: list[str]
    kl: list[list[int]]
    reuse: bool


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    if options.tag is not None and not options.tag:
        raise UsageProblem(f"--position {options.position}: which tag?", "as in after:check")
    if options.tag is None and options.position != "last":
        raise UsageProblem(f"--position {options.position}: last, or after:TAG", "as in after:check")
    if bool(options.fit_groups) != bool(options.test_groups):
        raise UsageProblem("--fit-groups and --test-groups belong together", "give both, or neither")
    if both := sorted(set(options.fit_groups) & set(options.test_groups)):
        raise UsageProblem(f"group {both[0]} is to be fitted and tested on", "a transfer is between different rows")
    if options.fit_groups and options.splits == "2":
        raise UsageProblem("--splits 2 has no use with groups", "leave it out")
    if options.plot is not None:
        plot_format(options.plot)
    if options.out is not None and not set(options.erasers) - {"none"}:
        raise UsageProblem("--out writes erasers, and none is fitted", "add --eraser leace")
    if options.layers != "all":
        layer_range(options.layers, 1 << 20)
    for name in ("out", "states"):
        if getattr(options, name) == "-":
            raise UsageProblem(f"--{name} -: stdout holds the rows", "name a file")
    if options.file == options.kl == "-":
        raise UsageProblem("the input and --kl cannot both be read from stdin", "name a file for one of them")


def read_rows(options: Options, call: Invocation) -> tuple[list[Record], list[str]]:
    """The labelled prompts and the name of each one's class.

    Raises: BadData (65) for rows that are none, an empty input, one class alone, or fewer than 20 rows of one.
    """
    rejected: list[bytes] = []
    reader = RecordReader(
        SHAPES,
        renames=parse_map(options.map_fields),
        on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )
    records, names = [], []
    for record in read_records(options.file, call.streams, reader):
        name = safety_label(record.value.label)
        if name is None:
            name = str(record.value.label).strip()
        if not name:
            reader.bad(record.bad("an empty label", "name the class", "$.label"), msgspec.json.encode(record.data))
            continue
        records.append(record)
        names.append(name)
    file = display_name(options.file)
    if reader.skipped:
        call.reporter.warn(f"{file}: {reader.skipped} bad rows left out")
    if options.rejects is not None and not call.dry_run:
        write_rejects(options.rejects, rejected)
    if not records:
        raise BadData("the input is empty", "give labelled prompts", file=file)
    _check_classes(names, [str(record.value.group) for record in records], options, file)
    return records, names


def _check_classes(names: Sequence[str], groups: Sequence[str], options: Options, file: str) -> None:
    sets: dict[str, tuple[str, ...] | None] = {"": None}
    if options.fit_groups:
        sets = {"--fit-groups": options.fit_groups, "--test-groups": options.test_groups}
    for option, wanted in sets.items():
        here = [name for name, group in zip(names, groups, strict=True) if wanted is None or group in wanted]
        counts = Counter(here)
        where = f"{option} {', '.join(wanted)}: " if wanted else ""
        if missing := sorted(set(names) - set(counts)):
            raise BadData(f"{where}no rows are {missing[0]}", "every class must be there", file=file)
        if len(counts) < 2:
            found = ", ".join(sorted(counts)) or "no rows"
            raise BadData(f"{where}one class alone cannot be told from another (found: {found})",
                          "give rows of at least two labels", file=file)  # fmt: skip
        least = min(sorted(counts), key=lambda name: counts[name])
        if counts[least] < LEAST:
            raise BadData(f"{where}only {counts[least]} rows are {least}", f"at least {LEAST} a class", file=file)


def class_names(names: Sequence[str]) -> list[str]:
    """The classes in order: harmful behind benign, others by name."""
    found = sorted(set(names))
    return [BENIGN, HARMFUL] if set(found) == {BENIGN, HARMFUL} else found


def wanted_layers(options: Options, depth: int) -> list[int]:
    """The states to probe of a model with ``depth`` decoder layers: 0 are the embeddings, ``depth`` the last."""
    if options.layers == "all":
        return list(range(depth + 1))
    return layer_range(options.layers, depth + 1)


def run(options: Options, call: Invocation) -> None:
    """Probe, write a row a layer and eraser, the erasers and the figure."""
    check(options)
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    leader = process_rank() == 0
    if options.out is not None and leader and not call.dry_run:
        _check_out(options)
    records, names = read_rows(options, call) if leader else ([], [])
    if call.dry_run:
        if leader:
            _show_plan(options, call, source, names)
        return
    from toolbox.coca.probe_run import probe

    found = probe(options, call, source, records, names)
    if found is not None:
        _write(options, call, found)


def _check_out(options: Options) -> None:
    from pathlib import Path

    from toolbox.shell.errors import CannotCreate

    path = Path(str(options.out))
    if path.exists() and not options.overwrite:
        raise CannotCreate(f"{path}: exists already", "pass --overwrite to replace it")
    if not path.absolute().parent.is_dir():
        raise CannotCreate(f"{path}: no such directory", "make it first")


def _show_plan(options: Options, call: Invocation, source: ModelSource, names: Sequence[str]) -> None:
    from toolbox.models.load import base_model, load_config

    trust = options.trust_remote_code
    config = load_config(base_model(source, trust_remote_code=trust), trust_remote_code=trust)
    text = config.get_text_config(decoder=True)
    layers = wanted_layers(options, text.num_hidden_layers)
    width = text.hidden_size
    plan = {
        "event": "plan", "command": call.command, "rows": len(names), "classes": dict(sorted(Counter(names).items())),
        "layers": len(layers), "erasers": list(options.erasers), "splits": options.split_seeds,
        "fits": len(layers) * len(options.erasers) * options.split_seeds,
        "memory_bytes": len(names) * len(layers) * width * 4 + 5 * width * width * 8, "settings": call.settings,
    }  # fmt: skip
    writer = JsonlWriter(call.streams)
    writer.write(plan)
    writer.close()
    call.reporter.note(
        f"{len(names)} rows at {len(layers)} layers: {plan['memory_bytes'] / 2**20:.0f} MiB for states and one layer's "
        "covariance, beside the model"
    )


def _write(options: Options, call: Invocation, found: Found) -> None:
    if options.out is not None:
        _write_erasers(options, call, found)
    if options.plot is not None:
        from toolbox.coca.probe_figure import draw_probe

        draw_probe(found.rows, found.plane, options.plot, title=f"coca-probe: {options.model}, {options.position}")
    writer = JsonlWriter(call.streams)
    for row in found.rows:
        writer.write(row)
    writer.close()
    for row in found.rows:
        if row["status"] == "identity":
            call.reporter.warn(f"layer {row['layer']}: {row['eraser']} found nothing to erase; its rank is 0")


def _write_erasers(options: Options, call: Invocation, found: Found) -> None:
    from toolbox.shell.files import atomic_file
    from toolbox.weights.provenance import header
    from toolbox.weights.write import write_file

    aside = ("file", "out", "plot", "states", "rejects", "on_bad", "quiet", "threads", "kl")
    deciding = {name: value for name, value in call.settings.items() if name not in aside}
    digest = hashlib.sha256(found.identity.encode()).hexdigest()
    with atomic_file(str(options.out), overwrite=options.overwrite) as handle:
        write_file(handle, found.erasers, header(call.command, deciding, options.seed, {"states": digest}))
