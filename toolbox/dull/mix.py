"""Head-to-tail transfer: some images of a batch are mixed with images of small classes, labels by the Remix rule.

Remix: H.-P. Chou et al., "Remix: Rebalanced Mixup", ECCV 2020 Workshops, arXiv 2007.03943, equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KAPPA, TAU, ALPHA = 3.0, 0.5, 4.0


@dataclass(frozen=True)
class Mixing:
    """For each row of a window: whether it is mixed, its partner's row, and l, the weight of the row itself."""

    mixed: NDArray[np.bool_]
    partner: NDArray[np.int64]
    weight: NDArray[np.float64]


def may_mix(rows: NDArray[np.int64], epoch: int) -> NDArray[np.bool_]:
    """Rows that may be mixed in this epoch: the odd ones and the even ones in turn.

    So every image is seen plain at least every other epoch, and q never grows old.
    """
    return (rows + epoch) % 2 == 0


def draw_mixing(
    rows: NDArray[np.int64],
    epoch: int,
    share: float,
    members: list[NDArray[np.int64]],
    generator: np.random.Generator,
    alpha: float = ALPHA,
) -> Mixing:
    """Choose what is mixed: a ``share`` of the batch, at most one half.

    ``members[c]`` are the rows of class c. The partner's class is drawn ∝ 1/n_c, its image evenly; l ~ Beta(α, α).
    """
    count = len(rows)
    mixed = may_mix(rows, epoch) & (generator.random(count) < 2 * share)
    sizes = np.array([len(one) for one in members], dtype=np.float64)
    inverse = np.divide(1.0, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    classes = generator.choice(len(members), size=count, p=inverse / inverse.sum())
    places = generator.random(count)
    partner = np.array([members[c][int(at * len(members[c]))] for c, at in zip(classes, places, strict=True)])
    return Mixing(mixed, partner.astype(np.int64), generator.beta(alpha, alpha, count))


def head_share(
    weight: NDArray[np.float64],
    sizes_own: NDArray[np.float64],
    sizes_partner: NDArray[np.float64],
    kappa: float = KAPPA,
    tau: float = TAU,
) -> NDArray[np.float64]:
    """The weight of the row's own target: l, but 0, the tail's target alone, where n_h/n_t ≥ κ and l < τ."""
    tail_only = (sizes_own >= kappa * sizes_partner) & (weight < tau)
    return np.where(tail_only, 0.0, weight)
