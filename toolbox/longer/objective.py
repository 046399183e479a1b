"""What longer-train learns: binary cross-entropy over all labelled candidates, each history read once a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.longer.data import Requests
from toolbox.longer.ranker import Batch
from toolbox.training.objective import Objective, Pass
from toolbox.training.windows import Window

AUTO_LENGTH = 1 << 15
"""History events of one backward pass, in the unit of ``cost``: some hundreds of MiB of activations at d = 32."""


def cost(arch: str, length: int, candidates: int) -> int:
    """What a piece weighs in memory, in events of LONGER; DIN has a hidden layer for each (candidate, event)."""
    if arch == "din":
        return max(length, length * candidates // 8)
    if arch in ("hstu", "transformer"):
        return length * max(1, length // 512) + candidates
    return length + candidates


class ClickObjective(Objective):
    """Mean BCE over the labels of the global window; a row of the loop is a piece of a request."""

    def __init__(self, requests: Requests, arch: str, tables: Any = None, push_rate: Any = None) -> None:
        """``tables``: TorchRec's, whose shards are states of this process; ``push_rate`` hands them their rate."""
        self.requests, self.tables, self.push_rate = requests, tables, push_rate
        pairs = zip(requests.length.tolist(), requests.candidates.tolist(), strict=True)
        self._cost = [1 + cost(arch, length, candidates) for length, candidates in pairs]

    def before_window(self, window: Window) -> None:
        """Their optimiser runs inside backward: it must know its rate before."""
        if self.push_rate is not None:
            self.push_rate()

    def state(self) -> dict[str, Tensor]:
        """The shards of this process."""
        return {} if self.tables is None else self.tables.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        if self.tables is not None:
            self.tables.load_state(state)

    def length(self, stream: str, row: int) -> int:
        """Cost of a piece."""
        return self._cost[row]

    def units(self, one: Pass, row: int) -> float:
        """Its labels."""
        return float(self.requests.candidates[row])

    def batch(self, one: Pass, rows: Sequence[int]) -> Batch:
        """The pieces as tensors."""
        return self.requests.batch(rows)

    def loss(self, model: nn.Module, one: Pass, batch: Batch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """-(1/N) Σ y ln p + (1 - y) ln(1 - p), from logits in fp32."""
        assert batch.labels is not None
        assert batch.labelled is not None
        logits = model(batch).float()
        losses = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        total = losses.masked_fill(~batch.labelled, 0.0).sum()
        tokens = batch.valid.sum() if batch.valid is not None else torch.tensor(float(batch.item.numel()))
        return total / divisor, {"bce": total.detach(), "tokens": tokens.detach()}

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        """Mean loss, labels and history events of the step."""
        return {
            "loss": sums["bce"] / divisors["train"],
            "labels": int(divisors["train"]),
            "tokens": int(sums["tokens"]),
        }


class EarlyStop:
    """``--early-stop``: ends a run whose validation figure has not improved for ``patience`` evaluations.

    Has the face of a stop condition (``met``); the best parameters are kept to be handed out. Its state goes with
    the objective's, so that a resumed run stops where the uninterrupted one does.
    """

    needs_evaluation = True

    def __init__(self, figure: str, patience: int, model: nn.Module) -> None:
        self.figure, self.patience, self.model = figure, patience, model
        self.text = f"no better {figure} for {patience} evaluations"
        self.best, self.waited, self.step = float("-inf"), 0, -1
        self.kept: dict[str, Tensor] = {}

    def met(self, values: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Whether to stop, given the figures of an evaluation."""
        value = values.get(f"valid_{self.figure}")
        if value is None:
            return False
        value = -value if self.figure == "logloss" else value
        if value > self.best:
            self.best, self.waited, self.step = value, 0, int(values["step"])
            self.kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        else:
            self.waited += 1
        return self.waited >= self.patience

    def restore(self) -> None:
        """Give the model its best parameters back."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.kept:
                    parameter.copy_(self.kept[name])

    def state(self) -> dict[str, Tensor]:
        """Best figure, evaluations waited, its step, and the parameters."""
        mark = torch.tensor([self.best, self.waited, self.step], dtype=torch.float64)
        return {"early": mark, **{f"best {name}": value for name, value in self.kept.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        best, waited, step = state["early"].tolist()
        self.best, self.waited, self.step = best, int(waited), int(step)
        self.kept = {name.removeprefix("best "): value for name, value in state.items() if name.startswith("best ")}


class StoppingObjective(ClickObjective):
    """The objective that carries an early stop's state."""

    def __init__(self, requests: Requests, arch: str, early: EarlyStop) -> None:
        super().__init__(requests, arch)
        self.early = early

    def state(self) -> dict[str, Tensor]:
        """The early stop's."""
        return self.early.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Hand it back."""
        self.early.load_state(state)
