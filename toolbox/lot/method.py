"""The prompting variants of Language of Thoughts as data, and their rendering by one pass of literal substitution.

Source: Liu et al. 2025, "On the Thinking-Language Modeling Gap in Large Language Models", arXiv 2505.12896. A premise
is hard to use because its own wording is unusual (L) or because the context hides it (q). *Expand* acts on L, *echo* on
q, the method's two wordings on both. The reasoning prefix is orthogonal to them and can be switched off.

A prompt is a layout whose slots are filled. Layouts and clauses are templates, written by whoever asks; what fills the
slots comes from data and is never looked at again, whatever it spells out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from toolbox.shell.errors import BadData, UsageProblem

PREFIXES: Mapping[str, str] = {"cot": "Let's think step by step.", "none": ""}
"""The text of each value of ``prefix``. The project page shows some clauses behind "(Think step by step.)" instead;
with one text for all, only the clause differs between variants."""

FORMAT_LINES: Mapping[str, str] = {
    "letter": 'End with one line: "Answer: X", where X is one of {labels}.',
    "number": 'End with one line: "Answer: N", where N is a number.',
    "text": 'End with one line: "Answer: ..."',
}
"""How the answer is asked for: the same in all variants."""

LAYOUT = "{context}\n\n{question}\n{choices}\n\n{prefix} {clause}\n\n{format}"

ITEM_SLOTS = ("context", "question", "choices", "format")
"""Slots that an item fills, in the order of ``Values``; the others, ``prefix`` and ``clause``, a variant fills."""

SLOTS = (*ITEM_SLOTS, "prefix", "clause")

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_BLANK_LINES = re.compile(r"(\n(?:[ \t]*\n)+)")
_CLOSED = re.compile(r"[.!?:;…。！？}]['\"’”)\]*_]*$")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_KEYS = ("id", "prefix", "clause", "source")
_ABSENT = -1
"""The place of a slot that the variant leaves empty."""

Part = str | int
"""A piece of a compiled template: literal text, or the place of a slot in ``Values``."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One wording. ``prefix`` is a key of ``PREFIXES``; ``clause`` may be empty; ``line`` is where its entry stands."""

    id: str
    prefix: str
    clause: str
    source: str
    line: int = 0

    def switched(self, prefix: str) -> str:
        """The prefix under ``--with prefix``: ``none`` takes it from variants that have a clause to be tested alone."""
        return "none" if self.clause and prefix == "none" else self.prefix


class Values(NamedTuple):
    """What an item puts into the slots; an absent one is empty."""

    context: str
    question: str
    choices: str
    format: str


def choice_lines(labels: Sequence[str], texts: Sequence[str]) -> str:
    """The choices one a line; nothing where the question itself lists them and only their labels are known."""
    return "\n".join([f"{label}) {text}" for label, text in zip(labels, texts, strict=False)])


@functools.lru_cache(maxsize=256)
def format_line(format: str, labels: tuple[str, ...]) -> str:
    """The line that says how to answer."""
    return FORMAT_LINES[format].replace("{labels}", ", ".join(labels)) if format == "letter" else FORMAT_LINES[format]


def closed(clause: str) -> str:
    """``clause`` with a full stop where it ends without punctuation."""
    return clause if not clause or _CLOSED.search(clause) else clause + "."


