"""coca-refactor: safety pairs in, pairs that reason first out, row by row and in order."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from toolbox.coca.ablate import Ablation, parse_ablation
from toolbox.coca.dialogues import Driver, Item, converse
from toolbox.coca.pairs import LABELS, SHAPES, Reading, Row, Unique, fit_for_asking
from toolbox.coca.record import Grammar, mended
from toolbox.coca.rows_out import Output, enhanced
from toolbox.coca.tally import Tally, write_summary
from toolbox.coca.teacher import Outcome, Sampling, Teacher
from toolbox.coca.template import Template, load_template
from toolbox.coca.verify import Candidate, Label, findings
from toolbox.coca.words import SCRIPTS
from toolbox.models.load import ModelSource, find_model
from toolbox.models.responses import ResponseLog, check_log, describe_run, model_identity
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.records import Record, RecordReader, parse_map, read_records
from toolbox.shell.streams import process_rank

_HERE = frozenset({"trust_remote_code", "dtype", "device", "batch_size", "threads", "num_processes", "accelerate"})
_THERE = frozenset({"base_url", "api_key_env", "concurrency", "rpm", "timeout", "retries", "emit_requests"})
_ASKING = frozenset({"temperature", "seed", "log", "resume"})
_UNUSED = {
    "local": _THERE | {"replay", "responses"},
    "openai": _HERE | {"replay", "responses"},
    "replay": _HERE | _THERE | _ASKING | {"model"},
}
"""Options that a backend has no use for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """coca-refactor's options; ``given`` names those that were typed or set by a recipe."""

    file: str = "-"
    out: str = "-"
    overwrite: bool = False
    resume: bool = False
    log: str | None = None
    replay: str | None = None
    responses: str | None = None
    rejects: str | None = None
    summary: str | None = None
    log_text: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    limit: int | None = None
    label: str | None = None
    turns: str = "last"
    reprocess: bool = False
    verify_only: bool = False
    fix: bool = False
    emit_requests: bool = False
    meta: bool = True
    keep_vanilla_text: bool = False
    template: str = "coca-v1"
    few_shot: int = 2
    decode: str = "auto"
    response_source: str = "splice"
    label_hint: bool = True
    tag_style: str = "spaced"
    tag_prefix: str = ""
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    verify: str = "strict"
    max_attempts: int = 3
    on_reject: str = "drop"
    min_accept: float = 0.0
    unsafe_vanilla: str = "reject"
    tokenizer: str | None = None
    max_length: int | None = None
    think_lang: str | None = None
    ablate: str | None = None
    backend: str = "local"
    model: str = "smollm2"
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"
    window: int = 64
    threads: int | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    rpm: float | None = None
    timeout: float = 600.0
    retries: int = 6
    given: frozenset[str] = frozenset()

    @property
    def grammar(self) -> Grammar:
        return Grammar(self.tag_style, self.tag_prefix)  # type: ignore[arg-type]

    @property
    def decoding(self) -> str:
        """``--decode``, where ``auto`` is what suits the backend."""
        if self.decode != "auto":
            return self.decode
        return "forced" if self.backend == "local" else "free"

    @property
    def stored(self) -> str | None:
        """The stored responses, by either of the two names."""
        return self.replay if self.replay is not None else self.responses

    @property
    def log_file(self) -> str | None:
        """``--log``; a run into a file has one beside that, which goes when the run has come to its end."""
        if self.log is not None or self.backend == "replay" or self.out == "-" or self.verify_only:
            return self.log
        return None if self.emit_requests else f"{self.out}.log"


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    backend = options.backend
    for name in sorted(options.given & _UNUSED[backend]):
        flag = "-j" if name == "num_processes" else "--" + name.replace("_", "-")
        raise UsageProblem(f"{flag} has no use with --backend {backend}", "leave it out")
    if options.decoding == "forced" and backend == "openai":
        raise UsageProblem("--decode forced needs the model here: a chat endpoint does not go on from a given text",
                           "--decode free or json")  # fmt: skip
    if options.decoding == "json" and (backend == "local" or options.response_source == "teacher"):
        raise UsageProblem("--decode json is for endpoints, with the answer spliced in", "--decode free")
    if backend == "openai" and options.model == "smollm2" and "model" not in options.given:
        raise UsageProblem("--backend openai needs --model", "name the model as the server knows it")
    if backend == "openai" and options.base_url is None and not options.emit_requests and not options.verify_only:
        raise UsageProblem("--backend openai needs an address", "as in --base-url http://localhost:8000/v1")
    if backend == "replay" and options.stored is None:
        raise UsageProblem("--backend replay needs --replay FILE", "a log, or what a batch answered")
    if options.replay is not None and options.responses is not None:
        raise UsageProblem("--replay and --responses are one and the same", "give one of them")
    if options.emit_requests and backend != "openai":
        raise UsageProblem("--emit-requests writes requests to an endpoint", "add --backend openai")
    if options.fix and not options.verify_only:
        raise UsageProblem("--fix mends records that are there", "add --verify-only")
    if options.verify_only and options.reprocess:
        raise UsageProblem("--verify-only and --reprocess exclude one another", "give one of them")
    if options.max_length is not None and options.tokenizer is None:
        raise UsageProblem("--max-length counts tokens, and whose is not said", "add --tokenizer MODEL, the student")
    if options.think_lang is not None and options.think_lang not in SCRIPTS:
        raise UsageProblem(f"--think-lang {options.think_lang}: not known", f"one of {', '.join(SCRIPTS)}")
    if options.resume and options.log_file is None:
        raise UsageProblem("--resume goes on with a log, and there is none", "name it with --log FILE, or -o FILE")
    if options.ablate is not None:
        parse_ablation(options.ablate, options.grammar)
    _ = options.grammar
    _check_files(options)


