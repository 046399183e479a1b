"""lot-eval: the job. Answered prompts in, a line a facet and variant out, then a line a comparison.

All rows are read before anything is said, since votes and pairs need them together; of each stays a small tuple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolbox.lot.figures import draw, drawable
from toolbox.lot.judge import METRICS, Table, against_baseline, judge, several_models
from toolbox.lot.lines import Comparison, Judgement
from toolbox.lot.metrics import Resampling
from toolbox.lot.report import markdown, summary_tables
from toolbox.lot.rows import Answers, Seen
from toolbox.models.votes import VOTES
from toolbox.plots import plot_format
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.lists import comma_list
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank

MANY_CUT = 0.1
"""Share of cut-off completions above which accuracies say more about the length limit than about the model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """lot-eval's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    baseline: str | None = None
    by: str | None = None
    metrics: str = "auto"
    format: str = "auto"
    pick: str = "last"
    extract: str = "auto"
    vote: str | None = None
    blank: str = "ignore"
    bootstrap: int = 2000
    seed: int = 0
    rows: str | None = None
    report: str | None = None
    figure: tuple[str, ...] = ()

    @property
    def facets(self) -> tuple[str, ...]:
        """The fields of ``--by``."""
        names = comma_list("by", self.by, ()) if self.by is not None else ()
        if "variant" in names:
            raise UsageProblem("--by variant: variants are told apart anyway", "leave it out")
        return names

    @property
    def votes(self) -> tuple[str, ...]:
        """The kinds of ``--vote``."""
        return comma_list("vote", self.vote, VOTES) if self.vote is not None else ()

    @property
    def wanted(self) -> tuple[str, ...] | None:
        """The metrics of ``--metrics``; None for auto."""
        return None if self.metrics == "auto" else comma_list("metrics", self.metrics, METRICS, besides="auto")

    @property
    def how(self) -> Resampling:
        return Resampling(self.bootstrap, self.seed)


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    _ = options.facets, options.votes, options.wanted  # each raises for a name that is not known
    outputs = [("rejects", options.rejects), ("rows", options.rows), ("report", options.report)]
    outputs += [("figure", path) for path in options.figure]
    named = [(option, path) for option, path in outputs if path is not None]
    for option, path in named:
        if path == "-":
            raise UsageProblem(f"--{option} -: stdout has the lines already", "name a file")
        if option == "figure":
            plot_format(path)
        if not Path(path).absolute().parent.is_dir():
            raise CannotCreate(f"--{option} {path}: no such directory", "make it first")
    places = [Path(path).absolute() for _, path in named]
    for (option, path), place in zip(named, places, strict=True):
        if places.count(place) > 1:
            raise UsageProblem(f"--{option} {path}: two outputs have the same name", "name another file")


def run(options: Options, call: Invocation) -> None:
    """Judge every row of ``options.file``: JSON lines on stdout, a table and warnings on stderr, files if asked for."""
    check(options)
    if process_rank() != 0:  # nothing to share: the first process does it all
        return
    lines: list[Judgement] = []
    with contextlib.ExitStack() as stack:
        keep = stack.enter_context(_rows_file(options.rows)) if options.rows and not call.dry_run else None
        table = _read(options, call, keep)
        if table.n:
            _check_table(options, table)
        if table.n and not call.dry_run:
            lines = judge(table, options)
            if options.figure and not drawable(lines):
                advice = "rows need an `answer` to be judged, or leave it out"
                raise UsageProblem("--figure draws accuracies, and there is none", advice)
    if call.dry_run:
        _dry_run(table, call)
        return
    if not table.n:
        call.reporter.note("no rows")
        return
    comparisons = against_baseline(table, options) if options.baseline is not None else []
    writer = JsonlWriter(call.streams)
    for line in (*lines, *comparisons):
        writer.write(line)
    writer.close()
    _show(lines, comparisons, options, call)


# -- reading ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _rows_file(path: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes rows one by one; the file is there, whole, when the block has ended well."""
    from toolbox.shell.files import atomic_file

    encode = msgspec.json.Encoder().encode
    with atomic_file(path) as handle:
        yield lambda row: handle.write(encode(row) + b"\n") and None


