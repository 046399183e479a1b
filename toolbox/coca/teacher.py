"""The teacher: from a pair of request and safe answer to a record that reasons first (paper: r' = M_T(p, r | P)).

Each pair is a generator of questions. It yields what is to be asked and is sent the answer, so that the same few lines
serve a local model in batches, an endpoint with hundreds of requests under way, and stored responses. The answer that
was given is spliced in, never typed again, unless that is asked for. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from toolbox.coca.judge import StringJudge, refusal
from toolbox.coca.record import NONE, Decision, Field, Grammar, concepts_of, decision_of, unsafe_of
from toolbox.coca.template import JSON_SCHEMA, Template, Turns
from toolbox.coca.verify import MOST_CONCEPTS, Candidate, Label, Level, Source, findings
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.shell.errors import BadData

Decode = Literal["forced", "free", "json"]

THINK_TOKENS, CONCEPT_TOKENS = 80, 32
"""Caps of the two fields that a forced teacher writes."""

HINTS = {
    "V01": "write every tag once, in order, closed, and nothing outside.",
    "V02": "write no tag inside a tag.",
    "V03": "name one to eight different concepts of a few words each.",
    "V04": "the check names only concepts of the list, or none.",
    "V05": "refuse exactly where a concept is unsafe.",
    "V06": "decide what the safe answer does.",
    "V07": "decide by the label.",
    "V08": "copy the safe answer to the letter.",
    "V09": "the think is about this very request, in its words.",
    "V10": "no steps, amounts, code or addresses, and not the answer itself.",
    "V11": "be brief.",
    "V12": "you annotate, you do not answer: write the tags.",
    "V13": "write in the language of the request.",
    "V14": "be brief.",
}


@dataclass(frozen=True)
class Pair:
    """What is annotated: a request, the safe answer to it, the turns before, the label. ``answer`` is what goes into
    the record; ``source`` says whether it is the one that was given."""

    prompt: str
    answer: str
    context: tuple[Mapping[str, str], ...] = ()
    label: Label | None = None
    source: Source = "vanilla"


@dataclass(frozen=True)
class Ask:
    """One question to the teacher: turns, and how its answer begins (``prefix``), ends (``stop``, ``max_tokens``), or
    which of ``options`` it is. ``name`` (of the pair), ``stage`` and ``attempt`` name it."""

    stage: str
    attempt: int
    turns: Turns
    prefix: str = ""
    stop: tuple[str, ...] = ()
    max_tokens: int = 256
    options: tuple[str, ...] = ()
    schema: str | None = None
    name: str = ""

    def request(self) -> TextRequest:
        """The question as its key and a stored response know it: all that decides the answer is in its content."""
        content = [dict(turn) for turn in self.turns]
        if self.prefix:
            content.append({"role": "assistant", "content": self.prefix})
        if self.options:
            content.append({"role": "options", "content": json.dumps(self.options)})
        return TextRequest(self.name, self.stage, self.attempt, content)


@dataclass(frozen=True)
class Sampling:
    """How a teacher's tokens are chosen."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def decoding(self, ask: Ask) -> Decoding:
        return Decoding(ask.max_tokens, self.temperature, self.top_p, ask.stop, self.seed, json_schema=ask.schema)


class Unanswered(Exception):
    """There is no answer to a question, and none will come: a stored response is missing."""


@dataclass(frozen=True)
class Usage:
    """Tokens that a pair cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, done: Completion) -> Usage:
        return Usage(
            self.prompt_tokens + (done.n_prompt_tokens or 0), self.completion_tokens + (done.n_completion_tokens or 0)
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a pair. ``texts`` are the fields of an accepted record, None where it was rejected; ``codes`` say
    why, each with its reason; ``raw`` is what the teacher wrote last."""

    texts: Mapping[Field, str] | None
    codes: Mapping[str, str]
    attempts: int
    usage: Usage = field(default_factory=Usage)
    raw: str = ""
    broken: tuple[str, ...] = ()
    """Codes of earlier attempts."""
    source: Source = "vanilla"

    @property
    def decision(self) -> Decision | None:
        return None if self.texts is None else decision_of(self.texts["erase"])

    @property
    def concepts(self) -> tuple[str, ...]:
        return () if self.texts is None else concepts_of(self.texts["concept"])

    @property
    def unsafe(self) -> tuple[str, ...]:
        return () if self.texts is None else unsafe_of(self.texts["check"])


@dataclass(frozen=True)
class Draft:
    """What the teacher wrote: the reasoning as text, how it ended, its words, and the answer where it wrote that."""

    reasoning: str
    finish: str
    raw: str
    usage: Usage
    response: str | None = None


