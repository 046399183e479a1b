"""Rows on their way through a teacher: each is a generator of questions, whoever answers them.

A driver takes items and gives them back in the same order, each with its outcomes or with what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from toolbox.coca.pairs import Row
from toolbox.coca.teacher import Ask, Outcome, Pair, Teacher, Unanswered
from toolbox.models.generate import Completion
from toolbox.shell.errors import BadData

Conversation = Generator[Ask, Completion, list[Outcome]]


def converse(row: Row, pairs: Sequence[Pair], teacher: Teacher) -> Conversation:
    """All questions about a row, pair after pair; each is named after its pair."""
    outcomes = []
    for place, pair in enumerate(pairs):
        dialogue = teacher.annotate(pair)
        try:
            ask = next(dialogue)
            while True:
                try:
                    done = yield replace(ask, name=row.name(place))
                except (BadData, Unanswered) as problem:
                    ask = dialogue.throw(problem)
                else:
                    ask = dialogue.send(done)
        except StopIteration as end:
            outcomes.append(end.value)
    return outcomes


@dataclass
class Item:
    """A row and where it stands: rejected before any question (``codes``), being asked about (``open``), done
    (``outcomes``), or wrong in itself (``problem``)."""

    row: Row
    codes: dict[str, str] = field(default_factory=dict)
    open: Conversation | None = None
    outcomes: list[Outcome] | None = None
    problem: BadData | None = None
    ask: Ask | None = None

    @property
    def done(self) -> bool:
        return self.open is None

    def begin(self) -> Ask | None:
        """The first question; None where there is none."""
        return self._step(lambda conversation: next(conversation)) if self.open is not None else None

    def answer(self, done: Completion) -> Ask | None:
        """The next question; None when all is said."""
        return self._step(lambda conversation: conversation.send(done))

    def refuse(self, problem: Exception) -> Ask | None:
        """The question cannot be answered: the next one, or None where that was the end of it."""
        return self._step(lambda conversation: conversation.throw(problem))

    def _step(self, move: Callable[[Conversation], Ask]) -> Ask | None:
        assert self.open is not None
        try:
            self.ask = move(self.open)
        except StopIteration as end:
            self.outcomes, self.open, self.ask = end.value, None, None
        except BadData as problem:
            self.problem, self.open, self.ask = problem, None, None
        except Unanswered:
            self.problem = BadData("there is no stored response for this row", "--on-bad skip leaves such rows out")
            self.open = self.ask = None
        return self.ask


class Driver(Protocol):
    """Whoever answers questions."""

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        """Every item, in order, done."""
        ...
