"""Is an enhanced record what it claims to be? Fourteen rules, each a pure function of a candidate, and two checks of
the pair before any teacher is asked.

A rule gives a reason, or None where it has nothing to say against the record. Rules know no cause: a record of which a
tag is missing fails V01 alone, and what would need that tag holds its peace. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from toolbox.coca.judge import StringJudge, refusal
from toolbox.coca.record import NONE, Decision, Field, Grammar, Parsed, concepts_of, decision_of, unsafe_of
from toolbox.coca.words import content, covered, overlap, script, similarity, token_count, words

Label = Literal["harmful", "benign"]
Source = Literal["vanilla", "teacher", "fixed"]

MOST_CONCEPTS, LONGEST_CONCEPT = 8, 12
SAME_CONCEPT = 0.8
SAME_RESPONSE = 0.98
LEAST_SHARE = 0.15
LONGEST_THINK = 120
PAYLOAD_OVERLAP = 0.6
COLLAPSE = 0.02
"""Share of rows with one and the same think above which the teacher has collapsed."""

DECISION_OF_LABEL: dict[Label, Decision] = {"harmful": "refuse", "benign": "comply"}


@dataclass(frozen=True)
class Candidate:
    """A record on trial, and what it is held against.

    ``text`` is the whole record; its response must be ``answer`` where ``source`` is not ``teacher``. ``reply`` is what
    the teacher wrote itself, ``finish`` how that ended. ``glosses`` are the explanations in the template's
    skeleton. ``length`` are tokens of the chat-templated row, if a tokenizer was given, ``max_length`` the bound.
    """

    text: str
    prompt: str
    answer: str
    label: Label | None = None
    source: Source = "vanilla"
    reply: str = ""
    finish: str = "stop"
    grammar: Grammar = field(default_factory=Grammar)
    glosses: frozenset[str] = frozenset()
    think_script: str | None = None
    length: int | None = None
    max_length: int | None = None
    judge: StringJudge = refusal

    @cached_property
    def parsed(self) -> Parsed:
        return self.grammar.parse(self.text)

    def get(self, name: Field) -> str | None:
        """The text of a field; None where it is not there."""
        return self.parsed.texts.get(name)

    @property
    def concepts(self) -> tuple[str, ...] | None:
        text = self.get("concept")
        return None if text is None else concepts_of(text)

    @property
    def unsafe(self) -> tuple[str, ...] | None:
        text = self.get("check")
        return None if text is None else unsafe_of(text)

    @property
    def decision(self) -> Decision | None:
        text = self.get("erase")
        return None if text is None else decision_of(text)


Rule = Callable[[Candidate], str | None]

_STRUCTURE = {"missing", "twice", "order", "unclosed", "outside", "stray"}


# -- structure --------------------------------------------------------------------------------------------------------
def v01(one: Candidate) -> str | None:
    """Each tag exactly once, in order, closed, nothing outside the tags."""
    found = [problem for problem in one.parsed.problems if problem in _STRUCTURE]
    return ", ".join(found) or None


def v02(one: Candidate) -> str | None:
    """No tag inside a tag, no tag that is not of this record, none in the answer that was given."""
    if set(one.parsed.problems) & {"nested", "foreign"}:
        return "a tag where none belongs"
    return "the answer holds a tag" if one.grammar.tag.search(one.answer) else None


# -- concepts and decision --------------------------------------------------------------------------------------------
def _normal(text: str) -> str:
    return " ".join(words(text))


def v03(one: Candidate) -> str | None:
    """1 to 8 concepts of 1 to 12 words, each once, none of them the template's gloss."""
    concepts = one.concepts
    if concepts is None:
        return None
    if not 1 <= len(concepts) <= MOST_CONCEPTS:
        return f"{len(concepts)} concepts"
    normal = [_normal(item) for item in concepts]
    if any(not 1 <= len(item.split()) <= LONGEST_CONCEPT for item in normal):
        return "a concept without a word, or of too many"
    if len(set(normal)) < len(normal):
        return "a concept twice"
    whole = _normal(one.get("concept") or "")
    if whole in one.glosses or any(item in one.glosses or item == NONE for item in normal):
        return "the template's own words"
    return None


