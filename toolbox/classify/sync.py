"""Batch norm over the batches of all processes, so that two processes train as one does.

torch's SyncBatchNorm knows CUDA only; on a CPU this module stands in, with gradients through one sum over processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SharedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training are those of all processes' batches together.

    With Σ and Σ² over images and pixels of all processes: mean = Σ/n, var = Σ²/n − mean². The names of its tensors are
    those of ``nn.BatchNorm2d``.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(hidden)
        from torch.distributed.nn.functional import all_reduce

        # In float64: var is a difference of two large numbers.
        wide = hidden.double()
        count = torch.full((1,), hidden.numel() / hidden.shape[1], dtype=torch.float64, device=hidden.device)
        sums = all_reduce(torch.cat([wide.sum((0, 2, 3)), (wide * wide).sum((0, 2, 3)), count]))
        mean, square, total = sums[: self.num_features], sums[self.num_features : -1], sums[-1]
        mean, square = mean / total, square / total
        variance = (square - mean * mean).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            unbiased = variance * total / (total - 1).clamp_min(1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        scale = self.weight.double() * (variance + self.eps).rsqrt()
        shift = self.bias.double() - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(hidden.dtype)


def share_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with every batch norm over all processes: torch's own on CUDA, ``SharedBatchNorm2d`` elsewhere."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
                shared.load_state_dict(child.state_dict())
                shared.train(child.training)
                setattr(parent, name, shared)
    return model
