"""lot-data: question sets as items, one JSON line each.

Rows come in units that belong together: the two sentences of a WinoBias line, the cells of a WinoControl sentence, a
single question elsewhere. ``--limit`` takes whole units.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolbox.lot.bbq import BBQ_SHAPES, bbq
from toolbox.lot.bbq import KINDS as BBQ_KINDS
from toolbox.lot.bbq import PUBLISHED as BBQ_PUBLISHED
from toolbox.lot.data import alice, example
from toolbox.lot.mcq import SHAPE_NAMES, SHAPES, mcq, shapes_for
from toolbox.lot.winobias import CELLS, SIDES, SPLITS, TYPES, winobias, winocontrol
from toolbox.lot.winobias import KINDS as WINOBIAS_KINDS
from toolbox.lot.winobias import PUBLISHED as WINOBIAS_PUBLISHED
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.items import Item
from toolbox.shell.lists import comma_list
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, Streams

Row = dict[str, Any]
Unit = list[Row]

INPUT_SHAPES = (*(shape.struct for shape in SHAPES.values()), Item, *BBQ_SHAPES)
UNITS = {"winobias": "line", "winocontrol": "sentence"}
"""What the rows of a unit are made of, where they are several."""

KINDS: Mapping[str, Mapping[str, str]] = {"winobias": WINOBIAS_KINDS, "winocontrol": WINOBIAS_KINDS, "bbq": BBQ_KINDS}
"""The marks in ``meta.irregular`` that a set gives."""

_ONE_SIDED = 0.9
_ENOUGH = 20
"""Of so many items more than this share under one label: who always says that label seems to know the answers."""


class Question(Item, kw_only=True):
    """What leaves: an item with an id of its own and the set it is from."""

    id: str
    dataset: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """lot-data's options; None where a set's own default is meant."""

    set: str = "example"
    paths: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0
    types: str | None = None
    splits: str | None = None
    sides: str | None = None
    cells: str | None = None
    distractors: int | None = None
    largest: int | None = None
    name: str | None = None
    shape: str | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None


_READING = ("map_fields", "on_bad", "rejects")
USES: Mapping[str, tuple[str, ...]] = {
    "winobias": ("types", "splits", "sides"),
    "winocontrol": ("splits", "cells", "distractors"),
    "bbq": _READING,
    "alice": ("largest",),
    "mcq": ("name", "shape", *_READING),
    "example": (),
}
"""The sets, and the options that each has a use for beside --limit and --seed."""

_WRITTEN = {"types": "type", "splits": "split", "sides": "side", "largest": "max", "map_fields": "map"}
_PATHS = {
    "winobias": (1, 1, "the folder of its files", WINOBIAS_PUBLISHED),
    "winocontrol": (1, 1, "the folder of WinoBias' files", WINOBIAS_PUBLISHED),
    "bbq": (1, None, "its files, or their folder", BBQ_PUBLISHED),
    "alice": (0, 0, "no file", None),
    "mcq": (0, 1, "one file", None),
    "example": (0, 0, "no file", None),
}  # fmt: skip
_DEFAULTS = Options()


def check(options: Options) -> None:
    """Refuse an option that the set has no use for, and too few or too many paths.

    Raises: UsageProblem.
    """
    for name in dict.fromkeys(name for names in USES.values() for name in names):
        if name not in USES[options.set] and getattr(options, name) != getattr(_DEFAULTS, name):
            written = _WRITTEN.get(name, name).replace("_", "-")
            users = " and ".join(one for one, names in USES.items() if name in names)
            raise UsageProblem(f"--{written} has no use in {options.set}", f"it is an option of {users}")
    fewest, most, what, published = _PATHS[options.set]
    if len(options.paths) < fewest:
        raise UsageProblem(f"{options.set} needs {what}", f"name it; published at {published}")
    if most is not None and len(options.paths) > most:
        advice = "several files are several calls" if options.set == "mcq" else None
        raise UsageProblem(f"{options.set} takes {what}, {len(options.paths)} given", advice)
    if options.distractors is not None and options.distractors % 2:
        raise UsageProblem(f"--distractors {options.distractors} is odd", "they come in pairs, one with each pronoun")


def chosen(option: str, text: str | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The members of a comma list, in the order of ``known``; ``default`` where none is given.

    Raises: UsageProblem for an unknown name, one that is there twice, or an empty list.
    """
    if text is None:
        return tuple(default)
    names = comma_list(option, text, known)
    return tuple(name for name in known if name in names)


