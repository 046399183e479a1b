"""Paths of reasoning, from rows to what is scored and drawn: questions, contexts, thoughts, and the answer of a path.

Nothing here needs torch, numpy or a model.

Symbols: a question x has choices c_1..c_k with answer strings a_1..a_k; a path is thoughts t_1..t_n.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from toolbox.landscape.wording import Wording, split_thoughts
from toolbox.models.answers import read_answer, trailing_cue
from toolbox.shell.errors import BadData
from toolbox.shell.items import Choices, choices_of, gold_of, same_answer
from toolbox.shell.records import Message, Record

FACETS = ("model", "variant", "dataset")
"""Kept of every path, beside what --by names."""

MOST_SINGLE = 0.2
"""Share of paths with one thought above which the way of cutting is doubtful."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question: its choices, its answer strings, and the index of the right choice, −1 where it is not known."""

    id: str
    choices: Choices
    answers: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Asking:
    """The context of a path: turns and the plain prompt where the row has them, else (both None) a ``text``."""

    turns: tuple[tuple[str, str], ...] | None = None
    prompt: str | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Path:
    """A path: ``question`` is an index, ``pred`` the index of the choice that it answers, −1 for none, and ``source``
    the rule that found it. ``asking`` is None where nothing is to be scored. ``cut``: we cut its text into thoughts."""

    id: str
    question: int
    thoughts: tuple[str, ...]
    pred: int
    source: str
    facets: dict[str, str | None]
    asking: Asking | None
    cut: bool
    record: Record


@dataclass(slots=True)
class Paths:
    """Paths and their questions, in the order in which they came.

    ``by``: further facets to keep, from fields of the row or of its ``meta``; ``seen_facets`` are those that some row
    had. ``scored``: contexts are needed. ``strangers`` counts given answers that name no choice.
    """

    wording: Wording
    by: tuple[str, ...] = ()
    scored: bool = True
    questions: list[Question] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    strangers: int = 0
    seen_facets: set[str] = field(default_factory=set)
    _numbers: dict[str, int] = field(default_factory=dict)
    _first: dict[str, Record] = field(default_factory=dict)
    _ordinals: Counter[tuple[str, str | None]] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Take one more row; a bad one changes nothing.

        Raises: BadData for choices, labels and an answer that do not fit together or are not those of the other rows of
        the same id, for a path that was there before, and where there is nothing to score a path under.
        """
        choices = choices_of(record)
        if choices is None:
            raise record.bad("no `choices`", "the map is of multiple-choice questions", "$.choices")
        question, number = self._question(record, choices)
        path_id, counted = self._path_id(record)
        if (first := self._first.get(path_id)) is not None:
            what = f"the path {path_id} stands on {_place(first)} already"
            raise record.bad(what, "give each path a name of its own, its model in front of it say", "$.path_id")
        facets = {name: self._facet(record, name) for name in dict.fromkeys((*FACETS, *self.by))}
        asking = self._asking(record, choices) if self.scored else None
        pred, source, stranger = self._answer(record, choices)
        thoughts, cut = self._thoughts(record)
        if self.wording.drop_answer_thought and pred >= 0:
            thoughts = _without_answer(thoughts, choices, pred)
        # Nothing can go wrong from here on.
        if number == len(self.questions):
            self._numbers[question.id] = number
            self.questions.append(question)
        self.questions[number] = question
        self._first[path_id] = record
        self._ordinals[counted] += 1
        self.strangers += stranger
        self.seen_facets |= {name for name, value in facets.items() if value is not None}
        self.paths.append(Path(path_id, number, thoughts, pred, source, facets, asking, cut, record))

    def leave_out(self, paths: Sequence[Path]) -> None:
        """Forget these paths, and questions that no other path answers."""
        gone = {path.id for path in paths}
        kept = [path for path in self.paths if path.id not in gone]
        used = sorted({path.question for path in kept})
        moved = {old: new for new, old in enumerate(used)}
        self.paths = [replace(path, question=moved[path.question]) for path in kept]
        self.questions = [self.questions[old] for old in used]

    @property
    def drawn(self) -> set[int]:
        """The questions that have a path with thoughts."""
        return {path.question for path in self.paths if path.thoughts}

    def to_score(self) -> list[int]:
        """The paths that a model has to read: those with thoughts, and the first path of a question without any."""
        drawn, numbers = self.drawn, []
        for number, path in enumerate(self.paths):
            if path.thoughts or path.question not in drawn:
                numbers.append(number)
            if not path.thoughts:
                drawn.add(path.question)  # its context alone is scored once
        return numbers

    def digest(self) -> str:
        """sha256 of all that came in and matters, in its order: ids, contexts, thoughts, choices, answers, facets."""
        hasher = hashlib.sha256()
        for path in self.paths:
            question = self.questions[path.question]
            told = (path.id, path.pred, path.facets, path.asking, *_scored(path, question), question.gold)
            hasher.update(msgspec.json.encode(told) + b"\n")
        return hasher.hexdigest()

    def texts_digest(self) -> str:
        """sha256 of what every row of a scored path still has: ids, thoughts and choices, in any order of the rows."""
        hasher = hashlib.sha256()
        for path in sorted(self.paths, key=lambda path: path.id):
            hasher.update(msgspec.json.encode(_scored(path, self.questions[path.question])) + b"\n")
        return hasher.hexdigest()

    # -- parts of a row
    def _question(self, record: Record, choices: Choices) -> tuple[Question, int]:
        """The question of a row, what was known of it before included, and its number."""
        try:
            answers = self.wording.answers(choices)
        except ValueError:
            advice = "give them, or use --answer-template 'Answer is: {label}'"
            raise record.bad("labels without the texts of the choices", advice, "$.choices") from None
        gold_label = gold_of(record, choices)
        gold = -1 if gold_label is None else choices.labels.index(gold_label)
        number = self._numbers.get(record.id)
        if number is None:
            return Question(record.id, choices, answers, gold), len(self.questions)
        known = self.questions[number]
        advice = "rows of one id are paths of one question: give another question another id"
        if known.choices != choices:
            raise record.bad(f"other choices than earlier rows of the id {record.id}", advice, "$.choices")
        if -1 not in (known.gold, gold) and known.gold != gold:
            raise record.bad(f"another answer than earlier rows of the id {record.id}", advice, "$.answer")
        return replace(known, gold=max(known.gold, gold)), number

    def _path_id(self, record: Record) -> tuple[str, tuple[str, str | None]]:
        """The path's id, the row's own or ``id/variant/ordinal``; and what ordinals are counted by."""
        value, counted = record.value, (record.id, record.value.variant)
        stem = "/".join(part for part in counted if part is not None)
        return value.path_id or f"{stem}/{self._ordinals[counted]}", counted

    def _facet(self, record: Record, name: str) -> str | None:
        for where, found in (("$", record.data), ("$.meta", record.value.meta)):
            if (value := found.get(name)) is not None:
                if isinstance(value, str):
                    return value
                if isinstance(value, bool | int | float):
                    return msgspec.json.encode(value).decode()
                if name in self.by:
                    raise record.bad("neither text nor number, so no facet", "see --by", f"{where}.{name}")
        return None

    def _asking(self, record: Record, choices: Choices) -> Asking:
        """The text under which the path was sampled, or the question."""
        value, kind = record.value, self.wording.context
        if kind != "question":
            turns = _turns(record)
            if turns or value.prompt:
                return Asking(turns, value.prompt or None)
            if kind == "prompt":
                advice = "--context auto takes the question where there is no prompt"
                raise record.bad("neither `messages` nor `prompt`", advice, "$.prompt")
        if value.question is None:
            advice = "a thought is scored behind the question that it is about"
            raise record.bad("neither `question` nor a prompt" if kind == "auto" else "no `question`", advice)
        return Asking(text=self.wording.question(value.question, value.context, choices))

    def _thoughts(self, record: Record) -> tuple[tuple[str, ...], bool]:
        """The thoughts, and whether we cut them."""
        value = record.value
        if isinstance(value.thoughts, list):
            return tuple(thought for thought in value.thoughts if thought.strip()), False
        text = value.completion if value.thoughts is None else value.thoughts
        return tuple(split_thoughts(text or "", self.wording.split)), True

    def _answer(self, record: Record, choices: Choices) -> tuple[int, str, bool]:
        """The index of the path's answer, the rule that found it, and whether a given one names no choice."""
        value = record.value
        if "pred" in record.data:
            try:
                given = _as_label(record, value.pred, choices)
            except BadData:
                return -1, "none", True
            return (-1, "none", False) if given is None else (choices.labels.index(given), "pred", False)
        text = value.completion
        if text is None:
            text = value.thoughts if isinstance(value.thoughts, str) else "\n".join(value.thoughts)
        if self.wording.compat:
            letters = re.findall("[A-E]", text)
            found = letters[-1] if letters and letters[-1] in choices.labels else None
            return (-1, "none", False) if found is None else (choices.labels.index(found), "last_letter", False)
        kind = value.format or "letter"
        cue = trailing_cue(value.prompt) if value.prompt else ""
        reading = read_answer(text, format=kind, labels=choices.labels, texts=choices.texts, cue=cue)
        if reading.value is None:
            return -1, "none", False
        if kind == "letter":
            return choices.labels.index(reading.value), reading.source, False
        # Asked for in its own words: the one choice that says the same.
        same = [place for place, text in enumerate(choices.texts) if same_answer(text, reading.value, kind)]
        return (same[0], reading.source, False) if len(same) == 1 else (-1, "none", False)