class Template:
    """A variant in a layout, ready to be filled.

    - ``prefix`` switches the prefix of variants with a clause (``Variant.switched``); ``bold`` wraps the clause, full
      stop included, in ``**``; ``system`` is a text that stands before the prompt (a turn of its own in ``messages``).
    - An empty slot takes the space before it along (at the start of a line, the one behind it). A line of nothing but
      empty slots goes, and a paragraph of nothing but such lines goes with the blank line behind it.
    - ``sha``: 16 hex digits of a SHA-256 over every text that goes into a prompt besides the item. Equal templates have
      equal ones, whatever they are called.

    Raises: UsageProblem for a layout with an unknown slot, without the question, or without a place for what the
    variant has to say.
    """

    __slots__ = ("_lines", "_plans", "clause", "prefix", "sha", "slots", "system", "variant")

    def __init__(
        self, variant: Variant, *, layout: str = LAYOUT, prefix: str = "cot", bold: bool = False, system: str = ""
    ) -> None:
        self.variant = variant.id
        self.system = system
        self.prefix = PREFIXES[variant.switched(prefix)]
        self.clause = closed(variant.clause)
        if bold and self.clause:
            self.clause = f"**{self.clause}**"
        used = _slot_names(layout, SLOTS, "--layout")
        for slot, text in (("question", "?"), ("prefix", self.prefix), ("clause", self.clause)):
            if text and slot not in used:
                raise UsageProblem(f"--layout has no {{{slot}}}, which {variant.id} needs", "add the slot")
        self.slots = frozenset(used) | frozenset(_slot_names(self.clause, ITEM_SLOTS, f"the clause of {variant.id}"))
        paragraphs = _BLANK_LINES.split(layout)
        self._lines = [
            ([self._parts(line) for line in paragraph.split("\n")], gap)
            for paragraph, gap in zip(paragraphs[::2], [*paragraphs[1::2], ""], strict=True)
        ]
        self._plans: dict[tuple[bool, bool], list[Part]] = {}
        texts = [self.system, layout, self.prefix, self.clause, choice_lines(["X"], ["x"]), *FORMAT_LINES.values()]
        self.sha = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]

    def __call__(self, values: Values) -> str:
        """The prompt of one item."""
        filled = (values.context != "", values.choices != "")
        plan = self._plans.get(filled)
        if plan is None:
            plan = self._plans[filled] = self._plan(*filled)
        return "".join([part if part.__class__ is str else values[part] for part in plan])  # type: ignore[misc,index]

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The prompt as turns."""
        turn = {"role": "user", "content": prompt}
        return [{"role": "system", "content": self.system}, turn] if self.system else [turn]

    def _parts(self, line: str) -> list[Part]:
        """A line of the layout as literals and places, the variant's own texts put in."""
        parts: list[Part] = []
        for literal, name in _pieces(line):
            parts.append(literal)
            if name == "prefix":
                parts.append(self.prefix or _ABSENT)
            elif name == "clause":
                parts += _item_parts(self.clause) or [_ABSENT]
            elif name:
                parts.append(ITEM_SLOTS.index(name))
        return [part for part in parts if part != ""]

    def _plan(self, has_context: bool, has_choices: bool) -> list[Part]:
        """The parts that are left when some slots are empty, neighbouring literals joined."""
        empty = {_ABSENT}
        empty |= set() if has_context else {ITEM_SLOTS.index("context")}
        empty |= set() if has_choices else {ITEM_SLOTS.index("choices")}
        parts: list[Part] = []
        gap = ""  # the blank lines before the next paragraph
        for lines, gap_behind in self._lines:
            kept = [line for parts_of_line in lines if (line := _without(parts_of_line, empty)) is not None]
            if not kept:
                continue
            parts.append(gap)
            for number, line in enumerate(kept):
                parts += [*(["\n"] if number else []), *line]
            gap = gap_behind
        return _joined(parts)


def _pieces(text: str) -> Iterable[tuple[str, str]]:
    """``(literal, slot name)`` pairs; the last name is empty."""
    pieces = _SLOT.split(text)
    return zip(pieces[::2], [*pieces[1::2], ""], strict=True)


def _item_parts(text: str) -> list[Part]:
    parts: list[Part] = []
    for literal, name in _pieces(text):
        parts += [literal, *([ITEM_SLOTS.index(name)] if name else [])]
    return [part for part in parts if part != ""]


def _slot_names(text: str, known: Sequence[str], where: str) -> list[str]:
    names = _SLOT.findall(text)
    for name in names:
        if name not in known:
            raise UsageProblem(
                f"{where} has an unknown slot {{{name}}}", "known here: " + ", ".join(f"{{{slot}}}" for slot in known)
            )
    return names


