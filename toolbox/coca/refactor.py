"""coca-refactor: safety pairs in, pairs that reason first out, row by row and in order."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator

from toolbox.coca.dialogues import Item
from toolbox.coca.drivers import driver, open_log, start_workers
from toolbox.coca.refactor_options import Options, check, finished
from toolbox.coca.refactor_rows import Rows, make_teacher
from toolbox.coca.rows_out import Output
from toolbox.coca.tally import write_summary
from toolbox.coca.template import Template, load_template
from toolbox.models.load import ModelSource, find_model
from toolbox.models.responses import ResponseLog
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.streams import JsonlWriter, process_rank

__all__ = ["Options", "check", "run"]


def run(options: Options, call: Invocation) -> None:
    """Refactor every row of ``options.file``; rows leave in order, rejected ones to ``--rejects``."""
    leader = process_rank() == 0
    if options.backend != "local" and not leader:
        return
    check(options)
    if finished(options):
        call.reporter.note(f"{options.out}: finished already")
        return
    template = load_template(options.template, options.grammar, options.few_shot)
    source = None
    if options.backend == "local" and not options.verify_only:
        source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    if not leader:
        _serve(options, call, source)
        return
    with contextlib.ExitStack() as stack:
        _lead(options, call, template, source, stack)


def _lead(
    options: Options, call: Invocation, template: Template, source: ModelSource | None, stack: contextlib.ExitStack
) -> None:
    teacher = make_teacher(options, template)
    work = Rows(options, call, teacher)
    log = None if call.dry_run else open_log(options, call, stack)
    nobody = options.verify_only or options.emit_requests or call.dry_run
    answering = None if nobody else driver(options, call, log, stack)
    ahead = options.window if options.backend == "local" else 1  # a model takes a while to load: bad lines come first
    first = list(itertools.islice(work.items(), ahead))
    if call.dry_run:
        _plan(work, first, options, call)
        return
    items = itertools.chain(first, work.rest())
    out = stack.enter_context(Output(options.out, call.streams, options.rejects, overwrite=True))
    if answering is not None and (first or "WORLD_SIZE" in os.environ):
        done = answering(source)(items)
    else:
        done = (_alone(item, work) for item in items)
    _write(done, work, out, options, call, log)
    out.finish(work.bad)
    _close(work, options, call)
    if options.log is None and options.log_file is not None:
        stack.callback(_forget, options.log_file)


def _forget(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _alone(item: Item, work: Rows) -> Item:
    """Without a teacher: first questions for a batch, or records that are judged as they are."""
    if work.options.emit_requests:
        item.begin()
    return item


def _write(
    done: Generator[Item, None, None],
    work: Rows,
    out: Output,
    options: Options,
    call: Invocation,
    log: ResponseLog | None,
) -> None:
    with call.reporter.progress("row", None) as bar, contextlib.closing(done):
        try:
            for item in done:
                work.settle(item, out)
                bar.advance()
                out.flush()
        except KeyboardInterrupt:
            done.close()  # answers under way may still come in
            kept = "nothing was kept: --log keeps answers" if log is None else f"{log.path} has {log.held + log.added}"
            more = "" if log is None else " answers; the same command with --resume goes on"
            call.reporter.warn(f"interrupted; {kept}{more}")
            raise


def _close(work: Rows, options: Options, call: Invocation) -> None:
    """Counts for people and for --summary, and what has to be said at the end."""
    if work.reader.skipped:
        call.reporter.warn(f"{work.reader.skipped} bad rows left out")
    record = {**work.tally.record(work.reader.skipped), **work.tag_tokens()}
    work.tally.show(call.reporter)
    if options.summary is not None:
        write_summary(options.summary, record)
    if work.tally.rows and work.tally.share < options.min_accept and not options.emit_requests:
        raise BadData(
            f"{work.tally.share:.1%} of the rows were accepted, less than --min-accept {options.min_accept:g}",
            "--rejects FILE says why",
        )


def _serve(options: Options, call: Invocation, source: ModelSource | None) -> None:
    if source is not None and not call.dry_run:
        start_workers(options, call, source).serve()


def _plan(work: Rows, first: list[Item], options: Options, call: Invocation) -> None:
    """--dry-run: how many rows there are, how many leave before any question, how many pairs are asked about."""
    rows, pairs, codes = 0, 0, {}
    for item in itertools.chain(first, work.rest()):
        rows += 1
        found = item.codes or {code: "" for one in item.outcomes or [] for code in one.codes}
        for code in found:
            codes[code] = codes.get(code, 0) + 1
        pairs += len(item.row.pairs) if not found else 0
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "rows": rows, "pairs": pairs, "rejected": dict(sorted(codes.items())),
        "skipped": work.reader.skipped, "decode": options.decoding, "template": work.teacher.template.name,
        "settings": call.settings,
    })  # fmt: skip
    writer.close()
