"""The enhanced record of COCA: five tags around reasoning and answer, rendered and parsed as exact inverses.

    <think> … </think>
    <concept> … </concept>
    <check> … </check>
    <erase unsafe concepts> … </erase unsafe concepts>
    <response> … </response>

Order and spelling are those of the published example (project page of arXiv 2505.18672). The fourth tag has spaces in
it, which no XML parser takes; the grammar is a small state machine over tag texts. Tags are plain text: what is written
between them is never escaped, and so may not hold a tag text itself.

No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from toolbox.shell.errors import UsageProblem

Decision = Literal["refuse", "comply"]
Field = Literal["think", "concept", "check", "erase", "response"]

FIELDS: tuple[Field, ...] = ("think", "concept", "check", "erase", "response")
"""The fields in the published order; ``erase`` is the decision in words."""

SPACED = {"erase": "erase unsafe concepts"}
NONE = "none"
"""What the check says where no concept is unsafe."""


@dataclass(frozen=True)
class Grammar:
    """Which tags, how they are spelt, in which order.

    ``style`` ``underscored`` writes ``erase_unsafe_concepts``; ``prefix`` stands before every name, for students that
    have a ``<think>`` of their own. ``fields`` may leave some out or come in another order (ablations).
    """

    style: Literal["spaced", "underscored"] = "spaced"
    prefix: str = ""
    fields: tuple[Field, ...] = FIELDS

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]*", self.prefix):
            raise UsageProblem(f"--tag-prefix {self.prefix}: letters, digits, - and _ only", "as in --tag-prefix coca-")
        if "response" not in self.fields or len(set(self.fields)) != len(self.fields):
            raise UsageProblem("a record has a response, and each tag once", f"tags are {', '.join(FIELDS)}")

    def name(self, field: Field) -> str:
        """The tag's name: ``erase unsafe concepts`` for ``erase``."""
        spaced = SPACED.get(field, field)
        return self.prefix + (spaced.replace(" ", "_") if self.style == "underscored" else spaced)

    def opening(self, field: Field) -> str:
        return f"<{self.name(field)}>"

    def closing(self, field: Field) -> str:
        return f"</{self.name(field)}>"

    @cached_property
    def _tags(self) -> dict[str, tuple[Field, bool]]:
        """All five fields' tags, those left out too: text of the field and whether it opens."""
        opening = {self.opening(field): (field, True) for field in FIELDS}
        return opening | {self.closing(field): (field, False) for field in FIELDS}

    @cached_property
    def tag(self) -> re.Pattern[str]:
        """Finds any of the tag texts."""
        return re.compile("|".join(map(re.escape, self._tags)))

    # -- render -------------------------------------------------------------------------------------------------------
    def block(self, field: Field, text: str) -> str:
        """One tag with its text; ValueError where the text holds a tag text."""
        if self.tag.search(text):
            raise ValueError(f"the {field} holds a tag of the record")
        return f"{self.opening(field)} {text} {self.closing(field)}"

    def render(self, texts: Mapping[Field, str]) -> str:
        """The record as text: one block a line. ``parse`` gives the same texts back, whatever else they hold."""
        return "\n".join(self.block(field, texts[field]) for field in self.fields)

    # -- parse --------------------------------------------------------------------------------------------------------
    def parse(self, text: str) -> Parsed:
        """Read a record; see ``Parsed``. One space inside a tag belongs to the tag, more belong to the text."""
        reader = _Reader(self)
        end = 0
        for found in self.tag.finditer(text):
            reader.outside_or_inside(text[end : found.start()])
            reader.take(*self._tags[found.group()])
            end = found.end()
        return reader.finish(text[end:])


@dataclass(frozen=True)
class Parsed:
    """What was found between tags.

    ``texts`` are the closed fields; ``problems`` say what breaks the grammar: ``missing``, ``twice``, ``order``,
    ``unclosed``, ``outside`` (text outside all tags), ``nested``, ``stray`` (an end without a beginning). ``open`` is
    the field that the text ends in, ``rest`` what stands in it so far.
    """

    texts: Mapping[Field, str]
    problems: tuple[str, ...]
    open: Field | None = None
    rest: str = ""
    tagged: bool = False

    @property
    def well_formed(self) -> bool:
        """Each tag once, in order, closed, nothing outside."""
        return not self.problems


