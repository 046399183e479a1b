"""What stands before and behind the sequence part: vectors of events and candidates, and the prediction head.

Event vector: a_e = Emb_item(i_e) + Σ_f Emb_f(f_e); x_e = MLP([a_e + P[p_e] ; T[b(Δ_e)]]), p_e counted from the newest
event, b(Δ) = min(31, ⌊log₂(1 + Δ)⌋), MLP = Linear(d + 8, d), GELU, Linear(d, d). Candidate vector: t_v = Emb_item(v) +
Σ_f Emb_f(f_v) over features known before the outcome; context vector: c_r = Σ_f Emb_f(f_r). That position is added and
time concatenated is the paper's (section 3.2 of arXiv 2505.04421), the rest of this a reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TIME_BUCKETS, TIME_WIDTH = 32, 8
PADDING, UNKNOWN = 0, 1
"""Rows of every vocabulary: padding (for users: nobody known, a zero vector), and out of vocabulary."""


def time_bucket(delta: Tensor) -> Tensor:
    """b(Δ) = min(31, ⌊log₂(1 + Δ)⌋) of whole numbers Δ ≥ 0, exactly: float logarithms miss powers of two."""
    edges = torch.tensor([2**power - 1 for power in range(1, TIME_BUCKETS)], device=delta.device)
    return torch.bucketize(delta.clamp(min=0), edges, right=True)


class EventEncoder(nn.Module):
    """x_e of summed embeddings a_e (B, L, d) and times Δ_e (B, L); ``position`` and ``time`` may be left out."""

    def __init__(self, dim: int, max_len: int, *, position: bool = True, time: bool = True) -> None:
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(max_len, dim)) if position else None
        self.time = nn.Parameter(0.02 * torch.randn(TIME_BUCKETS, TIME_WIDTH)) if time else None
        self.first = nn.Linear(dim + (TIME_WIDTH if time else 0), dim)
        self.second = nn.Linear(dim, dim)

    def forward(self, summed: Tensor, delta: Tensor) -> Tensor:
        """The last column is the newest event, position 0."""
        if self.position is not None:
            summed = summed + self.position[: summed.shape[1]].flip(0)
        if self.time is not None:
            summed = torch.cat((summed, self.time[time_bucket(delta)]), -1)
        return self.second(nn.functional.gelu(self.first(summed)))


class Head(nn.Module):
    """logit = MLP([LN(z) ; t_v ; c_r]) + b_v + b_0, one hidden layer of 64, GELU; in fp32 whatever the precision.

    b_0 starts at the logit of the training positive rate.
    """

    def __init__(self, dim: int, width: int, positive_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if width else None
        self.first, self.second = nn.Linear(width + 2 * dim, 64), nn.Linear(64, 1, bias=False)
        rate = torch.tensor(min(max(positive_rate, 1e-6), 1 - 1e-6), dtype=torch.float64)
        self.bias = nn.Parameter(torch.logit(rate).float().reshape(()))

    def forward(self, z: Tensor, candidates: Tensor, item_bias: Tensor) -> Tensor:
        """(B, R, width), [t_v ; c_r] (B, R, 2d) and b_v (B, R) to logits (B, R)."""
        with torch.autocast(z.device.type, enabled=False):
            z, candidates = z.float(), candidates.float()
            x = torch.cat((self.norm(z), candidates), -1) if self.norm is not None else candidates
            return self.second(nn.functional.gelu(self.first(x))).squeeze(-1) + item_bias.float() + self.bias