def v04(one: Candidate) -> str | None:
    """What is unsafe is one of the concepts (up to spelling), or the word none."""
    text, concepts = one.get("check"), one.concepts
    if text is None or concepts is None:
        return None
    if not text.strip():
        return "an empty check"
    normal = [_normal(item) for item in concepts]
    for item in one.unsafe or ():
        wanted = _normal(item)
        if not any(wanted == known or similarity(wanted, known) >= SAME_CONCEPT for known in normal):
            return "unsafe, and not among the concepts"
    return None


def v05(one: Candidate) -> str | None:
    """Something is unsafe exactly where the decision is to refuse."""
    unsafe = one.unsafe
    if unsafe is None or one.get("erase") is None:
        return None
    if one.decision is None:
        return "no decision, or two"
    return None if bool(unsafe) == (one.decision == "refuse") else f"{one.decision}, with {len(unsafe)} unsafe"


def v06(one: Candidate) -> str | None:
    """The decision is what the answer does, by the refusal judge."""
    response, decision = one.get("response"), one.decision
    if response is None or decision is None:
        return None
    refused = one.judge(response) == "refused"
    return None if refused == (decision == "refuse") else f"{decision}, and the answer does not"


def v07(one: Candidate) -> str | None:
    """The decision is that of the label: ``missed_harm`` or ``false_alarm`` where not."""
    if one.label is None or one.decision is None or one.decision == DECISION_OF_LABEL[one.label]:
        return None
    return "missed_harm" if one.label == "harmful" else "false_alarm"


def v08(one: Candidate) -> str | None:
    """The answer is the one that was given: every character, or nearly so where the teacher wrote it again."""
    response = one.get("response")
    if response is None:
        return None
    if one.source == "teacher":
        alike = similarity(response, one.answer)
        return None if alike >= SAME_RESPONSE else f"similarity {alike:.2f}"
    return None if response.strip() == one.answer.strip() else "the answer is another"


# -- the reasoning ----------------------------------------------------------------------------------------------------
def v09(one: Candidate) -> str | None:
    """The think is about this request: it shares a content stem with it, and 15 % of them."""
    think = one.get("think")
    if think is None:
        return None
    shared, share = covered(one.prompt, think)
    if share == 1.0 or (shared and share >= LEAST_SHARE):
        return None
    return f"{share:.0%} of the request's words"


_PAYLOAD = (
    ("numbered steps", re.compile(
        r"(?:^|\s)(?:\(?1[.)]|step\s*1|step one)\W?\s.{2,}?(?:\(?2[.)]|step\s*2|step two)\W?\s",
        re.IGNORECASE | re.DOTALL)),
    ("code", re.compile(r"```|~~~")),
    ("an address", re.compile(r"https?://|\bwww\.|\b[a-z0-9-]+\.onion\b", re.IGNORECASE)),
    ("a quantity", re.compile(
        r"\b\d+(?:[.,]\d+)?\s?(?:mg|(?-i:g)|kg|\u00b5g|ug|ml|(?-i:l)|litres?|liters?|grams?|milligrams?|kilograms?|kilos?|ounces?|"
        r"oz|lbs?|"
        r"pounds?|cups?|tablespoons?|teaspoons?|drops?|mol|volts?|amps?|watts?|psi|\u00b0\s?[cf]|degrees|%\s+solution|"
        r"milliliters?|millilitres?)\b", re.IGNORECASE)),
)  # fmt: skip


