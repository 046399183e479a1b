"""CHAIR: objects that a caption speaks of and the image does not have. No numpy, no torch.

Rohrbach et al., "Object Hallucination in Image Captioning" (EMNLP 2018). The list of synonyms built in is ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from toolbox.shell.errors import BadData

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "knives": "knife", "mice": "mouse",
    "geese": "goose", "oxen": "ox", "wolves": "wolf", "calves": "calf", "sheep": "sheep", "skis": "skis",
    "teeth": "tooth", "scissors": "scissors", "buses": "bus", "glasses": "glasses", "loaves": "loaf",
    "leaves": "leaf", "feet": "foot",
}  # fmt: skip


def singular(word: str) -> str:
    """A plain singular by rule: enough for names of objects."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("oes"):
        return word[:-2]
    if len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


@dataclass(frozen=True)
class Synonyms:
    """Words to object classes; ``sha256`` is that of the list as text."""

    classes: dict[str, str]
    names: tuple[str, ...]
    sha256: str

    @staticmethod
    def parse(text: str, file: str, drop: Collection[str] = ()) -> Synonyms:
        """One class a line, words separated by commas, the first is the class; ``drop`` leaves words out.

        Raises: BadData (65) for a word of two classes and for an empty list.
        """
        classes: dict[str, str] = {}
        names: list[str] = []
        for number, line in enumerate(text.splitlines(), 1):
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            if not words or line.startswith("#"):
                continue
            names.append(words[0])
            for word in words:
                if word in drop:
                    continue
                if classes.setdefault(word, words[0]) != words[0]:
                    raise BadData(f"{word!r} is of {classes[word]!r} already", "name it once", file=file, line=number)
        if not names:
            raise BadData("no class", "one a line: person, man, woman", file=file)
        digest = hashlib.sha256(("\n".join(sorted(drop)) + "\0" + text).encode()).hexdigest()
        return Synonyms(classes, tuple(names), digest)


def built_in(drop: Collection[str] = ()) -> Synonyms:
    """The eighty classes of COCO with plain words for them."""
    return Synonyms.parse((files("toolbox.lit") / "objects.txt").read_text(), "objects.txt", drop)


def synonyms_of(path: str | None, drop: Collection[str] = ()) -> Synonyms:
    """A list of the user's, or the one built in."""
    if path is None:
        return built_in(drop)
    try:
        return Synonyms.parse(Path(path).read_text("utf-8-sig"), path, drop)
    except UnicodeDecodeError:
        raise BadData("not UTF-8 text", "convert it to UTF-8", file=path) from None


def mentions(caption: str, synonyms: Synonyms) -> list[str]:
    """The classes that a caption speaks of, a mention each, in order.

    Two-word objects go before their parts; "baby" or "adult" before an animal is the animal, "passenger" before a jet
    or train the vehicle, "toilet seat" no chair, "bow tie" a tie.
    """
    words = [singular(word) for word in _WORD.findall(caption.lower())]
    found: list[str] = []
    place = 0
    while place < len(words):
        word, after = words[place], words[place + 1] if place + 1 < len(words) else ""
        pair = f"{word} {after}"
        if word in ("baby", "adult") and after in _ANIMALS:
            place += 1
            continue
        if word == "passenger" and after in _VEHICLES:
            found.append("airplane" if after == "jet" and "airplane" in synonyms.names else after)
            place += 2
            continue
        if pair == "toilet seat" and "toilet" in synonyms.names:
            found.append("toilet")
            place += 2
            continue
        if pair == "bow tie" and "tie" in synonyms.names:
            found.append("tie")
            place += 2
            continue
        if after and (name := synonyms.classes.get(pair)) is not None:
            found.append(name)
            place += 2
            continue
        if (name := synonyms.classes.get(word)) is not None:
            found.append(name)
        place += 1
    return found


def truth(objects: Iterable[str], captions: Iterable[str], synonyms: Synonyms) -> set[str]:
    """Classes that an image has: its labels, and what its reference captions speak of."""
    labelled = {synonyms.classes.get(singular(one.strip().lower()), one.strip().lower()) for one in objects}
    return labelled | {name for caption in captions for name in mentions(caption, synonyms)}


@dataclass(frozen=True)
class ChairRow:
    """One caption: object mentions, those the image does not have, true classes named, true classes, words."""

    mentions: int
    hallucinated: int
    named: int
    true: int
    words: int


def chair_row(caption: str, true: Collection[str], synonyms: Synonyms) -> ChairRow:
    """The counts of one caption."""
    spoken = mentions(caption, synonyms)
    wrong = sum(name not in true for name in spoken)
    return ChairRow(len(spoken), wrong, len(set(spoken) & set(true)), len(true), len(caption.split()))


def chair(rows: Sequence[ChairRow]) -> dict[str, float | None]:
    """CHAIR_i = hallucinated / mentions, CHAIR_s = captions with one / captions; recall of true classes; mean length.

    An empty caption has CHAIR 0: read it beside recall and length. A ratio over nothing is None.
    """
    said, wrong = sum(row.mentions for row in rows), sum(row.hallucinated for row in rows)
    true, named = sum(row.true for row in rows), sum(row.named for row in rows)
    return {
        "chair_i": wrong / said if said else None,
        "chair_s": sum(row.hallucinated > 0 for row in rows) / len(rows) if rows else None,
        "recall": named / true if true else None,
        "words": sum(row.words for row in rows) / len(rows) if rows else None,
    }
