"""Rows of coca-eval: prompts, answers or verdicts in, verdicts out; and what one answer is judged to be. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from toolbox.coca.judge import Graded
from toolbox.coca.lines import VERDICTS, Seen, Verdict
from toolbox.coca.pairs import LABELS
from toolbox.coca.record import Decision, Grammar, decision_of, final_text
from toolbox.coca.verify import Label
from toolbox.models.generate import Completion, Content, StopRule
from toolbox.shell.records import Identifier, Message, Record, Text

SPLITS = ("id", "ood")


class Asked(msgspec.Struct, kw_only=True):
    """What every row may carry."""

    id: Identifier = None
    label: str | bool | int | None = None
    attack: str | None = None
    split: str | None = None
    run: str | None = None
    coca: dict[str, Any] | None = None


class Answered(Asked, kw_only=True):
    """An answer that is there, perhaps with its verdict."""

    needs: ClassVar[tuple[str, ...]] = ("completion",)
    completion: str
    prompt: str | None = None
    messages: list[Message] | None = None
    finish_reason: str | None = None
    n_completion_tokens: int | None = None


class AskedMessages(Asked, kw_only=True):
    """A conversation to be answered."""

    needs: ClassVar[tuple[str, ...]] = ("messages",)
    messages: list[Message]


class AskedPrompt(Asked, kw_only=True):
    """A prompt to be answered."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    prompt: Text


class JudgedBefore(Asked, kw_only=True):
    """A verdict that coca-eval gave."""

    needs: ClassVar[tuple[str, ...]] = ("coca",)


SHAPES: tuple[type[msgspec.Struct], ...] = (Answered, AskedMessages, AskedPrompt, JudgedBefore)


class Found(msgspec.Struct, kw_only=True):
    """What was found in an answer."""

    verdict: Verdict
    judge: str
    format_ok: bool | None
    decision: Decision | None
    disagree: bool | None
    tokens: int | None
    score: float | None = None


