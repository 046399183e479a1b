"""Which classes belong to which task: equal runs of a class order, or a field of the rows. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolbox.classify.manifest import Sample, sorted_labels
from toolbox.shell.errors import BadData, MissingInput, UsageProblem


@dataclass(frozen=True)
class Split:
    """The labels of each task; ``field`` names the rows' field that tells them, None for runs of a class order."""

    tasks: tuple[tuple[str, ...], ...]
    field: str | None = None

    def of(self, task: int, source: str) -> tuple[str, ...]:
        """The labels of one task. Raises: UsageProblem (2) for a number that is none, BadData (65) for one class."""
        if not 0 <= task < len(self.tasks):
            raise UsageProblem(f"--task {task}: there are {len(self.tasks)} tasks, counted from 0", None)
        labels = self.tasks[task]
        if len(labels) < 2:
            what = f"task {task} has one class only, {labels[0]!r}"
            raise BadData(what, "two or more are needed to tell apart: ask for fewer tasks", file=source)
        return labels


def split_classes(order: Sequence[str], count: int, source: str) -> Split:
    """``count`` runs of ``order``; where they cannot be equal the first ones are one larger.

    Raises: BadData (65) for fewer classes than tasks.
    """
    if len(order) < count:
        raise BadData(f"{len(order)} classes cannot make {count} tasks", "lower --tasks", file=source)
    least, more = divmod(len(order), count)
    ends = [least * (place + 1) + min(place + 1, more) for place in range(count)]
    return Split(tuple(tuple(order[start:end]) for start, end in zip([0, *ends], ends, strict=False)))


def split_by_field(samples: Iterable[Sample], name: str, source: str) -> Split:
    """A task for each value of the field, in order: whole numbers by value, other values by letter.

    Raises: BadData (65) for a row without the field, or a class in two tasks.
    """
    found: dict[str, str] = {}
    for sample in samples:
        value: Any = sample.data.get(name)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise BadData(f"{sample.place}: no task in its field {name!r}", "a text or a whole number is expected")
        before = found.setdefault(sample.label, str(value))
        if before != str(value):
            what = f"{sample.place}: class {sample.label!r} is in task {value} and in task {before}"
            raise BadData(what, "a class belongs to one task")
    if not found:
        raise BadData("holds no images", None, file=source)
    tasks: dict[str, list[str]] = {}
    for label in sorted_labels(found):
        tasks.setdefault(found[label], []).append(label)
    return Split(tuple(tuple(tasks[value]) for value in sorted_labels(tasks)), name)


def class_order(labels: Sequence[str], how: str, seed: int) -> tuple[str, ...]:
    """``labels`` as they are (``sorted``), drawn by the seed (``seed``), or as a file lists them, one a line.

    Raises: MissingInput (66), BadData (65) where the file does not name every class once.
    """
    if how == "sorted":
        return tuple(labels)
    if how == "seed":
        return tuple(random.Random(seed).sample(list(labels), len(labels)))
    if not Path(how).is_file():
        raise MissingInput(f"--class-order {how}: no such file", "sorted, seed, or a file with one class a line")
    try:
        named = [line.strip() for line in Path(how).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise BadData("not UTF-8 text", "one class a line", file=how) from None
    twice = sorted({name for name in named if named.count(name) > 1}) if len(set(named)) < len(named) else []
    if twice:
        raise BadData(f"class {twice[0]!r} stands there twice", "name every class once", file=how)
    if lacking := [label for label in labels if label not in set(named)]:
        raise BadData(f"class {lacking[0]!r} is not in it", "name every class, one a line", file=how)
    return tuple(name for name in named if name in set(labels))


def check_new(labels: Sequence[str], learned: Sequence[Sequence[str]], source: str) -> None:
    """Raise BadData (65) where a model has learned any of these classes already."""
    known = {label: number for number, task in enumerate(learned) for label in task}
    if met := [label for label in labels if label in known]:
        named = ", ".join(map(repr, met[:5])) + (f" and {len(met) - 5} more" if len(met) > 5 else "")
        what = f"has learned {named} already, as its task {known[met[0]]}"
        raise BadData(what, "name another --task, or an earlier model", file=source)
