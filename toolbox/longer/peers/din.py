"""DIN: each event weighted by its fit to the candidate, without softmax.

Source: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction" (KDD 2018, arXiv 1706.06978). The
division by √(n + 1) is ours: histories here differ in length by orders of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolbox.longer.method import Cache, History
from toolbox.longer.peers.sumpool import masked

_HIDDEN = (80, 40)


class Din(nn.Module):
    """Σ_e w_e x_e / √(n + 1), w_e = MLP_80-40-1([x_e ; t_v ; x_e - t_v ; x_e ⊙ t_v]) with PReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.output_width = dim
        self.first = nn.Linear(4 * dim, _HIDDEN[0])
        self.second = nn.Linear(*_HIDDEN)
        self.third = nn.Linear(_HIDDEN[1], 1)
        self.act1, self.act2 = nn.PReLU(), nn.PReLU()

    def prefill(self, history: History) -> Cache:
        """``x``: (B, L, d) with zeros for padding; ``n``: (B, 1) events; ``own``: the first layer's share of x_e."""
        x, n = masked(history)
        of_event, _, difference, _ = self.first.weight.chunk(4, 1)
        return {"x": x, "n": n, "own": nn.functional.linear(x, of_event + difference, self.first.bias)}

    def score(self, cache: Cache, candidates: Tensor) -> Tensor:
        """(B, R, 2d) to (B, R, d). The first layer is applied by its four parts, so that no (R, L, 4d) input exists."""
        x, target = cache["x"], candidates[..., : self.output_width]
        _, of_target, difference, product = self.first.weight.chunk(4, 1)
        from_target = nn.functional.linear(target, of_target - difference)
        # W(x ⊙ t) = (W diag t) x, one matrix a candidate instead of one vector a (candidate, event)
        mixed = x[:, None] @ (target[:, :, None] * product).to(x.dtype).transpose(-1, -2)
        hidden = self.act1(mixed + (cache["own"][:, None] + from_target[:, :, None]))
        weight = self.third(self.act2(self.second(hidden)))
        # Padded events are zero vectors: whatever their weight, they add nothing.
        return (weight.to(x.dtype).transpose(-1, -2) @ x[:, None]).squeeze(-2) / torch.sqrt(cache["n"] + 1)[:, None]
