"""SatImp: gradient ascent whose token weights spare what is forgotten already and what is mere grammar.

    L_u = −(1/N_f) Σ_i sg( p_i^β1 · (1 − p_i)^β2 ) · l_i          L = γ·L_u + α·L_r

with l_i = −log p_i, N_f the labelled forget tokens of the window, sg the stop-gradient and L_r the mean negative
log-likelihood of the retain rows. p^β1 is the saturation factor: tokens with low probability, already forgotten,
get little weight. (1−p)^β2 is the importance factor: near-certain, structural tokens get little weight. The weight is
0 at both ends and peaks at p* = β1/(β1+β2).

Source: "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025, arXiv 2505.11953.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTINGS: dict[str, tuple[bool, bool]] = {
    "satimp": (True, True),
    "simsat": (True, False),
    "simimp": (False, True),
    "ga": (False, False),
    "wga": (True, False),
}
"""Each named weighting as (uses the saturation factor, uses the importance factor)."""


def exponents(weighting: str, beta1: float, beta2: float) -> tuple[float, float]:
    """(β1, β2) of a named weighting: one family.

    ``satimp`` keeps both, ``simsat`` is (β1, 0), ``simimp`` (0, β2), ``wga`` (1, 0) and ``ga``, plain gradient ascent,
    (0, 0).
    """
    saturation, importance = WEIGHTINGS[weighting]
    if weighting == "wga":
        beta1 = 1.0
    return beta1 if saturation else 0.0, beta2 if importance else 0.0


@torch.no_grad()
def token_weights(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """w_i = p_i^β1 · (1 − p_i)^β2 from l = −log p, in fp32 or float64, without gradient.

    1 − p is computed as −expm1(−l), exact where p is near 1, and clamped at 0: rounding may leave l slightly below 0,
    and a negative number to a fractional power is NaN. A factor whose exponent is 0 is left out, so that 0⁰ = 1.

    Args:
        nll: (n,) l_i in nats.
        beta1: saturation exponent β1 ≥ 0; ``beta2``: importance exponent β2 ≥ 0.
    """
    nll = nll.float() if nll.dtype in (torch.float16, torch.bfloat16) else nll
    weights = torch.ones_like(nll)
    if beta1 > 0:
        weights = torch.exp(-beta1 * nll)
    if beta2 > 0:
        weights = weights * (-torch.expm1(-nll)).clamp_min(0.0).pow(beta2)
    return weights


def forget_loss(nll: Tensor, weights: Tensor, divisor: float) -> Tensor:
    """−(1/N) Σ_i w_i · l_i: what is descended to unlearn. ``divisor`` is the window's N_f, never the sum of weights."""
    return -(weights * nll).sum() / divisor
