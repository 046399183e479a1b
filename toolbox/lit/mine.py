"""lit-templates: the job. Rows in, a line a sentence out, by falling count. No torch, no numpy."""

from __future__ import annotations

from dataclasses import dataclass

from toolbox.lit.lines import CAPTIONS, TURNS
from toolbox.lit.rows import Counts, Reading, read_samples
from toolbox.lit.templates import FEWEST_TURNS, Table, split_names
from toolbox.shell.command import Invocation
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-templates' options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    split: str = "newline,punct,colon"
    min_share: float = 0.15
    top_k: int | None = None
    limit: int | None = None
    seed: int = 0


def run(options: Options, call: Invocation) -> None:
    """Count, then write the table."""
    table = Table(split_names(options.split))
    rejected: list[bytes] = []
    reader = RecordReader(
        (*TURNS, *CAPTIONS), renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    for sample in read_samples(options.file, call.streams, reader, Reading("keep", 10**6, answers=False), Counts()):
        table.add(sample.id, (one.text for one in sample.messages if one.role == "user" and one.text.strip()))
    if reader.skipped:
        call.reporter.warn(f"{display_name(options.file)}: {reader.skipped} bad rows left out")
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    found = table.rows_out(min_share=options.min_share, top_k=options.top_k)
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        counts = {"rows": table.rows, "turns": table.turns, "sentences": len(found)}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **counts})
        writer.close()
        return
    for row in found[: options.limit]:
        writer.write(row)
    writer.close()
    if 0 < table.turns < FEWEST_TURNS:
        call.reporter.warn(f"{table.turns} user turns are too few to tell boilerplate: nothing is flagged")
    flagged = sum(row["template"] for row in found)
    counts = f"{table.rows} rows, {table.turns} user turns, {len(found)} sentences"
    call.reporter.note(f"{counts}, {flagged} flagged: look before you use it")
