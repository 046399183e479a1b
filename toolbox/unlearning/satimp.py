"""SatImp: gradient ascent whose token weights spare what is forgotten already and what is mere grammar.

    L_u = −(1/N_f) Σ_i sg( p_i^β1 · (1 − p_i)^β2 ) · l_i          L = γ·L_u + α·L_r

with l_i = −log p_i, N_f the labelled forget tokens of the window, sg the stop-gradient and L_r the mean negative
log-likelihood of the retain rows. p^β1 is the saturation factor: tokens with low probability, already forgotten,
get little weight. (1−p)^β2 is the importance factor: near-certain, structural tokens get little weight. The weight is
0 at both ends and peaks at p* = β1/(β1+β2).

The family around it, each part a function of l and of the row every token belongs to:

- weighting: what a token weighs (``token_weights``, ``annotated_weights``, ``tnpo_weights``);
- granularity: whether that is said of a token, of a ``group`` of a row's tokens that weigh alike, of a whole row
  (``instance``) or of the window (``batch``);
- sampling: ``hard_sample`` keeps a part of each row's tokens;
- reduction: what the sum is divided by.

They meet in ``−(weight · sample · factor · l).sum() / divisor``. Vectors (n,) are over the labelled tokens of a
micro-batch; ``row`` (n,) int64 is the row of each, from 0 and not necessarily every one. A row is never split between
micro-batches, so nothing here depends on how a window is cut. No weight carries a gradient.

Source: "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", ICML 2025, arXiv 2505.11953, and its code
(tmlr-group/SatImp); where that assumes a fixed length and takes l ≠ 0 for the label mask, this takes the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

WEIGHTINGS: dict[str, tuple[bool, bool]] = {
    "satimp": (True, True),
    "simsat": (True, False),
    "simimp": (False, True),
    "ga": (False, False),
    "wga": (True, False),
}
"""Each weighting that is one by exponents, as (uses the saturation factor, uses the importance factor)."""

FRACTIONS: dict[str, float] = {"topk": 0.15, "bottomk": 0.5, "random": 0.5}
"""The kinds of hard sampling and the fraction k that the authors' code gives each."""

_TNPO_FLOOR = 1e-5


def exponents(weighting: str, beta1: float, beta2: float) -> tuple[float, float]:
    """(β1, β2) of a named weighting: one family.

    ``satimp`` keeps both, ``simsat`` is (β1, 0), ``simimp`` (0, β2), ``wga`` (1, 0) and ``ga``, plain gradient ascent,
    (0, 0).
    """
    saturation, importance = WEIGHTINGS[weighting]
    if weighting == "wga":
        beta1 = 1.0
    return beta1 if saturation else 0.0, beta2 if importance else 0.0


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


# --- weighting ---


