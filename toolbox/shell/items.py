"""Questions and the paths of reasoning that answer them, as records; what their choices, labels and answers mean.

One vocabulary for every command that asks questions or judges answers: an item has a ``question`` and perhaps
``choices`` with ``labels``; its ``answer`` is normalised to a label where there are choices.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from toolbox.shell.records import Identifier, Record, Text

Format = Literal["letter", "number", "text"]
"""How an answer is written: one label of several, a number, or words."""

_THIN_SPACES = "\u00a0\u2009\u202f"
NUMBER = (
    rf"(?:[0-9]{{1,3}}(?:[,{_THIN_SPACES}][0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,3}}(?!\w))?"
)
"""Pattern of a number from its first digit on, without sign; a comma or a thin space may set off groups of three."""

_WHOLE_NUMBER = re.compile(rf"[-+\u2212]?(?:{NUMBER}|\.[0-9]+)")
_SEPARATORS = dict.fromkeys(map(ord, "," + _THIN_SPACES)) | {ord("\u2212"): "-"}
_ARTICLES = re.compile(r"\A(?:(?:the|an|a) )+(?=[\"“‘]?\w)")
_KEPT_AT_END = "%‰#"  # part of the answer, unlike a full stop: 5 %, C#
_MARKDOWN = "`~"  # the marks that Unicode does not call punctuation
_YES_NO = {True: ("yes", "true"), False: ("no", "false")}
_QUOTED = 60
"""Characters of an answer that a message shows."""


class ItemFields(msgspec.Struct, kw_only=True):
    """What a question carries beside its words."""

    id: Identifier = None
    choices: list[str] | None = None
    labels: Annotated[list[str | int] | None, msgspec.Meta(description="one for each choice; A, B, C... if absent")] = (
        None
    )
    answer: Annotated[
        str | int | float | bool | None,
        msgspec.Meta(description="a label, an index from 0 or the text of a choice; without choices a number or text"),
    ] = None
    context: str | None = None
    group: Annotated[str | int | None, msgspec.Meta(description="rows of one group are not independent")] = None
    meta: dict[str, Any] = {}


class Item(ItemFields, kw_only=True):
    """A question, with choices or without."""

    needs: ClassVar[tuple[str, ...]] = ("question",)
    question: Text


class PathFields(ItemFields, kw_only=True):
    """What a path of reasoning carries beside its text: the item it answers, where it comes from, how it was judged."""

    question: Text | None = None
    variant: str | None = None
    sample: int = 0
    model: str | None = None
    path_id: str | None = None
    completion: str | None = None
    thoughts: list[str] | str | None = None
    pred: Annotated[
        str | int | float | bool | None, msgspec.Meta(description="the answer of this path, read already")
    ] = None
    score: Annotated[float | None, msgspec.Meta(description="how much its vote weighs")] = None
    keep: Annotated[bool | None, msgspec.Meta(description="whether its vote counts")] = None
    format: Format | None = None
    prompt: str | None = None
    finish_reason: str | None = None
    n_prompt_tokens: int | None = None
    n_completion_tokens: int | None = None


class CompletedPath(PathFields, kw_only=True):
    """A path as the completion of its prompt."""

    needs: ClassVar[tuple[str, ...]] = ("completion",)
    completion: str


class ThoughtPath(PathFields, kw_only=True):
    """A path cut into its thoughts."""

    needs: ClassVar[tuple[str, ...]] = ("thoughts",)
    thoughts: list[str] | str


class AnsweredPath(PathFields, kw_only=True):
    """A path of which only the answer is left, or (null) that none could be read."""

    needs: ClassVar[tuple[str, ...]] = ("pred",)
    may_be_null: ClassVar[tuple[str, ...]] = ("pred",)
    pred: str | int | float | bool | None


ITEM_SHAPES: tuple[type[msgspec.Struct], ...] = (Item,)
"""What can be asked."""

PATH_SHAPES: tuple[type[msgspec.Struct], ...] = (CompletedPath, ThoughtPath, AnsweredPath)
"""What can be read for an answer."""


@dataclass(frozen=True, slots=True)
class Choices:
    """The labels of an item and the texts they stand for; no texts where the item names only labels."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]


@functools.cache
def default_labels(n: int) -> tuple[str, ...]:
    """The first ``n`` of A, B ... Z, AA, AB ... AZ, BA ..."""

    def label(index: int) -> str:
        letters = ""
        while index >= 0:
            letters = chr(ord("A") + index % 26) + letters
            index = index // 26 - 1
        return letters

    return tuple(map(label, range(n)))


def choices_of(record: Record) -> Choices | None:
    """The choices of an item or a path; None where it has neither choices nor labels.

    Raises: BadData for fewer than two, for labels that are empty or alike (``a`` and ``A`` are), and for labels and
    choices of different number. Choices with equal texts are allowed: real sets have them.
    """
    choices, labels = record.value.choices, record.value.labels
    if choices is None and labels is None:
        return None
    if labels is None:
        names, field = default_labels(len(choices)), "$.choices"
        if len(names) > 1:  # nothing else can be wrong with these
            return Choices(names, tuple(choices))
    else:
        names, field = tuple(str(label).strip() for label in labels), "$.labels"
        if choices is not None and len(choices) != len(names):
            what = f"{_count(len(names), 'label')} for {_count(len(choices), 'choice')}"
            raise record.bad(what, "give one label a choice", field)
    if len(names) < 2:
        what = f"{_count(len(names), field.removeprefix('$.').removesuffix('s'))}, at least two are needed"
        raise record.bad(what, "leave the field out of open questions", field)
    if not all(names):
        raise record.bad("an empty label", "name every choice", field)
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(name.casefold(), name)) != name or names.count(name) > 1:
            raise record.bad(f"labels {_quoted(other)} and {_quoted(name)} are alike", "name each choice once", field)
    return Choices(names, tuple(choices or ()))


