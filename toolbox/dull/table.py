"""The table of posteriors: one row a training sample, kept in half precision, updated wherever the sample was seen.

N · C · 2 bytes; above 256 classes a row keeps its 16 largest entries, and what is left is spread over the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolbox.dull.labels import moving_average
from toolbox.training.processes import gather_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

DENSE = 256
KEPT = 16


class Posteriors:
    """q of every training row, starting uniform; beside it the arg-max of its last prediction (-1: none yet)."""

    def __init__(self, rows: int, classes: int) -> None:
        self.rows, self.classes = rows, classes
        self.kept = classes if classes <= DENSE else KEPT
        self.values = np.full((rows, self.kept), 1 / classes, dtype=np.float16)
        self.places = None if classes <= DENSE else np.tile(np.arange(KEPT, dtype=np.int32), (rows, 1))
        self.last = np.full(rows, -1, dtype=np.int32)
        self._seen: list[NDArray[np.int64]] = []

    def get(self, rows: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        """q of these rows as float64 (n, C), each adding up to 1."""
        values = self.values[rows].astype(np.float64)
        if self.places is not None:
            rest = np.maximum(1 - values.sum(1, keepdims=True), 0) / (self.classes - KEPT)
            whole = np.repeat(rest, self.classes, axis=1)
            np.put_along_axis(whole, self.places[rows].astype(np.int64), values, axis=1)
            values = whole
        return values / np.maximum(values.sum(1, keepdims=True), 1e-12)

    def update(self, rows: NDArray[np.int64], predictions: NDArray[np.float64], beta: float) -> None:
        """q ← β q + (1 − β) p for rows that this process has seen; each at most once between two exchanges."""
        self._put(rows, moving_average(self.get(rows), predictions, beta))
        self.last[rows] = predictions.argmax(1)
        self._seen.append(rows)

    def _put(self, rows: NDArray[np.int64], q: NDArray[np.float64]) -> None:
        if self.places is None:
            self.values[rows] = q
            return
        places = np.argpartition(-q, KEPT - 1, axis=1)[:, :KEPT]
        self.places[rows] = places
        self.values[rows] = np.take_along_axis(q, places, axis=1)

    def exchange(self, accelerator: Accelerator) -> None:
        """Give every process what the others have updated since the last exchange."""
        if accelerator.num_processes > 1:
            seen = np.concatenate([np.zeros(0, np.int64), *self._seen])
            parts = [seen.tobytes(), self.values[seen].tobytes(), self.last[seen].tobytes()]
            if self.places is not None:
                parts.append(self.places[seen].tobytes())
            for payload in gather_bytes(accelerator, b"".join(parts)):
                self._take(payload)
        self._seen = []

    def _take(self, payload: bytes) -> None:
        width = 8 + 2 * self.kept + 4 + (4 * self.kept if self.places is not None else 0)
        count = len(payload) // width
        cuts = np.cumsum([0, 8 * count, 2 * self.kept * count, 4 * count])
        rows = np.frombuffer(payload[: cuts[1]], np.int64)
        self.values[rows] = np.frombuffer(payload[cuts[1] : cuts[2]], np.float16).reshape(count, self.kept)
        self.last[rows] = np.frombuffer(payload[cuts[2] : cuts[3]], np.int32)
        if self.places is not None:
            self.places[rows] = np.frombuffer(payload[cuts[3] :], np.int32).reshape(count, self.kept)

    def state(self) -> dict[str, Tensor]:
        """For a saved state. The same on every process only behind an exchange."""
        found = {"q": torch.from_numpy(self.values.copy()), "last": torch.from_numpy(self.last.copy())}
        if self.places is not None:
            found["q_places"] = torch.from_numpy(self.places.copy())
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        self.values[:], self.last[:] = state["q"].numpy(), state["last"].numpy()
        if self.places is not None:
            self.places[:] = state["q_places"].numpy()