def _place(record: Record) -> str:
    return f"line {record.line}" if record.line is not None else f"row {record.index + 1}"


def _scored(path: Path, question: Question) -> tuple[Any, ...]:
    return path.id, question.id, question.choices.labels, question.choices.texts, path.thoughts


def _turns(record: Record) -> tuple[tuple[str, str], ...] | None:
    """The row's ``messages``, which the path's own shape does not know; None where there are none."""
    if not record.data.get("messages"):
        return None
    try:
        turns = msgspec.convert(record.data["messages"], list[Message])
    except msgspec.ValidationError as error:
        what, at, place = str(error).rpartition(" - at `")
        field = "$.messages" + (place.rstrip("`").removeprefix("$") if at else "")
        raise record.bad(what if at else place, None, field) from None
    return tuple((turn.role, turn.content) for turn in turns)


def _as_label(record: Record, answer: Any, choices: Choices) -> str | None:
    """``answer`` read as the record's right one is; BadData where it is not among the choices."""
    return gold_of(replace(record, value=msgspec.structs.replace(record.value, answer=answer)), choices)


def _without_answer(thoughts: tuple[str, ...], choices: Choices, pred: int) -> tuple[str, ...]:
    """The thoughts without the last one that states the path's answer by itself."""
    for place in reversed(range(len(thoughts))):
        found = read_answer(thoughts[place], format="letter", labels=choices.labels, texts=choices.texts)
        if found.value == choices.labels[pred]:
            return thoughts[:place] + thoughts[place + 1 :]
    return thoughts