def _count(n: int, noun: str) -> str:
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"


def gold_of(record: Record, choices: Choices | None) -> str | None:
    """The right answer of an item or a path: a label where there are choices, else the number or text as a string.

    With choices the ``answer`` may be, in this order: a label (``b``, ``(B)`` and ``B)`` are B too), an index from 0
    (a JSON number), or the text of exactly one choice; true and false stand for the choice yes or true, no or false.
    Without choices true is "yes", and a whole number such as 7.0 is "7". None for an absent or blank answer.

    Raises: BadData for an answer that is not among the choices, or is the text of several.
    """
    answer = record.value.answer
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        return None
    if isinstance(answer, float) and answer.is_integer():  # tables with gaps turn whole columns into floats
        answer = int(answer)
    if choices is None:
        return _YES_NO[answer][0] if isinstance(answer, bool) else str(answer).strip()
    if isinstance(answer, bool):
        wanted = _YES_NO[answer]
        found = [label for label in choices.labels if label.casefold() in wanted] or _with_text(choices, *wanted)
    else:
        found = _with_label(choices, str(answer))
        if not found and isinstance(answer, int) and 0 <= answer < len(choices.labels):
            found = [choices.labels[answer]]
        found = found or _with_text(choices, str(answer))
    if len(found) == 1:
        return found[0]
    advice = "give a label, an index from 0 or the text of one choice"
    shown = _quoted(str(answer).lower() if isinstance(answer, bool) else str(answer))
    if found:
        raise record.bad(f"the answer {shown} is the text of {' and '.join(found)}", advice, "$.answer")
    labels = ", ".join(choices.labels[:12]) + (", ..." if len(choices.labels) > 12 else "")
    raise record.bad(f"the answer {shown} is not among the labels {labels}", advice, "$.answer")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…")


def _with_label(choices: Choices, answer: str) -> list[str]:
    answer = answer.strip()
    if answer in choices.labels:
        return [answer]
    for written in (answer, answer.strip("()[]. ")):
        if found := [label for label in choices.labels if label.casefold() == written.casefold()]:
            return found
    return []


def _with_text(choices: Choices, *texts: str) -> list[str]:
    """The labels of the choices with one of these texts: to the letter if there is one, else as ``plain`` has it."""
    pairs = list(zip(choices.labels, choices.texts, strict=False))  # no texts where there are only labels
    exact = [label for label, text in pairs if text in texts]
    wanted = {plain(text) for text in texts}
    return exact or [label for label, text in pairs if plain(text) in wanted]


def answer_format(choices: Choices | None, gold: str | None) -> Format:
    """The form an answer to this item takes: a letter with choices, a number if the right answer is one, else text."""
    if choices is not None:
        return "letter"
    return "number" if gold is not None and number(gold) is not None else "text"


def canonical_number(text: str) -> str | None:
    """The one spelling of the number that ``text`` is: "1,234.50" is "1234.5", "−07" is "-7"; None if it is none.

    Separators between groups of three digits, a plus, and zeros without meaning go; an exponent stays.
    """
    text = text.strip()
    if not _WHOLE_NUMBER.fullmatch(text):
        return None
    text = text.translate(_SEPARATORS).lower().lstrip("+")
    sign, text = text[: text.startswith("-")], text.removeprefix("-")
    mantissa, e, exponent = text.partition("e")
    whole, _, fraction = mantissa.partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    digits = f"{whole}.{fraction}" if fraction else whole
    return "0" if digits == "0" else f"{sign}{digits}{e}{exponent.lstrip('+')}"


def number(text: str) -> float | None:
    """The number that ``text`` is, with or without thousands separators; None for anything else ("5 kg", "1/2").

    Also None where it is too large for a float.
    """
    spelled = canonical_number(text)
    value = None if spelled is None else float(spelled)
    return None if value is None or abs(value) == float("inf") else value


def plain(text: str) -> str:
    """``text`` for comparison: lower case, without outer punctuation, markdown marks and leading articles, spaces
    squeezed. A minus sign, a dot before digits and a per cent sign stay; so does text that is nothing else."""
    squeezed = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    bare = _ARTICLES.sub("", _without_outer_punctuation(squeezed))
    return _without_outer_punctuation(bare) or squeezed


def _without_outer_punctuation(text: str) -> str:
    start, end = 0, len(text)
    while start < end and _is_punctuation(text[start]) and not _WHOLE_NUMBER.match(text, start):
        start += 1
    while start < end and _is_punctuation(text[end - 1]) and text[end - 1] not in _KEPT_AT_END:
        end -= 1
    return text[start:end]


def _is_punctuation(character: str) -> bool:
    kind = unicodedata.category(character)[0]  # punctuation, separators, and what cannot be seen
    return kind in "PZC" or character in _MARKDOWN


def same_answer(a: str, b: str, format: Format) -> bool:
    """Whether two answers are one: the same label, equal numbers (exactly, however spelled), or the same words."""
    if format == "letter":
        return a.strip().casefold() == b.strip().casefold()
    if format == "number":
        one, other = canonical_number(a), canonical_number(b)
        if one is not None and other is not None:
            return Decimal(one) == Decimal(other)  # floats would call two large whole numbers equal
    return plain(a) == plain(b)
