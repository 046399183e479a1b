"""longer-eval: how well scored rows or requests are ranked, as one JSON line; a table for people on stderr."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from toolbox.longer.lines import SCORED_ROWS, ScoredRequest
from toolbox.longer.metrics import Scores, bootstrap, by_length, measure
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Record, RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name

_SHOWN = ("auc", "logloss", "gauc", "avg_auc", "calibration")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, by name."""

    file: str
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    group: str = "user"
    bootstrap: int = 0
    compare: str | None = None
    seed: int = 0


@dataclass
class _Columns:
    """Rows as they are read; users and requests by number, -1 where a row has none."""

    label: array = field(default_factory=lambda: array("b"))
    score: array = field(default_factory=lambda: array("d"))
    user: array = field(default_factory=lambda: array("q"))
    request: array = field(default_factory=lambda: array("q"))
    length: array = field(default_factory=lambda: array("q"))
    users: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """One row or one request; BadData (65) with its place where a score or a label is none."""
        value = record.value
        if isinstance(value, ScoredRequest):
            labels, scores, request = value.labels, value.scores, f"request {record.index}"
            if len(labels) != len(scores):
                raise record.bad(f"{len(labels)} labels for {len(scores)} scores", "give one label a score")
        else:
            labels, scores = [value.label], [value.score]
            request = str(value.request) if value.request is not None else None
        for place, (label, score) in enumerate(zip(labels, scores, strict=True)):
            where = f"s[{place}]" if isinstance(value, ScoredRequest) else ""
            if label not in (0, 1):
                raise record.bad(f"{label} is neither 0 nor 1", None, f"$.label{where}")
            if not 0 <= score <= 1:
                raise record.bad(f"{score:g} is not within [0, 1]", "scores are probabilities", f"$.score{where}")
        user = -1 if value.user is None else self.users.setdefault(str(value.user), len(self.users))
        number = -1 if request is None else self.requests.setdefault(request, len(self.requests))
        for label, score in zip(labels, scores, strict=True):
            self.label.append(int(label))
            self.score.append(score)
            self.user.append(user)
            self.request.append(number)
            self.length.append(-1 if value.hist_len is None else value.hist_len)

    def scores(self, group: str, name: str) -> Scores:
        """The columns as arrays; groups and lengths only where all rows have them."""
        user, request, length = (np.frombuffer(one, np.int64) for one in (self.user, self.request, self.length))
        groups = {"user": user, "request": request}[group]
        if group == "request" and (groups < 0).any():
            raise BadData("--group request: a row has no `request`", "give it, or group by user", file=name)
        return Scores(
            np.frombuffer(self.label, np.int8),
            np.frombuffer(self.score, np.float64),
            None if (user < 0).any() else user,
            None if (groups < 0).any() else groups,
            None if (length < 0).any() else length,
        )


def run(options: Options, call: Invocation) -> None:
    """Read, judge, write."""
    if options.compare == "-" == options.file:
        raise UsageProblem("only one input can be stdin (-)", "name a file for the other")
    columns = _read(options, call, options.file, options.rejects)
    rows = columns.scores(options.group, display_name(options.file))
    other = None
    if options.compare is not None:
        theirs = _read(options, call, options.compare, None)
        _check_match(columns, theirs, options)
        other = theirs.scores(options.group, display_name(options.compare))
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, "n": len(rows)})
        writer.close()
        return
    found = judge(rows, options, other)
    writer.write(found)
    writer.close()
    _show(call, found)


