"""The first model's log-likelihoods of the forget rows, computed once before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolbox.models.chat import Encoded
from toolbox.models.score import score_rows
from toolbox.training.processes import gather_bytes

if TYPE_CHECKING:
    from toolbox.training.objective import Ground


def reference_nll(ground: Ground, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """l_ref of every labelled token of ``rows``, row after row, in fp32 on the CPU; the same on every rank.

    The model of the first step is its own reference, adapters included: they begin as nothing.
    """
    accelerator = ground.accelerator
    head = accelerator.unwrap_model(ground.model)
    # Sharded models must run in step: there every rank scores all rows.
    rank, world = (0, 1) if ground.sharded else (accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast():
        mine = score_rows(head, rows[rank::world], device=accelerator.device, pad_id=pad_id)
    payload = b"".join(one.nll.astype("<f4").tobytes() for one in mine)
    parts = [payload] if world == 1 else gather_bytes(accelerator, payload)
    counts = [row.n_labelled for row in rows]
    found: list[np.ndarray] = [np.empty(0, np.float32)] * len(rows)
    for number, part in enumerate(parts):
        edges = list(accumulate(counts[number::world]))[:-1]
        if counts[number::world]:  # fewer rows than ranks leave some without
            found[number::world] = np.split(np.frombuffer(part, "<f4"), edges)
    return torch.from_numpy(np.concatenate(found).copy())


class RowValues:
    """Numbers of the labelled tokens of many rows, laid end to end: ``of(row)`` gives one row's."""

    def __init__(self, rows: Sequence[Encoded], values: Tensor) -> None:
        ends = list(accumulate(row.n_labelled for row in rows))
        if ends[-1] != len(values):
            raise ValueError(f"{len(values)} values for {ends[-1]} labelled tokens")
        self.values = values
        self._edges = [0, *ends]

    def of(self, rows: Sequence[int]) -> Tensor:
        """The values of ``rows``, in that order."""
        return torch.cat([self.values[self._edges[row] : self._edges[row + 1]] for row in rows])
