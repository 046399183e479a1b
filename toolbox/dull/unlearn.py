"""Inner-feature partial unlearning (IFPU): the channels that speak for a wrong label only are weakened and unlearned.

Reconstructed: the paper (arXiv 2503.11414) names the part without publishing its formula.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-4
"""Keeps the unlearning loss below -log(1e-4) = 9.2, where plain gradient ascent has no bound."""


@torch.no_grad()
def wrong_only(gates: Tensor, given: Tensor, right: Tensor) -> Tensor:
    """m = G[:, y~] ∘ (1 − G[:, r]): (batch, K), channels tied to the given class and not shared with the right one.

    Detached: through m the loss would teach G to be empty.
    """
    return gates[:, given].T * (1 - gates[:, right].T)


def weakened(mask: Tensor, eta: float = 1.0) -> Tensor:
    """1 − η m, what the feature is multiplied with so that the wrong channels are seen less."""
    return 1 - eta * mask


def unlearning_loss(logits: Tensor, given: Tensor) -> Tensor:
    """L_un = −log(1 − softmax(W (f ∘ m) + b)[y~] + 1e-4), (batch,): bounded negative learning of the wrong label.

    Source of the form: Y. Kim et al., "NLNL: Negative Learning for Noisy Labels", ICCV 2019.
    """
    wrong = logits.softmax(1).gather(1, given[:, None])[:, 0]
    return -(1 - wrong + FLOOR).log()
