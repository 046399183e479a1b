"""LONGER once more, slowly: one request, one candidate, float64, explicit dense masks, no padding, no cache.

Written from the formulas alone; it takes a module's parameters by name and shares no code with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def block(p: dict[str, Tensor], name: str, queries: Tensor, keys: Tensor, allowed: list[list[bool]], heads: int):
    """Query row i attends to key row j where ``allowed[i][j]``; a row that may see nothing attends to nothing."""
    normed_q, normed_k = layer_norm(p, f"{name}.norm1", queries), layer_norm(p, f"{name}.norm1", keys)
    q, k, v = (linear(p, f"{name}.{w}", x) for w, x in (("query", normed_q), ("key", normed_k), ("value", normed_k)))
    size = q.shape[-1] // heads
    rows = []
    for i in range(len(queries)):
        found = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            seen = [j for j in range(len(keys)) if allowed[i][j]]
            if not seen:
                found.append(torch.zeros(size, dtype=q.dtype))
                continue
            scores = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(size) for j in seen])
            weights = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            found.append(sum(w * v[j, part] for w, j in zip(weights, seen, strict=True)))
        rows.append(torch.cat(found))
    x = queries + linear(p, f"{name}.out", torch.stack(rows))
    hidden = gelu(linear(p, f"{name}.up", layer_norm(p, f"{name}.norm2", x)))
    return x + linear(p, f"{name}.down", hidden)


def merged_tokens(p: dict[str, Tensor], events: Tensor, merge: int, inner: int, heads: int) -> list[Tensor]:
    """Groups counted from the newest event; the oldest group may lack its first members, which are zeros."""
    tokens = []
    end = len(events)
    while end > 0:
        group = events[max(0, end - merge) : end]
        for layer in range(inner):
            everything = [[True] * len(group)] * len(group)
            group = block(p, f"merge.blocks.{layer}", group, group, everything, heads)
        missing = torch.zeros(merge - len(group), events.shape[-1], dtype=events.dtype)
        tokens.insert(0, torch.cat((missing, group)).flatten())
        end -= merge
    return tokens


def chosen(strategy: str, n: int, k: int) -> list[int]:
    """The rows among n merged tokens that are queries, oldest first."""
    if n <= k:
        return list(range(n))
    if strategy == "recent":
        return list(range(n - k, n))
    if strategy == "uniform":
        return sorted(n - 1 - j * n // k for j in range(k))
    late, spread = math.ceil(k / 2), k // 2
    rest = n - late
    return sorted([rest - 1 - j * rest // spread for j in range(spread)] + list(range(n - late, n)))


def candidate_row(p: dict[str, Tensor], events: Tensor, uid: Tensor | None, candidate: Tensor, c: dict) -> Tensor:
    """The candidate's last row, and the CLS rows behind it where they are read.

    ``c``: merge, inner, inner_heads, heads, queries, most (max-len / K), strategy, layers, read_cls.
    """
    history = merged_tokens(p, events, c["merge"], c["inner"], c["inner_heads"])
    n = len(history)
    tail = []
    if "uid.weight" in p:
        tail.append(linear(p, "uid", uid))
    if "cls" in p:
        tail += list(p["cls"])
    tail.append(linear(p, "target", candidate))
    x = torch.stack([*history, *tail])
    globals_at = list(range(n, n + len(tail)))
    if c["strategy"] == "learnable":
        rows = torch.stack([*p["learned"], *tail])
        allowed = [[j < n for j in range(len(x))] for _ in p["learned"]]
    else:
        picked = chosen(c["strategy"], n, min(c["queries"], c["most"]))
        rows = torch.stack([*(history[o] for o in picked), *tail])
        allowed = [[j <= o for j in range(len(x))] for o in picked]
    allowed += [[j <= o for j in range(len(x))] for o in globals_at]
    rows = block(p, "cross", rows, x, allowed, c["heads"])
    for layer in range(c["layers"]):
        causal = [[j <= i for j in range(len(rows))] for i in range(len(rows))]
        rows = block(p, f"selves.{layer}", rows, rows, causal, c["heads"])
    if c["read_cls"]:
        return torch.cat((rows[-1], *rows[-1 - len(p["cls"]) : -1]))
    return rows[-1]
