"""Multiple-choice questions in the shapes that public sets have, as items.

The shape of a record is told by its keys. A field that no item has passes through untouched, the ones that became
``question``, ``choices``, ``labels``, ``answer`` or ``context`` are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec

from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.items import Item, choices_of, default_labels, gold_of
from toolbox.shell.records import Identifier, Record, RecordReader, Text, read_records
from toolbox.shell.streams import Streams

Row = dict[str, Any]

PUBLISHED = (
    "AQuA: https://github.com/google-deepmind/AQuA; CommonsenseQA: https://www.tau-nlp.org/commonsenseqa; "
    "MMLU: https://github.com/hendrycks/test; AGIEval: https://github.com/ruixiangcui/AGIEval; "
    "StrategyQA: https://allenai.org/data/strategyqa"
)

YES_NO = ("yes", "no")

_MARK = re.compile(r"\s*(?:\(\s*([A-Za-z])\s*\)|([A-Za-z])\s*\)|([A-Za-z])[.:](?=\s))\s*")
"""``(A)``, ``A)``, ``A.`` or ``A:`` before an option; the last two only before a space: 'A.M.' keeps its head."""


class Aqua(msgspec.Struct):
    """AQuA-RAT: options with their marks in the text, the right one's letter in ``correct``."""

    needs: ClassVar[tuple[str, ...]] = ("question", "options", "correct")
    question: Text
    options: list[str]
    correct: str
    id: Identifier = None


class AgiEval(msgspec.Struct):
    """AGIEval: a passage that may be null, options marked ``(A)``, the right one's letter in ``label``."""

    needs: ClassVar[tuple[str, ...]] = ("question", "options", "label")
    question: Text
    options: list[str]
    label: str | list[str]
    passage: str | None = None
    id: Identifier = None


class Mmlu(msgspec.Struct):
    """MMLU and its like: options with or without marks, ``answer`` a letter or a place counted from 0."""

    needs: ClassVar[tuple[str, ...]] = ("question", "options", "answer")
    question: Text
    options: list[str]
    answer: str | int
    id: Identifier = None


class LabelledText(msgspec.Struct):
    """One choice of CommonsenseQA."""

    label: str
    text: str


class Stem(msgspec.Struct):
    """The question of CommonsenseQA as it is published."""

    stem: Text
    choices: list[LabelledText]


class Columns(msgspec.Struct):
    """The choices of CommonsenseQA and ARC as the Hugging Face hub has them."""

    label: list[str]
    text: list[str]


class CommonsenseQa(msgspec.Struct):
    """CommonsenseQA and ARC, as published or as on the hub; an empty ``answerKey`` is an answer kept secret."""

    needs: ClassVar[tuple[str, ...]] = ("question", "answerKey")
    question: Stem | Text
    answerKey: str
    choices: Columns | None = None
    id: Identifier = None


class StrategyQa(msgspec.Struct):
    """StrategyQA: the answer is true or false, the choices are yes and no."""

    needs: ClassVar[tuple[str, ...]] = ("question", "answer")
    question: Text
    answer: bool
    qid: Identifier = None
    id: Identifier = None


class Tofu(msgspec.Struct):
    """TOFU and its like: an answer in words, and wrong ones made of it or of its paraphrase."""

    needs: ClassVar[tuple[str, ...]] = ("question", "answer", "perturbed_answer")
    question: Text
    answer: Text
    perturbed_answer: Annotated[list[Text], msgspec.Meta(min_length=1)] | Text
    paraphrased_answer: Text | None = None
    id: Identifier = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What an item is made of; ``labels`` None are A, B, C ..."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...] | None
    answer: str | int | None
    context: str | None = None


