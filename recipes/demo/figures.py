"""The figures of a step, read from the JSON that its commands wrote, and put into words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.demo.step import Figure
from toolbox.plot_style import short
from toolbox.shell.errors import BadData, MissingInput, clean, without_escapes
from toolbox.stats import Interval, wilson

MISSING = object()


@dataclass(frozen=True)
class Shown:
    """A figure in words: ``.93 [.86, .97]`` and what it is a mean over, where that is known."""

    label: str
    text: str
    n: str = ""
    number: bool = True


def read_figure(figure: Figure, folder: Path) -> Shown:
    """Find and word one figure of the step whose folder this is.

    Raises: MissingInput (66) where the file is not there; BadData (65) where it does not hold the value.
    """
    path = folder / figure.file
    record = _record(path, figure.where)
    value = _place(record, figure.value)
    if value is MISSING:
        raise BadData(
            f"{path}: has no {figure.value}", "the step's file asks for a figure that the command did not write"
        )
    n = _place(record, figure.n) if figure.n else None
    if isinstance(value, Mapping) and "estimate" in value:
        n = value.get("n") if n is None else n
        value, bounds = value["estimate"], (value.get("low"), value.get("high"))
    elif figure.of is not None:
        n = _place(record, figure.of)
        if not (isinstance(value, int) and isinstance(n, int) and 0 <= value <= n):
            raise BadData(f"{path}: {figure.value} of {figure.of} is {value!r} of {n!r}", "counts were expected")
        share = wilson(value, n)
        value, bounds = share.estimate, (share.low, share.high)
    else:
        bounds = _place(record, figure.interval) if figure.interval else None
    words = _words(value, bounds, path)
    return Shown(figure.label, words, "" if n in (None, MISSING) else f"{n:,}", not isinstance(value, str))


def _record(path: Path, where: Mapping[str, Any]) -> Any:
    """The last object of a file that has these values."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise MissingInput(f"{path}: is not there", "the step did not write it") from None
    try:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        try:
            records = [json.loads(text)]
        except json.JSONDecodeError as error:
            raise BadData(f"{path}: is not JSON: {error.msg}", "the step wrote something else") from None
    found = [one for one in records if all(_place(one, key) == value for key, value in where.items())]
    if not found:
        wanted = ", ".join(f"{key} {value}" for key, value in where.items())
        raise BadData(
            f"{path}: no line with {wanted}" if wanted else f"{path}: is empty", "the step wrote something else"
        )
    return found[-1]


def _place(record: Any, path: str) -> Any:
    """The value at ``a.b.-1``, or MISSING. A key that holds dots itself may be written as it stands."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    head, _, rest = path.partition(".")
    if isinstance(record, Mapping):
        if head not in record:
            return MISSING
        inner = record[head]
    elif isinstance(record, list) and head.lstrip("-").isdigit():
        try:
            inner = record[int(head)]
        except IndexError:
            return MISSING
    else:
        return MISSING
    return _place(inner, rest) if rest else inner


def _words(value: Any, bounds: Any, path: Path) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not determined"
    if isinstance(value, str):
        return clean(without_escapes(value)).strip()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise BadData(f"{path}: {value!r} is no figure", "the step's file asks for something else")
    if bounds not in (None, MISSING):
        low, high = (math.nan if bound is None else float(bound) for bound in bounds)
        return str(Interval(float(value), low, high, 0))
    return f"{value:,}" if isinstance(value, int) else short(value)
