"""A packed dataset as batches: requests with pointers into the events, cut, padded and gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from toolbox.longer.columns import read_columns
from toolbox.longer.dataset import Manifest, read_manifest
from toolbox.longer.ranker import Batch
from toolbox.training.windows import Window

_SORTED_TOGETHER = 50
"""Batches whose requests are sorted by length together: little padding, and still a fresh mixture every epoch."""


@dataclass(frozen=True)
class Shape:
    """How requests become tensors: longest history, merge factor, most candidates of a piece."""

    max_len: int
    merge: int
    max_candidates: int


class Dataset:
    """The columns of a directory that ``longer-prep`` made, mapped into memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest: Manifest = read_manifest(directory)
        self.events = read_columns(directory / "events.safetensors")

    def split(self, name: str, shape: Shape) -> Requests:
        """The requests of a split."""
        return Requests(self, read_columns(self.directory / f"samples.{name}.safetensors"), shape)


class Requests:
    """The pieces of a split: at most ``max_candidates`` samples of one request, with the request's history.

    ``first`` (pieces + 1,) points into the samples; ``length`` is the history's, cut at ``max_len``; ``whole`` uncut.
    """

    def __init__(self, dataset: Dataset, samples: dict[str, np.ndarray], shape: Shape) -> None:
        self.dataset, self.samples, self.shape = dataset, samples, shape
        self.first, self.request = _pieces(np.asarray(samples["request"]), shape.max_candidates)
        leading = self.first[:-1]
        self.user = np.asarray(samples["user"])[leading].astype(np.int64)
        self.ts = np.asarray(samples["ts"])[leading]
        self.end = np.asarray(samples["hist_end"])[leading]
        self.whole = self.end - np.asarray(dataset.events["user_ptr"])[self.user]
        self.length = np.minimum(self.whole, shape.max_len)
        self.candidates = np.diff(self.first)

    def __len__(self) -> int:
        return len(self.user)

    def batch(self, pieces: Sequence[int]) -> Batch:
        """Some pieces as tensors, padded on the left to a multiple of the merge factor."""
        manifest, events, samples = self.dataset.manifest, self.dataset.events, self.samples
        rows = np.asarray(pieces, np.int64)
        length, end = self.length[rows], self.end[rows]
        merge = self.shape.merge
        width = max(merge, -(-int(length.max()) // merge) * merge)
        places = end[:, None] + np.arange(-width, 0)
        valid = places >= (end - length)[:, None]
        places = np.where(valid, places, 0)
        empty = not len(events["ts"])
        take = {name: _taken(events[name], places, valid, empty) for name in events if name != "user_ptr"}
        delta = np.where(valid, self.ts[rows][:, None] - take.pop("ts"), 0)
        columns = int(self.candidates[rows].max())
        at = self.first[rows][:, None] + np.arange(columns)
        labelled = np.arange(columns) < self.candidates[rows][:, None]
        at = np.where(labelled, at, self.first[rows][:, None])
        user = np.where(self.user[rows] < manifest.train_users, self.user[rows] + 1, 0)
        leading = self.first[rows]
        return Batch(
            item=torch.from_numpy(take.pop("item")),
            sides={name.removeprefix("side."): torch.from_numpy(one) for name, one in take.items()},
            delta=torch.from_numpy(delta),
            valid=None if valid.all() else torch.from_numpy(valid),
            user=torch.from_numpy(user),
            candidate=torch.from_numpy(np.where(labelled, samples["item"][at], 0).astype(np.int64)),
            candidate_sides={
                name: torch.from_numpy(np.where(labelled, samples[f"side.{name}"][at], 0).astype(np.int64))
                for name in manifest.side
            },
            context={
                name: torch.from_numpy(np.asarray(samples[f"context.{name}"][leading], np.int64))
                for name in manifest.context
            },
            labels=torch.from_numpy(samples["label"][at].astype(np.float32)),
            labelled=torch.from_numpy(labelled),
        )


def _taken(column: np.ndarray, places: np.ndarray, valid: np.ndarray, empty: bool) -> np.ndarray:
    if empty:
        return np.zeros(places.shape, np.int64)
    return np.where(valid, column[places], 0).astype(np.int64)


def _pieces(request: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Borders of pieces of at most ``most`` samples of one request, and the request of each piece."""
    new = np.ones(len(request), bool)
    new[1:] = request[1:] != request[:-1]
    begin = np.flatnonzero(new)
    sizes = np.diff(np.append(begin, len(request)))
    within = np.arange(len(request)) - np.repeat(begin, sizes)
    cut = np.flatnonzero(within % most == 0)
    return np.append(cut, len(request)).astype(np.int64), request[cut]


class RequestPlan:
    """Which pieces each step takes: batches of like length, in an order that depends on the seed and the epoch alone.

    ``steps`` ends with the epochs, with ``max_labels`` (the step that reaches it is the last), or with ``max_steps``.
    ``order`` is ``shuffle``, or ``time`` for one pass after another in order of request times.
    """

    def __init__(
        self, requests: Requests, batch: int, epochs: float, seed: int, *, order: str = "shuffle",
        max_labels: int | None = None, max_steps: int | None = None,
    ) -> None:  # fmt: skip
        self.requests, self.batch, self.seed, self.order = requests, batch, seed, order
        self.per_epoch = -(-len(requests) // batch)
        self.steps = max(1, int(np.ceil(round(epochs * self.per_epoch, 9))))
        if max_steps is not None:
            self.steps = min(self.steps, max_steps)
        self._epoch, self._windows = -1, [np.zeros(0, np.int64)]
        if max_labels is not None:
            self.steps = self._steps_for(max_labels)

    def _steps_for(self, labels: int) -> int:
        count = 0
        for step in range(1, self.steps + 1):
            count += int(self.requests.candidates[self._rows(step)].sum())
            if count >= labels:
                return step
        return self.steps

    def _rows(self, step: int) -> np.ndarray:
        epoch, position = divmod(step - 1, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._of_epoch(epoch)
        return self._windows[position]

    def _of_epoch(self, epoch: int) -> list[np.ndarray]:
        count = len(self.requests)
        if self.order == "time":
            order = np.argsort(self.requests.ts, kind="stable")
            return [order[at : at + self.batch] for at in range(0, count, self.batch)]
        words = [self.seed & 0xFFFFFFFF, self.seed >> 32, epoch]
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
        order = generator.permutation(count)
        windows = []
        together = self.batch * _SORTED_TOGETHER
        for at in range(0, count, together):
            part = order[at : at + together]
            part = part[np.argsort(self.requests.length[part], kind="stable")]
            windows += [part[start : start + self.batch] for start in range(0, len(part), self.batch)]
        return [windows[place] for place in generator.permutation(len(windows))]

    def window(self, step: int) -> Window:
        """The window of ``step`` (1-based)."""
        epoch, position = divmod(step - 1, self.per_epoch)
        rows = {"train": tuple(self._rows(step).tolist())}
        return Window(step, epoch + 1, position == self.per_epoch - 1, rows)
