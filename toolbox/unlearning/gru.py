"""GRU: what would hurt retention is removed from the unlearning gradient.

    g̃ = g_u − (⟨g_u, ḡ⟩ / ‖ḡ‖²) · ḡ   if ⟨g_u, ḡ⟩ < 0, else g_u           ḡ_t = m·g_r,t + (1 − m)·ḡ_{t−1},  ḡ_0 = 0

with g_u the gradient that is DESCENDED to unlearn, g_r the gradient of the retain loss, and all trainable parameters
seen as ONE vector: one test and one projection a step, on gradients of the whole window. g̃ is the nearest vector to
g_u with ⟨g̃, ḡ⟩ ≥ 0: descending it does not raise the retain loss to first order. m weights the NEW gradient: m = 1 is
no smoothing, .99 almost none. Scaling ḡ changes nothing, so that ḡ needs no bias correction.

What the optimiser makes of g̃ is no longer orthogonal to ḡ: see ``geometry``.

Source: "GRU: Mitigating the Trade-off between Unlearning and Retention for LLMs", ICML 2025 (PMLR 267),
arXiv 2503.09117. The cosine clip and which gradient m weights are from its released code; scopes below the whole model
are ablations of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.unlearning.geffect import depth_groups
from toolbox.unlearning.products import (
    Gradients,
    Reduce,
    column_sums,
    cosine,
    cosine_of,
    dot,
    pieces,
    take_away,
    tensor_products,
)

__all__ = ["Rectification", "RetainAverage", "cosine", "dot", "rectify", "scope_groups"]

_SAFE = (1e-20, 1e30)
"""Squared norms between which no product that matters leaves fp32's range."""


