"""Forget and retain losses as sums over a micro-batch, each divided by its window's count.

A forget loss sees ``values``, what the model gives for the labelled tokens (usually l = −log p), and the batch. Its sum
over a window's micro-batches is the loss of the window, however it was split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from toolbox.models.head import SoftTarget
from toolbox.models.token_loss import HiddenState, TokenBatch
from toolbox.unlearning.registry import Constants
from toolbox.unlearning.satimp import row_sums

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class ForgetBatch:
    """Forget rows as tokens, with what else a loss may look at.

    Over the n labelled tokens: ``reference`` (n,) the first model's l, ``key`` (n,) annotated importances. ``rows`` is
    the number of forget rows; where a batch holds refusals too, row b's refusal is row ``rows + b``. ``draws`` are
    seeds, one a row.
    """

    tokens: TokenBatch
    rows: int
    reference: Tensor | None = None
    key: Tensor | None = None
    draws: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> ForgetBatch:
        moved = {
            item.name: value.to(device) for item in fields(self) if hasattr(value := getattr(self, item.name), "to")
        }
        return ForgetBatch(**{**{item.name: getattr(self, item.name) for item in fields(self)}, **moved})


@dataclass
class ForgetLoss:
    """One forget loss; subclasses give ``__call__``.

    ``answers``: which answers of the forget rows the batch holds. ``counts``: what the window's divisor counts.
    ``reference``: whether the batch must carry the first model's l. ``measures``: whether a pass without gradient comes
    first, whose sums ``measured`` receives. ``want``: what the model is asked for.
    """

    answers: ClassVar[Literal["own", "refusal", "both"]] = "own"
    counts: ClassVar[Literal["tokens", "later tokens", "rows", "one"]] = "tokens"
    reference: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    want: ClassVar[SoftTarget | HiddenState | None] = None

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        """The sum over the batch, to be divided by the window's count; detached sums for the report."""
        raise NotImplementedError

    def measure(self, values: Tensor, batch: ForgetBatch) -> Sums:
        raise NotImplementedError

    def measured(self, sums: Mapping[str, float], rows: int) -> None:
        """Take the window's sums of ``measure`` over its ``rows``."""


def negative_log_sigmoid(x: Tensor) -> Tensor:
    return -functional.logsigmoid(x)


@dataclass
class Npo(ForgetLoss):
    """−(2/β) · mean over rows of log σ(β (L − L_ref)), L = Σ l the sum over the row: bounded below by 0.

    Its gradient is gradient ascent's times 2 p^β/(p^β + p_ref^β) per row. Source: arXiv 2404.05868, eq. 3.
    """

    beta: float
    counts: ClassVar[Literal["tokens", "later tokens", "rows", "one"]] = "rows"
    reference: ClassVar[bool] = True

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        assert batch.reference is not None
        margin = row_sums(values - batch.reference, batch.tokens.row, batch.rows)
        return 2 / self.beta * negative_log_sigmoid(self.beta * margin).sum(), {}


@dataclass
class SimNpo(ForgetLoss):
    """−(2/β) · mean over rows of log σ(β (L/T − δ)): NPO by length instead of by reference. arXiv 2410.07163, eq. 4."""

    beta: float
    delta: float
    counts: ClassVar[Literal["tokens", "later tokens", "rows", "one"]] = "rows"

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        row = batch.tokens.row
        length = torch.bincount(row, minlength=batch.rows)
        margin = row_sums(values, row, batch.rows) / length - self.delta
        return 2 / self.beta * negative_log_sigmoid(self.beta * margin).sum(), {}


@dataclass
class Refuse(ForgetLoss):
    """Mean NLL of the refusals: learn to answer something else ("idk" in TOFU's code)."""

    answers: ClassVar[Literal["own", "refusal", "both"]] = "refusal"

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        return values.sum(), {}


