"""The answer that a completion states, read strictly: better none than a wrong one.

Of what a model wrote, only places that state an answer count, never a capital letter somewhere. The rules in order,
the first that finds something wins:

1. ``boxed``: the last ``\\boxed{...}`` that holds a label, a number or a text.
2. ``cue``: the last "answer / option / choice is" or ":" that an answer follows. A label may stand behind quotes,
   brackets, markdown marks and the words option or choice; it is a whole token and does not begin a running phrase:
   the article "a", the pronoun "I", "no" before a noun, a count such as "3 apples" and a formula's "c = 5" are none.
   A number is the first one between the cue and the next; a text is the rest of the cue's line (the next line where a
   cue ends its own).
3. ``final_line``: the last line with words is a label alone, or marks exactly one (``B)``, ``(B)``, ``option B``);
   a number is the last one of that line. There is no such rule for texts.
4. ``choice_text``, where that line marks no label: exactly one choice's text, as a whole sequence of words, stands on
   the last cue's line behind the cue, or ends the final line.

``pick="first"`` takes the first box or cue instead of the last: base models run on into the next problem. So are the
readings reproduced that were published with the Alice-in-Wonderland responses (Nezhurina et al. 2024).

Additions of ours to these rules, each towards no answer: "A or B" and the first line of a list of choices state none;
a label that begins another choice's text ("B = 0") is none; "the answer is not" and "the wrong answer is" are no cues;
rules 3 and 4 pass over what is denied ("not option B", "B) 300 is incorrect"); and a line that names two choices' texts
states neither. Numbers and texts in boxes are ours as well.
Known limits: of a fraction one of its numbers is read; rules 3 and 4 look at 4,000 characters of a line.

The time is linear in the length of the text: what is repeated in a pattern is possessive or bounded.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from toolbox.shell.items import NUMBER, Format, canonical_number, plain

Pick = Literal["first", "last"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    """The answer (one of the labels, a number in its one spelling, or words), and the rule that found it: "boxed",
    "cue", "final_line", "choice_text", or "none" with the value None."""

    value: str | None
    source: str


NOTHING = Reading(None, "none")

_SPACE = r"\s\u200b-\u200f\u2060\ufeff"
_MARKS = rf"[{_SPACE}*_`~#>\"'“”„‘’«»]*+"
_INLINE = r"[ \t\u00a0\u200b*_`~\"'”’)）]*+"
_OPENING = rf"(?:[{_SPACE}*_`~#>\"'“”„‘’«»()（\[{{$]|\\[a-z]*+|(?:option|choice)\b)"
_CLOSING = rf"[{_SPACE}*_`~\"'“”‘’«»)）\]}}$\\]"
_CUE = (
    r"(?<!\bwrong )(?<!\bincorrect )(?<!\bfalse )\b(?:answer|option|choice)\b"
    rf"{_INLINE}(?:[:：]|is\b(?!\s+not\b)(?:{_INLINE}[:：])?)"
)
_CUES = re.compile(_CUE, re.I)
_TRAILING_CUE = re.compile(
    rf"((?:\bthe\s+)?(?:\b(?:final|correct|right|best)\s+)?{_CUE})[{_SPACE}*_`(\[$]*+(?:\\boxed\{{)?\Z",
    re.I,
)
_LONGEST_CUE = 200  # characters at the end of a prompt
_BRACES = re.compile(r"(?P<box>\\f?boxed\s*+\{)|\\[{}]|(?P<open>\{)|(?P<close>\})")
_LONGEST_BOX = 400  # boxes inside boxes must not be read over and over

_AMBIGUOUS = re.compile(r"[a-z]|[AI]|[Nn]o|[0-9]+")
"""Labels that may be words, variables or counts as well: what follows one of these decides."""
_WORDS = re.compile(r"[aiI]|[Nn]o")
"""Those that may be words even behind "option", or as the text of a choice."""
_ENDS_TOKEN = re.compile(
    rf"[*_`\"'”’»)）\]}}$\\]|{_CLOSING}*+(?:[.,;:!?]|\Z)|[^\S\n]*+\n"
    r"|\s++(?:[(—–]|-\s|(?:because|since|as|which|although|though|but|instead|is|it|he|she|they|you|we|this|that|there"
    r"|the)\b)",
    re.I,
)
"""What cannot go on with a phrase that begins with an article, "I", "no" or a count."""
_SEPARATOR = rf"{_CLOSING}*+(?:,?\s*+\b(?:or|and)\b|[,/&])"
_NO_VERB = r"(?!\s+(?:is|was|has|does|would|can|could|cannot)\b)"
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|than|cannot)|n['’]t)\s+(?:(?!(?:but|then|so)\b)\w+\s+){0,3}\W*\Z", re.I
)
_DENIED_AFTER = re.compile(
    r"(?:(?!\b(?:because|since|as|so|for|if|and|but|that|who|which|where|when)\b)(?:[^.,;!?\n]|[.,](?=[0-9]))){0,60}?"
    r"\b(?:(?:is|are|was|were)\s+(?:\w+ly\s+|also\s+|thus\s+)?(?:not|incorrect|wrong|false|too)\b"
    r"|(?:is|are|was|were|does|do)n['’]t\b|(?:does|do)\s+not\b|cannot\b)",
    re.I,
)
_BEFORE = 60  # characters in front of a label in which it may be denied
_LONGEST_LINE = 4000  # characters of a line that are looked at: its first behind a cue, its last at the end

_NUMBERS = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}%])[-\u2212])?[$€£]?(?<![^\W_])(?<![0-9]\.)(?P<digits>{NUMBER}|(?<![\w.])\.[0-9]+)"
)
_LATEX_TEXT = re.compile(r"\\(?:text|math|mbox)[a-z]*\s*\{([^{}]*)\}")
_LINE = re.compile(r"[^\n]*\n?")
_HAS_WORD = re.compile(r"[^\W_]")


def read_answer(
    text: str,
    *,
    format: Format,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    pick: Pick = "last",
    cue: str = "",
) -> Reading:
    """The answer that ``text`` (a completion, or thoughts joined by newlines) states, by the rules of this module.

    ``labels`` and ``texts`` are those of the item's choices, for the format ``letter``: without labels nothing is
    found, texts may be absent. ``cue`` is what the prompt ended in, if that was a cue: it stands before the text.
    Upper and lower case are one.
    """
    text = unicodedata.normalize("NFC", text)
    if cue.strip():  # whatever it says, it asks for the answer here
        text = f"Answer: {text}"
    if format == "number":
        return _read_number(text, pick)
    if format == "text":
        return _read_text(text, pick)
    return _read_label(text, tuple(labels), tuple(texts), pick) if any(map(str.strip, labels)) else NOTHING


def trailing_cue(prompt: str) -> str:
    """The cue that ``prompt`` ends in ("Answer:", "The answer is"), to be handed on as ``cue``; "" where it ends in
    none. Blanks, opening brackets and markdown marks may follow; a cue in quotation marks is an instruction."""
    found = _TRAILING_CUE.search(prompt.rstrip()[-_LONGEST_CUE:])
    return "" if found is None else " ".join(found[1].split())


# --- places ---------------------------------------------------------------------------------------------------------


def _picked(found: Iterable[T], pick: Pick) -> Iterable[T]:
    return found if pick == "first" else reversed(list(found))


def _boxes(text: str) -> Iterator[str]:
    """What stands in the boxes of ``text``, in the order in which they close."""
    if "boxed" not in text:
        return
    opened: list[int | None] = []  # where the content of a box begins, None for another brace
    for brace in _BRACES.finditer(text):
        if brace["box"]:
            opened.append(brace.end())
        elif brace["open"]:
            opened.append(None)
        elif brace["close"] and opened:
            start = opened.pop()
            if start is not None and brace.start() - start <= _LONGEST_BOX:
                yield text[start : brace.start()]


def _cue_regions(text: str) -> Iterator[tuple[int, int]]:
    """For every cue with words behind it where it ends, and where the next begins or the text ends."""
    ends, starts = [], []
    for cue in _CUES.finditer(text):
        starts.append(cue.start())
        ends.append(cue.end())
    for start, end in zip(ends, [*starts[1:], len(text)], strict=False):
        if _HAS_WORD.search(text, start, end):
            yield start, end


def _rest_of_line(text: str, start: int) -> str:
    """The line from ``start`` on; the next with words where this has none left."""
    while (found := _LINE.match(text, start)) and found[0]:
        if _HAS_WORD.search(found[0]):
            return found[0][:_LONGEST_LINE].strip()
        start = found.end()
    return ""


def _final_line(text: str) -> str:
    return next((line[-_LONGEST_LINE:].strip() for line in reversed(text.splitlines()) if _HAS_WORD.search(line)), "")


# --- numbers and texts ----------------------------------------------------------------------------------------------


def _read_number(text: str, pick: Pick) -> Reading:
    for box in _picked(_boxes(text), pick):
        content = re.sub(r"\\[,!;: ]|\\?[$%]", "", _LATEX_TEXT.sub("", box).replace("{,}", ","))
        value = canonical_number(content.rpartition("=")[2])
        if value is not None:
            return Reading(value, "boxed")
    for start, end in _picked(_cue_regions(text), pick):
        if found := _NUMBERS.search(text, start, end):
            return Reading(_spelled(found), "cue")
    if numbers := list(_NUMBERS.finditer(_final_line(text))):
        return Reading(_spelled(numbers[-1]), "final_line")
    return NOTHING


def _spelled(found: re.Match[str]) -> str | None:
    return canonical_number(("-" if found["sign"] else "") + found["digits"])


def _read_text(text: str, pick: Pick) -> Reading:
    for box in _picked(_boxes(text), pick):
        content = _LATEX_TEXT.sub(r"\1", box).strip(" $")
        if plain(content):
            return Reading(content, "boxed")
    for start, _ in _picked(_cue_regions(text), pick):
        rest = re.sub(rf"\A{_MARKS}|\*\*|{_CLOSING}++\Z", "", _rest_of_line(text, start))
        if plain(rest):
            return Reading(rest, "cue")
    return NOTHING


# --- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Labels:
    """The patterns of an item's labels."""

    names: dict[str, str]  # as written in lower case, as given
    cue: re.Pattern[str]
    boxed: re.Pattern[str]
    alone: re.Pattern[str]
    marked: re.Pattern[str]
    another: re.Pattern[str]
    list_goes_on: re.Pattern[str]

    def name(self, written: str) -> str:
        return self.names[_folded(written)]


