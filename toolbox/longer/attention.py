"""Attention as LONGER needs it: bottom-right causal masks, rows without a key, and candidate rows beside shared keys.

Shapes: B requests, h heads, hd = width/h, Q query rows, M key rows, R candidates. Scores are scaled by 1/√hd.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, rows, width) as (B, heads, rows, width/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """Undo ``split_heads``."""
    return x.transpose(1, 2).flatten(-2)


def causal_rows(rows: Tensor, keys: int) -> Tensor:
    """The mask of the method: a query whose row is o sees the keys j ≤ o. (.., Q) row numbers to (.., Q, keys) bool.

    The paper sorts the history newest first and writes M_ij = 0 for j ≥ i; we store it oldest first, where the same
    mask reads j ≤ o (section 3.3 and equation of the mask, arXiv 2505.04421).
    """
    return torch.arange(keys, device=rows.device) <= rows[..., None]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, flex: bool = False) -> Tensor:
    """softmax(QKᵀ/√hd + mask) V; (B, h, Q, hd), (B, h, M, hd) twice, mask (B or 1, Q, M) bool or None.

    A query that may see no key gets 0, where a softmax over nothing would be NaN. ``flex``: by flex_attention, the mask
    as a function over blocks (CUDA).
    """
    if mask is None:
        return functional.scaled_dot_product_attention(query, key, value)
    if flex:
        return _flex(query, key, value, mask)
    blind = ~mask.any(-1, keepdim=True)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=(mask | blind)[:, None])
    return out.masked_fill(blind[:, None], 0.0)


def attend_recent(query: Tensor, key: Tensor, value: Tensor, flex: bool = False) -> Tensor:
    """Attention of the LAST Q of M rows without padding: bottom-right causal, query i sees the keys j ≤ i + M - Q.

    ``is_causal=True`` alone would align the mask top-left, so that the newest events see nothing of the history.
    """
    rows, keys = query.shape[-2], key.shape[-2]
    if rows == keys:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    if flex or not query.is_cuda:
        mask = causal_rows(torch.arange(keys - rows, keys, device=key.device), keys)[None]
        return _flex(query, key, value, mask) if flex else attend(query, key, value, mask)
    # Fused kernels know this mask by name. On a CPU it would be made dense anyway, and importing it takes seconds.
    from torch.nn.attention.bias import causal_lower_right

    return functional.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(rows, keys))


def attend_candidates(
    query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, seen: Tensor | None
) -> Tensor:
    """Each of R candidate rows over the user's M shared rows and itself, one softmax over both.

    ``query``, ``own_key``, ``own_value``: (B, h, R, hd); ``key``, ``value``: (B, h, M, hd); ``seen``: (B, M) bool or
    None. The user's rows are never copied a candidate, and no candidate sees another.
    """
    scale = 1 / math.sqrt(query.shape[-1])
    shared = (query * scale) @ key.transpose(-1, -2)
    if seen is not None:
        shared = shared.masked_fill(~seen[:, None, None, :], -math.inf)
    own = ((query * scale) * own_key).sum(-1, keepdim=True)
    # In fp32 whatever the precision: the own score is always finite, so no row is empty.
    weights = torch.softmax(torch.cat((shared, own.to(shared.dtype)), -1), -1, dtype=torch.float32).to(value.dtype)
    return weights[..., :-1] @ value + weights[..., -1:] * own_value


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blind = ~mask.any(-1, keepdim=True)
    dense = (mask | blind).expand(query.shape[0], -1, -1)

    def allowed(batch: Tensor, _: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return dense[batch, row, column]

    blocks = create_block_mask(
        allowed, query.shape[0], None, query.shape[-2], key.shape[-2], device=query.device.type
    )  # fmt: skip
    run: Callable[..., Tensor] = torch.compile(flex_attention) if query.is_cuda else flex_attention
    return run(query, key, value, block_mask=blocks).masked_fill(blind[:, None], 0.0)
