"""Unlearning objectives over a retain and a forget stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenBatch
from toolbox.training.token_rows import TokenRows
from toolbox.unlearning.satimp import forget_loss, token_weights


class SatImpObjective(TokenRows):
    """L = γ·L_u + α·L_r with SatImp token weights on the forget rows; two passes that add up.

    Args:
        rows: encoded ``forget`` and, unless α = 0, ``retain`` rows.
        beta1, beta2: exponents of the token weight.
        gamma, alpha: factors of the forget and the retain loss.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Encoded]],
        pad_id: int,
        *,
        beta1: float,
        beta2: float,
        gamma: float,
        alpha: float,
    ) -> None:
        super().__init__(rows, pad_id)
        self.beta1, self.beta2, self.gamma, self.alpha = beta1, beta2, gamma, alpha
        self.streams = ("retain", "forget") if "retain" in rows else ("forget",)

    def loss(
        self, model: nn.Module, stream: str, batch: TokenBatch, divisor: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nll, _ = model(batch.ids, batch.where, batch.labels)
        if stream == "retain":
            return self.alpha * nll.sum() / divisor, {"retain": nll.sum()}
        weights = token_weights(nll, self.beta1, self.beta2)
        loss = forget_loss(nll, weights, divisor)
        return self.gamma * loss, {"forget": loss * divisor, "weight": weights.sum()}

    def report(self, sums: dict[str, float], divisors: dict[str, float]) -> dict[str, float]:
        forget = sums["forget"] / divisors["forget"]
        found = {
            "loss": self.gamma * forget,
            "loss_forget": forget,
            "weight_mean": sums["weight"] / divisors["forget"],
            "tokens_forget": divisors["forget"],
        }
        if "retain" in divisors:
            found["loss_retain"] = sums["retain"] / divisors["retain"]
            found["tokens_retain"] = divisors["retain"]
            found["loss"] += self.alpha * found["loss_retain"]
        return found