def _folded(label: str) -> str:
    # A pattern without regard to case takes the Turkish letters for I, casefold does not.
    return " ".join(label.casefold().split()).replace("i\u0307", "i").replace("ı", "i")


def _bounds(label: str) -> tuple[str, str]:
    """What keeps ``label`` a whole token: not within a word, a hyphenated compound, a number or an abbreviation."""
    before = r"(?<![^\W_])" if _HAS_WORD.match(label[0]) else ""
    after = r"(?!['’‐‑-]?[^\W_]|/[^\W_])" if _HAS_WORD.match(label[-1]) else ""
    if label[0].isdigit():
        before += r"(?<![-\u2212])(?<![0-9][.,])(?:(?<![$€£])|(?=[0-9]+\$))"
    if label[-1].isdigit():
        after += r"(?![.,:/^][0-9]|\s?[%°])"
    elif len(label) == 1:
        after += r"(?!\.[a-z]\b)"
    return before, after


def _any_of(labels: Iterable[str]) -> str:
    """A pattern of any label; a longer one is tried before a shorter one that it begins with."""
    groups = []
    for (before, after), group in itertools.groupby(sorted(labels, key=len, reverse=True), key=_bounds):
        words = "|".join(r"\s+".join(map(re.escape, label.split())) for label in group)
        groups.append(f"{before}(?:{words}){after}")
    return f"(?:{'|'.join(groups)})"


