"""HSTU-like: two layers of pointwise (not softmax) attention with learned biases of distance and time.

U, V, Q, K = SiLU(W₁ LN X); A = mask ⊙ SiLU(QKᵀ + r_pos + r_time) / max-len; Y = X + W₂(LN(A V) ⊙ U).

Source: Zhai et al., "Actions Speak Louder than Words" (ICML 2024, arXiv 2402.17152). The kernels, the stochastic length
and the features of the original are not reproduced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from toolbox.longer.features import TIME_BUCKETS, time_bucket
from toolbox.longer.method import Cache, History


class HstuLayer(nn.Module):
    """One layer; rows are given with their number and the time (before the request) that they stand for."""

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        self.norm, self.after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.into, self.out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(max_len + 2))
        self.elapsed = nn.Parameter(torch.zeros(TIME_BUCKETS))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """U, V, Q, K, each of the shape of ``x``."""
        return silu(self.into(self.norm(x))).chunk(4, -1)

    def bias(self, far: Tensor, elapsed: Tensor) -> Tensor:
        """r_pos of whole distances plus r_time of the time between two rows."""
        return self.distance[far.clamp(0, self.max_len + 1)] + self.elapsed[time_bucket(elapsed)]

    def finish(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """X + W₂(LN(A V) ⊙ U)."""
        return x + self.out(self.after(attended) * u)


class Hstu(nn.Module):
    """Two layers; the candidates are last rows that see all before them and themselves, not one another."""

    def __init__(self, dim: int, max_len: int, *, uid: bool = False, layers: int = 2) -> None:
        super().__init__()
        self.output_width, self.max_len = dim, max_len
        self.layers = nn.ModuleList(HstuLayer(dim, max_len) for _ in range(layers))
        self.uid = nn.Linear(dim, dim) if uid else None
        self.target = nn.Linear(2 * dim, dim)

    def prefill(self, history: History) -> Cache:
        """``k0``, ``v0`` .. of every layer (B, L + m, d); ``seen`` and ``age`` before the request, both (B, L + m)."""
        x, age = history.events, history.delta
        valid = history.valid if history.valid is not None else x.new_ones(x.shape[:2], dtype=torch.bool)
        if self.uid is not None:
            assert history.uid is not None
            x = torch.cat((x, self.uid(history.uid)[:, None].to(x.dtype)), 1)
            age, valid = (nn.functional.pad(one, (0, 1), value=more) for one, more in ((age, 0), (valid, True)))
        rows = torch.arange(x.shape[1], device=x.device)
        cache: Cache = {"seen": valid, "age": age}
        far = rows[:, None] - rows
        allowed = (far >= 0) & valid[:, None, :]
        for number, layer in enumerate(self.layers):
            u, v, q, k = layer.project(x)
            cache[f"k{number}"], cache[f"v{number}"] = k, v
            if number + 1 < len(self.layers):  # nobody reads the last layer's user rows
                bias = layer.bias(far, (age[:, None, :] - age[:, :, None]).clamp(min=0))
                weights = silu(q @ k.transpose(-1, -2) + bias) * allowed / self.max_len
                x = layer.finish(x, u, weights.to(v.dtype) @ v)
        return cache

    def score(self, cache: Cache, candidates: Tensor) -> Tensor:
        """(B, R, 2d) to (B, R, d)."""
        x = self.target(candidates)
        seen, age = cache["seen"], cache["age"]
        far = torch.arange(seen.shape[1], 0, -1, device=x.device)
        for number, layer in enumerate(self.layers):
            u, v, q, k = layer.project(x)
            bias = layer.bias(far, age)[:, None]
            shared = silu(q @ cache[f"k{number}"].transpose(-1, -2) + bias) * seen[:, None] / self.max_len
            nothing = torch.zeros((), dtype=torch.int64, device=x.device)
            own = silu((q * k).sum(-1, keepdim=True) + layer.bias(nothing, nothing)) / self.max_len
            x = layer.finish(x, u, shared.to(v.dtype) @ cache[f"v{number}"] + own.to(v.dtype) * v)
        return x