def _read(options: Options, call: Invocation, keep: Callable[[dict[str, Any]], None] | None) -> Table:
    """All rows as small tuples; warnings about them on stderr."""
    rejected: list[bytes] = []
    reader = RecordReader(
        PATH_SHAPES,
        renames=parse_map(options.map_fields),
        on_bad=options.on_bad,
        rejects=(lambda raw, _: rejected.append(raw)) if options.rejects is not None else None,
    )
    answers = Answers(options.format, options.pick, options.extract, options.facets, "weighted" in options.votes)
    seen, table = Seen(), Table()
    first_fields: list[str] = []
    for record in read_records(options.file, call.streams, reader):
        try:
            answered = answers(record)
            seen.add(record, answered)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        first_fields = first_fields or [*record.data, *record.value.meta]
        table.add(answered)
        if keep is not None:
            row = answered.row
            keep({**record.data, "id": record.id, "pred": answered.pred, "pred_source": row.source,
                  "correct": row.correct})  # fmt: skip
    table.skipped = reader.skipped
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")
    if options.rejects is not None and not call.dry_run:
        write_rejects(options.rejects, rejected)
    if table.n:
        for name in options.facets:
            if name not in answers.seen_fields:
                raise UsageProblem(f"--by {name}: no row has such a field", f"the first has {', '.join(first_fields)}")
        for warning in _warnings(table, answers, seen):
            call.reporter.warn(warning)
    return table


def _check_table(options: Options, table: Table) -> None:
    """What does not fit the rows."""
    if options.baseline is not None and options.baseline not in table.variants:
        raise UsageProblem(
            f"--baseline {options.baseline}: no row has this variant", f"present: {', '.join(table.variants)}"
        )
    wanted = options.wanted or ()
    for name, what, holds in (
        ("con", "`side` (pro or anti) in its `meta`", lambda row: row.item.side is not None),
        ("bbq", "`context_condition` in its `meta`", lambda row: row.item.condition is not None),
        ("grid", "`cell` (L0q0 ... L2q2) in its `meta`", lambda row: row.item.cell is not None),
    ):
        if name in wanted and not table.any(holds):
            raise UsageProblem(f"--metrics {name}: no row has a {what}", "--metrics auto takes what is there")
    for kind, name in (("weighted", "score"), ("mask", "keep")):
        if kind in options.votes and not table.any(lambda row, name=name: getattr(row, name) is not None):
            raise UsageProblem(f"--vote {kind}: no row has a `{name}`", "weighted votes need score, masked ones keep")


def _warnings(table: Table, answers: Answers, seen: Seen) -> Iterator[str]:
    if seen.unlabelled == table.n:
        yield "no row has an `answer` to compare with: extraction rates and the agreement of votes only"
    elif seen.unlabelled:
        yield f"{seen.unlabelled} of {table.n} rows have no `answer` and are left out of accuracies"
    shared = several_models(table)
    if shared:
        models = sorted({str(row.model) for _, _, rows in table for row in rows})
        told = ", ".join(models[:4]) + (", ..." if len(models) > 4 else "")
        yield f"{shared} questions have answers of several models ({told}) under one variant: see --by model"
    if seen.other_golds:
        yield f"{len(seen.other_golds)} ids stand for questions with different answers: pairs of variants mean little"
    for variant in dict.fromkeys(key[-1] for key, shas in seen.templates.items() if len(shas) > 1):
        yield f"variant {variant} was asked by several templates: its rows do not belong together"
    if answers.strangers:
        yield f"{answers.strangers} rows have a `pred` that is none of the choices: taken for not read"


def _dry_run(table: Table, call: Invocation) -> None:
    read = sum(row.answer is not None for _, _, rows in table for row in rows)
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "rows": table.n, "read": read, "facets": len(table.facets),
        "variants": table.variants, "skipped": table.skipped, "settings": call.settings,
    })  # fmt: skip
    writer.close()


# -- showing ----------------------------------------------------------------------------------------------------------
def _show(lines: Sequence[Judgement], comparisons: Sequence[Comparison], options: Options, call: Invocation) -> None:
    """The table for people, and the files that were asked for."""
    if not call.reporter.silent:
        for table in summary_tables(lines, comparisons, options.baseline):
            call.reporter.show(table)
    cut = [line for line in lines if (line.cut_off or 0) > MANY_CUT]
    if cut:
        worst = max(cut, key=lambda line: line.cut_off or 0)
        call.reporter.warn(
            f"{len(cut)} lines have more than {MANY_CUT:.0%} of completions cut off by the length limit, "
            f"{worst.variant} {worst.cut_off:.0%}: what they would have answered is not known"
        )
    missing = sum(not any(one.by == line.by for one in comparisons) for line in lines)
    if options.baseline is not None and missing:
        call.reporter.warn(f"{missing} lines are compared with nothing: their facet has no {options.baseline}, "
                           "or nothing else")  # fmt: skip
    if options.report is not None:
        from toolbox.shell.files import atomic_file

        with atomic_file(options.report) as handle:
            handle.write(markdown(lines, comparisons, options).encode())
    for path in options.figure:
        draw(lines, comparisons, path, baseline=options.baseline)