@functools.lru_cache(maxsize=256)
def _labels(labels: tuple[str, ...]) -> _Labels:
    written = [" ".join(unicodedata.normalize("NFC", label).split()) for label in labels]
    any_label = _any_of(filter(None, written))
    opening = rf"(?:(?!{any_label}){_OPENING})*+"

    def compiled(pattern: str) -> re.Pattern[str]:
        return re.compile(pattern, re.I)

    return _Labels(
        names={_folded(name): label for name, label in reversed(list(zip(written, labels, strict=True)))},
        cue=compiled(rf"{_CUE}(?P<gap>{opening})(?P<label>{any_label})"),
        boxed=compiled(rf"{opening}(?P<label>{any_label})(?={_CLOSING}*+(?:\Z|[.:])|{_MARKS}[)\]}}])"),
        alone=compiled(rf"(?:[-•–—+]\s)?{opening}(?P<label>{any_label})(?:{_CLOSING}|[.,;:!])*+\Z"),
        marked=compiled(
            rf"(?<![^\W_])[(（\[]{_MARKS}(?P<bracketed>{any_label}){_MARKS}[)）\]]"
            rf"|\b(?:option|choice)\b{_MARKS}[(（\[]?{_MARKS}(?P<named>{any_label})"
            rf"|(?P<closed>{any_label}){_MARKS}[)）]"
            r"|(?P<open>[(（])|(?P<close>[)）])"
        ),
        another=compiled(rf"{_SEPARATOR}{opening}(?P<label>{any_label}){_NO_VERB}"),
        list_goes_on=compiled(rf"[^\n]*+\n{_MARKS}[(\[]?{_MARKS}(?P<label>{any_label}){_MARKS}[.:)\]]"),
    )


