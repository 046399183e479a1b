"""The losses of LoFiT's two stages on the shared loop, and where LoReFT's prompts are in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolbox.coca.lofit import Lofit, how_many, top_heads
from toolbox.coca.loreft import Loreft
from toolbox.models.token_loss import TokenBatch
from toolbox.training.objective import Ground, Pass
from toolbox.training.token_rows import SupervisedObjective

if TYPE_CHECKING:
    from toolbox.training.windows import Window


class LofitObjective(SupervisedObjective):
    """Stage a for ``first`` steps, ``L = CE + λ Σ|A|``; then the heads are chosen and stage b has ``L = CE``.

    CE is the mean over the window's labelled tokens, λ multiplies the plain sum. Without scales there is stage b alone.

    Args:
        first: steps of stage a; 0 without it.
        wanted: K, or the share of all heads that it is (``3%``). ``l1``: λ.
    """

    def __init__(self, rows: Mapping[str, Sequence[Any]], pad_id: int, *, first: int, wanted: str, l1: float) -> None:
        super().__init__(rows, pad_id)
        self.first, self.wanted, self.l1 = first, wanted, l1
        self._lofit: Lofit | None = None
        self._chosen: dict[str, Tensor] = {}

    @property
    def lofit(self) -> Lofit:
        assert self._lofit is not None, "the loop has not started"
        return self._lofit

    def start(self, ground: Ground) -> None:
        self._lofit = ground.accelerator.unwrap_model(ground.model).beside
        if self._chosen:  # a run that goes on behind the choice
            self.lofit.start_offsets(self._chosen["heads"].tolist(), self._chosen["scores"])

    def before_window(self, window: Window) -> None:
        if self.lofit.stage == "a" and window.step > self.first:
            self.choose()

    def choose(self) -> None:
        """From stage a to stage b: the K heads whose scales have grown most."""
        scores = self.lofit.score().cpu()
        places = top_heads(scores, how_many(self.wanted, self.lofit.grid))
        self._chosen = {"heads": torch.tensor(places), "scores": scores}
        self.lofit.start_offsets(places, scores)

    def loss(self, model: nn.Module, one: Pass, batch: TokenBatch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().loss(model, one, batch, divisor)
        if self.lofit.stage == "a":
            # λ Σ|A| belongs to the step: each micro-batch of each rank takes its tokens' share.
            penalty = self.lofit.penalty() * (len(batch.labels) / divisor)
            loss = loss + self.l1 * penalty
            sums["penalty"] = penalty.detach()
        return loss, sums

    def after_pass(self, one: Pass, sums: Mapping[str, Any] | None) -> None:
        # An optimiser counts steps and decays what has a gradient, be it 0.
        idle = self.lofit.v if self.lofit.stage == "a" else self.lofit.A
        if idle is not None:
            idle.grad = None

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        found = super().report(sums, divisors)
        stage = {"stage": self.lofit.stage, "ce": found["loss"]}
        penalty = self.l1 * sums.get("penalty", 0.0)
        return {**found, "loss": found["loss"] + penalty, **stage, **({"penalty": penalty} if penalty else {})}

    def state(self) -> dict[str, Tensor]:
        return self._chosen

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._chosen = state


def tell_prompts(loreft: Loreft, head: nn.Module) -> None:
    """Before each pass of ``head`` (a ``TokenLoss``): prompts end where a row's first labelled token is predicted.

    Rows are padded on the right there, so that a prompt begins in column 0. With gradient checkpointing the backward
    pass computes layers again: the prompts stay told until the next pass.
    """

    def tell(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids, where = inputs[0], inputs[1]
        rows, width = ids.shape
        first = torch.full((rows,), width, dtype=torch.int64, device=ids.device)
        first.scatter_reduce_(0, where // width, where % width + 1, "amin")
        loreft.prompts(torch.zeros_like(first), first)

    head.register_forward_pre_hook(tell)