@torch.no_grad()
def token_weights(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    """w_i = p_i^β1 · (1 − p_i)^β2 from l = −log p, in fp32 or float64, without gradient.

    1 − p is computed as −expm1(−l), exact where p is near 1, and clamped at 0: rounding may leave l slightly below 0,
    and a negative number to a fractional power is NaN. A factor whose exponent is 0 is left out, so that 0⁰ = 1.

    Args:
        nll: (n,) l_i in nats.
        beta1: saturation exponent β1 ≥ 0; ``beta2``: importance exponent β2 ≥ 0.
    """
    nll = _wide(nll)
    weights = torch.ones_like(nll)
    if beta1 > 0:
        weights = torch.exp(-beta1 * nll)
    if beta2 > 0:
        weights = weights * (-torch.expm1(-nll)).clamp_min(0.0).pow(beta2)
    return weights


@torch.no_grad()
def tnpo_weights(nll: Tensor, reference: Tensor, a: float = 0.0, b: float = 4.0) -> Tensor:
    """w_i = 2·p^(b+a) / (p^b + p_ref^b + 1e-5): token-wise NPO (a = 0) and its weighted form (a = 1.5).

    About 1 where the model is still the reference, 0 where it has forgotten, at most 2. Powers are taken as
    exp(−b·l): where both underflow the weight is 0, never NaN.

    Source: code of "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025
    (tmlr-group/G-effect).

    Args:
        nll: (n,) l of the model; ``reference``: (n,) l of the reference model, in nats.
    """
    nll, reference = _wide(nll), _wide(reference)
    model_power, reference_power = torch.exp(-b * nll), torch.exp(-b * reference)
    return 2 * torch.exp(-(b + a) * nll) / (model_power + reference_power + _TNPO_FLOOR)


@torch.no_grad()
def annotated_weights(key: Tensor, row: Tensor, row_weight: Tensor) -> Tensor:
    """w_i = k_i · u_row(i): k (n,) is 1 on key tokens and 0 elsewhere, u (rows,) the weight a row was given, else 1."""
    return key * row_weight[row]


# --- granularity ---


def row_sums(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """(n_rows,) sums of the values of each row, differentiable; 0 where a row has none."""
    values = _wide(values)
    return values.new_zeros(n_rows).index_add(0, row, values)


def row_lengths(row: Tensor, n_rows: int) -> Tensor:
    """(n_rows,) T: how many labelled tokens each row has."""
    return torch.bincount(row, minlength=n_rows)


def row_nll(nll: Tensor, row: Tensor, n_rows: int, prob: str = "sum") -> Tensor:
    """(n_rows,) −log P of each row: ``sum`` L = Σ l_i, so that P is the product over the answer and near 0 for a long
    one; ``mean`` L/T, so that P is the geometric mean of its token probabilities."""
    sums = row_sums(nll, row, n_rows)
    return sums / row_lengths(row, n_rows).clamp_min(1) if prob == "mean" else sums


@torch.no_grad()
def instance_weights(nll: Tensor, row: Tensor, n_rows: int, prob: str, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """(n_rows,) w_b, the weight at the row's probability P_b; 0 for a row without a token here.

    A row counts as one token of −log P_b (``row_nll``), so ``weight`` is any weighting as a function of l alone, as in
    ``lambda l: token_weights(l, 5, .1)``; one that needs a reference closes over the ``row_nll`` of that.
    For ``batch`` granularity the one weight of the window is the mean of these over its rows.
    """
    weights = weight(row_nll(nll, row, n_rows, prob))
    return torch.where(row_lengths(row, n_rows) > 0, weights, torch.zeros_like(weights))


def instance_loss(sums: Tensor, weights: Tensor, divisor: float) -> Tensor:
    """−(1/B) Σ_b w_b · L(row b): ``sums`` (rows,) the L, whatever P the weights were taken at; ``weights`` (rows,) or
    the one weight of the window; ``divisor`` the window's rows B_f."""
    return -(weights.detach() * sums).sum() / divisor


@torch.no_grad()
def group_weights(weights: Tensor, row: Tensor, size: int) -> Tensor:
    """(n,) in each row the weights sorted downwards, cut into chunks of ``size``, and every token given its chunk's
    mean; the last chunk of a row may be smaller. Equal weights keep their order.

    Raises: ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"groups of {size} tokens")
    weights = _wide(weights)
    order, rank = _ranked(weights, row, descending=True)
    chunk = (rank % size == 0).cumsum(0) - 1
    sums = torch.zeros_like(weights).index_add(0, chunk, weights[order])
    counts = torch.zeros_like(weights).index_add(0, chunk, torch.ones_like(weights))
    means = torch.empty_like(weights)
    means[order] = (sums / counts)[chunk]
    return means


def _ranked(values: Tensor, row: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    """(order (n,), rank (n,)): the tokens row after row with their values sorted, and the place of each in its row."""
    order = torch.argsort(values, descending=descending, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    lengths = torch.bincount(row)
    first = lengths.cumsum(0) - lengths
    return order, torch.arange(len(row), device=row.device) - first[row[order]]


# --- sampling ---


@torch.no_grad()
def hard_sample(
    nll: Tensor, row: Tensor, kind: str, fraction: float, soft_p: float = 1.0, seeds: Sequence[int] = ()
) -> Tensor:
    """(n,) factors that keep a part of each row's tokens, without gradient.

    ``topk`` is 1 where l > quantile(l, 1 − k) of the row and 0 elsewhere, ``bottomk`` 1 where l < quantile(l, 1 − k),
    so both keep none of a row of one token; ``random`` gives ⌊k·T⌋ of the row's T tokens the factor s and the others
    1 − s. Quantiles interpolate linearly between the two neighbouring values.

    Args:
        fraction: k in [0, 1]; ``FRACTIONS`` has the usual one of each kind.
        soft_p: s in [0, 1], of ``random`` alone.
        seeds: of ``random`` alone: by row number, from ``draw_seed``.

    Raises: ValueError for a ``kind`` that is none, IndexError where a row has no seed.
    """
    nll = _wide(nll)
    if kind == "random":
        return _random_share(nll, row, fraction, soft_p, seeds)
    threshold = row_quantile(nll, row, 1 - fraction)
    if kind == "topk":
        return (nll > threshold).to(nll.dtype)
    if kind == "bottomk":
        return (nll < threshold).to(nll.dtype)
    raise ValueError(f"{kind!r} is not one of {', '.join(FRACTIONS)}")


def draw_seed(seed: int, step: int, row: int) -> int:
    """The seed of one row's draw in one step, by the row's number in its set: nothing else decides the draw, neither
    the micro-batch the row falls into nor the process."""
    return int(np.random.SeedSequence((seed, step, row)).generate_state(1, np.uint64)[0])


@torch.no_grad()
def row_quantile(values: Tensor, row: Tensor, q: float) -> Tensor:
    """(n,) the q-quantile of each token's row: the values of the row at place q·(T − 1), linear in between."""
    order, _ = _ranked(values, row, descending=False)
    ordered, lengths = values[order], torch.bincount(row).tolist()
    first, found = 0, []
    for length in lengths:
        # Rounded: .99999999999 for 1 would interpolate, and the token at that place be above its own quantile.
        place = round(q * max(length - 1, 0), 9)
        found.append((first + math.floor(place), first + math.ceil(place), place - math.floor(place)))
        first += length
    low, high, share = zip(*found, strict=True) if found else ((), (), ())
    last = max(len(values) - 1, 0)  # a row without tokens behind all others
    low_at, high_at = (
        torch.tensor(at, dtype=torch.int64, device=row.device).clamp_max(last)[row] for at in (low, high)
    )
    between = torch.tensor(share, dtype=values.dtype, device=row.device)[row]
    return ordered[low_at] + between * (ordered[high_at] - ordered[low_at])


def _random_share(nll: Tensor, row: Tensor, fraction: float, soft_p: float, seeds: Sequence[int]) -> Tensor:
    owner = row.cpu().numpy()
    chosen = np.zeros(len(owner), dtype=bool)
    for number in np.unique(owner):
        places = np.flatnonzero(owner == number)
        count = math.floor(round(fraction * len(places), 9))
        chosen[np.random.Generator(np.random.PCG64(int(seeds[number]))).permutation(places)[:count]] = True
    kept = torch.from_numpy(chosen).to(nll.device)
    return torch.where(kept, torch.full_like(nll, soft_p), torch.full_like(nll, 1 - soft_p))


# --- reduction ---


@torch.no_grad()
def reduction_factors(reduction: str, nll: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """(n,) what each token's term is multiplied by before all are summed: 1/T of its row for ``sequence``, else 1.

    ``lengths`` (rows,) are the T of whole rows. The whole window's sum is then divided by its labelled tokens N_f for
    ``token``, by its rows B_f for ``sequence``, and by 1 for ``sum``, as hard sampling in the authors' code has it.
    """
    ones = torch.ones_like(_wide(nll))
    return ones / lengths[row] if reduction == "sequence" else ones


def forget_loss(nll: Tensor, weights: Tensor, divisor: float) -> Tensor:
    """−(1/N) Σ_i w_i · l_i: what is descended to unlearn. ``divisor`` is the window's N_f, never the sum of weights."""
    return -(weights * nll).sum() / divisor
