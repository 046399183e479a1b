"""The step an optimiser has just applied, against the retain gradient: computed back from its state, no copy of θ.

GRU makes the gradient orthogonal to ḡ. AdamW then rescales it by 1/√v, adds momentum and decays the weights: the
applied step Δ is not orthogonal. ``update_cosine`` measures cos(Δ, ḡ); ``correct_step`` takes from the step itself
what would raise the retain loss.

    A = m̂/(√v̂ + ε),  θ_old = (θ + ηA)/(1 − ηλ),  Δ = θ − θ_old = −ηA − ηλ·θ_old

Lists are those of ``gru``: local tensors in one order, and ``reduce``. Everything runs piece by piece, in θ's dtype,
with inner products in float64. Call these after the optimiser's step, before gradients are cleared or the learning
rate changes.

Source: the step is AdamW's (Loshchilov and Hutter, arXiv 1711.05101, as torch orders it); that it undoes orthogonality
is the subject of arXiv 2511.17100; this correction is ours, for GRU (arXiv 2503.09117).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from toolbox.shell.errors import UsageProblem
from toolbox.training.state import local_part
from toolbox.unlearning.products import (
    Gradients,
    Reduce,
    Scratch,
    column_sums,
    cosine_of,
    fetched,
    pieces,
    reduced,
    zeros_as,
)

Piece = tuple[Tensor, Tensor, Tensor, Tensor]
"""θ (a view), Δ, the denominator √v̂ + ε, ḡ: matching parts of one parameter's."""


@dataclass(frozen=True)
class StepCorrection:
    """``dot`` ⟨Δ, ḡ⟩ and ``cos_before``; whether ``coef``·Pḡ was taken away; ``update_cos`` measured afterwards."""

    dot: float
    cos_before: float
    corrected: bool
    coef: float
    update_cos: float


@torch.no_grad()
def step_delta(parameter: Tensor, optimizer: Optimizer, group: dict[str, Any], average: Tensor) -> Iterator[Piece]:
    """The pieces of the step that ``optimizer`` has just applied to ``parameter``.

    AdamW as above. SGD without momentum: its gradient, still in ``.grad``, for A, and 1 for the denominator.
    Parameter, state and gradient may be DTensors, whose local parts count.

    Args:
        group: the parameter's group of ``optimizer``, with the learning rate of that step.
        average: ḡ of this parameter: local, θ's shape, any dtype and device.
    Raises: UsageProblem when the step cannot be computed back.
    """
    _check(optimizer, group)
    rate = float(group["lr"])
    kept = 1 - rate * group["weight_decay"]
    if kept == 0:
        raise FloatingPointError("the learning rate times the weight decay is 1, which leaves nothing of the weights")
    if isinstance(optimizer, SGD):
        for theta, gradient, mean in pieces(_local(parameter), _local(parameter.grad), average):
            one = torch.ones_like(theta)
            yield theta, _delta(theta, gradient, one, rate, kept), one, mean.to(theta.device)
        return
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    count = float(state["step"])
    rate /= 1 - beta1**count
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    for theta, first, square, mean in pieces(*map(_local, (parameter, state["exp_avg"], second)), average):
        below = square.div(1 - beta2**count).sqrt_().add_(group["eps"])
        yield theta, _delta(theta, first, below, rate, kept), below, mean.to(theta.device)


@torch.no_grad()
def update_cosine(
    parameters: Sequence[Tensor], optimizers: Sequence[Any], average: Gradients, *, reduce: Reduce
) -> float:
    """cos(Δ, ḡ) of the step just applied; negative where the retain loss falls. 0 when nothing moved.

    UsageProblem: an optimiser other than AdamW or SGD without momentum. FloatingPointError: a product is not finite.
    """
    product, step, retain, _ = _products(_steps(parameters, optimizers, average), reduce, metric=False)
    return cosine_of(product, step, retain)


