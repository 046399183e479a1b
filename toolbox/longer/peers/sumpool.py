"""Sum pooling: the history as one vector that does not depend on the candidate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolbox.longer.method import Cache, History


class SumPool(nn.Module):
    """Σ valid x_e / √(n + 1), n valid events: a long history must not be louder than a short one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output_width = dim

    def prefill(self, history: History) -> Cache:
        """``sum``: (B, d)."""
        events, n = masked(history)
        return {"sum": events.sum(1) / torch.sqrt(n + 1)}

    def score(self, cache: Cache, candidates: Tensor) -> Tensor:
        """The same vector for every candidate, (B, R, d)."""
        return cache["sum"][:, None].expand(-1, candidates.shape[1], -1)


def masked(history: History) -> tuple[Tensor, Tensor]:
    """Events with zeros for padding, and the number of valid ones (B, 1)."""
    if history.valid is None:
        n = history.events.new_full((history.events.shape[0], 1), history.events.shape[1])
        return history.events, n
    n = history.valid.sum(1, keepdim=True).to(history.events.dtype)
    return history.events * history.valid[..., None].to(history.events.dtype), n