Dialogue = Generator[Ask, Completion, Outcome]
Drafting = Generator[Ask, Completion, Draft]


@dataclass(frozen=True)
class Teacher:
    """How pairs are annotated. ``fits`` gives the tokens of a finished row, where a student's tokenizer is known."""

    template: Template
    decode: Decode = "free"
    splice: bool = True
    hint: bool = True
    level: Level = "strict"
    attempts: int = 3
    max_tokens: int = 256
    think_script: str | None = None
    max_length: int | None = None
    fits: Any = None
    judge: StringJudge = refusal

    @property
    def grammar(self) -> Grammar:
        return self.template.grammar

    @property
    def last(self) -> Field:
        """The last tag that the teacher writes."""
        return "erase" if self.splice else "response"

    # -- one pair -----------------------------------------------------------------------------------------------------
    def annotate(self, pair: Pair) -> Dialogue:
        """Ask until a record passes, at most ``attempts`` times; each try is told what the last one broke."""
        broken: dict[str, str] = {}
        earlier: tuple[str, ...] = ()
        usage, raw, tried = Usage(), "", 0
        for attempt in range(self.attempts):
            try:
                draft = yield from self._draft(pair, attempt, broken, usage)
            except Unanswered:
                if not attempt:
                    raise
                break
            tried, usage, raw = attempt + 1, draft.usage, draft.raw
            candidate = self.candidate(pair, draft)
            earlier += tuple(broken)
            broken = findings(candidate, self.level)
            if not broken:
                return Outcome(self._texts(candidate), {}, tried, usage, raw, earlier, candidate.source)
        return Outcome(None, broken, tried, usage, raw, earlier)

    def candidate(self, pair: Pair, draft: Draft) -> Candidate:
        """The draft with its answer, as a record on trial."""
        source: Source = pair.source if draft.response is None else "teacher"
        response = pair.answer if draft.response is None else draft.response
        text = f"{draft.reasoning.strip()}\n{self.grammar.opening('response')} {response}"
        text += f" {self.grammar.closing('response')}"
        parsed = self.grammar.parse(text)
        if parsed.well_formed:
            text = self.grammar.render(_stripped(parsed.texts))
        one = Candidate(
            text, pair.prompt, pair.answer, pair.label, source, draft.raw, draft.finish, self.grammar,
            self.template.glosses, self.think_script, max_length=self.max_length, judge=self.judge,
        )  # fmt: skip
        return one if self.fits is None else replace(one, length=self.fits(pair, text))

    @staticmethod
    def _texts(candidate: Candidate) -> Mapping[Field, str]:
        return _stripped(candidate.parsed.texts)

    def _draft(self, pair: Pair, attempt: int, broken: Mapping[str, str], usage: Usage) -> Drafting:
        hint = pair.label if pair.label and (self.hint or "V12" in broken) else None
        rules = [HINTS[code] for code in broken]
        if self.decode == "forced":
            return (yield from self._forced(pair, attempt, hint, rules, usage))
        if self.decode == "json":
            try:
                return (yield from self._json(pair, attempt, hint, rules, usage))
            except BadData:  # the server takes no schema; what it says of the row itself, it says again
                pass
        return (yield from self._free(pair, attempt, hint, rules, usage))

    def _turns(self, pair: Pair, hint: str | None, rules: Sequence[str], as_json: bool = False) -> Turns:
        return self.template.turns(
            pair.prompt, pair.answer, context=pair.context, label=hint, rules=rules, last=self.last, as_json=as_json
        )

    # -- tag by tag ---------------------------------------------------------------------------------------------------
    def _forced(self, pair: Pair, attempt: int, hint: str | None, rules: Sequence[str], usage: Usage) -> Drafting:
        """Our code writes the tags; the model fills think and concept, and ``check`` is the likeliest choice."""
        grammar, turns = self.grammar, self._turns(pair, hint, rules)
        stop = ("</", "\n")
        prefix = grammar.opening("think")
        done = yield Ask("think", attempt, turns, prefix, stop, THINK_TOKENS)
        usage = usage.plus(done)
        think, finish = _sentences(done)
        text = f"{prefix} {think} {grammar.closing('think')}\n"
        done = yield Ask("concept", attempt, turns, text + grammar.opening("concept"), stop, CONCEPT_TOKENS)
        usage = usage.plus(done)
        concepts = _cleaned(done)
        text += f"{grammar.opening('concept')} {', '.join(concepts)} {grammar.closing('concept')}\n"
        options = choices(concepts, hint)
        check = options[0] if options else ""
        if len(options) > 1:
            done = yield Ask("check", attempt, turns, text + grammar.opening("check"), options=options)
            usage, check = usage.plus(done), done.text
        decision: Decision = "refuse" if unsafe_of(check) else "comply"
        text += f"{grammar.opening('check')} {check} {grammar.closing('check')}\n"
        text += f"{grammar.opening('erase')} {self.template.sentence(decision)} {grammar.closing('erase')}"
        if self.splice:
            return Draft(text, finish, text, usage)
        prefix = f"{text}\n{grammar.opening('response')}"
        done = yield Ask("response", attempt, turns, prefix, (grammar.closing("response"),), self.max_tokens)
        response = done.text.removeprefix(" ").removesuffix(" ")
        ended = finish if finish != "stop" else done.finish_reason
        return Draft(text, ended, text + done.text, usage.plus(done), response)

    # -- at once ------------------------------------------------------------------------------------------------------
    def _free(self, pair: Pair, attempt: int, hint: str | None, rules: Sequence[str], usage: Usage) -> Drafting:
        """One completion up to the last tag's end."""
        grammar = self.grammar
        stop = (grammar.closing(self.last),)
        done = yield Ask("annotate", attempt, self._turns(pair, hint, rules), "", stop, self.max_tokens)
        text = done.text
        if grammar.parse(text).open == self.last:  # the stop string is not part of a completion
            text = f"{text.rstrip()} {stop[0]}"
        if self.splice:
            return Draft(text, done.finish_reason, done.text, usage.plus(done))
        parsed = grammar.parse(text)
        before, _, _ = text.partition(grammar.opening("response"))
        return Draft(before, done.finish_reason, done.text, usage.plus(done), parsed.texts.get("response", ""))

    def _json(self, pair: Pair, attempt: int, hint: str | None, rules: Sequence[str], usage: Usage) -> Drafting:
        """One JSON object by a schema."""
        schema = json.dumps(JSON_SCHEMA, sort_keys=True)
        ask = Ask("json", attempt, self._turns(pair, hint, rules, as_json=True), "", (), self.max_tokens, schema=schema)
        done = yield ask
        return Draft(self._from_json(done.text), done.finish_reason, done.text, usage.plus(done))

    def _from_json(self, text: str) -> str:
        """The object as tags; the text itself, which then breaks V01, where it is no such object."""
        try:
            said = json.loads(text)
            think, decision = str(said["think"]), said["decision"]
            concept = ", ".join(map(str, said["concept"]))
            check = ", ".join(map(str, said["check"])) or NONE
        except (ValueError, KeyError, TypeError, RecursionError):
            return text
        sentence = self.template.sentence(decision) if decision in ("refuse", "comply") else str(decision)
        texts = {"think": think, "concept": concept, "check": check, "erase": sentence}
        grammar = self.grammar  # not `block`: a tag inside a field is for V02 to find
        return "\n".join(f"{grammar.opening(f)} {texts[f]} {grammar.closing(f)}" for f in texts)  # type: ignore[arg-type,index]


