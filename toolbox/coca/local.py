"""The teacher as a model here: the questions of many rows, a round at a time.

A round holds the next question of every row of a window; questions that are decoded alike run in one batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from toolbox.coca.dialogues import Item
from toolbox.coca.teacher import Ask, Sampling
from toolbox.coca.workers import Prompt, Workers
from toolbox.models.generate import Completion
from toolbox.models.responses import ResponseLog
from toolbox.shell.errors import BadData


class LocalTeacher:
    """Questions answered by ``workers``; to be called on rank 0. ``closing`` ends each option of a choice."""

    def __init__(
        self, workers: Workers, sampling: Sampling, log: ResponseLog | None, *, window: int, closing: str
    ) -> None:
        self.workers, self.sampling, self.log, self.window, self.closing = workers, sampling, log, window, closing

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        while window := list(itertools.islice(items, self.window)):
            for item in window:
                item.begin()
            while waiting := [item for item in window if item.ask is not None]:
                self._round(waiting)
            yield from window

    def _round(self, waiting: Sequence[Item]) -> None:
        alike: dict[tuple, list[Item]] = {}
        for item in waiting:
            ask = item.ask
            assert ask is not None
            alike.setdefault((ask.stop, ask.max_tokens, bool(ask.options)), []).append(item)
        for group in alike.values():
            self._answer(group)

    def _answer(self, group: Sequence[Item]) -> None:
        items, prompts = [], []
        for item in group:
            assert item.ask is not None
            try:
                prompt = self._prompt(item.ask)
                self.workers.fits(prompt, self.sampling.decoding(item.ask))
            except BadData as problem:
                item.refuse(problem)
                continue
            items.append(item)
            prompts.append(prompt)
        if not items:
            return
        asks = [item.ask for item in items]
        keys = [None if self.log is None else self.log.key(ask.request()) for ask in asks]  # type: ignore[union-attr]
        found: list[Completion | None] = [
            None if self.log is None or key is None else self.log.find(key) for key in keys
        ]
        decoding = self.sampling.decoding(asks[0])  # type: ignore[arg-type]
        new = self.workers.run(prompts, decoding, missing=[one is None for one in found])
        for place, item in enumerate(items):
            done = found[place]
            if done is None:
                done = self._told(new[place], item.ask)  # type: ignore[arg-type]
                if self.log is not None and keys[place] is not None:
                    done = self.log.add(keys[place], item.ask.request(), done)  # type: ignore[arg-type,union-attr]
            item.answer(done)

    def _prompt(self, ask: Ask) -> Prompt:
        ids = self.workers.chat.continued(ask.turns, ask.prefix)
        options = [f"{option} {self.closing}" for option in ask.options]
        return Prompt(ask.request().key, ids, options)

    def _told(self, done: Completion, ask: Ask) -> Completion:
        """Of a choice, the option without its end tag."""
        if not ask.options:
            return done
        text = done.text.removesuffix(f" {self.closing}")
        return Completion(text, done.finish_reason, done.n_prompt_tokens, done.n_completion_tokens, None)
