"""lm-generate's backends without a model of their own: an endpoint, and stored responses. No torch."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING

from toolbox.lm.windows import Answered, Windows, contents
from toolbox.models.endpoint import AccessDenied, Endpoint, Service
from toolbox.models.generate import Completion
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog, describe_run
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, Unavailable
from toolbox.shell.records import Record

if TYPE_CHECKING:
    from toolbox.lm.generate import Options


class ReplayAnswers:
    """Rows with their stored responses, a window at a time; a row that lacks one is a bad row."""

    def __init__(self, windows: Windows, replay: Replay, warn: Callable[[str], None]) -> None:
        self.windows, self.replay, self.warn = windows, replay, warn

    def __call__(self, first: list[Record]) -> Iterator[list[Answered]]:
        window = first
        while window:
            done, failure = [], None
            for record in window:
                try:
                    done.append(Answered(record, self.find(record)))
                except BadData as problem:
                    try:
                        self.windows.bad(record.bad(problem.reason, problem.advice), record)
                    except BadData as fatal:
                        failure = fatal
                        break
            yield done
            if failure is not None:
                raise failure
            window = self.windows.next()
        if changed := self.replay.changed:
            self.warn(f"{changed} responses were found by their id alone: prompt or options are not what they were")

    def find(self, record: Record) -> list[Completion]:
        """All samples of a row; BadData where one is missing."""
        content, *others = contents(record)
        found = []
        for request in self.windows.requests(record, content):
            one = self.replay.find(request, *others)
            if one is None:
                raise self.replay.missing(request)
            found.append(one)
        return found


class _Row:
    """A row some of whose samples are still to come."""

    def __init__(self, record: Record, samples: int) -> None:
        self.record = record
        self.completions: list[Completion | None] = [None] * samples
        self.problem: BadData | None = None

    @property
    def whole(self) -> bool:
        return self.problem is None and None not in self.completions

    def answered(self) -> Answered:
        return Answered(self.record, [one for one in self.completions if one is not None])


_Targets = list[tuple[_Row, int]]


class EndpointAnswers:
    """Rows with the responses of an endpoint, in input order, each as soon as it and those before it are there.

    The next window is read while the last responses of one are under way, in a thread of its own: whoever writes the
    prompts may be waiting for an answer first. At most two windows are held. Requests of one key, which only a log
    tells apart from others, are sent once. When something fails nothing new is started, attempts under way may finish
    (but not after 401 and 403), finished rows leave, and only then the failure is raised.
    """

    def __init__(
        self, options: Options, call: Invocation, windows: Windows, log: ResponseLog | None, chosen: Service
    ) -> None:
        self.options, self.windows, self.log, self.service = options, windows, log, chosen
        self.decoding = options.decoding()
        self.say = call.reporter.note
        self.rows: deque[_Row] = deque()
        self.flying: dict[str, _Targets] = {}
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.open = 0
        self.refused: list[_Row] = []
        self.reading = self.ended = self.stopped = False
        self.failure: BaseException | None = None
        if log is not None:
            run = describe_run(
                "openai", options.model, self.decoding, system=options.system, raw=options.raw,
                base_url=chosen.base_url.rstrip("/"),
            )  # fmt: skip
            if not log.begin(run, options.model):
                call.reporter.warn(f"{log.path}: holds no response of this endpoint with these options")

    def __call__(self, first: list[Record]) -> Iterator[list[Answered]]:
        strict = self.options.on_bad == "fail"
        with Endpoint(self.service, self.say, strict=strict) as self.endpoint:
            self._begin(first)
            while True:
                if ready := self._ready():
                    yield ready
                self._read_on()
                if not self.open and (self.stopped or self.ended):
                    break
                self.events.get()()
            yield self._rest()
        if self.failure is not None:
            raise self.failure

    # -- windows ------------------------------------------------------------------------------------------------------
    def _read_on(self) -> None:
        """Have the next window read when there are slots for it, unless rows wait for a slow one in front of them."""
        full = self.open >= self.service.concurrency or len(self.rows) > self.options.window
        if full or self.reading or self.ended or self.stopped:
            return
        self.reading = True
        threading.Thread(target=self._read, name="reader", daemon=True).start()

    def _read(self) -> None:
        try:
            window = self.windows.next()
        except BaseException as problem:
            self.events.put(partial(self._end, problem))
        else:
            self.events.put(partial(self._begin, window))

    def _begin(self, window: list[Record]) -> None:
        self.reading, self.ended = False, not window
        self._report()
        for record in window:
            self._start(record)

    def _end(self, problem: BaseException) -> None:
        """What was read before the bad line is finished first."""
        self.reading, self.ended = False, True
        self.failure = self.failure or problem

    # -- requests -----------------------------------------------------------------------------------------------------
    def _start(self, record: Record) -> None:
        row = _Row(record, self.options.n)
        self.rows.append(row)
        for request in self.windows.requests(record, contents(record)[0]):
            if self.stopped:
                return
            key = None
            if self.log is not None:
                key = self.log.key(request)
                if (stored := self.log.find(key)) is not None:
                    row.completions[request.sample] = stored
                    continue
                if key in self.flying:
                    self.flying[key].append((row, request.sample))
                    continue
            then = None if self.log is None or key is None else partial(self.log.add, key, request)
            try:
                future = self.endpoint.submit(request, self.decoding, then)
            except BadData as problem:
                self._refuse(row, problem)
                return
            targets = [(row, request.sample)]
            if key is not None:
                self.flying[key] = targets
            self.open += 1
            future.add_done_callback(partial(self._landed, key, targets))

    def _landed(self, key: str | None, targets: _Targets, future: Future[Completion]) -> None:
        self.events.put(partial(self._settle, key, targets, future))  # called in the endpoint's thread

    def _settle(self, key: str | None, targets: _Targets, future: Future[Completion]) -> None:
        self.open -= 1
        if key is not None:
            del self.flying[key]
        try:
            done = future.result()
        except CancelledError:
            return  # by _stop: the row stays unfinished
        except BadData as problem:
            for row, _ in targets:
                self._refuse(row, problem)
        except BaseException as problem:
            self.failure = self.failure or problem
            self._stop(at_once=isinstance(problem, AccessDenied) or not isinstance(problem, Unavailable))
        else:
            for row, sample in targets:
                row.completions[sample] = done

    def _refuse(self, row: _Row, problem: BadData) -> None:
        row.problem = row.problem or problem
        if self.options.on_bad == "fail":
            self._stop(at_once=False)

    def _stop(self, *, at_once: bool) -> None:
        self.stopped = True
        self.endpoint.stop(at_once=at_once)

    # -- rows ---------------------------------------------------------------------------------------------------------
    def _ready(self) -> list[Answered]:
        """The finished rows at the front; bad rows among them are left out."""
        ready = []
        while self.rows and (self.rows[0].whole or (self.rows[0].problem and self.options.on_bad == "skip")):
            row = self.rows.popleft()
            if row.problem is None:
                ready.append(row.answered())
            else:
                self.refused.append(row)
        if not self.reading:
            self._report()
        return ready

    def _rest(self) -> list[Answered]:
        """After a failure: all finished rows, whether or not those before them are. The first bad row is the failure
        if there is no other."""
        self.refused += [row for row in self.rows if row.problem is not None]
        rest = [row.answered() for row in self.rows if row.whole]
        self.rows.clear()
        if self.failure is None:
            try:
                self._report()
            except BadData as problem:
                self.failure = problem
        return rest

    def _report(self) -> None:
        """Tell of refused rows; not while the reader, who counts bad lines, is at work."""
        for row in self.refused:
            assert row.problem is not None
            problem = row.problem
            self.windows.bad(row.record.bad(problem.reason, problem.advice, problem.field), row.record)
        self.refused.clear()