def units(options: Options, streams: Streams, reader: RecordReader) -> Iterator[Unit]:
    """The set's items, unit by unit; nothing is read before the first one is asked for.

    Raises: UsageProblem at once; MissingInput, BadData on the way.
    """
    match options.set:
        case "winobias":
            return winobias(
                options.paths[0],
                streams,
                types=chosen("type", options.types, TYPES, ["1"]),
                splits=chosen("split", options.splits, SPLITS, ["test"]),
                sides=chosen("side", options.sides, SIDES, SIDES),
            )
        case "winocontrol":
            return winocontrol(
                options.paths[0],
                streams,
                splits=chosen("split", options.splits, SPLITS, ["test"]),
                cells=chosen("cells", options.cells, CELLS, CELLS),
                distractors=4 if options.distractors is None else options.distractors,
                seed=options.seed,
            )
        case "bbq":
            return bbq(options.paths, streams, reader)
        case "alice":
            return alice(10 if options.largest is None else options.largest)
        case "mcq":
            return mcq(options.paths[0] if options.paths else "-", streams, reader, options.name)
        case _:
            return example(streams)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


@dataclass(slots=True)
class Tally:
    """What went out of ``set``, for the words at the end; an irregular unit counts once a kind and side."""

    set: str
    rows: int = 0
    units: int = 0
    same_texts: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    irregular: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, unit: Unit) -> None:
        """Count a unit that goes out."""
        self.rows += len(unit)
        self.units += 1
        for row in unit:
            texts = row.get("choices") or ()
            self.same_texts += len(set(texts)) < len(texts)
            if texts and (label := row.get("answer")):
                self.answers[label] += 1
        if self.set in KINDS:
            metas = [row["meta"] for row in unit]
            found = {(kind, meta.get("side", "")) for meta in metas for kind in meta.get("irregular", ())}
            for kind, side in sorted(found):
                self.irregular.setdefault(kind, Counter())[side] += 1

    def warnings(self) -> Iterator[str]:
        """What an honest measurement has to deal with."""
        if self.same_texts:
            yield f"{self.same_texts} of {self.rows} items have choices of equal text"
        for label, times in self.answers.most_common(1):
            n = self.answers.total()
            if n >= _ENOUGH and times > _ONE_SIDED * n:
                yield f"the right answer is {label} in {times} of {n} items: lot-prompt --shuffle-choices moves it"

    def notes(self) -> Iterator[str]:
        """The rows, and each kind of irregular ones."""
        unit = UNITS.get(self.set)
        yield _counted(self.rows, "row") + (f" of {_counted(self.units, unit)}" if unit else "")
        for kind, what in KINDS.get(self.set, {}).items():
            if kind not in self.irregular:
                continue
            sides = self.irregular[kind]
            each = ", ".join(f"{sides[side]} {side}" for side in SIDES if sides[side])
            counted = _counted(sides.total(), "row" if each or not unit else unit)
            yield f"irregular, kept: {kind}, {counted}{f' ({each})' if each else ''}: {what}"


def run(options: Options, call: Invocation) -> None:
    """Write the set's items to stdout and what is odd about them to stderr."""
    check(options)
    rejected: list[bytes] = []
    reader = RecordReader(
        BBQ_SHAPES if options.set == "bbq" else shapes_for(options.shape or SHAPE_NAMES[0]),
        renames=parse_map(options.map_fields),
        on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw) if options.rejects is not None else None,
    )
    writer = JsonlWriter(call.streams)
    tally = Tally(options.set)
    for unit in itertools.islice(units(options, call.streams, reader), options.limit):
        tally.add(unit)
        if not call.dry_run:
            for row in unit:
                writer.write(row)
    if call.dry_run:
        writer.write({"event": "plan", "command": call.command, "rows": tally.rows, "skipped": reader.skipped,
                      "irregular": {kind: sides.total() for kind, sides in sorted(tally.irregular.items())},
                      "settings": call.settings})  # fmt: skip
    writer.close()
    for text in tally.notes():
        call.reporter.note(text)
    for text in tally.warnings():
        call.reporter.warn(text)
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")
    if options.rejects is not None and not call.dry_run:
        write_rejects(options.rejects, rejected)
