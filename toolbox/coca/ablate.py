"""What of the record matters? Ablations of finished records: parts made the same, taken out, put elsewhere.

Paper: fixing the concept or the reasoning to one generic text costs most of the gain (project page, ablation figure).
``length-matched`` is ours: reasoning of the same length that names no concept, to tell reasoning from longer context.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from toolbox.coca.record import Field, Grammar, parse_order, unsafe_of
from toolbox.coca.words import token_count
from toolbox.shell.errors import UsageProblem

CONCEPT = "harmful content"
THINK = "The request has to be looked at with care before it is answered."
FILLER = (
    "This text stands before the answer.", "It is here for its length alone.", "Nothing in it is about the request.",
    "The answer comes after it.", "It goes on for a while.", "Then it ends.",
)  # fmt: skip

KINDS = ("fix-concept[=TEXT]", "fix-think[=TEXT]", "drop:TAG", "order:A,B,...", "length-matched")


@dataclass(frozen=True)
class Ablation:
    """One change to a record: ``name`` as asked for, the ``grammar`` of what comes out, and the change itself."""

    name: str
    grammar: Grammar
    change: Callable[[Mapping[Field, str], Grammar], dict[Field, str]]

    def render(self, texts: Mapping[Field, str], grammar: Grammar) -> str:
        """The changed record as text; ``grammar`` is that of the record as it was."""
        return self.grammar.render(self.change(texts, grammar))


def parse_ablation(text: str, grammar: Grammar) -> Ablation:
    """An ablation by what was typed, one of ``KINDS``; UsageProblem for what is none."""
    kind, equals, value = text.partition("=")
    if kind in ("fix-concept", "fix-think"):
        if equals and (not value.strip() or grammar.tag.search(value)):
            raise UsageProblem(f"--ablate {kind}=: a text without tags is expected", f"as in --ablate {kind}")
        fixed = value.strip() or (CONCEPT if kind == "fix-concept" else THINK)
        change = _fix_concept(fixed) if kind == "fix-concept" else _fix_think(fixed)
        return Ablation(text, grammar, change)
    if text.startswith("drop:"):
        gone = parse_order([text.removeprefix("drop:")], "--ablate drop")[0]
        fields = tuple(field for field in grammar.fields if field != gone)
        return Ablation(text, Grammar(grammar.style, grammar.prefix, fields), lambda texts, _: dict(texts))
    if text.startswith("order:"):
        fields = parse_order(text.removeprefix("order:").split(","), "--ablate order")
        return Ablation(text, Grammar(grammar.style, grammar.prefix, fields), lambda texts, _: dict(texts))
    if text == "length-matched":
        short = Grammar(grammar.style, grammar.prefix, ("think", "response"))
        return Ablation(text, short, _length_matched)
    raise UsageProblem(f"--ablate {text}: not known", f"one of {', '.join(KINDS)}")


def _fix_concept(fixed: str) -> Callable[[Mapping[Field, str], Grammar], dict[Field, str]]:
    def change(texts: Mapping[Field, str], _: Grammar) -> dict[Field, str]:
        """The same generic concept on every unsafe row; safe rows stay."""
        if not unsafe_of(texts["check"]):
            return dict(texts)
        return {**texts, "concept": fixed, "check": fixed}

    return change


def _fix_think(fixed: str) -> Callable[[Mapping[Field, str], Grammar], dict[Field, str]]:
    return lambda texts, _: {**texts, "think": fixed}


def _length_matched(texts: Mapping[Field, str], grammar: Grammar) -> dict[Field, str]:
    """As many tokens (words and marks) of filler as the reasoning and its tags had, less those of the one tag left."""
    blocks = [grammar.block(field, texts[field]) for field in grammar.fields if field != "response"]
    wanted = sum(map(token_count, blocks)) - token_count(grammar.block("think", ""))
    parts: list[str] = []
    while (missing := wanted - sum(map(token_count, parts))) > 0:
        sentence = FILLER[len(parts) % len(FILLER)].split()
        kept = " ".join(sentence[:missing])
        parts.append(kept if token_count(kept) <= missing else " ".join(sentence[: missing - 1]) or "so")
    return {"think": " ".join(parts), "response": texts["response"]}
