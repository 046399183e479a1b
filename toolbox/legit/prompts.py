"""What the language model is asked, and how its answers are read.

It is shown names, descriptions, the domain, tried names and, if wanted, believed edges; never a row of data. Its answer
is untrusted text: it can order names of the list, and nothing else.
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolbox.legit.data import Variable
from toolbox.legit.network import keyed_generator
from toolbox.shell.errors import BadData, MissingInput, UsageProblem

SLOTS = ("domain", "variables", "ask", "tried", "edges")
_HERE = Path(__file__).parent
_ANSWER = re.compile(r"<\s*answer\s*>(.*?)<\s*/\s*answer\s*>", re.IGNORECASE | re.DOTALL)
_NUMBERING = re.compile(r"\A(?:[-*•]|\(?\d{1,3}[.):])\s+|\A\d{1,3}[.)](?=\D)")
_MARKS = " \t\r\"'`“”‘’«»<>[](){}*.;:"
_LONGEST_NAME = 200
_MOST_ITEMS = 1000
_UNSAID = "this field"


@dataclass(frozen=True)
class Sheet:
    """The variables as a prompt shows them: ``labels`` [N] in the variables' order and the lines of the list.

    ``anonymise`` replaces names by neutral labels and leaves descriptions and domain out: what a model then still
    knows is not knowledge of the system. Order and labels are functions of the seed.
    """

    labels: tuple[str, ...]
    listing: str
    domain: str

    @staticmethod
    def of(variables: Sequence[Variable], seed: int, *, anonymise: bool = False) -> Sheet:
        """BadData (65) for a variable without description, unless anonymised."""
        order = keyed_generator(seed, "legit prompt").permutation(len(variables)).tolist()
        if anonymise:
            labels = [""] * len(variables)
            for number, place in enumerate(order, 1):
                labels[place] = f"V{number}"
            return Sheet(tuple(labels), "\n".join(labels[place] for place in order), _UNSAID)
        bare = [one.name for one in variables if not one.description]
        if bare:
            raise BadData(
                f"no description for {', '.join(bare[:5])}{' ...' if len(bare) > 5 else ''}",
                "a language model is told names and descriptions: give them with --variables",
            )
        lines = [f"<{variables[place].name}>: {_plain(variables[place].description or '')}" for place in order]
        domains = sorted({_plain(one.domain) for one in variables if one.domain})
        return Sheet(tuple(one.name for one in variables), "\n".join(lines), ", ".join(domains) or _UNSAID)


def _plain(text: str) -> str:
    return " ".join(text.split())


def read_template(path: str | None, stem: str) -> str:
    """The text of a template, the shipped one where ``path`` is None. UsageProblem (2) for a slot that is not known."""
    if path is not None and not Path(path).is_file():
        raise MissingInput(f"{path}: no such file", "a prompt is a text file")
    try:
        text = Path(path or _HERE / f"prompt_{stem}.txt").read_text(encoding="utf-8")
        used = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except (UnicodeDecodeError, ValueError) as error:
        raise UsageProblem(f"{path}: not a template: {error}", "plain text in UTF-8; {{ and }} for braces") from None
    if unknown := sorted(set(used) - set(SLOTS)):
        raise UsageProblem(f"{path}: unknown slot {{{unknown[0]}}}", "known are " + ", ".join(SLOTS))
    if "variables" not in used:
        raise UsageProblem(f"{path}: has no slot {{variables}}", "the model must see the list to choose from it")
    return text


def fill(template: str, sheet: Sheet, ask: int, tried: Sequence[int], edges: Sequence[tuple[int, int]] | None) -> str:
    """The prompt. ``edges`` None shows none; each slot is filled once and never looked at again."""
    shown = ""
    if edges is not None:
        pairs = "\n".join(f"{sheet.labels[i]} -> {sheet.labels[j]}" for i, j in edges) or "none yet"
        shown = f"Edges that the experiments suggest so far:\n{pairs}\n"
    return template.format(
        domain=sheet.domain, variables=sheet.listing, ask=ask, edges=shown,
        tried=", ".join(sheet.labels[one] for one in tried) or "none",
    )  # fmt: skip


# -- answers ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reading:
    """The variables that an answer names, in its order, and how many of its items were dropped."""

    names: tuple[int, ...]
    dropped: int


def reader(sheet: Sheet) -> Callable[[str], Reading]:
    """A function that reads answers about ``sheet``."""
    known: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(sheet.labels):
        known[_folded(label)].append(place)

    def read(text: str) -> Reading:
        answers = _ANSWER.findall(text)
        if not answers:
            return Reading((), 0)
        items = [item for item in re.split(r"[,\n]", answers[-1])[:_MOST_ITEMS] if item.strip(_MARKS)]
        found: list[int] = []
        for item in items:
            places = known.get(_folded(_stripped(item)), [])
            if len(places) == 1 and places[0] not in found:  # an ambiguous name is none
                found.append(places[0])
        return Reading(tuple(found), len(items) - len(found))

    return read


def _stripped(item: str) -> str:
    return _NUMBERING.sub("", item[:_LONGEST_NAME].strip()).strip(_MARKS)


def _folded(name: str) -> str:
    """What a name is compared by: case, spaces, hyphens and underscores do not count."""
    return re.sub(r"[\s_-]+", "", name).casefold()


@dataclass(frozen=True)
class Ballot:
    """Names in the order of their votes, and how many answers named each."""

    order: tuple[int, ...]
    votes: tuple[int, ...]
    dropped: int
    empty: int


def count_votes(readings: Sequence[Reading]) -> Ballot:
    """Each name in an answer is one vote; order: votes, then mean position where it is named, then place."""
    positions: dict[int, list[int]] = defaultdict(list)
    for reading in readings:
        for position, name in enumerate(reading.names):
            positions[name].append(position)

    def rank(name: int) -> tuple[float, float, int]:
        own = positions[name]
        return -len(own), sum(own) / len(own), name

    order = tuple(sorted(positions, key=rank))
    empty = sum(not reading.names for reading in readings)
    return Ballot(order, tuple(len(positions[name]) for name in order), sum(one.dropped for one in readings), empty)
