"""lit-generate: the job. Rows with images in, answers out, in order; or, with ``--propose``, new rows to learn from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import Any

from toolbox.lit.build import DEFAULT, vlm_named
from toolbox.lit.images import ImageStore
from toolbox.lit.questions import Question, Questions, content_of
from toolbox.models.backends import EndpointOptions, check_backend
from toolbox.models.generate import Completion, Decoding
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.streams import JsonlWriter, process_rank

_HERE = frozenset(
    {"trust_remote_code", "dtype", "batch_size", "threads", "num_processes", "accelerate", "control_tokens", "propose",
     "suffix"}
)  # fmt: skip
_ASKING = frozenset({"temperature", "top_p", "max_new_tokens", "stop", "seed", "log", "resume"})
"""Options that only a model here has a use for, and those that stored responses have none for."""


@dataclass(frozen=True, kw_only=True)
class Options(EndpointOptions):
    """lit-generate's options; ``given`` names those that were typed or set by a recipe."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    image_root: str | None = None
    max_image_pixels: float = 50e6
    max_images_per_row: int = 8
    limit: int | None = None
    backend: str = "local"
    model: str = DEFAULT
    trust_remote_code: bool = False
    log: str | None = None
    resume: bool = False
    replay: str | None = None
    prompt: str | None = None
    all_turns: bool = False
    propose: int = 0
    suffix: str = ""
    image_position: str = "first"
    control_tokens: str = "escape"
    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None
    given: frozenset[str] = frozenset()

    def decoding(self) -> Decoding:
        """How the tokens of an answer are chosen; of a model here their log-probabilities are told."""
        drawn = 0.0 if self.propose or self.temperature is None else self.temperature
        return Decoding(self.max_new_tokens, drawn, self.top_p, self.stop, self.seed, self.backend == "local")

    def drawing(self) -> Decoding:
        """How the tokens of a proposed question are chosen."""
        heat = 1.0 if self.temperature is None else self.temperature
        return Decoding(self.max_new_tokens, heat, self.top_p, ("\n",), self.seed, True)


def check(options: Options) -> None:
    """What does not fit together."""
    check_backend(options, Options.model, here=_HERE, asking=_ASKING)
    if options.propose and (options.prompt is not None or options.all_turns):
        raise UsageProblem("--propose asks questions of its own", "leave --prompt and --all-turns out")
    if options.propose > 1 and options.temperature == 0:
        raise UsageProblem(
            f"--propose {options.propose} with --temperature 0 would ask {options.propose} equal questions",
            "leave --temperature out: questions are drawn at 1",
        )
    if options.suffix and not options.propose:
        raise UsageProblem("--suffix is put behind proposed questions", "it needs --propose N")


def run(options: Options, call: Invocation) -> None:
    """Answer every row."""
    leader = process_rank() == 0
    if options.backend != "local" and not leader:
        return  # rank 0 says why
    check(options)
    with contextlib.ExitStack() as stack:
        if options.backend == "local":
            _local(options, call, stack, leader)
        else:
            _remote(options, call, stack)


# -- a model here -----------------------------------------------------------------------------------------------------
def _local(options: Options, call: Invocation, stack: contextlib.ExitStack, leader: bool) -> None:
    from toolbox.lit.answer_local import prompt_of
    from toolbox.models.spans import Aligner
    from toolbox.models.vlm import find_vlm, load_processor

    source = find_vlm(vlm_named(options.model, call.reporter.note), trust_remote_code=options.trust_remote_code)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)

    @cache  # at the first row: a line that is none is told before seconds of imports
    def aligner() -> Aligner:
        processor = load_processor(source, trust_remote_code=options.trust_remote_code)
        return Aligner(processor, options.control_tokens)  # type: ignore[arg-type]

    opens = bool(options.propose)
    questions = Questions(options, call, lambda sample: prompt_of(aligner(), store, sample, opens))
    if call.dry_run:
        if leader:
            _plan(questions, call)
        return
    log = _open_log(options, call, stack) if leader else None
    stream = iter(questions) if leader else iter(())
    first = list(islice(stream, 1))
    writer = JsonlWriter(call.streams)
    if first or "WORLD_SIZE" in os.environ:
        from toolbox.lit.answer_local import LocalAnswers
        from toolbox.training.processes import start_processes

        answers = LocalAnswers(options, source, aligner(), store, start_processes("fp32"), log, call.reporter.warn)
        if not leader:
            answers.serve()
            return
        made = _proposals if options.propose else _answers
        with call.reporter.progress("row", None) as bar:
            for count, rows in made(options, call, chain(first, stream), answers):
                _write(writer, rows)
                bar.advance(count)
        answers.close()
    writer.close()
    questions.finish()