def _check_files(options: Options) -> None:
    named = {"-o": options.out, "--rejects": options.rejects, "--summary": options.summary, "--log": options.log_file}
    places: dict[str, str] = {}
    for flag, path in named.items():
        if path is None or (flag == "-o" and path == "-"):
            continue
        if path == "-":
            raise UsageProblem(f"{flag} -: stdout has the rows already", "name a file")
        place = os.path.abspath(path)
        if place in places:
            raise UsageProblem(f"{flag} {path}: {places[place]} has the same name", "name another file")
        places[place] = flag
        if not os.path.isdir(os.path.dirname(place)):
            raise CannotCreate(f"{flag} {path}: no such directory", "make it first")
    if options.backend == "replay" and options.stored == options.file == "-":
        raise UsageProblem("the input and the stored responses cannot both be read from stdin", "name a file")
    if options.out != "-" and os.path.exists(options.out) and not (options.overwrite or options.resume):
        raise CannotCreate(f"{options.out}: exists already", "--overwrite replaces it")
    if options.log_file is not None and process_rank() == 0 and not _finished(options):
        check_log(options.log_file, resume=options.resume)


def _finished(options: Options) -> bool:
    """Whether ``--resume`` found the output of a run that came to its end."""
    return options.resume and not options.overwrite and options.out != "-" and os.path.exists(options.out)


# -- the job ----------------------------------------------------------------------------------------------------------
def run(options: Options, call: Invocation) -> None:
    """Refactor every row of ``options.file``; rows leave in order, rejected ones to ``--rejects``."""
    leader = process_rank() == 0
    if options.backend != "local" and not leader:
        return
    check(options)
    if _finished(options):
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
    teacher = _teacher(options, template)
    work = _Rows(options, call, teacher)
    log = None if call.dry_run else _open_log(options, call, stack)
    driver = (
        None if options.verify_only or options.emit_requests or call.dry_run else _driver(options, call, log, stack)
    )
    first = list(itertools.islice(work.items(), options.window))
    if call.dry_run:
        _plan(work, first, options, call)
        return
    items = itertools.chain(first, work.rest())
    out = stack.enter_context(Output(options.out, call.streams, options.rejects, overwrite=True))
    if driver is not None and (first or "WORLD_SIZE" in os.environ):
        done = driver(source)(items)
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


def _alone(item: Item, work: _Rows) -> Item:
    """Without a teacher: first questions for a batch, or records that are judged as they are."""
    if work.options.emit_requests:
        item.begin()
    return item


def _write(
    done: Iterator[Item], work: _Rows, out: Output, options: Options, call: Invocation, log: ResponseLog | None
) -> None:
    with call.reporter.progress("row", None) as bar, contextlib.closing(done):  # type: ignore[type-var]
        try:
            for item in done:
                work.settle(item, out)
                bar.advance()
                out.flush()
        except KeyboardInterrupt:
            kept = "nothing was kept: --log keeps answers" if log is None else f"{log.path} has {log.held + log.added}"
            more = "" if log is None else " answers; the same command with --resume goes on"
            call.reporter.warn(f"interrupted; {kept}{more}")
            raise


def _close(work: _Rows, options: Options, call: Invocation) -> None:
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