def _read_label(text: str, labels: tuple[str, ...], texts: tuple[str, ...], pick: Pick) -> Reading:
    known = _labels(labels)
    own_text = dict(zip(labels, map(plain, texts), strict=False))
    for box in _picked(_boxes(text), pick):
        found = known.boxed.match(box)
        if found and not _goes_on(known.another, found, known):
            return Reading(known.name(found["label"]), "boxed")
    for found in _picked(known.cue.finditer(text), pick):
        name = known.name(found["label"])
        if not (
            _begins_phrase(found, "label", _AMBIGUOUS, own_text.get(name, ""))
            or _goes_on(known.another, found, known)
            or ("\n" in found["gap"] and _goes_on(known.list_goes_on, found, known))
            or _begins_other_text(found, name, own_text)
        ):
            return Reading(name, "cue")
    line = _final_line(text)
    if found := known.alone.match(line):
        return Reading(known.name(found["label"]), "final_line")
    marked = list(_marked(line, known))
    names = {name for name, _, _ in marked}
    if marked:
        stated = len(names) == 1 and not all(
            _denied(line, start, _behind_own_text(line, end, own_text.get(name, ""))) for name, start, end in marked
        )
        return Reading(names.pop(), "final_line") if stated else NOTHING
    return _read_choice_text(text, line, labels, texts, pick)


def _begins_phrase(found: re.Match[str], group: str | int, ambiguous: re.Pattern[str], own_text: str = "") -> bool:
    """Whether the label found is no label but the first word of a phrase (that is not the label's own choice)."""
    end = found.end(group)
    if not ambiguous.fullmatch(found[group]) or _ENDS_TOKEN.match(found.string, end):
        return False
    return not (own_text and _begins_with(_plain_from(found.string, end, len(own_text)), own_text))


def _begins_other_text(found: re.Match[str], name: str, texts: dict[str, str]) -> bool:
    """Whether the label found is the first word of another choice: of "B = 0" among the choices of a quiz on fields."""
    others = [text for text in texts.values() if len(text) > len(name) and text != texts[name]]
    following = _plain_from(found.string, found.start("label"), max(map(len, others), default=0))
    return any(_begins_with(following, text) for text in others)


def _plain_from(text: str, start: int, length: int) -> str:
    return plain(text[start : start + 2 * length + 40])


def _begins_with(text: str, words: str) -> bool:
    return text.startswith(words) and not text[len(words) : len(words) + 1].isalnum()


def _goes_on(pattern: re.Pattern[str], found: re.Match[str], known: _Labels) -> bool:
    """Whether ``pattern`` finds another label right behind the one that was found."""
    other = pattern.match(found.string, found.end("label"))
    return (
        other is not None
        and known.name(other["label"]) != known.name(found["label"])
        and not _begins_phrase(other, "label", _AMBIGUOUS)
    )


def _marked(line: str, known: _Labels) -> Iterator[tuple[str, int, int]]:
    """The marked labels of ``line`` with their places. The bracket in "(of stock B)" closes another one: no mark."""
    depth = 0
    for found in known.marked.finditer(line):
        if found["open"]:
            depth += 1
        elif found["close"] or (found["closed"] and depth):
            depth = max(depth - 1, 0)
        elif not (found["named"] and _begins_phrase(found, "named", _WORDS)):
            group = found.lastgroup or "closed"
            yield known.name(found[group]), found.start(), found.end()