def _windows(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    source = iter(questions)
    while window := list(islice(source, size)):
        yield window


Batches = Iterator[tuple[int, list[dict[str, Any]]]]


def _answers(options: Options, call: Invocation, questions: Iterable[Question], answers: Any) -> Batches:
    from toolbox.lit.answer_local import Ask

    for window in _windows(questions, answers.window):
        asked = [
            Ask(one.request(content_of(one.sample, answers.store) if options.log else ""), one.sample, one.ready)
            for one in window
        ]
        done = answers.complete(asked, options.decoding())
        yield len(window), [_row(one, found) for one, found in zip(window, done, strict=True)]


def _proposals(options: Options, call: Invocation, questions: Iterable[Question], answers: Any) -> Batches:
    from toolbox.lit.propose import Proposing

    proposing = Proposing(
        answers, options.propose, options.suffix, options.drawing(), options.decoding(), options.log is not None
    )
    kept = 0
    for window in _windows(questions, answers.window):
        rows = proposing.rows(window)
        kept += len(rows)
        yield len(window), rows
    left = proposing.left.told()
    call.reporter.note(f"{kept} rows" + (f"; left out: {left}" if left else ""))


# -- an endpoint, stored responses ------------------------------------------------------------------------------------
def _remote(options: Options, call: Invocation, stack: contextlib.ExitStack) -> None:
    from toolbox.lit.answer_remote import EndpointAnswers, replayed

    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    questions = Questions(options, call, lambda sample: content_of(sample, store))
    answers: Callable[[Questions], Iterator[tuple[Question, Completion]]]
    lacking = None
    if options.backend == "openai":
        service = options.service(options.model, call.reporter.warn)
        if not call.dry_run:
            answers = EndpointAnswers(options, call, service, _open_log(options, call, stack))
    else:
        assert options.replay is not None
        stored = Replay(options.replay, call.streams, model=options.model if "model" in options.given else None)
        stack.callback(stored.close)
        if stored.torn:
            call.reporter.warn(f"{stored.name}: its last line is cut off, and left out")
        answers = lambda questions: replayed(questions, stored, call.reporter.warn)  # noqa: E731
        lacking = lambda one: stored.find(one.request(one.ready)) is None  # noqa: E731
    if call.dry_run:
        _plan(questions, call, lacking)
        return
    writer = JsonlWriter(call.streams)
    with call.reporter.progress("row", None) as bar, contextlib.closing(answers(questions)) as found:  # type: ignore[type-var]
        for question, done in found:
            _write(writer, [_row(question, done)])
            bar.advance(1)
    writer.close()
    questions.finish()


# -- output -----------------------------------------------------------------------------------------------------------
def _open_log(options: Options, call: Invocation, stack: contextlib.ExitStack) -> ResponseLog | None:
    if options.log is None:
        return None
    log = stack.enter_context(ResponseLog(options.log, resume=options.resume))

    def tell() -> None:
        if log.found:
            call.reporter.note(f"{log.found} responses from {log.path}, {log.added} new")

    stack.callback(tell)
    return log


def _row(question: Question, done: Completion) -> dict[str, Any]:
    sample = question.sample
    return {
        **sample.data, "id": sample.id, "turn": question.turn, "prompt": sample.messages[-1].text,
        "text": done.text, "logprob": None if done.logprobs is None else round(sum(done.logprobs), 4),
        "tokens": done.n_completion_tokens, "finish_reason": done.finish_reason,
    }  # fmt: skip


def _write(writer: JsonlWriter, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        writer.write(row)
    writer.flush()


def _plan(questions: Questions, call: Invocation, lacking: Callable[[Question], bool] | None = None) -> None:
    """The plan; of stored responses, how many questions lack one."""
    count = missing = 0
    for one in questions:
        count += 1
        missing += lacking is not None and lacking(one)
    questions.finish()
    plan = {"event": "plan", "command": call.command, "settings": call.settings, "answers": count}
    writer = JsonlWriter(call.streams)
    writer.write(plan if lacking is None else {**plan, "missing": missing})
    writer.close()
