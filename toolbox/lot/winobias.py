"""WinoBias, and the controlled grid that Language of Thoughts builds on it (WinoControl).

Sources: Zhao et al. 2018, "Gender Bias in Coreference Resolution: Evaluation and Debiasing Methods", arXiv 1804.06876;
Liu et al. 2025, arXiv 2505.12896, experiment on controlled implicitness. A line is ``N sentence`` with bracketed
spans: the entity that is meant, then the pronoun that is asked about. Line N of the pro-stereotyped file and line N of
the anti-stereotyped file are a pair: the same sentence with the pronoun changed.

The published lines have irregularities. All are kept, and each says of itself what it is (``KINDS``).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.items import default_labels
from toolbox.shell.streams import Streams, iter_lines, open_source

Row = dict[str, Any]

PUBLISHED = "https://github.com/uclanlp/corefBias, folder WinoBias/wino/data (MIT)"
TYPES = ("1", "2")
SPLITS = ("dev", "test")
SIDES = ("pro", "anti")

KINDS: Mapping[str, str] = {
    "spans": "three or more bracketed spans, the first two are used",
    "article": "the brackets of the entity leave its article out",
    "pronoun": "a third-person pronoun outside the brackets",
    "occupations": "not exactly two occupations in the sentence",
    "pair": "the sentences of the pair differ by more than the pronoun",
    "entity": "the sentences of the pair mean different entities",
}
"""What a line may be marked with in ``meta.irregular``; the last two are about the pair and mark both its lines."""

PRONOUNS: Mapping[str, str] = {
    **dict.fromkeys(("he", "him", "his", "himself"), "he"),
    **dict.fromkeys(("she", "her", "hers", "herself"), "she"),
}
"""Third-person pronouns, and the subject form of each."""

OTHER = {"he": "she", "she": "he"}

CELLS = tuple(f"{level}{q}" for level in ("L0", "L1", "L2") for q in ("q0", "q1", "q2"))
"""The grid: how much is said of the entities (L0 most), and how much stands around it (q2 most)."""

FRUITS = (
    "apple", "apricot", "avocado", "banana", "blackberry", "blueberry", "cherry", "clementine", "coconut", "cranberry",
    "fig", "gooseberry", "grape", "grapefruit", "guava", "kiwi", "kumquat", "lemon", "lime", "lychee", "mandarin",
    "mango", "melon", "mulberry", "nectarine", "olive", "orange", "papaya", "peach", "pear", "persimmon", "pineapple",
    "plum", "pomegranate", "pomelo", "quince", "raspberry", "satsuma", "strawberry", "tangerine",
)  # fmt: skip

_LINE = re.compile(r"(\d+)\s+(\S.*)")
_SPAN = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"(?:the|an?)\s+", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]+")
_ANY_PRONOUN = re.compile(rf"\b(?:{'|'.join(PRONOUNS)})\b")


@dataclass(frozen=True, slots=True)
class Sentence:
    """One line: ``text`` without brackets, the asked ``pronoun`` as it is written, the meant ``entity`` and all
    ``occupations`` of the sentence in order of mention, spelled as in the lists; ``irregular`` are keys of ``KINDS``.
    """

    number: int
    text: str
    pronoun: str
    entity: str
    occupations: tuple[str, ...]
    irregular: tuple[str, ...]
    file: str
    line: int

    @property
    def question(self) -> str:
        return f'What does "{self.pronoun}" refer to in: "{self.text}"?'

    @property
    def answer(self) -> str:
        """The label of the meant entity among the occupations."""
        return default_labels(len(self.occupations))[self.occupations.index(self.entity)]


class Occupations:
    """The forty occupations, and how they are found in a sentence: whole words, whatever their case."""

    def __init__(self, names: Sequence[str]) -> None:
        self._spelled = {name.lower(): name for name in names}
        self.names = tuple(self._spelled.values())
        longest_first = sorted(map(re.escape, self.names), key=len, reverse=True)
        self._pattern = re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE)

    def within(self, text: str) -> tuple[str, ...]:
        """The different occupations in ``text`` in order of mention."""
        return tuple(dict.fromkeys(self._spelled[found.lower()] for found in self._pattern.findall(text)))

    def named(self, span: str) -> str | None:
        """The occupation that a span names, its article and outer spaces left out."""
        return self._spelled.get(_ARTICLE.sub("", span.strip(), count=1).strip().lower())


# -- reading


def _lines(path: str, streams: Streams) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file; blank ones are left out.

    Raises: MissingInput where there is no such file, BadData for bytes that are no UTF-8.
    """
    if not os.path.isfile(path):
        raise MissingInput(f"{path}: no such file", f"WinoBias is published at {PUBLISHED}")
    with open_source(path, streams) as handle:
        for number, raw in iter_lines(handle, path):
            try:
                yield number, raw.decode().strip()
            except UnicodeDecodeError:
                raise BadData("not UTF-8 text", "fetch the file anew", file=path, line=number) from None