class Judged(msgspec.Struct, kw_only=True):
    """One verdict. ``prompt_sha256`` are the first 16 digits of the prompt's: it pairs runs, and texts stay away."""

    id: str
    attack: str | None
    split: str
    label: Label
    run: str
    prompt_sha256: str | None
    coca: Found

    def seen(self) -> Seen:
        """As far as rates need it."""
        name = msgspec.json.encode([self.id, self.attack, self.split, self.label, self.prompt_sha256])
        found = self.coca
        return Seen(
            hashlib.blake2b(name, digest_size=8).digest(), self.run, self.label == "harmful", self.attack, self.split,
            found.verdict, found.format_ok, found.disagree, found.score,
        )  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One row as it came: what is known of it, and what it holds."""

    record: Record
    label: Label
    attack: str | None
    split: str
    prompt: Content | None
    completion: Completion | None
    verdict: Found | None

    @property
    def prompt_text(self) -> str:
        """The last thing that was asked."""
        if self.prompt is None or isinstance(self.prompt, str):
            return self.prompt or ""
        return self.prompt[-1]["content"]

    def judged(self, run: str, found: Found) -> Judged:
        """The verdict of this row in one run."""
        sha = None
        if self.prompt is not None:
            text = self.prompt if isinstance(self.prompt, str) else msgspec.json.encode(list(self.prompt)).decode()
            sha = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        elif isinstance(known := self.record.data.get("prompt_sha256"), str):
            sha = known
        return Judged(
            id=self.record.id, attack=self.attack, split=self.split, label=self.label, run=run, prompt_sha256=sha,
            coca=found,
        )  # fmt: skip


def subject(record: Record) -> Subject:
    """Read a row. Raises: BadData (65) for a label or split that is missing or not known, or half a verdict."""
    value: Asked = record.value
    said = value.label
    if said is None:
        raise record.bad("no label", "harmful or benign: without it a refusal is neither right nor wrong", "$.label")
    label = LABELS.get(said.strip().lower() if isinstance(said, str) else said)
    if label is None:
        raise record.bad(f"unknown label {said!r}", "harmful or benign (unsafe, safe, true, false, 1, 0)", "$.label")
    split = value.split or ("ood" if value.attack else "id")
    if split not in SPLITS:
        raise record.bad(f"unknown split {split!r}", "id or ood", "$.split")
    prompt: Content | None = getattr(value, "prompt", None)
    if (turns := getattr(value, "messages", None)) is not None:
        if not turns:
            raise record.bad("no message", None, "$.messages")
        prompt = [{"role": one.role, "content": one.content} for one in turns]
    completion = None
    if isinstance(value, Answered):
        reason = value.finish_reason if value.finish_reason in ("length", "error") else "stop"
        completion = Completion(value.completion, reason, None, value.n_completion_tokens, None)  # type: ignore[arg-type]
    return Subject(record, label, value.attack, split, prompt, completion, _verdict(record, value))


def _verdict(record: Record, value: Asked) -> Found | None:
    if value.coca is None or "verdict" not in value.coca:
        if isinstance(value, JudgedBefore):
            raise record.bad("no verdict in `coca`, and nothing to judge", "a prompt, or a completion", "$.coca")
        return None
    try:
        found = msgspec.convert(value.coca, Found)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        raise record.bad(what, "is this a row of coca-eval?", "$.coca" + place.rstrip("`")) from None
    assert found.verdict in VERDICTS
    return found


# -- judging ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shape:
    """What the tags of an answer say: the final text (None: unfinished), whether the format is kept, the decision."""

    final: str | None
    format_ok: bool
    decision: Decision | None


def shape_of(done: Completion, grammar: Grammar) -> Shape:
    """Read an answer. An answer that was cut short inside its response has kept the format so far."""
    parsed = grammar.parse(done.text)
    final = final_text(parsed, done.text)
    reasoning = [field for field in grammar.fields if field != "response"]
    cut = (
        done.finish_reason == "length"
        and parsed.open == "response"
        and set(parsed.problems) <= {"unclosed", "missing"}
        and all(field in parsed.texts for field in reasoning)
    )
    decision = decision_of(parsed.texts["erase"]) if "erase" in parsed.texts else None
    blank = final is None or not final.strip()
    return Shape(None if blank else final, parsed.well_formed or cut, decision)


def found_in(done: Completion, shape: Shape, judge: str, graded: Graded | None) -> Found:
    """The verdict on an answer; ``graded`` is None where a judge could not be read."""
    verdict: Verdict = "unjudged"
    if shape.final is None:
        verdict = "unfinished"
    elif graded is not None:
        verdict = graded.verdict
    disagree = None
    if shape.decision is not None and verdict in ("refused", "answered"):
        disagree = (shape.decision == "refuse") != (verdict == "refused")
    return Found(
        verdict=verdict, judge=judge, format_ok=shape.format_ok, decision=shape.decision, disagree=disagree,
        tokens=done.n_completion_tokens, score=None if graded is None else graded.score,
    )  # fmt: skip


def final_rule(grammar: Grammar) -> Callable[[int], StopRule]:
    """Makes the rule that ends a row when its final text has ``cap`` tokens: those behind the response's tag, or all of
    them where there is no tag. Judges read no further, and what they do not read need not be written."""

    def make(cap: int) -> StopRule:
        opened: list[int] = []

        def enough(count: int, text: Callable[[], str]) -> bool:
            if not opened:
                said = text()
                if grammar.opening("response") in said:
                    opened.append(count)
                elif count >= cap and not grammar.tag.search(said):
                    return True
            return bool(opened) and count - opened[0] >= cap

        return enough

    return make


class Unique:
    """One verdict for a prompt in a run: a second one is refused."""

    def __init__(self) -> None:
        self._seen: set[tuple[bytes, str]] = set()

    def check(self, seen: Seen, record: Record) -> None:
        if (seen.unit, seen.run) in self._seen:
            raise record.bad(
                f"run {seen.run} has a verdict for {record.id} already", "give each row an `id` of its own", "$.id"
            )
        self._seen.add((seen.unit, seen.run))


def turns_of(prompt: Content, system: str | None) -> Sequence[dict[str, str]]:
    """The turns a model is asked with; ``system`` stands first where there is none."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return turns
