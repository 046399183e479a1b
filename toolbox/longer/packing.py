"""Vocabularies from training, every column in terms of them, and the manifest: a dataset ready to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolbox.longer.columns import write_columns
from toolbox.longer.dataset import FORMAT, MANIFEST, Manifest, bucket, schema_hash
from toolbox.longer.events import Log, codes
from toolbox.longer.requests import Events, Negatives, Requests
from toolbox.longer.splits import SPLITS
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file, sha256_file

LABEL = "label"
"""The feature of past events that is their outcome."""


@dataclass(frozen=True)
class Features:
    """Names of features by their use."""

    side: list[str]
    event_side: list[str]
    context: list[str]

    @property
    def all(self) -> list[str]:
        return [*self.side, *self.event_side, *self.context]


@dataclass(frozen=True)
class Packed:
    """A dataset in memory, ready to be written."""

    manifest: Manifest
    events: dict[str, np.ndarray]
    samples: dict[str, dict[str, np.ndarray]]
    items: dict[str, np.ndarray]
    vocabularies: dict[str, list[str]]

    @property
    def summary(self) -> dict[str, Any]:
        """The manifest without hashes of inputs and files."""
        whole = msgspec.to_builtins(self.manifest)
        return {key: value for key, value in whole.items() if key not in ("files", "inputs")}

    def write(self, directory: Path) -> None:
        """Write everything below ``directory``, the manifest last."""
        (directory / "vocab").mkdir()
        for name, names in self.vocabularies.items():
            (directory / "vocab" / f"{name}.json").write_bytes(msgspec.json.encode(names))
        meta = {"schema": self.manifest.schema}
        write_columns(directory / "events.safetensors", self.events, meta)
        write_columns(directory / "items.safetensors", self.items, meta)
        for split, columns in self.samples.items():
            write_columns(directory / f"samples.{split}.safetensors", columns, meta)
        paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
        self.manifest.files = {str(path.relative_to(directory)): sha256_file(path) for path in paths}
        with atomic_file(directory / MANIFEST) as handle:
            handle.write(msgspec.json.format(msgspec.json.encode(self.manifest), indent=2) + b"\n")


class Packer:
    """Vocabularies from training, and every column in terms of them."""

    def __init__(
        self, options: Any, features: Features, split: str, inputs: Mapping[str, str], log: Log, asked: Log,
        events: Events, requests: Requests, part: np.ndarray, boundaries: list[int], negatives: Negatives | None,
    ) -> None:  # fmt: skip
        self.options, self.features, self.split, self.inputs = options, features, split, inputs
        self.log, self.asked, self.events = log, asked, events
        self.requests, self.part, self.boundaries, self.negatives = requests, part, boundaries, negatives
        self.vocabularies: dict[str, list[str]] = {}
        self.maps: dict[str, np.ndarray] = {}
        self.labels_known = bool(
            self.options.history_label and not self.options.negatives and (log.labels() >= 0).any()
        )

    def packed(self) -> Packed:
        trained = self._training_events()
        self._vocabularies(trained)
        user_at = self._users()
        samples = self._samples(user_at)
        for split in SPLITS:
            _check_labels(split, samples[split]["label"], self.split)
        events = self._events(user_at)
        return Packed(self._manifest(events, samples), events, samples, self._items(), self.vocabularies)

    # -- vocabularies -------------------------------------------------------------------------------------------------
    def _training_events(self) -> np.ndarray:
        """(rows,) which rows of the log a training run may know of."""
        if self.split == "temporal":
            return self.log.times() < self.boundaries[0]
        users = np.zeros(len(self.log.user.names), bool)
        users[self.requests.user[self.part == 0]] = True
        return users[codes(self.log.user)]

    def _vocabularies(self, trained: np.ndarray) -> None:
        options = self.options
        names = list(self.log.item.names)
        counts = np.bincount(codes(self.log.item)[trained], minlength=len(names))
        if self.asked is not self.log:
            first = np.zeros(len(self.asked), bool)
            train = np.repeat(self.part == 0, np.diff(self.requests.first))
            first[self.requests.rows[train]] = True
            counts += np.bincount(codes(self.asked.item)[first], minlength=len(names))
        if options.hash_buckets:
            self.maps["item"] = np.asarray([bucket(name, options.hash_buckets) for name in names], np.int32)
            self.vocabularies["item"] = []
        else:
            kept = np.flatnonzero(counts >= options.min_count)
            self.maps["item"] = np.ones(len(names), np.int32)
            self.maps["item"][kept] = 2 + np.arange(len(kept), dtype=np.int32)
            self.vocabularies["item"] = [names[place] for place in kept]
        places = np.flatnonzero(trained)
        asked_places = self.requests.rows[np.repeat(self.part == 0, np.diff(self.requests.first))]
        for name in self.features.all:
            if name == LABEL:
                continue
            known: dict[str, None] = {}  # in order of appearance
            for one, rows in ((self.log, places), (self.asked, asked_places)):
                if name in one.features:
                    names_here = list(one.features[name].names)
                    seen = np.unique(codes(one.features[name])[rows])
                    known |= dict.fromkeys(names_here[code] for code in seen if code >= 0)
            self.vocabularies[name] = list(known)

    def _rows(self, log: Log, name: str, places: np.ndarray) -> np.ndarray:
        """Table rows of a feature at some rows of a log."""
        column = log.features[name]
        known = {value: 2 + row for row, value in enumerate(self.vocabularies[name])}
        table = np.asarray([*(known.get(value, 1) for value in column.names), 1], np.int32)
        return table[codes(column)[places]]

    def _users(self) -> np.ndarray:
        """The new number of each user: those with training samples first."""
        names = list(self.log.user.names)
        trained = np.zeros(len(names), bool)
        trained[self.requests.user[self.part == 0]] = True
        order = np.argsort(~trained, kind="stable")
        self.train_users = int(trained.sum())
        self.user_order = order
        self.vocabularies["user"] = [names[place] for place in order]
        at = np.empty(len(names), np.int64)
        at[order] = np.arange(len(names))
        return at

    # -- columns ------------------------------------------------------------------------------------------------------
    def _events(self, user_at: np.ndarray) -> dict[str, np.ndarray]:
        ptr, order = self.events.user_ptr, self.user_order
        sizes = np.diff(ptr)[order]
        new_ptr = np.append(0, np.cumsum(sizes)).astype(np.int64)
        places = np.repeat(ptr[:-1][order] - new_ptr[:-1], sizes) + np.arange(len(self.events.user))
        rows = self.events.order[places]
        columns = {
            "user_ptr": new_ptr,
            "item": self.maps["item"][self.events.item[places]].astype(np.int32),
            "ts": self.events.ts[places].astype(np.int64),
        }
        for name in (*self.features.side, *(n for n in self.features.event_side if n != LABEL)):
            columns[f"side.{name}"] = self._rows(self.log, name, rows).astype(np.int32)
        if self._event_side()[-1:] == [LABEL]:
            columns[f"side.{LABEL}"] = (self.log.labels()[rows] + 2).astype(np.int32)  # none, 0, 1 as 1, 2, 3
        return columns

    def _event_side(self) -> list[str]:
        plain = [name for name in self.features.event_side if name != LABEL]
        return [*plain, LABEL] if self.labels_known or LABEL in self.features.event_side else plain

    def _samples(self, user_at: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        requests, asked = self.requests, self.asked
        owner = np.arange(len(requests.rows))
        source, label = requests.rows, np.ones(len(owner), np.uint8)
        if self.negatives is None:
            label = asked.labels()[requests.rows].astype(np.uint8)
        else:  # each positive is followed by its negatives
            order = np.argsort(np.concatenate((owner, self.negatives.sample)), kind="stable")
            source = np.concatenate((source, self.negatives.event))[order]
            label = np.concatenate((label, np.zeros(len(self.negatives.sample), np.uint8)))[order]
            owner = np.concatenate((owner, self.negatives.sample))[order]
        request = requests.of_sample()[owner]
        # Pointers into the events by their new order of users.
        start = self.events.user_ptr[requests.user]
        new_start = np.append(0, np.cumsum(np.diff(self.events.user_ptr)[self.user_order]))[user_at[requests.user]]
        columns = {
            "user": user_at[requests.user].astype(np.int32)[request],
            "item": self.maps["item"][codes(asked.item)[source]].astype(np.int32),
            "ts": requests.ts.astype(np.int64)[request],
            "hist_end": (requests.hist_end - start + new_start).astype(np.int64)[request],
            "label": label,
        }
        for name in self.features.side:
            columns[f"side.{name}"] = self._rows(asked, name, source).astype(np.int32)
        leading = requests.rows[requests.first[:-1]]
        for name in self.features.context:  # of the request, so that a negative has its positive's
            columns[f"context.{name}"] = self._rows(asked, name, leading).astype(np.int32)[request]
        found = {}
        for number, split in enumerate(SPLITS):
            mine = self.part[request] == number
            found[split] = {name: column[mine] for name, column in columns.items()}
            found[split]["request"] = np.unique(request[mine], return_inverse=True)[1].astype(np.int32)
        return found

    def _items(self) -> dict[str, np.ndarray]:
        """Features of each item of the vocabulary as last seen in the whole log; 1 where it has none."""
        rows = np.argsort(self.log.times(), kind="stable")
        item = self.maps["item"][codes(self.log.item)[rows]]
        columns = {}
        for name in self.features.side:
            columns[f"side.{name}"] = np.ones(self._sizes()["item"], np.int32)
            columns[f"side.{name}"][item] = self._rows(self.log, name, rows)  # the last one wins
        return columns

    # -- the manifest -------------------------------------------------------------------------------------------------
    def _sizes(self) -> dict[str, int]:
        """Rows of each table."""
        sizes = {"item": 2 + (self.options.hash_buckets or len(self.vocabularies["item"]))}
        sizes["user"] = 1 + self.train_users
        sizes |= {name: 2 + len(self.vocabularies[name]) for name in self.features.side}
        sizes |= {f"context.{name}": 2 + len(self.vocabularies[name]) for name in self.features.context}
        for name in self._event_side():
            sizes[f"event.{name}"] = 4 if name == LABEL else 2 + len(self.vocabularies[name])
        return sizes

    def _manifest(self, events: dict[str, np.ndarray], samples: dict[str, dict[str, np.ndarray]]) -> Manifest:
        options, lengths = self.options, self.requests.hist_end - self.events.user_ptr[self.requests.user]
        users = [set(np.unique(samples[split]["user"]).tolist()) for split in SPLITS]
        sizes = self._sizes()
        schema = schema_hash({
            "format": FORMAT, "sizes": sizes, "side": self.features.side, "event_side": self._event_side(),
            "context": self.features.context, "ts_scale": options.ts_scale, "hash_buckets": options.hash_buckets,
            "vocabularies": {name: schema_hash(names) for name, names in self.vocabularies.items()},
        })  # fmt: skip
        times = self.log.times()
        return Manifest(
            format=FORMAT,
            schema=schema,
            users=len(self.vocabularies["user"]),
            train_users=self.train_users,
            items=len(self.log.item.names),
            events=len(self.log),
            samples={split: len(samples[split]["user"]) for split in SPLITS},
            requests={split: int(samples[split]["request"].max()) + 1 for split in SPLITS},
            positive_rate={split: float(samples[split]["label"].mean()) for split in SPLITS},
            out_of_vocabulary={split: _out_of_vocabulary(samples[split]) for split in SPLITS},
            side=self.features.side,
            event_side=self._event_side(),
            context=self.features.context,
            vocabulary=sizes,
            hash_buckets=options.hash_buckets,
            split=options.split,
            boundaries=self.boundaries,
            user_disjoint=users[2].isdisjoint(users[0]),
            request_window=options.request_window,
            negatives=options.negatives,
            time_range=[int(times.min()), int(times.max())] if len(times) else [],
            ts_scale=options.ts_scale,
            history_length={
                "mean": round(float(lengths.mean()), 1),
                **{f"p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90, 99)},
                "max": float(lengths.max()),
            },
            inputs=dict(self.inputs),
            files={},
        )


def _out_of_vocabulary(samples: dict[str, np.ndarray]) -> dict[str, float]:
    """Shares among positives and negatives: where they differ much, being unknown tells the label."""
    unknown, label = samples["item"] == 1, samples["label"] == 1
    return {
        "positives": round(float(unknown[label].mean()), 4) if label.any() else 0.0,
        "negatives": round(float(unknown[~label].mean()), 4) if (~label).any() else 0.0,
    }


def _check_labels(name: str, labels: np.ndarray, split: str) -> None:
    if not len(labels):
        raise BadData(f"the {name} split is empty", f"choose another --split (now {split}), or give more data")
    if labels.min() == labels.max():
        only = "positives" if labels[0] else "negatives"
        raise BadData(f"the {name} split has only {only}", "give negatives too, or draw them with --negatives 4")