# -- rows -------------------------------------------------------------------------------------------------------------
class _Rows:
    """The rows of a run: read, made ready for asking, settled when all is said."""

    def __init__(self, options: Options, call: Invocation, teacher: Teacher) -> None:
        self.options, self.teacher = options, teacher
        self.tally = Tally()
        self.bad: list[tuple[int, bytes]] = []
        self.ablation: Ablation | None = None
        if options.ablate is not None:
            self.ablation = parse_ablation(options.ablate, options.grammar)
        self.reader = RecordReader(
            SHAPES, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self.bad.append((self.reader.read + self.reader.skipped, raw)),
        )  # fmt: skip
        label: Label | None = None if options.label is None else LABELS[options.label]
        keep = options.verify_only
        turns = "all" if options.turns == "all" else "last"
        self.reading = Reading(label, turns, options.grammar, options.reprocess, keep)  # type: ignore[arg-type]
        self._records = read_records(options.file, call.streams, self.reader)
        self._items = self._made()
        self.backend = options.backend
        self._fixed = teacher.template.refusal if options.unsafe_vanilla == "refuse" else None

    def items(self) -> Iterator[Item]:
        return self._items

    rest = items

    def _made(self) -> Iterator[Item]:
        import msgspec

        unique, taken = Unique(), 0
        if self.options.limit == 0:
            return
        for record in self._records:
            try:
                row = self.reading.row(record)
                unique.check(record)
            except BadData as problem:
                self.reader.bad(problem, msgspec.json.encode(record.data))
                continue
            yield self._item(row)
            taken += 1
            if taken == self.options.limit:
                return

    def _item(self, row: Row) -> Item:
        if self.options.verify_only:
            return self._judged(row)
        pairs, codes = fit_for_asking(row, self.options.grammar, self.teacher.judge, self._fixed)
        return Item(row, codes, None if codes else converse(row, pairs, self.teacher))

    def _judged(self, row: Row) -> Item:
        """A record that is there already, by the same rules; its answer's hash is looked at where it has one."""
        outcomes = []
        for pair in row.pairs:
            text = mended(pair.answer, self.options.grammar) if self.options.fix else pair.answer
            parsed = self.options.grammar.parse(text)
            response = parsed.texts.get("response", "")
            candidate = Candidate(
                text, pair.prompt, response, pair.label, "vanilla", text, grammar=self.options.grammar,
                glosses=self.teacher.template.glosses, think_script=self.teacher.think_script,
                length=None if self.teacher.fits is None else self.teacher.fits(pair, text),
                max_length=self.options.max_length, judge=self.teacher.judge,
            )  # fmt: skip
            found = findings(candidate, self.teacher.level)
            if self._other_answer(row.record, response):
                found["V08"] = "the answer is not the one whose hash the row has"
            texts = None if found else dict(parsed.texts)
            outcomes.append(Outcome(texts, found, 0, raw=text))
        return Item(row, outcomes=outcomes)

    @staticmethod
    def _other_answer(record: Record, response: str) -> bool:
        from toolbox.coca.rows_out import answer_digest

        said = record.data.get("coca")
        if not isinstance(said, dict) or said.get("response_source") != "vanilla":
            return False
        return isinstance(said.get("vanilla_sha256"), str) and said["vanilla_sha256"] != answer_digest(response)

    # -- settled ------------------------------------------------------------------------------------------------------
    def settle(self, item: Item, out: Output) -> None:
        """Write a row, or note why not. Raises: BadData for what ends the run."""
        import msgspec

        record = item.row.record
        if self.options.emit_requests:
            self._emit(item, out)
            return
        if item.problem is not None:
            problem = record.bad(item.problem.reason, item.problem.advice, item.problem.field)
            self.reader.bad(problem, msgspec.json.encode(record.data))
            return
        outcomes = item.outcomes or []
        codes = item.codes or {code: why for one in outcomes for code, why in one.codes.items()}
        self.tally.take(outcomes, codes)
        if not codes:
            out.write(self._accepted(item.row, outcomes))
            return
        raw = [one.raw for one in outcomes if one.raw]
        out.reject(record, codes, raw if raw and self.options.log_text else None)
        if self.options.on_reject == "fail":
            told = ", ".join(f"{code} ({why})" for code, why in codes.items())
            raise record.bad(f"rejected: {told}", "--on-reject drop leaves such rows out")
        if self.options.on_reject == "keep-vanilla" and "unsafe_vanilla" not in codes:
            self.tally.kept += 1
            meta = {"coca": {"kept": "vanilla", "codes": sorted(codes)}} if self.options.meta else {}
            out.write({**record.data, "id": record.id, **meta})

    def _accepted(self, row: Row, outcomes: list[Outcome]) -> dict[str, Any]:
        options = self.options
        if options.verify_only:
            return row.replaced([one.raw for one in outcomes]) if options.fix else row.record.data
        return enhanced(row, outcomes, self.ablation, self)

    def _emit(self, item: Item, out: Output) -> None:
        from toolbox.models.endpoint import Service, batch_line

        if item.codes:
            self.tally.take([], item.codes)
            out.reject(item.row.record, item.codes, None)
        elif item.ask is not None:
            self.tally.take([], {})
            service = Service(self.options.base_url or "http://localhost/v1", self.options.model)
            ask = item.ask
            out.write(batch_line(service, ask.request(), self.sampling.decoding(ask)))

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.options.temperature, seed=self.options.seed)

    def tag_tokens(self) -> dict[str, Any]:
        """Whether the student's tokenizer spells each tag alike alone and in a record."""
        fits = self.teacher.fits
        return {} if fits is None else {"tags_alike": fits.tags_alike(self.options.grammar)}


