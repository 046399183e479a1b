"""Which rows each optimiser step sees, planned globally, and how a window's rows are shared out.

A window is cut from the seeded row order before anything is sharded. So neither the number of processes nor the
micro-batch size nor a resumed run changes what a step is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of one optimiser step: ``rows[stream]`` are global row numbers. ``step`` counts from 1."""

    step: int
    epoch: int
    ends_epoch: bool
    rows: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stream:
    """One source of rows.

    The leading stream has ``batch`` rows a step and defines the epoch (its last window may be smaller, never
    dropped). A following stream supplies ``batch`` rows a step, or (0) as many as the leading one, from its own
    sequence of shuffled passes, so that every row is seen before any is seen twice.
    """

    name: str
    count: int
    batch: int


@lru_cache(maxsize=8)
def _permutation(count: int, seed: int, epoch: int, salt: str) -> np.ndarray:
    words = [seed & 0xFFFFFFFF, seed >> 32, epoch, *salt.encode()]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).permutation(count)


_NEAR = 50
"""Windows whose rows are sorted by length together."""


def _grouped(order: np.ndarray, lengths: np.ndarray, batch: int, seed: int, epoch: int) -> np.ndarray:
    """``order`` with rows of like length in one window: sorted inside blocks of 50 windows, then the whole windows in
    a new order, so that the run does not go from long rows to short ones. The last window keeps its place."""
    blocks = [order[start : start + _NEAR * batch] for start in range(0, len(order), _NEAR * batch)]
    near = np.concatenate([block[np.argsort(-lengths[block], kind="stable")] for block in blocks])
    whole = len(near) // batch
    places = _permutation(whole, seed, epoch, "windows") if whole else np.zeros(0, dtype=np.int64)
    return np.concatenate([near[: whole * batch].reshape(whole, batch)[places].ravel(), near[whole * batch :]])


class Plan:
    """All windows of a run, computed on demand.

    Args:
        leading: the stream whose rows make the epoch.
        following: further streams, drawn from beside it.
        epochs: passes over the leading stream; may be fractional (the steps are rounded up).
        seed: of the row order.
        lengths: of the leading stream's rows; given, rows of like length share windows.
    """

    def __init__(
        self, leading: Stream, following: Sequence[Stream], epochs: float, seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.leading, self.following, self.seed = leading, tuple(following), seed
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        self._held: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))
        self.per_epoch = math.ceil(leading.count / leading.batch)
        self.steps = max(1, math.ceil(round(epochs * self.per_epoch, 9)))

    def window(self, step: int) -> Window:
        """The window of ``step`` (1-based)."""
        epoch, position = divmod(step - 1, self.per_epoch)
        first = position * self.leading.batch
        order = self._order(epoch)
        leading = tuple(int(row) for row in order[first : first + self.leading.batch])
        rows = {self.leading.name: leading}
        for stream in self.following:
            start = (step - 1) * stream.batch if stream.batch else epoch * self.leading.count + first
            rows[stream.name] = self._cyclic(stream, start, stream.batch or len(leading))
        return Window(step, epoch + 1, position == self.per_epoch - 1, rows)

    def _order(self, epoch: int) -> np.ndarray:
        """The leading stream's rows in the order of an epoch (from 0)."""
        if self._lengths is None:
            return _permutation(self.leading.count, self.seed, epoch, self.leading.name)
        if self._held[0] != epoch:
            order = _permutation(self.leading.count, self.seed, epoch, self.leading.name)
            self._held = epoch, _grouped(order, self._lengths, self.leading.batch, self.seed, epoch)
        return self._held[1]

    def _cyclic(self, stream: Stream, start: int, size: int) -> tuple[int, ...]:
        rows = []
        for place in range(start, start + size):
            lap, position = divmod(place, stream.count)
            rows.append(int(_permutation(stream.count, self.seed, lap, stream.name)[position]))
        return tuple(rows)


def share_out(
    rows: Sequence[int], lengths: Sequence[int], processes: int, max_rows: int, max_tokens: int | None = None
) -> list[list[list[int]]]:
    """Micro-batches of a window for each process: ``[process][micro-batch][row]``.

    Rows of like length go together (least padding), a micro-batch holds at most ``max_rows`` rows and, where given,
    ``max_tokens`` padded tokens (but at least one row). Every process gets the same number of micro-batches, the last
    ones possibly empty, because sharded models must run in step.
    """
    batches: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        longest = lengths[batches[-1][0]] if batches else 0
        if (
            batches
            and len(batches[-1]) < max_rows
            and (max_tokens is None or longest * (len(batches[-1]) + 1) <= max_tokens)
        ):
            batches[-1].append(row)
        else:
            batches.append([row])
    _split_for(batches, processes)
    rounds = math.ceil(len(batches) / processes)
    batches += [[] for _ in range(rounds * processes - len(batches))]
    return [batches[rank::processes] for rank in range(processes)]


def _split_for(batches: list[list[int]], processes: int) -> None:
    """Halve the largest micro-batches until every process has work, as far as there are rows."""
    while len(batches) < processes:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        if len(batches[largest]) < 2:
            return
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