def read_occupations(directory: str, streams: Streams) -> Occupations:
    """The two lists of a WinoBias directory."""
    names: list[str] = []
    for gender in ("male", "female"):
        path = os.path.join(directory, f"{gender}_occupations.txt")
        found = [text for _, text in _lines(path, streams)]
        if not found:
            raise BadData("names no occupation", f"WinoBias is published at {PUBLISHED}", file=path)
        names += found
    return Occupations(names)


def _sentence(path: str, line: int, text: str, occupations: Occupations) -> Sentence:
    def bad(what: str) -> BadData:
        return BadData(what, "a line is: 7 [The lawyer] hired the clerk because [she] ...", file=path, line=line)

    matched = _LINE.fullmatch(text)
    if matched is None:
        raise bad("expected a number and a sentence")
    spans = _SPAN.findall(matched[2])
    if len(spans) < 2:
        raise bad(f"expected two bracketed spans or more, found {len(spans)}")
    pronoun = spans[1].strip()
    if pronoun.lower() not in PRONOUNS:
        raise bad(f"the second span is no pronoun: {pronoun!r}")
    entity = occupations.named(spans[0])
    if entity is None:
        raise bad(f"the first span is none of the occupations: {spans[0]!r}")
    plain = " ".join(matched[2].replace("[", "").replace("]", "").split())
    found = occupations.within(plain)
    if len(found) < 2:
        raise bad("expected two occupations, found one")
    outside = _WORD.findall(_SPAN.sub(" ", matched[2]))
    marks = {
        "spans": len(spans) > 2,
        "article": not _ARTICLE.match(spans[0].strip()),
        "pronoun": any(word.lower() in PRONOUNS for word in outside),
        "occupations": len(found) != 2,
    }
    irregular = tuple(kind for kind, marked in marks.items() if marked)
    return Sentence(int(matched[1]), plain, pronoun, entity, found, irregular, path, line)


def _without_pronouns(text: str) -> str:
    return "".join(_ANY_PRONOUN.sub("@", text.lower()).split())


def read_pairs(
    directory: str, kind: str, split: str, occupations: Occupations, streams: Streams
) -> Iterator[dict[str, Sentence]]:
    """The pairs of one type and split as ``{"pro": ..., "anti": ...}``, in the order of the files.

    Both files are read whatever is wanted of them, so that the marks of a line never depend on the options.
    Raises: MissingInput, BadData (a malformed line, files that are not aligned).
    """
    paths = {side: os.path.join(directory, f"{side}_stereotyped_type{kind}.txt.{split}") for side in SIDES}
    for pro, anti in itertools.zip_longest(*(_lines(path, streams) for path in paths.values())):
        if pro is None or anti is None:
            short, long = ("pro", "anti") if pro is None else ("anti", "pro")
            raise BadData(f"has fewer lines than {os.path.basename(paths[long])}", "fetch both anew", file=paths[short])
        pair = {side: _sentence(paths[side], *line, occupations) for side, line in zip(SIDES, (pro, anti), strict=True)}
        one, two = pair.values()
        if one.number != two.number:
            what = f"line {two.number} stands where {os.path.basename(paths['pro'])} has line {one.number}"
            raise BadData(what, "line N of both files must be a pair", file=two.file, line=two.line)
        more = []
        if _without_pronouns(one.text) != _without_pronouns(two.text):
            more.append("pair")
        if one.entity != two.entity:
            more.append("entity")
        yield {side: replace(one, irregular=(*one.irregular, *more)) for side, one in pair.items()}


# -- items


def _meta(sentence: Sentence, split: str, **more: Any) -> Row:
    meta = {**more, "split": split, "line": sentence.number, "pronoun": sentence.pronoun, "entity": sentence.entity}
    return {**meta, "irregular": list(sentence.irregular)} if sentence.irregular else meta


def winobias(
    directory: str, streams: Streams, *, types: Sequence[str], splits: Sequence[str], sides: Sequence[str]
) -> Iterator[list[Row]]:
    """The items of each line: its pro-stereotyped and its anti-stereotyped sentence stand together.

    Raises: MissingInput, BadData.
    """
    occupations = read_occupations(directory, streams)
    for kind, split in itertools.product(types, splits):
        dataset = f"winobias/t{kind}/{split}"
        for pair in read_pairs(directory, kind, split, occupations, streams):
            yield [
                {
                    "id": f"{dataset}/{one.number}/{side}",
                    "question": one.question,
                    "choices": list(one.occupations),
                    "answer": one.answer,
                    "group": f"{dataset}/{one.number}",
                    "dataset": dataset,
                    "meta": _meta(one, split, side=side, type=int(kind)),
                }
                for side, one in pair.items()
                if side in sides
            ]


# -- the controlled grid


def _hash(*key: object) -> bytes:
    """A number that the key alone decides: no generator with a state, so nothing depends on what was drawn before."""
    return hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()


