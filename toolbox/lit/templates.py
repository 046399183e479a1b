"""Task templates: boilerplate sentences of instructions, found by how often they occur. No torch, no numpy.

arXiv: 2503.22215 removes image-independent sentences ("Answer the question using a single word or phrase.") from the
loss on instructions and finds them by sentence frequency. It gives neither the sentence rule nor the cut-off; both here
are ours.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from toolbox.shell.lists import comma_list

SPLITS = ("newline", "punct", "colon")
FEWEST_TURNS = 200
"""With fewer turns no share says anything: nothing is flagged."""

_CUTS = {
    "newline": r"(?<=\S)(?=[^\S\n]*\n)",
    "punct": r"(?<=[.?!])(?=\s)",
    "colon": r"(?<=:)(?=\s)",
}


def sentences(text: str, split: Collection[str] = SPLITS) -> list[tuple[int, int]]:
    """Spans of the sentences of ``text``, which together cover it.

    Cut at a newline, behind ``.`` ``?`` ``!`` and behind ``:`` before white space; ``split`` names which of them. White
    space between two sentences belongs to the second, what trails belongs to the last.
    """
    pattern = "|".join(_CUTS[name] for name in SPLITS if name in split)
    cuts = [found.start() for found in re.finditer(pattern, text)] if pattern else []
    end = len(text.rstrip())
    edges = [0, *(cut for cut in cuts if 0 < cut < end and text[:cut].strip()), len(text)]
    return [(start, stop) for start, stop in pairwise(edges) if stop > start]


def split_names(text: str) -> tuple[str, ...]:
    """A comma list of ``SPLITS``; nothing is cut by an empty one. Raises: UsageProblem (2)."""
    return comma_list("split", text, SPLITS) if text else ()


def key_of(sentence: str) -> str:
    """What sentences are compared by: NFC, white space collapsed and trimmed; case and punctuation count."""
    return " ".join(unicodedata.normalize("NFC", sentence).split())


def template_spans(
    text: str, templates: Collection[str], split: Collection[str] = SPLITS
) -> list[tuple[int, int, bool]]:
    """``(start, stop, is a template)`` of every sentence of ``text``; a list entry matches a whole sentence only."""
    return [(start, stop, key_of(text[start:stop]) in templates) for start, stop in sentences(text, split)]


@dataclass
class _Seen:
    """What is known of one sentence."""

    turns: int = 0
    rows: int = 0
    last_row: int = -1
    example: str = ""
    places: Counter[str] = field(default_factory=Counter)
    neighbours: set[int] = field(default_factory=set)


class Table:
    """Counts sentences over user turns; memory is that of the distinct sentences and the pairs that meet in a turn."""

    def __init__(self, split: Collection[str] = SPLITS) -> None:
        self.split, self.turns, self.rows = split, 0, 0
        self._numbers: dict[str, int] = {}
        self._seen: list[_Seen] = []

    def add(self, row_id: str, turns: Iterable[str]) -> None:
        """Count the user turns of one row, each sentence once a turn."""
        self.rows += 1
        for text in turns:
            self.turns += 1
            keys = [key for start, stop in sentences(text, self.split) if (key := key_of(text[start:stop]))]
            self._count(row_id, keys)

    def _count(self, row_id: str, keys: Sequence[str]) -> None:
        numbers = [self._number(key) for key in keys]
        for place, number in enumerate(numbers):
            seen = self._seen[number]
            seen.places[_position(place, len(keys))] += 1
            seen.neighbours.update(numbers)
            if numbers.index(number) != place:
                continue
            seen.turns += 1
            if seen.last_row != self.rows:
                seen.rows, seen.last_row = seen.rows + 1, self.rows
            seen.example = seen.example or row_id

    def _number(self, key: str) -> int:
        number = self._numbers.setdefault(key, len(self._numbers))
        if number == len(self._seen):
            self._seen.append(_Seen())
        return number

    def rows_out(self, *, min_share: float = 0.15, top_k: int | None = None) -> list[dict[str, Any]]:
        """One record a sentence, the most frequent first (ties by text).

        ``template`` is a share of turns of at least ``min_share``, or with ``top_k`` a place among the first so many;
        nothing with fewer than ``FEWEST_TURNS`` turns.
        """
        order = sorted(self._numbers, key=lambda key: (-self._seen[self._numbers[key]].turns, key))
        return [self._record(key, rank, min_share, top_k) for rank, key in enumerate(order)]

    def _record(self, key: str, rank: int, min_share: float, top_k: int | None) -> dict[str, Any]:
        number = self._numbers[key]
        seen = self._seen[number]
        share = seen.turns / self.turns
        chosen = rank < top_k if top_k is not None else share >= min_share
        place = max(seen.places, key=lambda name: (seen.places[name], name))
        return {
            "sentence": key,
            "count": seen.turns,
            "share_turns": round(share, 6),
            "share_rows": round(seen.rows / self.rows, 6),
            "position": place,
            "neighbours": len(seen.neighbours - {number}),
            "template": chosen and self.turns >= FEWEST_TURNS,
            "example": seen.example,
        }


def _position(place: int, count: int) -> str:
    if count == 1:
        return "only"
    return "first" if place == 0 else "last" if place == count - 1 else "middle"
