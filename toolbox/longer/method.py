"""LONGER's sequence part: token merge, query choice, hybrid attention, and the user's side as an exact cache.

Rows stand oldest to newest: X = [M_1 .. M_L' | g_uid | g_cls], then the candidate's row; a query whose row in X is o
sees the rows j ≤ o. The paper sorts newest first and writes the mirrored mask; the result is the same. Its section 3.3
also says that global tokens influence the sequence's tokens, which contradicts its mask and its cache: the mask is
followed here. Because no user row sees a candidate, the user's keys and values (``prefill``) serve every candidate of a
request (``score``), exactly, in training as in serving.

Shapes: B requests, L events of width d, K events a merged token of width D = Kd, L' = ⌈L/K⌉, k query rows, m user-side
global tokens, R candidates. Source: Chai et al., "LONGER" (RecSys 2025, arXiv 2505.04421), sections 3.2 to 3.4; what
the paper leaves open (heads, pre-norm, GELU, projections) is our reconstruction: docs/longer.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolbox.longer.attention import (
    attend,
    attend_candidates,
    attend_recent,
    causal_rows,
    join_heads,
    split_heads,
)

STRATEGIES = ("recent", "uniform", "recent+uniform", "learnable")

Cache = dict[str, Tensor]
"""What a sequence module keeps of a user's side: tensors by name, first dimension the request."""


@dataclass(frozen=True)
class History:
    """The user's side of B requests, padded on the left to a common length L.

    ``events``: (B, L, d), the newest last; ``valid``: (B, L) bool, None where nothing is padded; ``delta``: (B, L)
    whole seconds (or whatever unit time has) before the request; ``uid``: (B, d) or None.
    """

    events: Tensor
    valid: Tensor | None
    delta: Tensor
    uid: Tensor | None = None