@dataclass(frozen=True, slots=True)
class Insertions:
    """What may be inserted around one sentence; all cells take from these, so that cells differ by nothing else.

    ``excluding`` (L0) and ``enabling`` (L1) speak of the two entities; ``distractors`` come in pairs, one with each
    pronoun, q1 takes the first pair and q2 as many as are wanted. ``fruits`` are those of the L sentence and of the
    distractors in turn.
    """

    excluding: str
    enabling: str
    distractors: tuple[str, ...]
    wrong: str
    strangers: tuple[str, ...]
    fruits: tuple[str, ...]


def insertions(sentence: Sentence, occupations: Occupations, seed: int, distractors: int) -> Insertions:
    """The sentences drawn for ``sentence``; a function of the seed and its text alone.

    Distractors speak of occupations that the sentence does not have, and no fruit comes twice: the answer can be found
    neither by who is named most nor by a shared word.
    Raises: BadData where the sentence has other than two occupations, so that no one entity is the wrong one, and for
    lists with too few others.
    """
    if len(sentence.occupations) != 2:
        raise BadData(
            f"{len(sentence.occupations)} occupations, so the wrong one is not known", "leave the line out",
            file=sentence.file, line=sentence.line,
        )  # fmt: skip
    (wrong,) = (name for name in sentence.occupations if name != sentence.entity)
    words = set(_WORD.findall(sentence.text.lower()))

    def drawn(what: str, pool: Sequence[str]) -> list[str]:
        return sorted(pool, key=lambda one: _hash(seed, sentence.text, what, one))

    def ate(who: str, fruit: str, pronoun: str) -> str:
        return f"The {who} ate one {fruit} because {pronoun} likes it."

    strangers = drawn("occupation", [name for name in occupations.names if name not in sentence.occupations])
    if len(strangers) < distractors:
        what = f"{len(strangers)} occupations beside those of the sentence, {distractors} are needed"
        raise BadData(what, "ask for fewer distractors", file=sentence.file, line=sentence.line)
    fruit, *fruits = drawn("fruit", [name for name in FRUITS if name not in words])[: distractors + 1]
    strangers = strangers[:distractors]
    pronouns: list[str] = []
    for pair in range(distractors // 2):
        first = ("he", "she")[_hash(seed, sentence.text, "pronoun", pair)[0] & 1]
        pronouns += [first, OTHER[first]]
    same = PRONOUNS[sentence.pronoun.lower()]
    return Insertions(
        excluding=ate(wrong, fruit, OTHER[same]),
        enabling=ate(sentence.entity, fruit, same),
        distractors=tuple(map(ate, strangers, fruits, pronouns)),
        wrong=wrong,
        strangers=tuple(strangers),
        fruits=(fruit, *fruits),
    )


def _context(sentence: Sentence, drawn: Insertions, cell: str, seed: int) -> tuple[str | None, int]:
    """The inserted sentences of a cell in seeded random order, and how many of them are distractors.

    Each sentence has a rank of its own, so that those which two cells share stand in the same order in both.
    """
    level = {"L0": [drawn.excluding], "L1": [drawn.enabling], "L2": []}[cell[:2]]
    around = drawn.distractors[: {"q0": 0, "q1": 2, "q2": len(drawn.distractors)}[cell[2:]]]
    # The L sentences share one key: else the place in the order would differ between L0 and L1.
    ranked = [(_hash(seed, sentence.text, "order", "L"), text) for text in level]
    ranked += [(_hash(seed, sentence.text, "order", place), text) for place, text in enumerate(around)]
    return " ".join(text for _, text in sorted(ranked)) or None, len(around)


def winocontrol(
    directory: str, streams: Streams, *, splits: Sequence[str], cells: Sequence[str], distractors: int, seed: int
) -> Iterator[list[Row]]:
    """The items of each anti-stereotyped type-1 sentence, one a cell.

    Raises: MissingInput, BadData.
    """
    occupations = read_occupations(directory, streams)
    for split in splits:
        for pair in read_pairs(directory, "1", split, occupations, streams):
            yield _grid(pair["anti"], occupations, split, cells, distractors, seed)


def _grid(
    sentence: Sentence, occupations: Occupations, split: str, cells: Sequence[str], distractors: int, seed: int
) -> list[Row]:
    drawn = insertions(sentence, occupations, seed, distractors)
    rows = []
    for cell in cells:
        context, n = _context(sentence, drawn, cell, seed)
        meta = {"cell": cell, "distractors": list(drawn.strangers[:n]), "other": drawn.wrong}
        rows.append(
            {
                "id": f"winocontrol/{cell}/{split}/{sentence.number}",
                "question": sentence.question,
                "choices": list(sentence.occupations),
                "answer": sentence.answer,
                "context": context,
                "group": f"winobias/t1/{split}/{sentence.number}",
                "dataset": f"winocontrol/{split}",
                "meta": _meta(sentence, split, **meta),
            }
        )
    return rows