def _stripped(texts: Mapping[Field, str]) -> dict[Field, str]:
    """Reasoning without outer blanks; the response to the letter."""
    return {name: text if name == "response" else text.strip() for name, text in texts.items()}


def choices(concepts: Sequence[str], hint: str | None) -> tuple[str, ...]:
    """What ``check`` may say: none, one of the concepts, or all; with a label only what that allows."""
    if hint == "benign":
        return (NONE,)
    every = (", ".join(concepts),) if len(concepts) > 1 else ()
    return (*(() if hint == "harmful" else (NONE,)), *concepts, *every)


_SENTENCE = re.compile(r"^.*[.!?](?=\s|$)", re.DOTALL)


def _sentences(done: Completion) -> tuple[str, str]:
    """A think and how it ended: one that ran into its cap is cut back to its last whole sentence."""
    text = " ".join(done.text.split())
    if done.finish_reason != "length":
        return text, done.finish_reason
    whole = _SENTENCE.match(text)
    return (whole.group(), "stop") if whole else (text, "length")


def _cleaned(done: Completion) -> list[str]:
    """Concepts as the model wrote them, each once, at most eight; the last is dropped where the cap may have cut it."""
    items = list(concepts_of(done.text))
    if done.finish_reason == "length" and len(items) > 1:
        items.pop()
    kept: dict[str, str] = {}
    for item in items:
        if item.lower() != NONE:
            kept.setdefault(item.lower(), item)
    return list(kept.values())[:MOST_CONCEPTS]
