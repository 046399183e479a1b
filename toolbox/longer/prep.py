"""longer-prep: a log of who touched what and when becomes a packed dataset whose histories cannot leak."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

from toolbox.longer.dataset import verify
from toolbox.longer.events import (
    GROUPLENS,
    RECBOLE,
    Coded,
    Log,
    Reading,
    codes,
    read_items,
    read_log,
    read_map,
)
from toolbox.longer.packing import LABEL, Features, Packed, Packer
from toolbox.longer.requests import Requests, draw_negatives, group_requests, sort_events
from toolbox.longer.splits import Split, by_time, by_user, parse_split, valid_users
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_file, sha256_file
from toolbox.shell.records import write_rejects
from toolbox.shell.streams import JsonlWriter, display_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, by name."""

    file: str
    out: str | None
    verify: str | None = None
    overwrite: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    format: str = "auto"
    samples: str | None = None
    items: str | None = None
    side: tuple[str, ...] = ()
    event_side: tuple[str, ...] = ()
    context: tuple[str, ...] = ()
    history_label: bool = True
    split: str = "temporal:.8,.1,.1"
    request_window: int | None = None
    negatives: int = 0
    neg: str = "popularity"
    min_count: int = 2
    hash_buckets: int | None = None
    ts_scale: float = 1.0
    seed: int = 0


def run(options: Options, call: Invocation) -> None:
    """Do what the command line says."""
    if options.verify is not None:
        _verify(options, call)
        return
    if options.out is None:
        raise UsageProblem("Missing option '--out'.", "a directory to write, or --verify DIR to check one")
    split = parse_split(options.split)
    if call.dry_run:
        packed = _Prep(options, call, split).pack()
        _say(call, {"event": "plan", **packed.summary})
        return
    with OutputDirectory(options.out, overwrite=options.overwrite, resumable=False) as out:
        began = time.time()
        packed = _Prep(options, call, split).pack()
        packed.write(out.partial)
        record = {
            "command": call.command,
            "settings": call.settings,
            "versions": {name: version(name) for name in ("toolbox-ten", "numpy")},
            "wall_seconds": round(time.time() - began, 1),
        }
        with atomic_file(out.partial / RUN_FILE) as handle:
            handle.write(json.dumps(record, indent=2).encode() + b"\n")
        out.commit()
    _say(call, {"event": "done", **packed.summary})


def _say(call: Invocation, row: dict[str, Any]) -> None:
    writer = JsonlWriter(call.streams)
    writer.write(row)
    writer.close()


def _verify(options: Options, call: Invocation) -> None:
    problems = verify(Path(str(options.verify)))
    _say(call, {"event": "verify", "ok": not problems, "problems": problems})
    for problem in problems:
        call.reporter.warn(problem)
    if problems:
        raise click.exceptions.Exit(1)


