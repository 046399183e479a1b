"""What each task makes of the channels of each permutation group: mean |activation|, firing rate, Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.lwi.plan import Plan

_BATCH = 256


@dataclass
class Use:
    """Sums over what layers read of one group: Σ|a| (C,), how often a > 0 (C,), Σ a aᵀ (C, C), in fp64."""

    magnitude: Tensor
    fired: Tensor
    gram: Tensor
    count: int = 0

    def add(self, values: Tensor) -> None:
        """Activations (positions, C)."""
        values = values.detach().float()
        self.magnitude += values.abs().sum(0).double()
        self.fired += (values > 0).sum(0).double()
        self.gram += (values.T @ values).double()
        self.count += len(values)

    def tensors(self) -> dict[str, Tensor]:
        """Means over positions: ``mean_abs``, ``firing``, ``gram``, fp32."""
        found = {"mean_abs": self.magnitude, "firing": self.fired, "gram": self.gram}
        return {name: (value / self.count).float().cpu() for name, value in found.items()}


def readers(model: nn.Module, plan: Plan) -> dict[str, list[str]]:
    """For each group the convolutions and linear layers that read it: all channels of the group are their inputs.

    Groups that are met only inside nested blocks (attention heads) have none.
    """
    modules, found = dict(model.named_modules()), {name: [] for name in plan.groups}
    for key, tensor in plan.tensors.items():
        module = modules.get(key.removesuffix(".weight"))
        if not isinstance(module, nn.Conv2d | nn.Linear) or len(tensor.axes) < 2:
            continue
        axis = tensor.axes[1]
        if len(axis) == 1 and len(axis[0]) == 1 and axis[0][0].group is not None:
            found[axis[0][0].group].append(key.removesuffix(".weight"))
    return {name: places for name, places in found.items() if places}


def task_use(
    model: nn.Module, places: dict[str, list[str]], pixels: Tensor, prepare: Callable[[Tensor], Tensor]
) -> dict[str, Use]:
    """How the images use each group, over all positions and all layers that read it."""
    device = next(model.parameters()).device
    uses: dict[str, Use] = {}

    def watch(group: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            values = inputs[0]
            values = values.movedim(1, -1) if isinstance(module, nn.Conv2d) else values
            values = values.flatten(0, -2)
            if group not in uses:
                size = values.shape[1]
                zero = torch.zeros(size, dtype=torch.float64, device=values.device)
                uses[group] = Use(zero, zero.clone(), zero.repeat(size, 1))
            uses[group].add(values)

        return hook

    hooks = [
        model.get_submodule(place).register_forward_pre_hook(watch(group))
        for group, names in places.items()
        for place in names
    ]
    model.eval()
    try:
        with torch.inference_mode():
            for batch in pixels.split(_BATCH):
                model(pixel_values=prepare(batch.to(device)))
    finally:
        for one in hooks:
            one.remove()
    return uses