class Block(nn.Module):
    """Pre-norm transformer block of width w, 12w² + 13w parameters.

    y = x + O(attn(Q(LN₁x), K(LN₁x_kv), V(LN₁x_kv))); out = y + W₂ GELU(W₁ LN₂ y), W₁ four times as wide.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def queries(self, x: Tensor) -> Tensor:
        """(B, rows, w) to (B, heads, rows, w/heads)."""
        return split_heads(self.query(self.norm1(x)), self.heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, (B, heads, rows, w/heads) each."""
        normed = self.norm1(x)
        return split_heads(self.key(normed), self.heads), split_heads(self.value(normed), self.heads)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rows ``x`` behind attention (B, heads, rows, w/heads), residuals and feed-forward network."""
        x = x + self.dropout(self.out(join_heads(attended)))
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class TokenMerge(nn.Module):
    """Groups of K adjacent events as one token: blocks of width d within the group, then concatenation to D = Kd.

    Groups are aligned to the newest end: padding stands before the oldest event, so that the partial group is the
    oldest. Padded events are masked as keys inside their group and zeroed before concatenation.
    """

    def __init__(self, dim: int, merge: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.merge = merge
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))

    def forward(self, events: Tensor, valid: Tensor | None, recompute: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, L, d) and (B, L) to (B, L', Kd) and (B, L'); L must be a multiple of K."""
        batch, length, dim = events.shape
        x = events.reshape(-1, self.merge, dim)
        inside = None if valid is None else valid.reshape(-1, self.merge)
        mask = None if inside is None else inside[:, None, :].expand(-1, self.merge, -1)
        for block in self.blocks:
            x = checkpoint(_within, block, x, mask, use_reentrant=False) if recompute else _within(block, x, mask)
        if inside is not None:
            x = x * inside[..., None].to(x.dtype)
        merged = x.reshape(batch, length // self.merge, self.merge * dim)
        return merged, None if valid is None else valid.reshape(batch, -1, self.merge).any(-1)


def _within(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    key, value = block.keys_values(x)
    return block.finish(x, attend(block.queries(x), key, value, mask))


def query_rows(strategy: str, valid: Tensor, count: int) -> Tensor:
    """Which of the L' merged rows are queries: (B, min(count, L')) row numbers, ascending; ``valid`` is (B, L') bool.

    With n valid rows (the last n): recent takes the last k; uniform rows n - 1 - ⌊jn/k⌋, j = 0 .. k-1; recent+uniform
    the last ⌈k/2⌉ and ⌊k/2⌋ uniform ones of the rest. If n ≤ k all are taken (what is missing are padded rows).
    """
    total = valid.shape[-1]
    count = min(count, total)
    recent = torch.arange(total - count, total, device=valid.device).expand(valid.shape[0], -1)
    n = valid.sum(-1, keepdim=True)
    if strategy in ("recent", "learnable"):
        return recent
    late = 0 if strategy == "uniform" else -(-count // 2)
    spread, rest = count - late, n - late
    if spread == 0:
        return recent
    step = torch.arange(spread - 1, -1, -1, device=valid.device)
    even = rest - 1 - torch.div(step * rest, spread, rounding_mode="floor") + (total - n)
    chosen = torch.cat((even, recent[:, spread:]), -1)
    return torch.where(n > count, chosen, recent)


class Longer(nn.Module):
    """The sequence part. ``prefill`` reads a history once; ``score`` sends candidates through against what it kept.

    ``queries`` counts merged tokens; ``layers`` is N; ``cls`` the number of learned global tokens; ``uid`` whether the
    user is one; ``read_cls`` whether the head reads the CLS rows beside the candidate's.
    """

    def __init__(
        self,
        dim: int,
        *,
        merge: int = 8,
        inner_layers: int = 1,
        queries: int = 100,
        strategy: str = "recent",
        layers: int = 1,
        heads: int | None = None,
        cls: int = 1,
        uid: bool = False,
        read_cls: bool = False,
        dropout: float = 0.0,
        recompute: str = "none",
        flex: bool = False,
    ) -> None:
        super().__init__()
        width = dim * merge
        heads = heads or max(1, width // 64)
        self.dim, self.merge_factor, self.width, self.count, self.strategy = dim, merge, width, queries, strategy
        self.read_cls, self.recompute, self.flex = read_cls, recompute, flex
        self.merge = TokenMerge(dim, merge, inner_layers, max(1, dim // 32), dropout)
        self.cross = Block(width, heads, dropout)
        self.selves = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.cls = nn.Parameter(0.02 * torch.randn(cls, width)) if cls else None
        self.uid = nn.Linear(dim, width) if uid else None
        self.learned = nn.Parameter(0.02 * torch.randn(queries, width)) if strategy == "learnable" else None
        self.target = nn.Linear(2 * dim, width)

    @property
    def output_width(self) -> int:
        """Width of what ``score`` gives: D, and D for each CLS row that is read."""
        return self.width * (1 + (len(self.cls) if self.read_cls and self.cls is not None else 0))

    # -- the user's side ----------------------------------------------------------------------------------------------
    def prefill(self, history: History) -> Cache:
        """Keys and values of every layer: ``k0`` and ``v0`` of L' + m rows, ``k1`` .. of k + m; which are valid; CLS.

        Of the last layer nothing else is computed, since nobody reads it.
        """
        merged, valid = self.merge(history.events, history.valid, self.training and self.recompute == "blocks")
        tail = self._globals(merged.shape[0], history.uid, merged)
        x = torch.cat((merged, *tail), 1)
        seen = None if valid is None else nn.functional.pad(valid, (0, x.shape[1] - valid.shape[1]), value=True)
        cache: Cache = {}
        rows, row_numbers, kept = self._query_rows(merged, valid, tail)
        for number, block in enumerate([self.cross, *self.selves]):
            source, mask_keys = (x, seen) if number == 0 else (rows, kept)
            key, value = block.keys_values(source)
            cache[f"k{number}"], cache[f"v{number}"] = key, value
            if mask_keys is not None:
                cache[f"seen{number}"] = mask_keys
            last = number == len(self.selves)
            if last and not self.read_cls:
                break
            if last and self.cls is not None:  # CLS rows are the last ones and see every row
                rows = rows[:, -len(self.cls) :]
                row_numbers = row_numbers[:, -len(self.cls) :]
            rows = self._layer(block, rows, key, value, row_numbers, mask_keys, number == 0)
            row_numbers = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
        if self.read_cls and self.cls is not None:
            cache["cls"] = rows.flatten(1)
        return cache

    def _globals(self, batch: int, uid: Tensor | None, like: Tensor) -> list[Tensor]:
        tail = []
        if self.uid is not None:
            assert uid is not None
            tail.append(self.uid(uid)[:, None].to(like.dtype))
        if self.cls is not None:
            tail.append(self.cls.expand(batch, -1, -1).to(like.dtype))
        return tail

    def _query_rows(
        self, merged: Tensor, valid: Tensor | None, tail: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows O = [chosen history ; globals], their row numbers in X, and which of them are valid."""
        batch, total = merged.shape[:2]
        globals_count = sum(one.shape[1] for one in tail)
        if self.learned is not None:
            # They stand between history and globals: each sees all merged tokens and no global.
            chosen = self.learned.expand(batch, -1, -1).to(merged.dtype)
            numbers = torch.full((batch, chosen.shape[1]), total - 1, device=merged.device)
            kept = None
        elif valid is None and self.strategy == "recent":
            count = min(self.count, total)
            chosen = merged[:, total - count :]
            numbers = torch.arange(total - count, total, device=merged.device).expand(batch, -1)
            kept = None
        else:
            known = valid if valid is not None else merged.new_ones((batch, total), dtype=torch.bool)
            numbers = query_rows(self.strategy, known, self.count)
            chosen = merged.gather(1, numbers[..., None].expand(-1, -1, merged.shape[-1]))
            kept = known.gather(1, numbers)
            kept = nn.functional.pad(kept, (0, globals_count), value=True)
        behind = torch.arange(total, total + globals_count, device=merged.device).expand(batch, -1)
        return torch.cat((chosen, *tail), 1), torch.cat((numbers, behind), 1), kept

    def _layer(
        self, block: Block, rows: Tensor, key: Tensor, value: Tensor, numbers: Tensor, seen: Tensor | None, cross: bool
    ) -> Tensor:
        plain = seen is None and (not cross or (self.strategy == "recent" and self.learned is None))

        def attention(rows: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = block.queries(rows)
            if plain:
                return attend_recent(query, key, value, self.flex)
            mask = causal_rows(numbers, key.shape[-2])
            if seen is not None:
                mask = mask & seen[:, None, :]
            return attend(query, key, value, mask, self.flex)

        def whole(rows: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return block.finish(rows, attention(rows, key, value))

        if self.training and self.recompute == "blocks":
            return checkpoint(whole, rows, key, value, use_reentrant=False)
        if self.training and self.recompute == "attention":
            return block.finish(rows, checkpoint(attention, rows, key, value, use_reentrant=False))
        return whole(rows, key, value)

    # -- the candidates -----------------------------------------------------------------------------------------------
    def score(self, cache: Cache, candidates: Tensor) -> Tensor:
        """Candidates (B, R, 2d), [t_v ; c_r], as rows (B, R, width): each over the cached rows and itself."""
        x = self.target(candidates)
        for number, block in enumerate([self.cross, *self.selves]):
            shared = cache[f"k{number}"], cache[f"v{number}"], cache.get(f"seen{number}")
            if self.training and self.recompute == "blocks":
                x = checkpoint(_candidate_layer, block, x, *shared, use_reentrant=False)
            else:
                x = _candidate_layer(block, x, *shared)
        if self.read_cls and self.cls is not None:
            x = torch.cat((x, cache["cls"][:, None].expand(-1, x.shape[1], -1).to(x.dtype)), -1)
        return x

    # -- the plain path -----------------------------------------------------------------------------------------------
    def forward_joint(self, history: History, candidate: Tensor) -> Tensor:
        """One candidate (B, 2d) a request as the last row, every row computed under a dense mask; (B, width).

        What ``score(prefill(history), candidate)`` must equal; for checks and ``--no-kv-cache``.
        """
        merged, valid = self.merge(history.events, history.valid)
        target = self.target(candidate)[:, None].to(merged.dtype)
        tail = [*self._globals(merged.shape[0], history.uid, merged), target]
        rows, numbers, kept = self._query_rows(merged, valid, tail)
        x = torch.cat((merged, *tail), 1)
        seen = None if valid is None else nn.functional.pad(valid, (0, x.shape[1] - valid.shape[1]), value=True)
        for number, block in enumerate([self.cross, *self.selves]):
            source, mask_keys = (x, seen) if number == 0 else (rows, kept)
            mask = causal_rows(numbers, source.shape[1])
            if mask_keys is not None:
                mask = mask & mask_keys[:, None, :]
            key, value = block.keys_values(source)
            rows = block.finish(rows, attend(block.queries(rows), key, value, mask))
            numbers = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[0], -1)
        out = rows[:, -1]
        if self.read_cls and self.cls is not None:
            out = torch.cat((out, rows[:, -1 - len(self.cls) : -1].flatten(1)), -1)
        return out


def _candidate_layer(block: Block, x: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
    own_key, own_value = block.keys_values(x)
    return block.finish(x, attend_candidates(block.queries(x), key, value, own_key, own_value, seen))