class _Prep:
    """From options to a packed dataset."""

    def __init__(self, options: Options, call: Invocation, split: Split) -> None:
        self.options, self.call, self.split = options, call, split
        self.features = Features(*(_names(getattr(options, name)) for name in ("side", "event_side", "context")))
        twice = {name for name in self.features.all if self.features.all.count(name) > 1}
        if twice:
            raise UsageProblem(
                f"`{min(twice)}` is named twice among --side, --event-side and --context", "name it once"
            )
        reserved = {"user", "item", "ts", "request"} & set(self.features.all)
        if reserved:
            raise UsageProblem(f"`{min(reserved)}` is no feature", "it has a role of its own")
        if LABEL in self.features.side:
            raise UsageProblem("--side label: the outcome is not known for a candidate", "it is added to past events")
        self.inputs: dict[str, str] = {}

    def pack(self) -> Packed:
        """Read, group, split, draw, map to vocabularies."""
        log, asked = self._read()
        events = sort_events(codes(log.user), codes(log.item), log.times(), len(log.user.names))
        labels = asked.labels()
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            hint = "--map 'label=rating>=4' makes labels of a number, --negatives N draws them for a log of positives"
            raise BadData("no event has a label", hint, file=display_name(self.options.samples or self.options.file))
        requests = group_requests(
            events, rows, codes(asked.user)[rows], asked.times()[rows], codes(asked.request)[rows],
            self.options.request_window,
        )  # fmt: skip
        part, boundaries = self._split(asked, requests)
        negatives = None
        if self.options.negatives:
            negatives = draw_negatives(
                codes(log.item), log.times(), requests, codes(asked.item)[requests.rows].astype(np.int64),
                self.options.negatives, self.options.neg, self.options.seed,
            )  # fmt: skip
            if negatives.short:
                self.call.reporter.warn(
                    f"{negatives.short} positives got fewer than {self.options.negatives} negatives"
                )
        return Packer(
            self.options, self.features, self.split.kind, self.inputs, log, asked, events, requests, part, boundaries,
            negatives,
        ).packed()  # fmt: skip

    # -- reading ------------------------------------------------------------------------------------------------------
    def _read(self) -> tuple[Log, Log]:
        """The log of events and that of samples, which are one without ``--samples``."""
        options, rejected = self.options, []
        renames, comparisons = read_map(options.map_fields)
        joined = self._item_features()
        fold = [self.split.column] if self.split.kind == "column" else []

        def reading(*names: str) -> Reading:
            wanted = [name for name in dict.fromkeys(names) if name != LABEL and name not in joined]
            return Reading(
                renames, comparisons, wanted, options.ts_scale, options.on_bad, lambda raw, _: rejected.append(raw),
                options.format,
            )  # fmt: skip

        if options.file.startswith(RECBOLE):
            self.call.reporter.note(GROUPLENS)
        side, past, context = self.features.side, self.features.event_side, self.features.context
        asked_for = [*side, *context, *fold]
        first = [*side, *past] if options.samples is not None else [*side, *past, *context, *fold]
        log = read_log(options.file, self.call.streams, reading(*first))
        asked = log
        if options.samples is not None:
            if options.negatives:
                raise UsageProblem("--negatives with --samples: the samples have labels of their own", "leave one out")
            asked = read_log(options.samples, self.call.streams, reading(*asked_for), users=log.user, items=log.item)
            self.inputs["samples"] = asked.sha256
        if not len(log) and options.samples is None:
            skipped = f" ({log.skipped} bad rows skipped)" if log.skipped else ""
            raise BadData(f"the log is empty{skipped}", "give at least one event", file=display_name(options.file))
        self.inputs["log"] = log.sha256
        for one, name in ((log, options.file), *([(asked, options.samples)] if asked is not log else [])):
            if one.skipped:
                self.call.reporter.warn(f"{display_name(str(name))}: {one.skipped} bad rows left out")
        if options.rejects and not self.call.dry_run:
            write_rejects(options.rejects, rejected)
        self._join(log, asked, joined)
        self._positives(log)
        self._count_oddities(log)
        return log, asked

    def _item_features(self) -> dict[str, dict[str, str]]:
        """``{feature: {item: value}}`` of the features that ``--items`` has."""
        if self.options.items is None:
            return {}
        side = self.features.side
        found = read_items(self.options.items, self.call.streams, side)
        columns = {name: {item: row[name] for item, row in found.items() if name in row} for name in side}
        self.inputs["items"] = sha256_file(self.options.items) if self.options.items != "-" else "stdin"
        return {name: column for name, column in columns.items() if column}

    def _join(self, log: Log, asked: Log, joined: dict[str, dict[str, str]]) -> None:
        for one in [log] if asked is log else [log, asked]:
            names = list(one.item.names)
            for feature, values in joined.items():
                column = one.features[feature] = Coded()
                table = [column.names.setdefault(values[n], len(column.names)) if n in values else -1 for n in names]
                column.codes.frombytes(np.asarray(table, np.int32)[codes(one.item)].tobytes())

    def _positives(self, log: Log) -> None:
        if not self.options.negatives:
            return
        if (log.labels() >= 0).any():
            raise UsageProblem(
                "--negatives is for a log of positives, this one has labels", "leave --negatives out, or map them away"
            )
        log.label = type(log.label)("b", b"\1" * len(log))

    def _count_oddities(self, log: Log) -> None:
        user, item, ts = codes(log.user), codes(log.item), log.times()
        if len(log) < 2:
            return
        unsorted = int((np.diff(ts[np.argsort(user, kind="stable")]) < 0)[np.diff(np.sort(user)) == 0].sum())
        order = np.lexsort((ts, item, user))
        same = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0) & (np.diff(ts[order]) == 0)
        if unsorted or same.any():
            self.call.reporter.note(
                f"{unsorted} events out of time order were sorted; {int(same.sum())} repeat another's user, item and "
                "time and were kept"
            )

    # -- splitting ----------------------------------------------------------------------------------------------------
    def _split(self, asked: Log, requests: Requests) -> tuple[np.ndarray, list[int]]:
        """The split of each request, and the boundaries in time where there are any."""
        split, seed = self.split, self.options.seed
        if split.kind == "temporal":
            return by_time(requests.ts, np.diff(requests.first), split.shares)
        names = list(asked.user.names)
        if split.kind == "user":
            return by_user(names, split.folds, seed)[requests.user], []
        column = asked.features[split.column]
        if split.value not in column.names:
            shown = ", ".join(sorted(column.names)[:8])
            raise BadData(
                f"no row has {split.column}={split.value}; found {shown}", "check --split",
                file=display_name(self.options.samples or self.options.file),
            )  # fmt: skip
        test = codes(column)[requests.rows[requests.first[:-1]]] == column.names[split.value]
        valid = valid_users(names, seed)[requests.user]
        return np.where(test, 2, valid).astype(np.int8), []


def _names(values: Sequence[str]) -> list[str]:
    return [name for value in values for name in value.split(",") if name]