def _marks(options: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The texts behind the marks and the marks, where every option has one and they run A, B, C or a, b, c."""
    matches = [match for option in options if (match := _MARK.match(option))]
    marks = tuple(next(filter(None, match.groups())) for match in matches)
    expected = default_labels(len(options))
    if not options or marks not in (expected, tuple(label.lower() for label in expected)):
        return None
    return tuple(option[match.end() :].strip() for option, match in zip(options, matches, strict=True)), marks


def without_marks(options: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """The option texts without their marks, and the marks as labels; None where there are none.

    Marks count only where every option has one and they run A, B, C (or a, b, c): the head of 'B. subtilis' in a list
    without marks is no mark. Marks that stand twice ('A)A)59' in AQuA's test set) go twice.
    """
    texts, labels = tuple(option.strip() for option in options), None
    while found := _marks(texts):
        texts, labels = found[0], labels or found[1]
    return texts, labels


def _aqua(record: Record) -> Parts:
    value: Aqua = record.value
    return Parts(value.question, *without_marks(value.options), value.correct.strip())


def _agieval(record: Record) -> Parts:
    value: AgiEval = record.value
    labels = [value.label] if isinstance(value.label, str) else value.label
    if len(labels) != 1:
        raise record.bad(f"{len(labels)} right answers", "items have one; leave the row out", "$.label")
    context = value.passage.strip() if value.passage else None
    return Parts(value.question, *without_marks(value.options), labels[0].strip(), context or None)


def _mmlu(record: Record) -> Parts:
    value: Mmlu = record.value
    answer = value.answer.strip() if isinstance(value.answer, str) else value.answer
    return Parts(value.question, *without_marks(value.options), answer)


def _commonsense(record: Record) -> Parts:
    value: CommonsenseQa = record.value
    if isinstance(value.question, Stem):
        question = value.question.stem
        pairs = [(choice.label, choice.text) for choice in value.question.choices]
    elif value.choices is not None:
        question = value.question
        if len(value.choices.label) != len(value.choices.text):
            counts = f"{len(value.choices.label)} labels and {len(value.choices.text)} texts"
            raise record.bad(counts, "each choice needs both", "$.choices")
        pairs = list(zip(value.choices.label, value.choices.text, strict=True))
    else:
        raise record.bad("no choices", "expected question.choices, or choices with label and text", "$.choices")
    labels = tuple(label.strip() for label, _ in pairs)
    return Parts(question, tuple(text.strip() for _, text in pairs), labels, value.answerKey.strip() or None)


def _yes_no(record: Record) -> Parts:
    return Parts(record.value.question, YES_NO, None, YES_NO[0] if record.value.answer else YES_NO[1])


def what_differs(texts: Sequence[str]) -> tuple[str, ...]:
    """The texts without the words that all begin with and all end with; as they are where one would be left empty.

    A full stop at the end goes as well: 'She was born in Harrow.', 'She was born in Tolbeck Ferry.' give 'Harrow' and
    'Tolbeck Ferry'.
    """
    words = [text.removesuffix(".").split() for text in texts]
    shortest = min(map(len, words))

    def shared(at: Callable[[int], int]) -> int:
        return next((n for n in range(shortest) if len({each[at(n)] for each in words}) > 1), shortest)

    begin, end = shared(lambda n: n), shared(lambda n: -1 - n)
    if begin + end >= shortest:
        return tuple(text.strip() for text in texts)
    return tuple(" ".join(each[begin : len(each) - end]) for each in words)


def _tofu(record: Record) -> Parts:
    value: Tofu = record.value
    wrong = [value.perturbed_answer] if isinstance(value.perturbed_answer, str) else value.perturbed_answer
    return Parts(value.question, what_differs([value.paraphrased_answer or value.answer, *wrong]), None, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """A public shape: how it is read, the field of its gold answer, and the fields that become parts of the item."""

    struct: type[msgspec.Struct]
    parts: Callable[[Record], Parts]
    gold: str
    used: tuple[str, ...]


SHAPES: dict[str, Shape] = {
    "aqua": Shape(Aqua, _aqua, "correct", ("options", "correct")),
    "agieval": Shape(AgiEval, _agieval, "label", ("options", "label", "passage")),
    "mmlu": Shape(Mmlu, _mmlu, "answer", ("options",)),
    "commonsenseqa": Shape(CommonsenseQa, _commonsense, "answerKey", ("answerKey",)),
    "tofu": Shape(Tofu, _tofu, "answer", ()),
    "strategyqa": Shape(StrategyQa, _yes_no, "answer", ("qid",)),
}
"""The public shapes by name; ``items`` is our own schema beside them."""

SHAPE_NAMES = ("auto", *SHAPES, "items")


def shapes_for(name: str = "auto") -> tuple[type[msgspec.Struct], ...]:
    """The shapes to read with under ``--shape NAME``.

    ``auto`` leaves StrategyQA to our own schema, which its keys fit as well: a boolean answer without choices is told
    from the record.
    """
    if name == "auto":
        return (*(shape.struct for key, shape in SHAPES.items() if key != "strategyqa"), Item)
    return (Item,) if name == "items" else (SHAPES[name].struct,)


def _shape_of(record: Record) -> Shape | None:
    """The public shape of a record; None for our own schema."""
    value = record.value
    if isinstance(value, Item):
        boolean = isinstance(value.answer, bool) and value.choices is None and value.labels is None
        return SHAPES["strategyqa"] if boolean else None
    return next(shape for shape in SHAPES.values() if isinstance(value, shape.struct))


def item(record: Record, name: str) -> Row:
    """The item in ``record``: id under ``name``, choices without marks, the answer as a label.

    Raises: BadData for choices, labels and answers that do not fit together.
    """
    shape = _shape_of(record)
    if shape is None:
        row = {key: value for key, value in record.data.items() if key != "id"}
        choices = choices_of(record)
        if choices is not None and (gold := gold_of(record, choices)) is not None:
            row["answer"] = gold
        identifier = record.id
    else:
        row = _built(record, shape)
        qid = record.data.get("qid") if record.value.id is None else None
        identifier = record.id if not isinstance(qid, str | int) else str(qid)
    if not isinstance(row.get("dataset"), str):
        row["dataset"] = name or "mcq"
    return {"id": f"{name}/{identifier}" if name else identifier, **row}


def _built(record: Record, shape: Shape) -> Row:
    parts = shape.parts(record)
    made: Row = {"question": parts.question, "choices": list(parts.choices), "answer": parts.answer}
    if parts.labels is not None and parts.labels != default_labels(len(parts.choices)):
        made["labels"] = list(parts.labels)
    if parts.context is not None:
        made["context"] = parts.context
    gone = {*made, *shape.used, "id", "labels"}
    row = made | {key: value for key, value in record.data.items() if key not in gone}
    try:
        typed = Record(row, msgspec.convert(row, Item), record.id, record.file, record.line, record.index)
        row["answer"] = gold_of(typed, choices_of(typed))
    except msgspec.ValidationError as error:  # a field that passes through has a meaning of ours: `context`, `group`
        raise record.bad(str(error), "rename fields with --map new=old") from None
    except BadData as problem:  # our names are not those of the file: say which field of it is meant
        field = f"$.{shape.gold}" if (problem.field or "").endswith("answer") else None
        raise record.bad(problem.reason, problem.advice, field) from None
    return row


def set_name(path: str) -> str:
    """How a file's items are called: its name without folder and suffixes, ``mcq`` for stdin."""
    return "mcq" if path == "-" else os.path.basename(path).split(".")[0] or "mcq"


def mcq(path: str, streams: Streams, reader: RecordReader, name: str | None = None) -> Iterator[list[Row]]:
    """The items of a file (``-``: stdin); ``reader`` has the shapes of ``shapes_for``.

    Raises: MissingInput, BadData (or leaves the record to ``reader`` under ``--on-bad skip``).
    """
    if path != "-" and not os.path.exists(path):
        raise MissingInput(f"{path}: no such file", PUBLISHED)
    name = set_name(path) if name is None else name
    for record in read_records(path, streams, reader):
        try:
            row = item(record, name)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        yield [row]
