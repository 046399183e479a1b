"""Unlearning objectives over a forget and a retain stream: γ · forget loss + α · retain loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolbox.models.chat import Encoded
from toolbox.models.token_loss import HiddenState, TokenBatch, collate
from toolbox.training.objective import Ground, Pass
from toolbox.training.token_rows import TokenRows
from toolbox.unlearning.losses import ForgetBatch, ForgetLoss, RetainLoss, retain_sum, retain_want
from toolbox.unlearning.reference import RowValues, reference_nll
from toolbox.unlearning.satimp import draw_seed
from toolbox.unlearning.weight_figure import histogram

if TYPE_CHECKING:
    from toolbox.training.windows import Window


@dataclass(frozen=True)
class Retention:
    """One retain loss: its kind, its factor, and over which ``positions`` a KL is taken.

    ``labelled``: the mean over labelled positions. ``all``: the sum over every position of rows padded to the window's
    longest, divided by rows · length, as TOFU's code does it; its size depends on the padding.
    """

    kind: RetainLoss = "nll"
    factor: float = 1.0
    positions: str = "labelled"
    layer: int = 0


class UnlearnObjective(TokenRows):
    """L = γ · L_forget + α · L_retain as passes that add up.

    Args:
        rows: encoded ``forget`` rows, ``retain`` rows where they are trained on, and ``refusal`` rows (one for every
            forget row, in order) where the forget loss needs them.
        keys: annotated importances of the forget rows' labelled tokens, laid end to end.
        seed: of random sampling.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Encoded]],
        pad_id: int,
        forget: ForgetLoss,
        *,
        gamma: float = 1.0,
        retain: Retention | None = None,
        keys: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, pad_id)
        self.forget, self.gamma, self.seed = forget, gamma, seed
        self.terms = {} if retain is None else {"retain": retain}
        self.keys = None if keys is None else RowValues(rows["forget"], keys)
        self.reference: Tensor | None = None
        self._references: list[RowValues] = []
        weigh = (Pass("weigh", "forget", gradient=False),) if forget.measures else ()
        self.passes = (*(Pass(name, "retain") for name in self.terms), *weigh, Pass("forget", "forget"))
        self._step = self._padded = self._tokens = self._rows = 0

    # -- the first model ----------------------------------------------------------------------------------------------
    def start(self, ground: Ground) -> None:
        self.parameters = list(ground.parameters.values())
        if self.forget.reference:
            if self.reference is None:
                self.reference = reference_nll(ground, list(chain(*self._answers())), self.pad_id)
            sizes = [sum(row.n_labelled for row in answers) for answers in self._answers()]
            parts = self.reference.split(sizes)
            self._references = [RowValues(rows, part) for rows, part in zip(self._answers(), parts, strict=True)]

    def state(self) -> dict[str, Tensor]:
        return {} if self.reference is None else {"reference": self.reference}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.reference = state.get("reference")

    # -- rows ---------------------------------------------------------------------------------------------------------
    def _answers(self) -> list[Sequence[Encoded]]:
        """The answers to the forget rows that the forget loss looks at: their own, the refusals, or both."""
        names = {"own": ("forget",), "refusal": ("refusal",), "both": ("forget", "refusal")}
        return [self.rows[name] for name in names[self.forget.answers]]

    def length(self, stream: str, row: int) -> int:
        if stream != "forget":
            return super().length(stream, row)
        return sum(len(answers[row].ids) for answers in self._answers())

    def units(self, one: Pass, row: int) -> float:
        if one.stream == "retain":
            return self._padded if self.terms[one.name].positions == "all" else super().units(one, row)
        labelled = sum(answers[row].n_labelled for answers in self._answers())
        return {"tokens": labelled, "later tokens": labelled - 1, "rows": 1}.get(self.forget.counts, 0)

    def before_window(self, window: Window) -> None:
        self._step = window.step
        if "retain" in window.rows:
            self._padded = max(len(self.rows["retain"][row].ids) for row in window.rows["retain"])
        self._tokens = sum(answers[row].n_labelled for answers in self._answers() for row in window.rows["forget"])
        self._rows = len(window.rows["forget"])

    def batch(self, one: Pass, rows: Sequence[int]) -> TokenBatch | ForgetBatch:
        if one.stream == "retain":
            if self.terms[one.name].positions == "all":
                return all_positions([self.rows["retain"][row] for row in rows], self.pad_id, self._padded)
            return super().batch(one, rows)
        tokens = collate([answers[row] for answers in self._answers() for row in rows], self.pad_id)
        reference = torch.cat([values.of(rows) for values in self._references]) if self._references else None
        draws = tuple(draw_seed(self.seed, self._step, row) for row in rows)
        return ForgetBatch(tokens, len(rows), reference, None if self.keys is None else self.keys.of(rows), draws)

    # -- losses -------------------------------------------------------------------------------------------------------
    def loss(self, model: nn.Module, one: Pass, batch: Any, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        if one.stream == "retain":
            term = self.terms[one.name]
            given = model(batch.ids, batch.where, batch.labels, retain_want(term.kind, term.layer))
            total = retain_sum(term.kind, given)
            return term.factor * total / divisor, {one.name: total.detach()}
        tokens = batch.tokens
        values = model(tokens.ids, tokens.where, tokens.labels, self.forget.want)[0]
        if one.name == "weigh":
            return values.sum() * 0.0, self.forget.measure(values, batch)
        total, sums = self.forget(values, batch)
        return self.gamma * total / self._divisor(divisor), {"forget": total.detach(), **sums}

    def _divisor(self, count: float) -> float:
        return max(count, 1.0)  # a sum is divided by nothing, and rows of one token have no later ones

    def after_pass(self, one: Pass, sums: Mapping[str, Any] | None) -> None:
        if one.name == "weigh":
            assert sums is not None
            self.forget.measured(sums, self._rows)
        if isinstance(self.forget.want, HiddenState):  # what lies above the layer has a gradient, 0, with any engine
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        forget = sums["forget"] / self._divisor(divisors["forget"])
        found: dict[str, Any] = {"loss": self.gamma * forget, "loss_forget": forget}
        if "weight" in sums:
            of_rows = getattr(self.forget, "of_rows", False)
            found["weight_mean"] = sums["weight"] / (self._rows if of_rows else self._tokens)
        found["tokens_forget"] = self._tokens
        if "weights" in sums:
            found["log"] = {"weights": histogram(self._step, sums["weights"])}
        for name, term in self.terms.items():
            mean = sums[name] / divisors[name]
            found[f"loss_{name}"] = mean
            found[f"tokens_{name}"] = divisors[name]
            found["loss"] += term.factor * mean
        return found


def all_positions(rows: Sequence[Encoded], pad_id: int, length: int) -> TokenBatch:
    """Every position of rows padded to ``length``, prompts and padding too; the labels mean nothing."""
    batch = collate(rows, pad_id)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    ids[:, : batch.ids.shape[1]] = batch.ids
    where = torch.arange(ids.numel())
    nothing = torch.zeros_like(where)
    return TokenBatch(ids, batch.mask, where, nothing, nothing, nothing.bool())
