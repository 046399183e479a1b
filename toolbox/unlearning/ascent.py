"""Gradient ascent with SatImp's weights in all their variants, as one forget loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolbox.unlearning import satimp
from toolbox.unlearning.losses import ForgetBatch, ForgetLoss, Sums, negative_log_sigmoid

WTNPO_A = 1.5
"""a of ``wtnpo``, as in G-effect's code."""


@dataclass(frozen=True)
class Weighting:
    """A named token weight as a function of l, of the first model's l and of annotated importances."""

    name: str
    beta1: float = 5.0
    beta2: float = 0.1

    @property
    def reference(self) -> bool:
        return self.name in ("tnpo", "wtnpo")

    def __call__(self, nll: Tensor, reference: Tensor | None, key: Tensor | None) -> Tensor:
        match self.name:
            case "annotated":
                assert key is not None
                return key
            case "tnpo" | "wtnpo":
                assert reference is not None
                return satimp.tnpo_weights(nll, reference, a=WTNPO_A if self.name == "wtnpo" else 0.0)
            case _:
                return satimp.token_weights(nll, *satimp.exponents(self.name, self.beta1, self.beta2))


@dataclass
class Ascent(ForgetLoss):
    """−(1/N) Σ w_i l_i over tokens, or −(1/B) Σ w_b L(b) over rows b, with weights that no gradient flows through.

    ``granularity`` is what one weight covers, ``sampling`` which tokens of a row count, ``reduction`` what the sum is
    divided by. ``base`` ``npo`` puts the weighted sum over a row of l − l_ref into NPO's −(2/β) log σ(β ·).
    """

    weighting: Weighting
    granularity: Literal["token", "group", "instance", "batch"] = "token"
    group_size: int = 10
    instance_prob: Literal["sum", "mean"] = "sum"
    sampling: Literal["soft", "topk", "bottomk", "random"] = "soft"
    fraction: float = 0.5
    soft_p: float = 1.0
    reduction: Literal["token", "sequence", "sum"] = "token"
    base: Literal["ga", "npo"] = "ga"
    beta: float = 0.1
    histogram: bool = False
    window_weight: float = 1.0

    @property
    def of_rows(self) -> bool:
        """Whether a weight covers a whole row."""
        return self.granularity in ("instance", "batch")

    @property
    def counts(self) -> Literal["tokens", "later tokens", "rows", "one"]:  # type: ignore[override]
        if self.reduction == "sum":
            return "one"
        return "rows" if self.of_rows or self.base == "npo" or self.reduction == "sequence" else "tokens"

    @property
    def reference(self) -> bool:  # type: ignore[override]
        return self.base == "npo" or self.weighting.reference

    @property
    def measures(self) -> bool:  # type: ignore[override]
        return self.granularity == "batch"

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        weights = self._token_weights(values, batch)
        if self.of_rows or self.base == "npo":
            loss, shown = self._by_row(values, weights, batch)
        else:
            loss, shown = satimp.forget_loss(values, weights * self._per_token(values, batch), 1.0), weights
        sums = {"weight": shown.sum()}
        if self.histogram:
            from toolbox.unlearning.weight_figure import bin_counts

            sums["weights"] = bin_counts(values.detach(), shown[batch.tokens.row] if self.of_rows else shown)
        return loss, sums

    def measure(self, values: Tensor, batch: ForgetBatch) -> Sums:
        return {"instance_weight": self._row_weights(values, batch).sum()}

    def measured(self, sums: Mapping[str, float], rows: int) -> None:
        self.window_weight = sums["instance_weight"] / rows

    def _token_weights(self, nll: Tensor, batch: ForgetBatch) -> Tensor:
        """The weight of every token before anything is averaged over a row; 1 where weights belong to rows."""
        row = batch.tokens.row
        if self.of_rows:
            weights = torch.ones_like(nll)
        else:
            weights = self.weighting(nll.detach(), batch.reference, batch.key)
            if self.granularity == "group":
                weights = satimp.group_weights(weights, row, self.group_size)
        if self.sampling == "soft":
            return weights
        return weights * satimp.hard_sample(nll, row, self.sampling, self.fraction, self.soft_p, batch.draws)

    def _per_token(self, nll: Tensor, batch: ForgetBatch) -> Tensor:
        row = batch.tokens.row
        return satimp.reduction_factors(self.reduction, nll, row, satimp.row_lengths(row, batch.rows))

    def _row_weights(self, nll: Tensor, batch: ForgetBatch) -> Tensor:
        """(rows,) the weight at each row's probability."""
        row, reference = batch.tokens.row, batch.reference
        before = None if reference is None else satimp.row_nll(reference, row, batch.rows, self.instance_prob)
        return satimp.instance_weights(
            nll, row, batch.rows, self.instance_prob, lambda of_row: self.weighting(of_row, before, None)
        )

    def _by_row(self, values: Tensor, weights: Tensor, batch: ForgetBatch) -> tuple[Tensor, Tensor]:
        """The loss as a sum over rows, and the weights that it was made with."""
        row, rows = batch.tokens.row, batch.rows
        weighted = weights * self._per_token(values, batch)
        if self.base == "npo":
            assert batch.reference is not None
            margin = satimp.row_sums(weighted * (values - batch.reference), row, rows)
            of_row = 2 / self.beta * negative_log_sigmoid(self.beta * margin)
        else:
            of_row = -satimp.row_sums(weighted * values, row, rows)
        if not self.of_rows:
            return of_row.sum(), weights
        mine = self._row_weights(values, batch)
        if self.granularity == "batch":
            mine = torch.full_like(mine, self.window_weight)
        return -satimp.instance_loss(of_row, mine, 1.0), mine
