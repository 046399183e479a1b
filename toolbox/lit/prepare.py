"""Everything of lit-tune that happens before weights load: reading, aligning, labelling, the list of templates."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from toolbox.lit.data import Labelling, Rows, user_texts
from toolbox.lit.images import ImageStore
from toolbox.lit.lines import CAPTIONS, TURNS, ListedSentence
from toolbox.lit.options import Options
from toolbox.lit.rows import Counts, Reading, Sample, read_samples
from toolbox.lit.templates import Table, key_of
from toolbox.models.facts import weights_digest
from toolbox.models.load import ModelSource
from toolbox.models.spans import Aligner
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import Streams, display_name

PROCESSES = "number of processes"
FEW = 0.99
"""Share of rows without a supervised instruction token from which on LIT is no other than VIT."""


@dataclass(frozen=True)
class Brief:
    """What rank 0 tells the others once everything has been checked."""

    train: list[Sample] = field(default_factory=list)
    watched: list[Sample] = field(default_factory=list)
    templates: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def labelling(self, options: Options) -> Labelling:
        """How rows are labelled."""
        chosen = frozenset(key_of(row["sentence"]) for row in self.templates if row["template"])
        return Labelling(
            mode=options.label_mode, stage=options.stage, templates=chosen,  # type: ignore[arg-type]
            split=options.splits, text_only_instructions=options.text_only_instructions == "on",
            max_length=options.max_length, overlong=options.overlong,  # type: ignore[arg-type]
        )  # fmt: skip


class Source:
    """One input: its samples, and what to do with bad ones."""

    def __init__(
        self, name: str, options: Options, call: Invocation, rejected: list[bytes], role: str, empty: bool = False
    ) -> None:  # fmt: skip
        self.name, self.call = name, call
        self.counts = Counts()
        self.reader = RecordReader(
            (*TURNS, *CAPTIONS), renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: rejected.append(raw),
        )  # fmt: skip
        how = Reading(options.image_position, options.max_images_per_row)  # type: ignore[arg-type]
        self.samples = list(read_samples(name, call.streams, self.reader, how, self.counts, role))
        if not self.samples and not self.reader.skipped and not empty:
            raise BadData("the set is empty", "give at least one row", file=display_name(name))

    def fail(self, sample: Sample, problem: BadData) -> None:
        """A row that turned out bad later."""
        self.reader.bad(problem, msgspec.json.encode(sample.data))

    def say(self) -> None:
        """Count what was left out."""
        if self.reader.skipped:
            self.call.reporter.warn(f"{display_name(self.name)}: {self.reader.skipped} bad rows left out")


def read_all(
    options: Options, call: Invocation, load: Callable[[], Any], store: ImageStore
) -> tuple[Brief, Rows, Rows]:  # fmt: skip
    """Rank 0: read, align and label every row: what is told, training rows, held-out rows. Raises what is wrong.

    ``load`` gives the processor; it costs seconds and is called once every line has been read.
    """
    rejected: list[bytes] = []
    train = Source(options.file, options, call, rejected, "the training set")
    held_out = None
    if options.eval_rows is not None:
        held_out = Source(options.eval_rows, options, call, rejected, "--eval")
    templates = template_list(options, call.streams, train.samples)
    if options.label_mode == "lit" and options.task_templates == "auto":
        call.reporter.note(
            f"{len(templates)} task templates found; they are listed beside the model, see lit-templates"
        )
    brief = Brief(templates=templates)
    how = brief.labelling(options)
    aligner = Aligner(load(), options.control_tokens)  # type: ignore[arg-type]
    rows, watched = Rows(aligner, store, how), Rows(aligner, store, how)
    rows.add(train.samples, train.fail)
    train.say()
    if held_out is not None:
        watched.add(held_out.samples, held_out.fail)
        held_out.say()
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    _check(options, call, rows, train)
    kept = [row.sample for row in rows.rows]
    seen = [row.sample for row in watched.rows]
    digests = {"train": digest(kept), **({"eval": digest(seen)} if seen else {})}
    counts = {
        "leading_turns_dropped": train.counts.leading_turns_dropped,
        "images_moved": train.counts.images_moved,
    }
    return replace(brief, train=kept, watched=seen, digests=digests, counts=counts), rows, watched


def _check(options: Options, call: Invocation, rows: Rows, source: Source) -> None:
    tally, name = rows.tally, display_name(source.name)
    if tally.dropped_overlong:
        call.reporter.warn(
            f"{name}: {tally.dropped_overlong} rows longer than --max-length {options.max_length} left out"
        )
    if tally.truncated:
        call.reporter.warn(f"{name}: {tally.truncated} answers cut at --max-length {options.max_length}")
    if not rows.rows:
        skipped = f" ({source.reader.skipped} bad rows skipped)" if source.reader.skipped else ""
        raise BadData(f"no row has a supervised token{skipped}", "see lit-inspect", file=name)
    if options.label_mode in ("lit", "lit-system") and tally.empty_instruction > FEW * tally.kept:
        call.reporter.warn("hardly any row has an instruction to learn from: LIT equals VIT here")


def template_list(options: Options, streams: Streams, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The sentences that ``--task-templates`` asks for; only ``--mode lit`` has a use for them."""
    if options.label_mode != "lit" or options.task_templates == "none":
        return []
    if options.task_templates != "auto":
        return read_list(options.task_templates, streams)
    table = Table(options.splits)
    for row_id, texts in user_texts(samples):
        table.add(row_id, texts)
    if not table.turns:
        return []
    return [row for row in table.rows_out(min_share=options.min_share) if row["template"]]


def read_list(path: str, streams: Streams) -> list[dict[str, Any]]:
    """An edited list of sentences. Raises: BadData (65)."""
    reader = RecordReader((ListedSentence,))
    return [
        {"sentence": record.value.sentence, "template": record.value.template}
        for record in read_records(path, streams, reader, "--task-templates")
    ]


def digest(samples: Sequence[Sample]) -> str:
    """sha256 over what was read: ids, turns, names of images, weights."""
    hasher = hashlib.sha256()
    for one in samples:
        turns = [(message.role, message.parts) for message in one.messages]
        hasher.update(msgspec.json.encode((one.id, turns, one.images, one.weight)) + b"\n")
    return hasher.hexdigest()


def marks(options: Options, call: Invocation, brief: Brief, source: ModelSource) -> dict[str, Any]:
    """What an interrupted run and its continuation must share."""
    found = options.marks() | {f"data ({name})": sha for name, sha in brief.digests.items()}
    found["task templates"] = hashlib.sha256(json.dumps(brief.templates).encode()).hexdigest()
    found["model (its weights)"] = weights_digest(source)
    return found | {PROCESSES: int(os.environ.get("WORLD_SIZE", "1")), "command": call.command}


def write_templates(path: Path, brief: Brief) -> None:
    """The list that was used, one sentence a line."""
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in brief.templates))
