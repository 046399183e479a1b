"""Inner-feature disentangling (IFD): which channels serve which class, learned as G in [0, 1]^(K x C).

Built on the class-specific gates of CSGCNN (H. Liang et al., "Training Interpretable Convolutional Neural Networks by
Differentiating Class-specific Filters", ECCV 2020, arXiv 2007.08194). A gate multiplies a whole channel, so the pooled
feature of a gated map is the gated pooled feature, GAP(F ∘ g) = GAP(F) ∘ g, and a mask of the size of the map is never
made. Predictions are taken without gates. That G starts at 1 and how its sparsity is scaled are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolbox.shell.errors import BadData

RHO = 0.2
"""Density that the gates are pressed to: CSGCNN's."""
PRESS = 16.0
"""λ_G = PRESS / (lr_G · steps). With 5 the density of a 12-epoch run ended at .59, with 12 at .45: dividing rows by
their maximum undoes a pull that all classes share, so gates shrink only as gaps between them grow."""


def gate_vectors(gates: Tensor, targets: Tensor) -> Tensor:
    """g_t = clip(Σ_c t_c G[:, c], 0, 1): (batch, K) for targets (batch, C), one-hot or soft."""
    return (targets.to(gates.dtype) @ gates.T).clamp(0, 1)


def sparsity(gates: Tensor, rho: float = RHO) -> Tensor:
    """relu(‖G‖₁ − ρKC), a scalar: nothing once the gates are sparse enough."""
    return F.relu(gates.abs().sum() - rho * gates.numel())


def auto_lambda(lr: float, steps: int) -> float:
    """λ_G such that the pull of the L1 term over all ``steps`` does not depend on their number."""
    return PRESS / (lr * steps)


@torch.no_grad()
def project(gates: Tensor) -> None:
    """G[k, :] ← clip(G[k, :] / max_c G[k, c], 0, 1) in place: every channel serves one class fully.

    A channel without a positive gate has lost all its classes and starts anew with 1 for each.
    """
    largest = gates.amax(1, keepdim=True)
    gates.div_(largest.clamp_min(torch.finfo(gates.dtype).tiny)).clamp_(0, 1)
    gates.masked_fill_(largest <= 0, 1.0)


def find_head(backbone: nn.Module, classes: int) -> nn.Linear:
    """The last linear layer with one output a class. Raises: BadData (65) where there is none."""
    heads = [one for one in backbone.modules() if isinstance(one, nn.Linear) and one.out_features == classes]
    if not heads:
        raise BadData(
            f"the model has no linear layer with {classes} outputs, so its pooled feature cannot be found",
            "take an image classifier that ends in one: ResNet, ViT, ConvNeXt, Swin",
        )
    return heads[-1]


class Gated(nn.Module):
    """A classifier with its gates beside it; ``forward`` gives every path that a step needs from one pass.

    ``gates`` is fp32 (K, C), starting at 1, with its gradient only where IFD is on.
    """

    def __init__(self, backbone: nn.Module, classes: int, *, trained: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = [find_head(backbone, classes)]  # in a list: it is the backbone's, not a second child
        self.gates = nn.Parameter(torch.ones(self.head[0].in_features, classes), requires_grad=trained)
        self._pooled: Tensor | None = None
        self.head[0].register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._pooled = inputs[0]

    def features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits z = W f + b (batch, C) and the pooled feature f (batch, K), both fp32."""
        logits = self.backbone(pixel_values=pixels).logits
        pooled, self._pooled = self._pooled, None
        if pooled is None or pooled.ndim != 2:
            shape = "never used" if pooled is None else f"fed {tuple(pooled.shape)}"
            raise BadData(f"the model's last linear layer is {shape}, not one vector an image", "take another model")
        return logits.float(), pooled.float()

    def classify(self, features: Tensor) -> Tensor:
        """W f + b of changed features, in fp32 whatever the precision around it."""
        weight, bias = self.head[0].weight, self.head[0].bias
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, weight.float(), None if bias is None else bias.float())

    def forward(
        self, pixels: Tensor, targets: Tensor | None = None, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """``logits``; with ``targets`` also ``gated``; with ``masks`` each feature times its mask.

        ``masks`` are (batch, K) multipliers by name, and have no gradient.
        """
        logits, pooled = self.features(pixels)
        out = {"logits": logits}
        if targets is not None:
            out["gated"] = self.classify(pooled * gate_vectors(self.gates, targets))
        for name, mask in (masks or {}).items():
            out[name] = self.classify(pooled * mask)
        return out