def _teacher(options: Options, template: Template) -> Teacher:
    fits = None
    if options.tokenizer is not None:
        from toolbox.coca.student import Student

        fits = Student(options.tokenizer, trust_remote_code=options.trust_remote_code)
    return Teacher(
        template, options.decoding, options.response_source == "splice", options.label_hint, options.verify,  # type: ignore[arg-type]
        options.max_attempts, options.max_tokens, SCRIPTS.get(options.think_lang or ""), options.max_length, fits,
    )  # fmt: skip


# -- who answers ------------------------------------------------------------------------------------------------------
Start = Callable[[ModelSource | None], Driver]


def _open_log(options: Options, call: Invocation, stack: contextlib.ExitStack) -> ResponseLog | None:
    path = options.log_file
    if path is None:
        return None
    log = stack.enter_context(ResponseLog(path, resume=options.resume, mode=0o600))

    def tell() -> None:
        if log.found:
            call.reporter.note(f"{log.found} responses from {log.path}, {log.added} new")

    stack.callback(tell)
    return log


def _describe(options: Options, log: ResponseLog | None, identity: str, call: Invocation, **more: Any) -> None:
    """Tell the log what decides answers beside the questions themselves, which hold the template's words."""
    if log is None:
        return
    sampling = Sampling(options.temperature, seed=options.seed)
    from toolbox.coca.teacher import Ask

    run = describe_run(
        options.backend, identity, sampling.decoding(Ask("", 0, (), max_tokens=options.max_tokens)),
        decode=options.decoding, **more,
    )  # fmt: skip
    if not log.begin(run, options.model):
        call.reporter.warn(f"{log.path}: holds no response of this model with these options")


def _driver(options: Options, call: Invocation, log: ResponseLog | None, stack: contextlib.ExitStack) -> Start:
    sampling = Sampling(options.temperature, seed=options.seed)
    if options.backend == "replay":
        from toolbox.coca.remote import ReplayTeacher
        from toolbox.models.replay import Replay

        assert options.stored is not None
        replay = Replay(options.stored, call.streams)
        stack.callback(replay.close)
        if replay.torn:
            call.reporter.warn(f"{replay.name}: its last line is cut off, and left out")
        return lambda _: ReplayTeacher(replay)
    if options.backend == "openai":
        return _remote(options, call, log, sampling)

    def start(source: ModelSource | None) -> Driver:
        from toolbox.coca.local import LocalTeacher

        assert source is not None
        workers = _workers(options, call, source)
        stack.callback(workers.dismiss)
        if log is not None:
            identity = model_identity(source, trust_remote_code=options.trust_remote_code)
            _describe(options, log, identity, call, dtype=workers.dtype)
        closing = options.grammar.closing("check")
        return LocalTeacher(workers, sampling, log, window=options.window, closing=closing)

    return start


def _remote(options: Options, call: Invocation, log: ResponseLog | None, sampling: Sampling) -> Start:
    from toolbox.coca.remote import EndpointTeacher
    from toolbox.models.endpoint import Service
    from toolbox.models.endpoint_key import find_key

    assert options.base_url is not None
    service = Service(
        options.base_url, options.model, find_key(options.api_key_env, options.base_url),
        concurrency=options.concurrency, rpm=options.rpm, timeout=options.timeout, retries=options.retries,
    )  # fmt: skip
    _describe(options, log, options.model, call, base_url=service.base_url.rstrip("/"))
    window = max(options.window, 4 * options.concurrency)
    bad = options.on_bad == "fail"
    return lambda _: EndpointTeacher(service, sampling, log, window=window, say=call.reporter.note, stop_at_bad=bad)


def _workers(options: Options, call: Invocation, source: ModelSource) -> Any:
    from toolbox.coca.workers import Workers

    return Workers(
        source, call.reporter, dtype=options.dtype, device=options.device, batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code, share_beginnings=True,
    )  # fmt: skip


def _serve(options: Options, call: Invocation, source: ModelSource | None) -> None:
    if source is not None and not call.dry_run:
        _workers(options, call, source).serve()


def _plan(work: _Rows, first: list[Item], options: Options, call: Invocation) -> None:
    """--dry-run: how many rows there are, how many leave before any question, how many pairs are asked about."""
    from toolbox.shell.streams import JsonlWriter

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
