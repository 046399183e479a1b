"""Objectives over token rows: the part that every language-model objective shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenBatch, collate
from toolbox.training.objective import Objective, Pass


class TokenRows(Objective):
    """Streams of encoded rows; the divisor of a pass counts labelled tokens."""

    def __init__(self, rows: Mapping[str, Sequence[Encoded]], pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id
        self._labelled = {stream: [row.n_labelled for row in encoded] for stream, encoded in rows.items()}

    def length(self, stream: str, row: int) -> int:
        return len(self.rows[stream][row].ids)

    def units(self, one: Pass, row: int) -> float:
        return self._labelled[one.stream][row]

    def batch(self, one: Pass, rows: Sequence[int]) -> TokenBatch:
        return collate([self.rows[one.stream][row] for row in rows], self.pad_id)


class SupervisedObjective(TokenRows):
    """Supervised fine-tuning: ``L = (1/N) Σ_i l_i`` over the N labelled tokens of the window."""

    def loss(self, model: nn.Module, one: Pass, batch: TokenBatch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        nll, _ = model(batch.ids, batch.where, batch.labels)
        total = nll.sum()
        return total / divisor, {"nll": total.detach()}

    def report(self, sums: dict[str, float], divisors: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nll"] / divisors["train"], "tokens": divisors["train"]}