def _without(line: Sequence[Part], empty: set[int]) -> list[Part] | None:
    """The line without its empty slots and a space each; None where nothing else was in it."""
    kept: list[Part] = []
    dropped = open_start = False
    for part in line:
        if isinstance(part, int) and part in empty:
            dropped = True
            if kept and isinstance(kept[-1], str):
                kept[-1] = kept[-1].removesuffix(" ")
            open_start = not kept
            continue
        if open_start and isinstance(part, str):
            part = part.removeprefix(" ")
        open_start = False
        kept.append(part)
    nothing_else = not any(isinstance(part, int) or part.strip() for part in kept)
    return None if dropped and nothing_else else kept


def _joined(parts: Iterable[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


# -- variants as data


def parse_variants(text: bytes, file: str) -> list[Variant]:
    """The variants in YAML: a list of flat entries ``{id, prefix, clause, source}``; ``prefix`` is cot or none, clause
    and source may be left out (the source is then the file).

    Read strictly, as a variant that is half understood asks something else than its author meant: no anchors, aliases,
    tags or nested values, no key that is unknown or there twice, no id twice. Values are text as written.

    Raises: BadData with file and line; UsageProblem for a clause with an unknown slot.
    """
    import yaml

    def bad(what: str, node: Any, advice: str = "an entry has id, prefix (cot or none), clause and source") -> BadData:
        return BadData(what, advice, file=file, line=node.start_mark.line + 1)

    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is built from the text
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise bad("anchors, aliases and tags are not allowed", event, "write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:  # the list, and an entry
                raise bad("a value is one text", event)
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise BadData(f"not valid YAML: {what}", file=file, line=mark.line + 1 if mark else None) from None
    except (RecursionError, ValueError, OverflowError) as error:  # the last two: an escape that is no character
        raise BadData(f"not valid YAML: {error}", file=file) from None
    if len(documents) != 1 or not isinstance(documents[0], yaml.SequenceNode):
        raise BadData("not a list of variants", "as in: - {id: mine, prefix: cot, clause: List the facts}", file=file)
    found: dict[str, Variant] = {}
    for node in documents[0].value:
        variant = _variant(_entry(node, bad), node, file, bad)
        if variant.id in found:
            raise bad(f"`{variant.id}` stands on line {found[variant.id].line} already", node, "choose another id")
        found[variant.id] = variant
    return list(found.values())


def _entry(node: Any, bad: Callable[..., BadData]) -> dict[str, str]:
    """One entry's keys and values, null ones left out."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise bad("not an entry", node)
    entry: dict[str, str] = {}
    seen = set()
    for key, value in node.value:
        if key.value not in _KEYS:
            raise bad(f"unknown key `{key.value}`", key)
        if key.value in seen:
            raise bad(f"`{key.value}` is there twice", key, "keep one of them")
        seen.add(key.value)
        try:
            value.value.encode()
        except UnicodeEncodeError:
            raise bad("half of a surrogate pair is no character", value, "write the character itself") from None
        if value.style is not None or value.value not in ("", "~", "null", "Null", "NULL"):
            entry[key.value] = value.value.strip()
    return entry


def _variant(entry: Mapping[str, str], node: Any, file: str, bad: Callable[..., BadData]) -> Variant:
    for key in ("id", "prefix"):
        if key not in entry:
            raise bad(f"an entry without `{key}`", node)
    name, prefix = entry["id"], entry["prefix"]
    if not _ID.fullmatch(name) or name == "all":
        raise bad(f"`{name}` cannot be an id", node, "letters, digits and . _ + - (and not: all)")
    if prefix not in PREFIXES:
        raise bad(f"`prefix` is cot or none, not `{prefix}`", node)
    line = node.start_mark.line + 1
    clause = entry.get("clause", "")
    _slot_names(clause, ITEM_SLOTS, f"{file}:{line}: the clause of {name}")
    return Variant(name, prefix, clause, entry.get("source") or file, line)