def _read(options: Options, call: Invocation, name: str, rejects: str | None) -> _Columns:
    rejected: list[bytes] = []
    reader = RecordReader(
        SCORED_ROWS, renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    columns = _Columns()
    for record in _records(call, name, reader):
        try:
            columns.add(record)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
    if reader.skipped:
        call.reporter.warn(f"{display_name(name)}: {reader.skipped} bad rows left out")
    if rejects and not call.dry_run:
        write_rejects(rejects, rejected)
    if not columns.label:
        raise BadData("the input is empty", "give at least one scored row", file=display_name(name))
    return columns


def _records(call: Invocation, name: str, reader: RecordReader) -> Iterator[Record]:
    yield from read_records(name, call.streams, reader, "the scored rows")


def _check_match(mine: _Columns, theirs: _Columns, options: Options) -> None:
    name = display_name(str(options.compare))
    if len(mine.label) != len(theirs.label):
        raise BadData(f"{len(theirs.label)} rows, not {len(mine.label)}", "compare scores of the same rows", file=name)
    names, others = list(mine.users), list(theirs.users)
    for place, (a, b) in enumerate(zip(mine.label, theirs.label, strict=True)):
        one, two = mine.user[place], theirs.user[place]
        same_user = (one < 0) == (two < 0) and (one < 0 or names[one] == others[two])
        if a != b or not same_user:
            what = "label" if a != b else "user"
            raise BadData(f"row {place + 1} has another {what}", "compare scores of the same rows", file=name)


def judge(rows: Scores, options: Options, other: Scores | None = None) -> dict[str, Any]:
    """All figures of ``rows``, their intervals, and paired differences to ``other`` (these minus those)."""
    found = measure(rows)
    found["by_length"] = by_length(rows)
    found["notes"] = _notes(rows, found)
    theirs = measure(other) if other is not None else None
    if options.bootstrap:
        intervals, apart = bootstrap(rows, options.bootstrap, options.seed, other)
        found |= {f"{name}_ci": intervals.get(name) for name in _SHOWN}
        found["bootstrap"] = {"draws": options.bootstrap, "of": "users" if rows.user is not None else "rows"}
    if theirs is not None:
        compared: dict[str, Any] = {"other": {name: theirs[name] for name in _SHOWN}}
        for name in _SHOWN:
            one, two = found[name], theirs[name]
            compared[name] = None if one is None or two is None else one - two
            if options.bootstrap:
                compared[f"{name}_ci"] = apart.get(name)
        found["difference"] = compared
    return found


def _notes(rows: Scores, found: dict[str, Any]) -> list[str]:
    notes = []
    if found["auc"] is None:
        notes.append("one class only: no AUC")
    if rows.group is None:
        notes.append("rows without user: no GAUC, intervals over rows")
    return notes


def _show(call: Invocation, found: dict[str, Any]) -> None:
    if call.reporter.silent:
        return
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=f"{found['n']} rows, {found['positives']} positive", title_justify="left")
    for name in ("history", "n", "AUC", "LogLoss", "GAUC"):
        grid.add_column(name, justify="left" if name == "history" else "right")
    everything = {"name": "all", **found}
    for one in [everything, *({"name": _bucket(part), **part} for part in found["by_length"])]:
        grid.add_row(
            one["name"], str(one["n"]), *(_figure(one, name) for name in ("auc", "logloss", "gauc"))
        )  # fmt: skip
    call.reporter.show(grid)
    if "difference" in found:
        apart = found["difference"]
        text = ", ".join(f"{name} {_signed(apart, name)}" for name in ("auc", "logloss", "gauc"))
        call.reporter.note(f"these minus the other's: {text}")
    for note in found["notes"]:
        call.reporter.note(note)


def _bucket(part: dict[str, Any]) -> str:
    return f"[{part['from']}, {part['below'] if part['below'] is not None else '∞'})"


def _figure(one: dict[str, Any], name: str) -> str:
    if one[name] is None:
        return "–"
    interval = one.get(f"{name}_ci")
    return f"{one[name]:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _signed(apart: dict[str, Any], name: str) -> str:
    if apart[name] is None:
        return "–"
    interval = apart.get(f"{name}_ci")
    return f"{apart[name]:+.4f}" + (f" [{interval[0]:+.4f}, {interval[1]:+.4f}]" if interval else "")