class RetainAverage:
    """ḡ_t = m·g_r,t + (1 − m)·ḡ_{t−1}, ḡ_0 = 0: one buffer the size of the gradients, sharded where they are.

    Args:
        momentum: m in (0, 1], the weight of the NEW gradient. UsageProblem outside.
        dtype: of the buffer. bfloat16 halves it; with a small m its 8 bits lose part of every new gradient.
        device: of the buffer; None keeps each tensor beside its gradient.
    """

    def __init__(
        self, momentum: float, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        if not 0 < momentum <= 1:
            raise UsageProblem(
                f"the momentum of the retain average is {momentum:g}, outside (0, 1]",
                "it weights the new gradient: .8 is usual, 1 keeps no average",
            )
        self.momentum, self.dtype = momentum, dtype
        self.device = torch.device(device) if device is not None else None
        self.tensors: list[Tensor | None] = []
        """ḡ in the order of the gradients; None where a parameter has never had one."""

    @torch.no_grad()
    def fold(self, gradients: Gradients) -> None:
        """Take in the window's g_r, in place; the first one allocates. A missing gradient counts as zero."""
        self.tensors += [None] * (len(gradients) - len(self.tensors))
        for place, (gradient, mean) in enumerate(zip(gradients, self.tensors, strict=True)):
            if gradient is None:
                if mean is not None:
                    mean.mul_(1 - self.momentum)
                continue
            mean = self.tensors[place] = self._beside(gradient, mean)
            wide = torch.promote_types(torch.promote_types(mean.dtype, gradient.dtype), torch.float32)
            for old, new in pieces(mean, gradient):
                new = new.to(old.device).to(wide)
                if old.dtype == wide:
                    old.lerp_(new, self.momentum)
                else:
                    old.copy_(old.to(wide).lerp_(new, self.momentum))

    def _beside(self, gradient: Tensor, mean: Tensor | None) -> Tensor:
        """``mean`` where it belongs: it may be missing as yet, or lie where it was loaded."""
        device = self.device or gradient.device
        if mean is None:
            return torch.zeros_like(gradient, dtype=self.dtype, device=device)
        if mean.shape != gradient.shape:
            raise BadData(
                f"the retain average has shape {tuple(mean.shape)}, its gradient {tuple(gradient.shape)}",
                "start anew with --overwrite",
            )
        return mean.to(device)

    def state(self) -> dict[str, Tensor]:
        """The buffer itself, not a copy, by place."""
        return {str(place): mean for place, mean in enumerate(self.tensors) if mean is not None}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what ``state`` gave; the next ``fold`` changes these tensors in place."""
        self.tensors = [None] * (1 + max(map(int, state), default=-1))
        for key, mean in state.items():
            self.tensors[int(key)] = mean.to(self.dtype)


@dataclass(frozen=True)
class Rectification:
    """What one step found and did. The vectors are the whole ones, whatever the scope of the projection.

    ``dot`` ⟨g_u, ḡ⟩; ``cos`` of the angle between them; ``norm_forget`` ‖g_u‖; ``norm_retain`` ‖ḡ‖; ``rectified``:
    whether g_u was changed, with groups the share of them that was; ``coef`` c of g̃ = g_u − c·ḡ, None with groups;
    ``norm_after`` ‖g̃‖ by ‖g_u‖² − 2c⟨g_u, ḡ⟩ + c²‖ḡ‖²; ``cos_after`` cos(g̃, ḡ), whose product is measured on g̃, good to
    some 1e-8; ``products`` ⟨g_u, ḡ⟩ of each tensor, before.
    """

    dot: float
    cos: float
    norm_forget: float
    norm_retain: float
    rectified: bool | float
    coef: float | None
    norm_after: float
    cos_after: float
    products: tuple[float, ...] = field(repr=False)


@torch.no_grad()
def rectify(
    gradients: Gradients,
    average: Gradients,
    *,
    reduce: Reduce,
    groups: Sequence[int] | None = None,
    cos_clip: float | None = None,
    apply: bool = True,
) -> Rectification:
    """Project ``gradients`` in place; where there is no conflict, or ḡ is zero, not a bit changes.

    Args:
        gradients: g_u of the whole window, reduced over processes; None where a parameter has none.
        average: ḡ (``RetainAverage.tensors``), one a gradient, of any dtype and on any device.
        reduce: sums numbers over the ranks that hold shards; called once, and once more where something is projected.
        groups: a group number a tensor: one decision and one projection a group. None: the whole model is one.
        cos_clip: c in [−1, 0]: take away no more than ‖g_u‖·max(cos θ, c) along ḡ/‖ḡ‖; a violation stays below c.
        apply: False only reports.

    Raises: FloatingPointError, on all ranks alike, when a product is not finite.
    """
    numbers = [0] * len(gradients) if groups is None else list(groups)
    before = tensor_products(gradients, average, reduce)
    members: dict[int, list[list[float]]] = {}
    for number, row in zip(numbers, before, strict=True):
        members.setdefault(number, []).append(row)
    coefs = {number: _coefficient(*column_sums(rows, 3), cos_clip) for number, rows in members.items()}
    taken = [coefs[number] if apply else 0.0 for number in numbers]
    touched = [place for place, coef in enumerate(taken) if coef]
    product, forget, retain = column_sums(before, 3)
    left = [row[0] for row in before]
    if touched:
        some = ([values[place] for place in touched] for values in (gradients, average, taken))
        quick = all(_SAFE[0] < square < _SAFE[1] for square in (forget, retain))
        for place, measured in zip(touched, take_away(*some, reduce, quick), strict=True):
            left[place] = measured
    kept = max(0.0, math.fsum(g - c * (2 * gm - c * m) for c, (gm, g, m) in zip(taken, before, strict=True)))
    share = len({numbers[place] for place in touched}) / max(1, len(members))
    return Rectification(
        dot=product,
        cos=cosine_of(product, forget, retain),
        norm_forget=math.sqrt(forget),
        norm_retain=math.sqrt(retain),
        rectified=bool(touched) if groups is None else share,
        coef=(coefs[0] if touched else 0.0) if groups is None else None,
        norm_after=math.sqrt(kept),
        cos_after=cosine_of(math.fsum(left), kept, retain),
        products=tuple(row[0] for row in before),
    )


def _coefficient(product: float, forget: float, retain: float, cos_clip: float | None) -> float:
    """c of g̃ = g_u − c·ḡ: ⟨g_u,ḡ⟩/‖ḡ‖², or ‖g_u‖·max(cos θ, clip)/‖ḡ‖; 0 without a conflict."""
    if product >= 0 or retain == 0:
        return 0.0
    if cos_clip is None or cosine_of(product, forget, retain) >= cos_clip:
        return product / retain
    return cos_clip * math.sqrt(forget) / math.sqrt(retain)


def scope_groups(names: Sequence[str], scope: str) -> list[int] | None:
    """The ``groups`` of ``rectify`` for the parameters ``names``: scope ``model`` (None), ``layer`` or ``tensor``."""
    match scope:
        case "model":
            return None
        case "layer":
            labels = depth_groups(names)
            order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
            return [order[label] for label in labels]
        case "tensor":
            return list(range(len(names)))
    raise ValueError(f"no scope {scope!r}")
