"""lit-inspect: the job. Every token's kind and whether it is learned from, from the processor alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from toolbox.lit.build import DEFAULT, vlm_named
from toolbox.lit.data import Labelled, Rows
from toolbox.lit.images import ImageStore
from toolbox.lit.options import Options as TuneOptions
from toolbox.lit.prepare import Brief, Source, template_list
from toolbox.models.spans import Aligner, Kind
from toolbox.models.vlm import find_vlm, load_processor
from toolbox.shell.command import Invocation
from toolbox.shell.errors import clean, tell
from toolbox.shell.records import write_rejects
from toolbox.shell.streams import JsonlWriter

_COLOURS = {
    Kind.IMAGE: "34", Kind.SYSTEM_TEMPLATE: "90", Kind.SYSTEM_CONTENT: "90", Kind.INSTRUCTION: "36",
    Kind.TASK_TEMPLATE: "33", Kind.PRE_IMAGE: "33", Kind.RESPONSE: "32", Kind.END_OF_TURN: "32", Kind.PAD: "90",
}  # fmt: skip
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-inspect's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    image_root: str | None = None
    max_image_pixels: float = 50e6
    max_images_per_row: int = 8
    model: str = DEFAULT
    trust_remote_code: bool = False
    mode: str = "lit"
    task_templates: str = "auto"
    min_share: float = 0.15
    split: str = "newline,punct,colon"
    text_only_instructions: str = "on"
    image_position: str = "first"
    control_tokens: str = "escape"
    max_length: int = 10**9
    counts: bool = False
    pretty: bool = False
    limit: int | None = None
    seed: int = 0

    def tuning(self) -> TuneOptions:
        """The same for lit-tune: what is shown here is what is trained there."""
        shared = {item.name for item in fields(TuneOptions)}
        return TuneOptions(**{item.name: getattr(self, item.name) for item in fields(self) if item.name in shared})


def run(options: Options, call: Invocation) -> None:
    """Write a line a row."""
    tuning = options.tuning()
    found = find_vlm(vlm_named(options.model, call.reporter.note), trust_remote_code=options.trust_remote_code)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    rejected: list[bytes] = []
    source = Source(options.file, tuning, call, rejected, "the input", empty=True)
    brief = Brief(templates=template_list(tuning, call.streams, source.samples))
    processor = load_processor(found, trust_remote_code=options.trust_remote_code)
    rows = Rows(Aligner(processor, options.control_tokens), store, brief.labelling(tuning), keep=False)  # type: ignore[arg-type]
    writer = JsonlWriter(call.streams)
    shown = 0
    samples = source.samples[: options.limit]
    for start in range(0, len(samples), _BLOCK):
        rows.rows.clear()
        rows.add(samples[start : start + _BLOCK], source.fail)
        for row in () if call.dry_run else rows.rows:
            writer.write(_line(row, processor.tokenizer, options))
            if options.pretty:
                tell(_painted(row, processor.tokenizer) + "\n")
        shown += len(rows.rows)
    source.say()
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    if call.dry_run:
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, "rows": shown})
    writer.close()
    tally = rows.tally
    share = tally.empty_instruction / max(1, tally.kept)
    call.reporter.note(
        f"{tally.kept} rows, {tally.response} response and {tally.instruction} instruction tokens supervised, "
        f"{tally.dropped_unsupervised} rows with nothing supervised, {share:.1%} without a supervised instruction"
    )


def _line(row: Labelled, tokenizer: Any, options: Options) -> dict[str, Any]:
    learned = set(row.places)
    counts = np.bincount(row.kinds, minlength=len(Kind))
    line: dict[str, Any] = {
        **row.sample.data,
        "id": row.sample.id,
        "length": len(row.kinds),
        "counts": {kind.label: int(counts[kind]) for kind in Kind if counts[kind]},
        "supervised": len(row.places),
    }
    if not options.counts:
        ids = row.aligned.ids
        line["tokens"] = [
            [token, text, Kind(row.kinds[place]).label, int(place in learned)]
            for place, (token, text) in enumerate(zip(ids, _texts(ids, tokenizer), strict=True))
        ]
    return line


def _texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False) for token in ids]


def _painted(row: Labelled, tokenizer: Any) -> str:
    """The row in colours: blue the image, grey the template, yellow boilerplate, cyan instructions, green answers;
    what is learned from is underlined."""
    learned, ids = set(row.places), row.aligned.ids
    parts = [f"{clean(row.sample.id)}: "]
    start = 0
    while start < len(ids):
        kind, on = Kind(row.kinds[start]), start in learned
        stop = start + 1
        while stop < len(ids) and Kind(row.kinds[stop]) == kind and (stop in learned) == on:
            stop += 1
        if kind == Kind.IMAGE:
            text = f"[image: {stop - start} tokens]"
        else:
            text = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        style = _COLOURS[kind] + (";4" if on else "")
        parts.append("\n".join(f"\x1b[{style}m{clean(line)}\x1b[0m" if line else "" for line in text.split("\n")))
        start = stop
    return "".join(parts)