@torch.no_grad()
def correct_step(
    parameters: Sequence[Tensor], optimizers: Sequence[Any], average: Gradients, *, reduce: Reduce
) -> StepCorrection:
    """If ⟨Δ, ḡ⟩ > 0: Δ ← Δ − (⟨Δ, ḡ⟩/⟨ḡ, Pḡ⟩)·Pḡ, by changing the parameters in place.

    This is the nearest step with ⟨Δ, ḡ⟩ ≤ 0 in the optimiser's own metric ‖x‖² = Σ x_i²/P_i. Otherwise not a bit of
    the parameters changes. UsageProblem: an optimiser other than AdamW. FloatingPointError: a product is not finite.
    """
    for optimizer in map(_plain, optimizers):
        if not isinstance(optimizer, AdamW):
            raise UsageProblem(
                f"the optimiser's geometry is AdamW's, not {type(optimizer).__name__}'s",
                "use --optimizer adamw, or --geometry raw",
            )
    product, step, retain, within = _products(_steps(parameters, optimizers, average), reduce)
    before = cosine_of(product, step, retain)
    if product <= 0:
        return StepCorrection(product, before, False, 0.0, before)
    coef = product / within
    corrected = (_corrected(found, coef) for found in _steps(parameters, optimizers, average))
    left, length, _, _ = _products(corrected, reduce, metric=False)
    return StepCorrection(product, before, True, coef, cosine_of(left, length, retain))


def _corrected(step: Iterable[Piece], coef: float) -> Iterator[Piece]:
    """Take ``coef``·Pḡ from θ; the pieces of the step as it then is, with what rounding made of the correction."""
    for theta, delta, below, mean in step:
        old = theta.clone()
        theta.addcdiv_(mean.to(theta.dtype), below, value=-coef)
        yield theta, delta.add_(theta - old), below, mean


def _steps(parameters: Sequence[Tensor], optimizers: Sequence[Any], average: Gradients) -> Iterator[Iterator[Piece]]:
    """``step_delta`` of every parameter that was moved: those with a gradient, of one of the optimisers."""
    owners = {
        id(parameter): (optimizer, group)
        for optimizer in map(_plain, optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for parameter, mean in zip(parameters, average, strict=True):
        if parameter.grad is not None and id(parameter) in owners:
            mean = zeros_as(_local(parameter)) if mean is None else mean
            yield step_delta(parameter, *owners[id(parameter)], mean)


def _products(steps: Iterable[Iterable[Piece]], reduce: Reduce, metric: bool = True) -> list[float]:
    """⟨Δ,ḡ⟩, ⟨Δ,Δ⟩, ⟨ḡ,ḡ⟩ and, with ``metric``, ⟨ḡ,Pḡ⟩ (else 0) over all parameters and ranks."""
    totals, scratch = [], Scratch()
    for step in steps:
        sums = []
        for _, delta, below, mean in step:
            move, mean = scratch.exact(delta, mean)
            sums += [torch.dot(move, mean), torch.dot(move, move), torch.dot(mean, mean)]
            if metric:  # Δ has been used: its buffer takes Pḡ
                move.view(below.shape).copy_(below)
                torch.div(mean, move, out=move)
            sums.append(torch.dot(move, mean) if metric else move.new_zeros(()))
        totals.append(torch.stack(sums).view(-1, 4).sum(0))
    return reduced(column_sums(fetched(totals), 4), reduce)


def _check(optimizer: Optimizer, group: dict[str, Any]) -> None:
    known = isinstance(optimizer, AdamW) or (isinstance(optimizer, SGD) and not group["momentum"])
    if not known or group["maximize"]:
        raise UsageProblem(
            f"the step of this {type(optimizer).__name__} cannot be computed back",
            "use AdamW, or SGD without momentum",
        )


def _plain(optimizer: Any) -> Optimizer:
    """The optimiser itself: accelerate wraps it."""
    return getattr(optimizer, "optimizer", optimizer)


def _local(tensor: Tensor) -> Tensor:
    return local_part(tensor.detach())


def _delta(theta: Tensor, above: Tensor, below: Tensor, rate: float, kept: float) -> Tensor:
    """−M − ηλ·θ_old with M = rate·above/below and θ_old = (θ + M)/(1 − ηλ), gathered: −(M + ηλ·θ)/(1 − ηλ)."""
    return theta.mul((kept - 1) / kept).addcdiv_(above, below, value=-rate / kept)
