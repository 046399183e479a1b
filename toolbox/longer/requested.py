"""Requests as a model takes them: names become rows of its tables, histories come from the record or from a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolbox.longer.columns import read_columns
from toolbox.longer.data import Dataset, Shape
from toolbox.longer.dataset import Manifest, bucket, read_vocabulary
from toolbox.longer.events import feature_value, identifier, label_value, whole_time
from toolbox.longer.packing import LABEL
from toolbox.longer.ranker import Batch, Config
from toolbox.shell.records import Record

UNKNOWN = 1


@dataclass(frozen=True)
class Past:
    """A user's events before the request, oldest first, the newest ``max_len`` of ``whole``: table rows and times."""

    item: np.ndarray
    sides: Mapping[str, np.ndarray]
    ts: np.ndarray
    whole: int
    late: int = 0
    """Events of the record at or after the request, left out."""

    def digest(self) -> str:
        """sha256 of everything that a cache depends on but the model and the time."""
        hasher = hashlib.sha256()
        for column in (self.item, self.ts, *(self.sides[name] for name in sorted(self.sides))):
            hasher.update(np.ascontiguousarray(column, np.int64).tobytes())
        return hasher.hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request: what goes out again (``row``), and what the model takes."""

    row: dict[str, Any]
    user: str
    user_row: int
    ts: int
    past: Past
    candidate: np.ndarray
    candidate_sides: Mapping[str, np.ndarray]
    context: Mapping[str, int]
    names: Sequence[Any]


class Reader:
    """Turns request records into ``Asked``; ``data`` supplies histories that records do not bring."""

    def __init__(self, model: Path, config: Config, manifest: Manifest, data: Path | None) -> None:
        self.config, self.manifest = config, manifest
        self.items = {name: 2 + row for row, name in enumerate(read_vocabulary(model, "item"))}
        self.users = {name: place for place, name in enumerate(read_vocabulary(model, "user"))}
        features = {*config.side, *config.event_side, *config.context} - {LABEL}
        self.features = {
            name: {value: 2 + row for row, value in enumerate(read_vocabulary(model, name))} for name in features
        }
        self.latest = read_columns(model / "items.safetensors") if config.side else {}
        self.dataset = Dataset(data) if data is not None else None

    # -- records ------------------------------------------------------------------------------------------------------
    def __call__(self, record: Record) -> Asked:
        """BadData (65) with the record's place for what does not fit."""
        value = record.value
        try:
            user = identifier(value.user, "user")
            ts = whole_time(value.ts, self.manifest.ts_scale)
            if user is None:
                raise ValueError("`user` is empty")
            rows, sides = self._candidates(value.candidates)
            if value.labels is not None:
                if len(value.labels) != len(value.candidates):
                    raise ValueError(f"{len(value.labels)} labels for {len(value.candidates)} candidates")
                for label in value.labels:
                    label_value(label)
            past = self._given(value.history, ts) if value.history is not None else self.stored(user, ts)
            context = {
                name: self.features[name].get(feature_value(record.data.get(name), name) or "", UNKNOWN)
                for name in self.config.context
            }
        except ValueError as problem:
            what, _, advice = str(problem).partition("; ")
            raise record.bad(what, advice or None) from None
        row = {key: one for key, one in record.data.items() if key != "history"}
        return Asked(row, user, self._user_row(user), ts, past, rows, sides, context, value.candidates)

    def _user_row(self, user: str) -> int:
        place = self.users.get(user, self.manifest.train_users)
        return place + 1 if place < self.manifest.train_users else 0

    def item_row(self, name: str) -> int:
        """The table row of an item."""
        if self.manifest.hash_buckets:
            return bucket(name, self.manifest.hash_buckets)
        return self.items.get(name, UNKNOWN)

    def _candidates(self, candidates: Sequence[Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        given = [one if isinstance(one, dict) else {"item": one} for one in candidates]
        rows = np.asarray([self.item_row(_item(one)) for one in given], np.int64)
        sides = {}
        for name in self.config.side:
            known = self.features[name]
            column = np.asarray(self.latest[f"side.{name}"][rows], np.int64) if len(rows) else rows
            for place, one in enumerate(given):
                if name in one:
                    column[place] = known.get(feature_value(one[name], name) or "", UNKNOWN)
            sides[name] = column
        return rows, sides

    def _given(self, history: Sequence[Mapping[str, Any]], ts: int) -> Past:
        times = np.asarray([whole_time(one.get("ts"), self.manifest.ts_scale) for one in history], np.int64)
        kept = np.flatnonzero(times < ts)
        order = kept[np.argsort(times[kept], kind="stable")]
        cut = order[max(0, len(order) - self.config.max_len) :]
        picked = [history[place] for place in cut]
        item = np.asarray([self.item_row(_item(one)) for one in picked], np.int64)
        sides: dict[str, np.ndarray] = {}
        for name in (*self.config.side, *self.config.event_side):
            if name == LABEL:
                values = [label_value(one.get(LABEL)) + 2 for one in picked]
            else:
                known = self.features[name]
                values = [known.get(feature_value(one.get(name), name) or "", UNKNOWN) for one in picked]
            sides[name] = np.asarray(values, np.int64)
            if name in self.config.side and len(picked):  # what the event does not say, the item does
                silent = np.asarray([one.get(name) is None for one in picked])
                sides[name][silent] = self.latest[f"side.{name}"][item[silent]]
        return Past(item, sides, times[cut], len(order), len(history) - len(kept))

    # -- the dataset --------------------------------------------------------------------------------------------------
    def stored(self, user: str, ts: int) -> Past:
        """The events of a user strictly before ``ts``; none without a dataset, or of a user who is not in it."""
        place = self.users.get(user) if self.dataset is not None else None
        if self.dataset is None or place is None:
            nothing = np.zeros(0, np.int64)
            return Past(nothing, dict.fromkeys((*self.config.side, *self.config.event_side), nothing), nothing, 0)
        events = self.dataset.events
        begin, end = (int(one) for one in events["user_ptr"][place : place + 2])
        return self._slice(begin, begin + int(np.searchsorted(events["ts"][begin:end], ts, side="left")))

    def _slice(self, begin: int, end: int) -> Past:
        assert self.dataset is not None
        events = self.dataset.events
        part = slice(max(begin, end - self.config.max_len), end)
        sides = {
            name: np.asarray(events[f"side.{name}"][part], np.int64)
            for name in (*self.config.side, *self.config.event_side)
        }
        return Past(np.asarray(events["item"][part], np.int64), sides, np.asarray(events["ts"][part]), end - begin)

    def of_split(self, split: str) -> Iterator[Asked]:
        """The requests of a split of the dataset, with labels. Items out of vocabulary have lost their names: null."""
        assert self.dataset is not None
        requests = self.dataset.split(split, Shape(self.config.max_len, 1, 1 << 40))
        samples, ptr = requests.samples, self.dataset.events["user_ptr"]
        users, items = list(self.users), ["", None, *self.items]
        for number in range(len(requests)):
            part = slice(int(requests.first[number]), int(requests.first[number + 1]))
            rows = np.asarray(samples["item"][part], np.int64)
            user = int(requests.user[number])
            names = [items[row] if not self.manifest.hash_buckets else None for row in rows]
            row = {
                "user": users[user],
                "ts": int(requests.ts[number]),
                "request": number,
                "candidates": names,
                "labels": np.asarray(samples["label"][part]).tolist(),
            }
            yield Asked(
                row, users[user], user + 1 if user < self.manifest.train_users else 0, int(requests.ts[number]),
                self._slice(int(ptr[user]), int(requests.end[number])), rows,
                {name: np.asarray(samples[f"side.{name}"][part], np.int64) for name in self.config.side},
                {name: int(samples[f"context.{name}"][part][0]) for name in self.config.context}, names,
            )  # fmt: skip


def _item(one: Mapping[str, Any]) -> str:
    name = identifier(one.get("item"), "item")
    if name is None:
        raise ValueError("a candidate or event without `item`")
    return name


def as_batch(asked: Sequence[Asked], times: Sequence[int], merge: int) -> Batch:
    """Histories and candidates of some requests as one batch; ``times``: the time each is scored at."""
    width = max(merge, *(-(-len(one.past.item) // merge) * merge for one in asked))
    columns = max(1, *(len(one.candidate) for one in asked))

    def left(values: Sequence[np.ndarray]) -> torch.Tensor:
        out = np.zeros((len(asked), width), np.int64)
        for row, value in enumerate(values):
            out[row, width - len(value) :] = value
        return torch.from_numpy(out)

    def right(values: Sequence[np.ndarray]) -> torch.Tensor:
        out = np.zeros((len(asked), columns), np.int64)
        for row, value in enumerate(values):
            out[row, : len(value)] = value
        return torch.from_numpy(out)

    lengths = torch.tensor([len(one.past.item) for one in asked])
    valid = torch.arange(width) >= width - lengths[:, None]
    return Batch(
        item=left([one.past.item for one in asked]),
        sides={name: left([one.past.sides[name] for one in asked]) for name in asked[0].past.sides},
        delta=left([t - one.past.ts for one, t in zip(asked, times, strict=True)]),
        valid=None if bool(valid.all()) else valid,
        user=torch.tensor([one.user_row for one in asked]),
        candidate=right([one.candidate for one in asked]),
        candidate_sides={
            name: right([one.candidate_sides[name] for one in asked]) for name in asked[0].candidate_sides
        },
        context={name: torch.tensor([one.context[name] for one in asked]) for name in asked[0].context},
    )
