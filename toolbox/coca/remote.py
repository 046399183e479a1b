"""Teachers without a model of their own: an endpoint, and stored responses. No torch."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial

from toolbox.coca.dialogues import Item
from toolbox.coca.teacher import Ask, Sampling, Unanswered
from toolbox.models.endpoint import AccessDenied, Endpoint, Service
from toolbox.models.generate import Completion, TextRequest
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog
from toolbox.shell.errors import BadData, Unavailable

PATIENCE = 5.0
"""Seconds that requests under way get to finish when the user interrupts."""


class ReplayTeacher:
    """Questions answered from stored responses; one that is not there ends its row's attempts."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            ask = item.begin()
            while ask is not None:
                found = self.replay.find(ask.request())
                ask = item.refuse(Unanswered()) if found is None else item.answer(found)
            yield item


class EndpointTeacher:
    """Many rows under way at an endpoint; they leave in order, each as soon as it and those before it are done.

    Rows are read in a thread of its own, at most ``window`` ahead of the first that is not done: whoever writes them
    may be waiting for an answer first. When something fails nothing new is started, attempts under way may finish,
    rows that are done leave, and only then the failure is raised.
    """

    def __init__(
        self,
        service: Service,
        sampling: Sampling,
        log: ResponseLog | None,
        *,
        window: int,
        say: Callable[[str], None],
        stop_at_bad: bool,
    ) -> None:
        self.service, self.sampling, self.log, self.say = service, sampling, log, say
        self.stop_at_bad = stop_at_bad
        self.slots = threading.Semaphore(window)
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.rows: deque[Item] = deque()
        self.flying: dict[str, list[Item]] = {}
        self.under_way = 0
        self.ended = self.stopped = False
        self.failure: BaseException | None = None

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        with Endpoint(self.service, self.say) as self.endpoint:
            threading.Thread(target=self._read, args=(items,), name="reader", daemon=True).start()
            try:
                while True:
                    yield from self._ready()
                    if not self.under_way and (self.stopped or (self.ended and not self.rows)):
                        break
                    self.events.get()()
            except (KeyboardInterrupt, GeneratorExit):  # the latter when whoever writes the rows is interrupted
                self._drain()
                raise
            yield from [item for item in self.rows if item.done]
        if self.failure is not None:
            raise self.failure

    # -- in the reader's thread ---------------------------------------------------------------------------------------
    def _read(self, items: Iterator[Item]) -> None:
        try:
            while True:
                self.slots.acquire()
                if self.stopped:
                    return
                item = next(items, None)
                if item is None:
                    break
                self.events.put(partial(self._start, item))
        except BaseException as problem:
            self.events.put(partial(self._end, problem))
        else:
            self.events.put(partial(self._end, None))

    # -- in the main thread -------------------------------------------------------------------------------------------
    def _start(self, item: Item) -> None:
        self.rows.append(item)
        if not self.stopped:
            self._go_on(item, item.begin())

    def _end(self, problem: BaseException | None) -> None:
        self.ended = True
        self.failure = self.failure or problem

    def _go_on(self, item: Item, ask: Ask | None) -> None:
        """Ask what the item wants to know; answers that are there already are given at once."""
        while ask is not None and not self.stopped:
            request, key = ask.request(), None
            if self.log is not None:
                key = self.log.key(request)
                if (stored := self.log.find(key)) is not None:
                    ask = item.answer(stored)
                    continue
                if key in self.flying:
                    self.flying[key].append(item)
                    return
            self._submit(item, ask, request, key)
            return
        if item.problem is not None and self.stop_at_bad:
            self._stop(at_once=False)

    def _submit(self, item: Item, ask: Ask, request: TextRequest, key: str | None) -> None:
        then = None if self.log is None or key is None else partial(self.log.add, key, request)
        sent = TextRequest(request.id, request.variant, request.sample, [dict(turn) for turn in ask.turns])
        waiting = [item]
        self.under_way += 1  # before it is: an interrupt between the two must not forget it
        future = self.endpoint.submit(sent, self.sampling.decoding(ask), then)
        if key is not None:
            self.flying[key] = waiting
        future.add_done_callback(lambda done: self.events.put(partial(self._landed, key, waiting, done)))

    def _landed(self, key: str | None, waiting: list[Item], future: Future[Completion]) -> None:
        self.under_way -= 1
        if key is not None:
            self.flying.pop(key, None)
        try:
            done = future.result()
        except CancelledError:
            return  # by _stop: the row stays open
        except BadData as problem:
            for item in waiting:
                self._go_on(item, item.refuse(problem))
        except BaseException as problem:
            self.failure = self.failure or problem
            self._stop(at_once=isinstance(problem, AccessDenied) or not isinstance(problem, Unavailable))
        else:
            for item in waiting:
                self._go_on(item, item.answer(done))

    def _stop(self, *, at_once: bool) -> None:
        if not self.stopped:
            self.stopped = True
            self.endpoint.stop(at_once=at_once)
            self.slots.release()  # the reader may be waiting for one

    def _ready(self) -> Iterator[Item]:
        while self.rows and self.rows[0].done:
            yield self.rows.popleft()
            self.slots.release()

    def _drain(self) -> None:
        """After an interrupt: what is under way may come in, and into the log, for a few seconds."""
        self._stop(at_once=False)
        if self.log is None:
            return
        until = time.monotonic() + PATIENCE
        while self.under_way and (left := until - time.monotonic()) > 0:
            try:
                self.events.get(timeout=left)()
            except queue.Empty:
                return
