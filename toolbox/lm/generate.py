"""lm-generate: completions of prompts, as a filter over JSON lines.

Rows are read in windows, which bound memory and the delay before a row leaves. Whatever completes them (a model here,
an endpoint, stored responses) takes records and gives them back with their completions, in input order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from toolbox.lm.windows import Answered, Windows
from toolbox.models.backends import EndpointOptions, check_backend
from toolbox.models.generate import Decoding, path_id
from toolbox.models.load import find_model
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Path, Record, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank


class CompletedRow(Path, kw_only=True):
    """A completed prompt by any backend: not all endpoints count tokens, not all stored responses name a model."""

    model: str | None
    n_prompt_tokens: int | None
    n_completion_tokens: int | None


_HERE = frozenset(
    {"trust_remote_code", "template", "dtype", "device", "batch_size", "batch_tokens", "threads", "num_processes",
     "accelerate"}
)  # fmt: skip
_ASKING = frozenset(
    {"system", "raw", "temperature", "top_p", "max_new_tokens", "stop", "logprobs", "seed", "log", "resume"}
)
"""Options that only a model here has a use for, and those that stored responses have none for."""


@dataclass(frozen=True, kw_only=True)
class Options(EndpointOptions):
    """lm-generate's options; ``given`` names those that were typed or set by a recipe."""

    file: str = "-"
    backend: str = "local"
    model: str = "smollm2"
    trust_remote_code: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    limit: int | None = None
    log: str | None = None
    resume: bool = False
    replay: str | None = None
    template: str = "auto"
    system: str | None = None
    raw: bool = False
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"
    batch_tokens: int | None = None
    window: int = 256
    threads: int | None = None
    given: frozenset[str] = frozenset()

    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_new_tokens, self.temperature, self.top_p, self.stop, self.seed, self.logprobs)


def check(options: Options) -> None:
    """What does not fit together."""
    backend = options.backend
    if options.n > 1 and options.temperature == 0 and backend != "replay":
        raise UsageProblem(
            f"--n {options.n} with --temperature 0 would give {options.n} equal completions", "add --temperature 1"
        )
    if options.raw and options.template not in ("auto", "raw"):
        raise UsageProblem("--raw and --template exclude one another", "give one of them")
    check_backend(options, Options.model, here=_HERE, asking=_ASKING)


def run(options: Options, call: Invocation) -> None:
    """Complete every prompt of ``options.file``; one JSON line a completion, in input order."""
    leader = process_rank() == 0
    if options.backend != "local" and not leader:
        return  # rank 0 says why
    check(options)
    with contextlib.ExitStack() as stack:
        if options.backend == "local":
            start = _local(options, call, stack)
        else:
            start = _replay(options, call, stack) if options.backend == "replay" else _endpoint(options, call, stack)
        windows = Windows(options, call) if leader else None
        first = windows.next() if windows is not None else []
        if call.dry_run:
            if windows is not None:
                _dry_run(windows, first, start, options, call)
            return
        if leader and not first and "WORLD_SIZE" not in os.environ:
            _finish(windows, options, call)
            return
        _write(start(windows)(first), windows, options, call)


Answers = Callable[[list[Record]], Iterator[list[Answered]]]
Start = Callable[[Windows | None], Answers]


def _open_log(options: Options, call: Invocation, stack: contextlib.ExitStack) -> ResponseLog | None:
    """The log of this run, on rank 0: its state is judged before any model loads."""
    if options.log is None or call.dry_run or process_rank() != 0:
        return None
    log = stack.enter_context(ResponseLog(options.log, resume=options.resume))

    def tell() -> None:
        if log.found:
            call.reporter.note(f"{log.found} responses from {log.path}, {log.added} new")

    stack.callback(tell)
    return log


def _local(options: Options, call: Invocation, stack: contextlib.ExitStack) -> Start:
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    log = _open_log(options, call, stack)

    def start(windows: Windows | None) -> Answers:
        from toolbox.lm.local import LocalAnswers

        return LocalAnswers(options, call, source, windows, log)

    return start


def _endpoint(options: Options, call: Invocation, stack: contextlib.ExitStack) -> Start:
    from toolbox.lm.remote import EndpointAnswers

    chosen = options.service(options.model, call.reporter.warn, system=options.system, raw=options.raw)
    log = _open_log(options, call, stack)

    def start(windows: Windows | None) -> Answers:
        assert windows is not None
        return EndpointAnswers(options, call, windows, log, chosen)

    return start


def _replay(options: Options, call: Invocation, stack: contextlib.ExitStack) -> Start:
    from toolbox.lm.remote import ReplayAnswers

    assert options.replay is not None
    replay = Replay(options.replay, call.streams, model=options.model if "model" in options.given else None)
    stack.callback(replay.close)
    if replay.torn:
        call.reporter.warn(f"{replay.name}: its last line is cut off, and left out")

    def start(windows: Windows | None) -> Answers:
        assert windows is not None
        return ReplayAnswers(windows, replay, call.reporter.warn)

    return start


def _write(answers: Iterator[list[Answered]], windows: Windows | None, options: Options, call: Invocation) -> None:
    """Rows as they come; whatever ends this early, the backend is closed and what it finished is written."""
    writer = JsonlWriter(call.streams)
    with call.reporter.progress("row", None) as bar, contextlib.closing(answers):  # type: ignore[type-var]
        for finished in answers:
            for answered in finished:
                for row in _rows(answered, options):
                    writer.write(row)
            writer.flush()
            bar.advance(len(finished))
    writer.close()
    _finish(windows, options, call)


def _rows(answered: Answered, options: Options) -> Iterator[dict[str, Any]]:
    """Output rows: what came in, and the path that was taken."""
    record = answered.record
    for sample, one in enumerate(answered.completions):
        row = {
            **record.data,
            "id": record.id,
            "path_id": path_id(record.id, record.value.variant, sample),
            "sample": sample,
            "model": one.model if options.backend == "replay" else options.model,
            "completion": one.text,
            "finish_reason": one.finish_reason,
            "n_prompt_tokens": one.n_prompt_tokens,
            "n_completion_tokens": one.n_completion_tokens,
        }
        if one.logprobs is not None:
            row["logprobs"] = list(one.logprobs)
        yield row


def _dry_run(windows: Windows, first: list[Record], start: Start, options: Options, call: Invocation) -> None:
    """The plan; of stored responses, how many rows lack one."""
    find = start(windows).find if options.backend == "replay" else None  # type: ignore[attr-defined]
    rows, missing, window = 0, 0, first
    while window:
        rows += len(window)
        for record in window if find is not None else ():
            try:
                find(record)
            except BadData:
                missing += 1
        window = windows.next()
    plan = {"event": "plan", "command": call.command, "rows": rows, "completions": rows * options.n,
            "skipped": windows.reader.skipped, "settings": call.settings}  # fmt: skip
    writer = JsonlWriter(call.streams)
    writer.write(plan if find is None else {**plan, "missing": missing})
    writer.close()


def _finish(windows: Windows | None, options: Options, call: Invocation) -> None:
    if windows is None:
        return
    if windows.reader.skipped:
        call.reporter.warn(f"{windows.reader.skipped} bad rows left out")
    if options.rejects is not None:
        write_rejects(options.rejects, windows.rejected)