class _Reader:
    """The state machine: outside all tags, or inside one."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._texts: dict[Field, str] = {}
        self._order: list[Field] = []
        self._problems: list[str] = []
        self._open: Field | None = None
        self._text = ""
        self._tagged = False

    def outside_or_inside(self, text: str) -> None:
        if self._open is not None:
            self._text += text
        elif text.strip():
            self._problems.append("outside")

    def take(self, field: Field, opens: bool) -> None:
        self._tagged = True
        if opens and self._open is None:
            self._open, self._text = field, ""
        elif not opens and self._open == field:
            self._close(field)
        else:
            self._problems.append("nested" if opens or self._open is not None else "stray")
            if opens and self._open is not None and field not in self._texts:
                # <think> … <concept> …: the first was never closed; what follows is still worth reading
                self._problems.append("unclosed")
                self._open, self._text = field, ""

    def _close(self, field: Field) -> None:
        if field in self._texts:
            self._problems.append("twice")
        else:
            self._texts[field] = _unpadded(self._text)
            self._order.append(field)
        self._open = None

    def finish(self, rest: str) -> Parsed:
        self.outside_or_inside(rest)
        wanted = self._grammar.fields
        if self._open is not None:
            self._problems.append("unclosed")
        if set(self._texts) - set(wanted):
            self._problems.append("foreign")
        if set(wanted) - set(self._texts):
            self._problems.append("missing")
        if [field for field in wanted if field in self._texts] != [field for field in self._order if field in wanted]:
            self._problems.append("order")
        problems = tuple(dict.fromkeys(self._problems))
        return Parsed(self._texts, problems, self._open, self._text if self._open is not None else "", self._tagged)


def _unpadded(text: str) -> str:
    """Without the one space on each side that rendering puts there."""
    text = text.removeprefix(" ")
    return text.removesuffix(" ")


# -- the meaning of the fields ----------------------------------------------------------------------------------------
def concepts_of(text: str) -> tuple[str, ...]:
    """The items of a comma list, blanks and a closing full stop taken off, empty ones left out."""
    items = (" ".join(item.split()).strip(" .;") for item in text.replace("\n", ",").split(","))
    return tuple(item for item in items if item)


def unsafe_of(text: str) -> tuple[str, ...]:
    """The unsafe concepts that a check names: none where it says ``none``."""
    items = concepts_of(text)
    return () if len(items) <= 1 and (not items or items[0].lower() == NONE) else items


_REFUSE = re.compile(
    r"\b(?:refus\w*|declin\w*|reject\w*|(?:will|can)(?:not| not)(?: be)? (?:help|assist|comply|answer\w*|fulfil\w*))\b"
)
_COMPLY = re.compile(
    r"\b(?:no|not|without|none)\b.{0,30}\bunsafe\b|\b(?:comply|complete and helpful|full and helpful|helpful)\b"
)
_NO_REFUSAL = re.compile(
    r"\b(?:no (?:need|reason) to|not|without|never|rather than|instead of)\s+(?:be\s+)?(?:refus|declin|reject)"
)


def decision_of(erase: str) -> Decision | None:
    """The decision that the erase sentence states; None where it states none, or both."""
    text = " ".join(erase.lower().replace("\u2019", "'").split())
    refuses = bool(_REFUSE.search(_NO_REFUSAL.sub(" ", text)))
    complies = bool(_COMPLY.search(text))
    if refuses == complies:
        return None
    return "refuse" if refuses else "comply"


def neutralise(text: str, grammar: Grammar) -> str:
    """A text in which no tag of the record is one any more: a request may spell out tags, and is shown to a teacher
    that writes them. Only for what the teacher reads; records keep what they were given."""
    return grammar.tag.sub(lambda found: "\u2039" + found.group()[1:-1] + "\u203a", text)


def final_text(parsed: Parsed, text: str) -> str | None:
    """What a reader takes for the answer: the text in ``response``, closed or not; the whole text where there is no
    tag at all; None where the text has tags and never comes to its response: it is unfinished."""
    if "response" in parsed.texts:
        return parsed.texts["response"]
    if parsed.open == "response":
        return parsed.rest.removeprefix(" ")
    return None if parsed.tagged else text


def mended(text: str, grammar: Grammar) -> str:
    """The text with whitespace between blocks and at both ends made regular, and the missing end of the last tag put
    behind it. Nothing else is changed."""
    parsed = grammar.parse(text)
    last = grammar.fields[-1]
    if parsed.open == last and set(parsed.problems) <= {"unclosed", "missing"}:
        text = text.rstrip() + f" {grammar.closing(last)}"
        parsed = grammar.parse(text)
    if not parsed.well_formed:
        return text
    return "\n".join(grammar.block(field, parsed.texts[field].strip()) for field in grammar.fields)


# -- ablations --------------------------------------------------------------------------------------------------------
def parse_order(names: Sequence[str], option: str) -> tuple[Field, ...]:
    """Fields by their names as users type them; UsageProblem for one that is none."""
    known = {**{field: field for field in FIELDS}, **{name: field for field, name in SPACED.items()}}
    fields = []
    for name in names:
        if name.strip() not in known:
            raise UsageProblem(f"{option}: there is no tag {name.strip()}", f"tags are {', '.join(FIELDS)}")
        fields.append(known[name.strip()])
    return tuple(fields)