@dataclass
class Dpo(ForgetLoss):
    """−(2/β) · mean over rows of log σ(β [(L_ref − L)(refusal) − (L_ref − L)(answer)]): prefer the refusal.

    DPO (arXiv 2305.18290) with the refusal chosen and the answer rejected, scaled by 2/β as NPO is.
    """

    beta: float
    answers: ClassVar[Literal["own", "refusal", "both"]] = "both"
    counts: ClassVar[Literal["tokens", "later tokens", "rows", "one"]] = "rows"
    reference: ClassVar[bool] = True

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        assert batch.reference is not None
        gain = row_sums(batch.reference - values, batch.tokens.row, 2 * batch.rows)
        answer, refusal = gain[: batch.rows], gain[batch.rows :]
        return 2 / self.beta * negative_log_sigmoid(self.beta * (refusal - answer)).sum(), {}


@dataclass
class Distil(ForgetLoss):
    """UNDIAL: the mean over labelled tokens of the cross-entropy to softmax(z_ref − β · onehot(y)).

    Source: arXiv 2402.10052, eq. 3.
    """

    beta: float

    @property
    def want(self) -> SoftTarget:  # type: ignore[override]
        return SoftTarget("lowered", self.beta)

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        return values.sum(), {}


@dataclass
class OtherTokens(ForgetLoss):
    """CE-U: the mean cross-entropy to what the model itself would say without the true token.

    Each row's first answer token is left alone. Source: arXiv 2503.01224.
    """

    counts: ClassVar[Literal["tokens", "later tokens", "rows", "one"]] = "later tokens"
    want: ClassVar[SoftTarget | HiddenState | None] = SoftTarget("others")

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        row = batch.tokens.row
        later = torch.zeros_like(row, dtype=torch.bool)
        later[1:] = row[1:] == row[:-1]
        return (values * later).sum(), {}


@dataclass
class Rmu(ForgetLoss):
    """Mean over labelled tokens of ‖h_ℓ − c·u‖²/d: steer the layer's output to a fixed random direction.

    u is uniform in [0, 1)^d, scaled to norm 1; c is ``steer``. Source: RMU, arXiv 2403.03218, section 4.
    """

    layer: int
    steer: float
    seed: int
    direction: Tensor | None = field(default=None, repr=False)

    @property
    def want(self) -> HiddenState:  # type: ignore[override]
        return HiddenState(self.layer)

    def __call__(self, values: Tensor, batch: ForgetBatch) -> tuple[Tensor, Sums]:
        if self.direction is None:
            draw = torch.rand(values.shape[1], generator=torch.Generator().manual_seed(self.seed))
            self.direction = (draw / draw.norm()).to(values)
        return (values - self.steer * self.direction).square().mean(dim=1).sum(), {}


RetainLoss = Literal["nll", "kl", "hidden"]


def retain_want(kind: RetainLoss, layer: int) -> SoftTarget | HiddenState | None:
    """What the model is asked for by a retain loss: nothing else for ``nll``, the reference for the others."""
    match kind:
        case "kl":
            return SoftTarget("reference")
        case "hidden":
            return HiddenState(layer, reference=True)
        case _:
            return None


def retain_sum(kind: RetainLoss, given: tuple[Tensor, Tensor]) -> Tensor:
    """Σ over positions of l (``nll``), of KL(p_ref ‖ p) (``kl``) or of ‖h − h_ref‖²/d (``hidden``)."""
    if kind == "hidden":
        return (given[0] - given[1]).square().mean(dim=1).sum()
    return given[0].sum()


def make_forget_loss(name: str, constants: Constants, seed: int) -> ForgetLoss:
    """The forget loss of the objective ``name``."""
    from toolbox.unlearning.ascent import Ascent, Weighting

    def ascent(kind: str) -> Ascent:
        return Ascent(Weighting(kind, constants.beta1, constants.beta2))

    makers: dict[str, Callable[[], Any]] = {
        **{kind: lambda: ascent("ga") for kind in ("ga", "graddiff", "klmin")},
        **{kind: lambda kind=kind: ascent(kind) for kind in ("wga", "satimp", "tnpo", "wtnpo")},
        "npo": lambda: Npo(constants.beta),
        "simnpo": lambda: SimNpo(constants.beta, constants.delta_margin),
        "idk": Refuse,
        "dpo": lambda: Dpo(constants.beta),
        "rmu": lambda: Rmu(constants.layer, constants.steer, seed),
        "undial": lambda: Distil(constants.beta),
        "ceu": OtherTokens,
    }
    return makers[name]()