def _behind_own_text(line: str, end: int, own_text: str) -> int:
    """Where the text of a label's choice ends, if it follows the label: what it denies is not the choice."""
    pattern = own_text and rf"[\s.:)\]*_]*+{_text_pattern(own_text)}"
    found = pattern and re.compile(pattern, re.I).match(line, end)
    return found.end() if found else end


def _denied(text: str, start: int, end: int) -> bool:
    before = text[max(0, start - _BEFORE) : start]
    return bool(_DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text, end))


# --- texts of choices -----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _choice_texts(labels: tuple[str, ...], texts: tuple[str, ...]) -> tuple[dict[str, list[str]], re.Pattern[str]]:
    """The labels of each text (several, where choices are worded alike), and a pattern that finds any text."""
    labels_of: dict[str, list[str]] = {}
    for label, text in zip(labels, texts, strict=False):
        if core := plain(text):
            labels_of.setdefault(core, []).append(label)
    longest_first = sorted(labels_of, key=len, reverse=True)
    groups = "|".join(f"({_text_pattern(core)})" for core in longest_first)
    return {core: labels_of[core] for core in longest_first}, re.compile(f"(?={groups})")


def _text_pattern(core: str) -> str:
    """``core`` as whole words, however they are spaced, with any dash for a dash and any apostrophe for another."""
    tokens = re.findall(r"[^\W_]+|\S", core)
    pattern = ""
    for previous, token in zip(["", *tokens], tokens, strict=False):
        both_words = _HAS_WORD.match(previous) and _HAS_WORD.match(token)
        pattern += "" if not previous else r"\s++" if both_words else r"\s*+"
        dash, apostrophe = "-‐‑‒–—―\u2212", "'’‘"
        pattern += f"[{dash}]" if token in dash else f"[{apostrophe}]" if token in apostrophe else re.escape(token)
    before = r"(?<![^\W_])(?<!\w[-‐‑])" if _HAS_WORD.match(core[0]) else r"(?<![\w)])" if core[0] in "-\u2212" else ""
    if core[0].isdigit():
        before += r"(?<![-\u2212])(?<![0-9][.,])"
    after = r"(?!['’‐‑-]?[^\W_])" if _HAS_WORD.match(core[-1]) else ""
    if core[-1].isdigit():
        after += r"(?![.,][0-9]|\s?%)"
    return before + pattern + after


def _read_choice_text(text: str, line: str, labels: tuple[str, ...], texts: tuple[str, ...], pick: Pick) -> Reading:
    labels_of, pattern = _choice_texts(labels, texts)
    if not labels_of:
        return NOTHING
    for start, _ in list(_picked(_cue_regions(text), pick))[:1]:
        mentioned = _mentions(_rest_of_line(text, start).casefold(), pattern)
        if len(mentioned) > 1:
            return NOTHING
        if mentioned:
            return _only(labels_of, next(iter(mentioned)))
    line = line.casefold()
    mentioned = _mentions(line, pattern)
    for group, end in mentioned.items() if len(mentioned) == 1 else ():
        if re.fullmatch(rf"(?:{_CLOSING}|[.,;:!])*+", line[end:]):
            return _only(labels_of, group)
    return NOTHING


def _only(labels_of: dict[str, list[str]], group: int) -> Reading:
    """The label of a text, unless several choices have it."""
    stated = list(labels_of.values())[group - 1]
    return Reading(stated[0], "choice_text") if len(stated) == 1 else NOTHING


def _mentions(line: str, pattern: re.Pattern[str]) -> dict[int, int]:
    """Which texts ``line`` states (the pattern's groups) and where each ends last; what is denied or part of a longer
    text is left out. Looks no further than the second text."""
    ends: dict[int, int] = {}
    reached = 0
    for found in pattern.finditer(line):
        group = found.lastindex or 0
        start, end = found.span(group)
        if end <= reached:  # within a longer one
            continue
        reached = end
        if _WORDS.fullmatch(found[group]) and _begins_phrase(found, group, _WORDS):
            continue
        if group in ends or not _denied(line, start, end):
            ends[group] = end
        if len(ends) > 1:
            break
    return ends
