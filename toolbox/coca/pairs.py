"""Rows in, rows out: the four kinds of safety data, the pairs in them, and the same row with its answers replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from toolbox.coca.judge import StringJudge, refusal
from toolbox.coca.record import Grammar
from toolbox.coca.teacher import Pair
from toolbox.coca.verify import Label, of_pair
from toolbox.shell.records import Identifier, Message, Record, Text

LABELS: dict[Any, Label] = {
    "harmful": "harmful", "unsafe": "harmful", True: "harmful", "1": "harmful",
    "benign": "benign", "safe": "benign", False: "benign", "0": "benign",
}  # fmt: skip
"""What a label may be; 1 and 0 are True and False to a dict."""


class Labelled(msgspec.Struct, kw_only=True):
    """What every row may carry."""

    id: Identifier = None
    label: Annotated[
        str | bool | int | None, msgspec.Meta(description="harmful, unsafe, true, 1; or benign, safe, false, 0")
    ] = None


class SafeMessages(Labelled, kw_only=True):
    """Turns with roles; the last one is the assistant's."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]


class SafePair(Labelled, kw_only=True):
    """A prompt and its completion, as in TRL."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "completion")
    prompt: Text
    completion: Text


class Alpaca(Labelled, kw_only=True):
    """An instruction, perhaps with an input, and its output."""

    needs: ClassVar[tuple[str, ...]] = ("instruction", "output")
    instruction: Text
    output: Text
    input: str | None = None


class ShareTurn(msgspec.Struct):
    """One turn of ``conversations``."""

    speaker: Literal["human", "user", "gpt", "assistant", "system"] = msgspec.field(name="from")
    value: str


class ShareGpt(Labelled, kw_only=True):
    """``conversations`` of from and value."""

    needs: ClassVar[tuple[str, ...]] = ("conversations",)
    conversations: Annotated[list[ShareTurn], msgspec.Meta(min_length=1)]


SHAPES: tuple[type[msgspec.Struct], ...] = (SafeMessages, SafePair, Alpaca, ShareGpt)

_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its pairs, and where in the row each answer stands (the turn, or None where the row has one answer)."""

    record: Record
    label: Label | None
    pairs: tuple[Pair, ...]
    places: tuple[int | None, ...]

    @property
    def id(self) -> str:
        return self.record.id

    def name(self, place: int) -> str:
        """The name of a pair in requests and logs: the row's id, and the turn where several are annotated."""
        return self.id if len(self.pairs) == 1 else f"{self.id}#{self.places[place]}"

    def replaced(self, answers: Sequence[str]) -> dict[str, Any]:
        """The row as it came, with its answers replaced."""
        data = dict(self.record.data)
        value = self.record.value
        if isinstance(value, SafePair):
            data["completion"] = answers[0]
        elif isinstance(value, Alpaca):
            data["output"] = answers[0]
        else:
            field, text = ("messages", "content") if isinstance(value, SafeMessages) else ("conversations", "value")
            turns = list(data[field])
            for place, answer in zip(self.places, answers, strict=True):
                assert place is not None
                turns[place] = {**turns[place], text: answer}
            data[field] = turns
        return data


@dataclass(frozen=True)
class Reading:
    """How rows are read: a label for all of them, every turn or the last, what becomes of tags that are there."""

    label: Label | None = None
    turns: Literal["last", "all"] = "last"
    grammar: Grammar = field(default_factory=Grammar)
    reprocess: bool = False
    keep_tags: bool = False

    def row(self, record: Record) -> Row:
        """The pairs of a record. Raises: BadData (65) with line and field."""
        label = self._label(record)
        value = record.value
        if isinstance(value, SafePair):
            return self._single(record, label, value.prompt, value.completion, "$.completion")
        if isinstance(value, Alpaca):
            prompt = value.instruction + (f"\n{value.input}" if value.input else "")
            return self._single(record, label, prompt, value.output, "$.output")
        if isinstance(value, SafeMessages):
            return self._turns(record, label, [(one.role, one.content) for one in value.messages], "messages")
        turns = [(_ROLES.get(one.speaker, one.speaker), one.value) for one in value.conversations]
        return self._turns(record, label, turns, "conversations")

    def _label(self, record: Record) -> Label | None:
        said = record.value.label
        if said is None:
            return self.label
        label = LABELS.get(said.strip().lower() if isinstance(said, str) else said)
        if label is None:
            raise record.bad(
                f"unknown label {said!r}", "harmful or benign (unsafe, safe, true, false, 1, 0)", "$.label"
            )
        return label

    def _single(self, record: Record, label: Label | None, prompt: str, answer: str, where: str) -> Row:
        if not prompt.strip():
            raise record.bad("the prompt is empty", None, "$.instruction" if where == "$.output" else "$.prompt")
        return Row(record, label, (Pair(prompt, self._answer(record, answer, where), (), label),), (None,))

    def _turns(self, record: Record, label: Label | None, turns: Sequence[tuple[str, str]], name: str) -> Row:
        if turns[-1][0] != "assistant":
            raise record.bad("the last turn is not the assistant's", "there is no answer to go on from", f"$.{name}")
        wanted = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
        pairs = []
        places = wanted if self.turns == "all" else wanted[-1:]
        for place in places:
            where = f"$.{name}[{place}]"
            if not place or turns[place - 1][0] != "user" or not turns[place - 1][1].strip():
                raise record.bad("an answer without a request before it", None, where)
            context = tuple({"role": role, "content": text} for role, text in turns[: place - 1])
            answer = self._answer(record, turns[place][1], where)
            pairs.append(Pair(turns[place - 1][1], answer, context, label))
        return Row(record, label, tuple(pairs), tuple(places))

    def _answer(self, record: Record, answer: str, where: str) -> str:
        if not answer.strip():
            raise record.bad("the answer is empty", "a pair needs a safe answer", where)
        if self.keep_tags:
            return answer
        parsed = self.grammar.parse(answer)
        if set(self.grammar.fields) <= set(parsed.texts):
            if not self.reprocess:
                raise record.bad(
                    "the answer has the five tags already",
                    "--reprocess annotates it anew, --verify-only judges it",
                    where,
                )
            return parsed.texts["response"]
        return answer


def fit_for_asking(
    row: Row, grammar: Grammar, judge: StringJudge = refusal, fixed: str | None = None
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs to be annotated, or why the row is rejected before any teacher is asked.

    ``unsafe_vanilla``: labelled harmful, and the answer complies; with ``fixed`` that text takes its place.
    ``false_alarm``: labelled benign, and the answer refuses. V02: the answer holds a tag text.
    """
    pairs: list[Pair] = []
    for pair in row.pairs:
        if grammar.tag.search(pair.answer):
            return [], {"V02": "the answer holds a tag"}
        code = of_pair(pair.label, pair.answer, judge)
        if code == "unsafe_vanilla" and fixed is not None:
            pair = Pair(pair.prompt, fixed, pair.context, pair.label, "fixed")
        elif code is not None:
            said = "harmful, and the answer does not refuse" if code == "unsafe_vanilla" else "benign, and it refuses"
            return [], {code: said}
        pairs.append(pair)
    return pairs, {}


class Unique:
    """Rows with an ``id`` that another row has are refused; of each id stay eight bytes."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def check(self, record: Record) -> None:
        name = int.from_bytes(
            hashlib.blake2b(record.id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
        )
        if name in self._seen:
            raise record.bad(f"another row has the id {record.id}", "give each row an `id` of its own", "$.id")
        self._seen.add(name)