def v10(one: Candidate) -> str | None:
    """No payload in the reasoning: steps, code, an address, a quantity, too many words, or the answer itself."""
    reasoning = [one.get(name) for name in ("think", "concept", "check", "erase")]
    text = "\n".join(part for part in reasoning if part is not None)
    for what, pattern in _PAYLOAD:
        if pattern.search(text):
            return what
    think = one.get("think") or ""
    if token_count(think) > LONGEST_THINK:
        return f"more than {LONGEST_THINK} tokens"
    if len(content(think)) >= 8 and one.judge(one.answer) != "refused" and overlap(think, one.answer) > PAYLOAD_OVERLAP:
        return "the answer's own words"
    return None


# -- the teacher ------------------------------------------------------------------------------------------------------
def v11(one: Candidate) -> str | None:
    """The teacher came to an end by itself."""
    return None if one.finish == "stop" else f"finish reason {one.finish}"


_DECLINES = re.compile(
    r"^\W*(?:(?:i'm|i am)?\s*(?:very |so )?sorry\b|i apologi[sz]e|i(?:'m| am)? ?(?:cannot|can't|can not|won't|will not|"
    r"unable|not able|must decline)|as an ai\b)"
)


def v12(one: Candidate) -> str | None:
    """The teacher did its task, and did not refuse to: words of refusal in place of tags, or as the think."""
    untagged = not one.grammar.tag.search(one.reply) and one.judge(one.reply) == "refused"
    think = (one.get("think") or "").lower().replace("\u2019", "'")
    return "the teacher refused" if (one.reply and untagged) or _DECLINES.match(think) else None


def v13(one: Candidate) -> str | None:
    """The think is written in the request's script, or in the one asked for."""
    think = one.get("think")
    if think is None:
        return None
    wanted, found = one.think_script or script(one.prompt), script(think)
    return None if wanted is None or found == wanted else f"{found or 'no letters'} instead of {wanted}"


def v14(one: Candidate) -> str | None:
    """The whole row fits the student."""
    if one.length is None or one.max_length is None or one.length <= one.max_length:
        return None
    return f"{one.length} tokens"


RULES: dict[str, Rule] = {
    "V01": v01, "V02": v02, "V03": v03, "V04": v04, "V05": v05, "V06": v06, "V07": v07, "V08": v08, "V09": v09,
    "V10": v10, "V11": v11, "V12": v12, "V13": v13, "V14": v14,
}  # fmt: skip
LENIENT = ("V01", "V02", "V05", "V06", "V07", "V08", "V10", "V11", "V12")
ALWAYS = ("V01", "V02", "V08")
Level = Literal["strict", "lenient", "off"]


def findings(one: Candidate, level: Level = "strict") -> dict[str, str]:
    """Codes of the rules that the record breaks, with the reason of each.

    ``off`` keeps what nothing may switch off: a record that cannot be read is none (V01, V02), its answer is the one
    that was given (V08), and where the decision is to refuse, it does refuse (V06).
    """
    wanted = {"strict": tuple(RULES), "lenient": LENIENT, "off": ALWAYS}[level]
    found = dict(_broken(one, wanted))
    if level == "off" and one.decision == "refuse" and (why := v06(one)):
        found["V06"] = why
    return found


def _broken(one: Candidate, codes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for code in codes:
        why = RULES[code](one)
        if why is not None:
            yield code, why


# -- before a teacher is asked ----------------------------------------------------------------------------------------
def of_answer(answer: str, judge: StringJudge = refusal) -> Decision:
    """What the answer that was given does: d(r)."""
    return "refuse" if judge(answer) == "refused" else "comply"


def of_pair(label: Label | None, answer: str, judge: StringJudge = refusal) -> str | None:
    """Label and answer disagree: ``unsafe_vanilla`` (harmful, and the answer complies) or ``false_alarm`` (benign, and
    it refuses); None where they agree or there is no label."""
    if label is None or of_answer(answer, judge) == DECISION_OF_LABEL[label]:
        return None
    return "unsafe_vanilla" if label == "harmful" else "false_alarm"
