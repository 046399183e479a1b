"""lit-generate's backends without a model of their own: an endpoint that sees, and stored responses. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING

from toolbox.lit.questions import Question, Questions
from toolbox.models.endpoint import Endpoint, Service
from toolbox.models.generate import Completion, TextRequest
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog, describe_run
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    from toolbox.lit.answer import Options

AHEAD = 64
"""Rows that are read and asked before the first one has to leave."""

Answers = Iterator[tuple[Question, Completion]]


def replayed(questions: Questions, stored: Replay, warn: Callable[[str], None]) -> Answers:
    """The questions with their stored responses; one that lacks it is a bad row."""
    for question in questions:
        request = question.request(question.ready)
        done = stored.find(request)
        if done is None:
            _refuse(questions, question, stored.missing(request))
            continue
        yield question, done
    if changed := stored.changed:
        warn(f"{changed} responses were found by their id alone: prompt or options are not what they were")


class EndpointAnswers:
    """Questions with the responses of an endpoint, in input order.

    ``AHEAD`` rows are under way at most; with a log each response is in it as soon as it is there. Of equal requests,
    which only a log tells, one is sent.
    """

    def __init__(self, options: Options, call: Invocation, service: Service, log: ResponseLog | None) -> None:
        self.options, self.call, self.service, self.log = options, call, service, log
        self.decoding = options.decoding()
        self.flying: dict[str, Future[Completion]] = {}
        self.waiting: deque[tuple[Question, Future[Completion]]] = deque()
        if log is not None:
            run = describe_run("openai", options.model, self.decoding, raw=False, base_url=service.base_url.rstrip("/"))
            if not log.begin(run, options.model):
                call.reporter.warn(f"{log.path}: holds no response of this endpoint with these options")

    def __call__(self, questions: Questions) -> Answers:
        """Ask and wait. What was read before a bad line is finished first; other failures end the connection, and what
        had been answered by then is in the log."""
        stream, bad = iter(questions), None
        with Endpoint(self.service, self.call.reporter.note, strict=self.options.on_bad == "fail") as endpoint:
            while True:
                try:
                    question = next(stream, None)
                except BadData as problem:
                    bad = problem
                    break
                if question is None:
                    break
                self.waiting.append((question, self._ask(endpoint, question)))
                while self.waiting and (len(self.waiting) >= AHEAD or self.waiting[0][1].done()):
                    yield from self._settled(questions)
            while self.waiting:
                yield from self._settled(questions)
        if bad is not None:
            raise bad

    def _ask(self, endpoint: Endpoint, question: Question) -> Future[Completion]:
        request: TextRequest = question.request(question.ready)
        if self.log is None:
            return endpoint.submit(request, self.decoding)
        key = self.log.key(request)
        if (stored := self.log.find(key)) is not None:
            ready: Future[Completion] = Future()
            ready.set_result(stored)
            return ready
        if key not in self.flying:
            future = endpoint.submit(request, self.decoding, partial(self.log.add, key, request))
            self.flying[key] = future
            future.add_done_callback(lambda _: self.flying.pop(key, None))  # from now on the log has it
            return future
        return self.flying[key]

    def _settled(self, questions: Questions) -> Answers:
        """The first of those that wait, once it is there."""
        question, future = self.waiting.popleft()
        try:
            done = future.result()
        except BadData as problem:
            _refuse(questions, question, problem)
        except CancelledError:  # by the failure of a later one, which says why
            for later, other in self.waiting:
                problem = None if other.cancelled() else other.exception()
                if isinstance(problem, BadData):
                    _refuse(questions, later, problem)
                elif problem is not None:
                    raise problem from None
            raise
        else:
            yield question, done


def _refuse(questions: Questions, question: Question, problem: BadData) -> None:
    bad = question.sample.bad(problem.reason, problem.advice, problem.field)
    questions.bad(bad, question.sample.data)
