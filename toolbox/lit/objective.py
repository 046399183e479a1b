"""The loss of lit-tune as an objective of the house's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.lit.data import Rows
from toolbox.lit.method import Normalize, Weights, coefficients
from toolbox.models.head import Head, plain_head, token_nll
from toolbox.models.vlm import VisionBatch, collate, hidden_states, inner
from toolbox.shell.errors import UsageProblem
from toolbox.training.objective import Objective, Pass
from toolbox.training.windows import Window


class VisionLoss(nn.Module):
    """An image-text model whose forward gives −log p of the tokens asked for, (n,) in fp32.

    The head is applied at predicting positions alone, ``chunk`` at a time: at a vocabulary of 49 thousand the logits of
    whole rows would be most of the memory. The model's own loss is not used: no class masks image tokens in it.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk
        if not plain_head(inner(model)):
            raise UsageProblem("the language-model head must be a plain linear layer", "use another model")

    def forward(self, inputs: dict[str, Tensor], where: Tensor, labels: Tensor) -> Tensor:
        """−log p(label) behind each flattened position in ``where``."""
        hidden = hidden_states(self.model, inputs).flatten(0, 1)[where]
        nll, _ = token_nll(hidden, Head.of(inner(self.model)), labels, self.chunk)
        return nll + self._nothing()

    def _nothing(self) -> Tensor | float:
        """0, of which every trained parameter is a part: a micro-batch without images leaves the connector out, and DDP
        would wait for it for ever."""
        if not torch.distributed.is_initialized():
            return 0.0
        trained = [p for p in self.parameters() if p.requires_grad]
        if any(hasattr(p, "to_local") for p in trained):
            return 0.0
        return 0.0 * sum(p.sum() for p in trained)


class LabelledTokens(Objective):
    """Σ_t c_t ℓ_t with the coefficients of ``method.coefficients`` over the global window."""

    def __init__(self, rows: Rows, pad_id: int, weights: Weights, normalize: Normalize) -> None:
        self.rows, self.pad_id, self.weights, self.normalize = rows, pad_id, weights, normalize
        self._counts = [row.counts for row in rows.rows]
        self._shares: dict[int, tuple[float, float]] = {}
        self._window: tuple[int, int] = (0, 0)

    def before_window(self, window: Window) -> None:
        """Coefficients need the counts of all rows of the step."""
        places = window.rows["train"]
        counts = [self._counts[place] for place in places]
        self._shares = dict(zip(places, coefficients(counts, self.weights, self.normalize), strict=True))
        self._window = sum(one.response for one in counts), sum(one.instruction for one in counts)

    def length(self, stream: str, row: int) -> int:
        """Tokens, images included."""
        return len(self.rows.rows[row].aligned.ids)

    def units(self, one: Pass, row: int) -> float:
        """Supervised tokens."""
        return float(len(self.rows.rows[row].places))

    def batch(self, one: Pass, rows: Sequence[int]) -> VisionBatch:
        """Rows with pixels; the coefficient of each supervised token, and whether it is an answer's."""
        labelled = [self.rows.rows[row] for row in rows]
        shares = [self._shares.get(row, (0.0, 0.0)) for row in rows]
        weigh = [[share[0] if on else share[1] for on in row.response]
                 for row, share in zip(labelled, shares, strict=True)]  # fmt: skip
        extra = {"coefficient": weigh, "response": [[float(on) for on in row.response] for row in labelled]}
        return collate([self.rows.aligned(row) for row in rows], [row.places for row in labelled], self.pad_id, extra)

    def loss(self, model: nn.Module, one: Pass, batch: VisionBatch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's part of Σ c ℓ, and plain sums of ℓ on either side."""
        nll = model(batch.inputs, batch.where, batch.labels)
        total = (nll * batch.extra["coefficient"].to(nll.dtype)).sum()
        response = batch.extra["response"].to(nll.dtype)
        with torch.no_grad():
            sums = {
                "loss": total.detach(),
                "response": (nll * response).sum(),
                "instruction": (nll * (1 - response)).sum(),
                "tokens": batch.inputs["attention_mask"].sum().to(nll.dtype),
            }
        return total, sums

    def report(self, sums: dict[str, float], divisors: dict[str, float]) -> dict[str, Any]:
        """The loss of the step, unweighted token means of either side (null where there are none), counts."""
        answers, others = self._window
        return {
            "loss": sums["loss"],
            "loss_response": sums["response"] / answers if answers else None,
            "loss_instruction": sums["instruction"] / others if others else None,
            "n_response": answers,
            "n_instruction": others,
            "tokens": int(sums["tokens"]),
        }
