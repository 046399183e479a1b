"""Continuations of one token sequence as branches that a model runs side by side, in one forward pass.

The sequence (the chain) has been run already and its keys and values are kept. A branch leaves it behind some token;
branches that leave at the same place share their common stem. What is fed of them are *rows*: every token but the last
of each branch, a shared one once. A row sees the chain up to where its branch leaves, its own ancestors and itself;
its position id goes on from where the branch leaves, however the rows are packed.

Rows are in depth-first order, so that the descendants of row r are the rows r + 1 ... end[r] − 1: who sees whom is a
comparison of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

MASK_BYTES = 64 << 20
"""Bytes of the largest additive mask, at four a number."""


@dataclass(frozen=True, slots=True)
class Branch:
    """The tokens ``ids`` behind the first ``at`` tokens of the chain."""

    at: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forest:
    """The rows of all branches of a chain, and where the log-probability of every branch token is read.

    Over the R rows, int64: ``tokens`` (R,) what is fed; ``at`` (R,) how many chain tokens the row sees; ``positions``
    (R,) its position id; ``end`` (R,) the row behind its last descendant. ``trees`` (number of trees + 1,) are the rows
    without a parent, and R.

    A *slot* is the number of a branch token, counted through all branches in the order given. ``first_*`` (branches,):
    the first token of a branch is read at the chain's position ``first_place``. ``later_*`` (n,): the others are read
    at the row ``later_row``. ``*_label`` are the tokens' ids, ``*_slot`` their slots.
    """

    tokens: np.ndarray
    at: np.ndarray
    positions: np.ndarray
    end: np.ndarray
    trees: np.ndarray
    first_place: np.ndarray
    first_label: np.ndarray
    first_slot: np.ndarray
    later_row: np.ndarray
    later_label: np.ndarray
    later_slot: np.ndarray

    @property
    def rows(self) -> int:
        """R, the tokens fed."""
        return len(self.tokens)

    @property
    def slots(self) -> int:
        """The tokens of all branches."""
        return len(self.first_slot) + len(self.later_slot)

    @property
    def largest_tree(self) -> int:
        """Rows of the largest tree; 0 without rows."""
        return int(np.diff(self.trees).max(initial=0))


def grow(branches: Sequence[Branch], *, merge: bool = True) -> Forest:
    """Pack branches. Without ``merge`` none shares a stem with another."""
    starts = np.cumsum([0, *(len(branch.ids) for branch in branches)])
    # In sorted order a branch shares with the one before it all that it shares with any before it.
    order = sorted(range(len(branches)), key=lambda number: (branches[number].at, branches[number].ids[:-1]))
    tokens: list[int] = []
    at: list[int] = []
    depth: list[int] = []
    parent: list[int] = []
    reads: list[tuple[int, int, int]] = []
    path: list[int] = []  # the rows of the branch at hand
    before: Branch | None = None
    for number in order:
        branch = branches[number]
        fed = branch.ids[:-1]
        shared = 0
        if merge and before is not None and before.at == branch.at:
            shared = common(before.ids[:-1], fed)
        del path[shared:]
        for level in range(shared, len(fed)):
            parent.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(fed[level])
            at.append(branch.at)
            depth.append(level)
        reads += [(path[level], branch.ids[level + 1], int(starts[number]) + level + 1) for level in range(len(fed))]
        before = branch
    later = np.array(reads, dtype=np.int64).reshape(-1, 3)
    place = np.array(at, dtype=np.int64)
    return Forest(
        tokens=np.array(tokens, dtype=np.int64),
        at=place,
        positions=place + np.array(depth, dtype=np.int64),
        end=_ends(parent),
        trees=np.array([*(row for row, above in enumerate(parent) if above < 0), len(tokens)], dtype=np.int64),
        first_place=np.array([branch.at - 1 for branch in branches], dtype=np.int64),
        first_label=np.array([branch.ids[0] for branch in branches], dtype=np.int64),
        first_slot=starts[:-1].astype(np.int64),
        later_row=later[:, 0],
        later_label=later[:, 1],
        later_slot=later[:, 2],
    )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def _ends(parent: Sequence[int]) -> np.ndarray:
    size = [1] * len(parent)
    for row in range(len(parent) - 1, -1, -1):
        if parent[row] >= 0:
            size[parent[row]] += size[row]
    return np.arange(len(parent), dtype=np.int64) + np.array(size, dtype=np.int64)


# -- packing --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Chunk:
    """The rows ``start`` ... ``stop`` − 1, fed together; of the rows before them those from ``base`` on are still in
    the cache (``base`` = ``start`` unless a tree is larger than a chunk)."""

    base: int
    start: int
    stop: int


def row_limit(columns: int, chains: int, batch_tokens: int) -> int:
    """How many rows of each of so many ``chains`` may be fed together behind ``columns`` cached tokens: at most
    ``batch_tokens`` in all, under a mask (chains × rows × (columns + rows)) of at most ``MASK_BYTES``; at least 1."""
    cells = MASK_BYTES // (4 * chains)
    widest = (math.isqrt(columns * columns + 4 * cells) - columns) // 2
    return max(1, min(batch_tokens // chains, widest))


def cut_chunks(forest: Forest, columns: int, limit: int) -> Iterator[Chunk]:
    """The rows in chunks of whole trees, at most ``limit`` rows each (see ``row_limit``).

    A larger tree is fed piece by piece; its earlier pieces stay in the cache until its last one, and its pieces are so
    small that the mask over them too keeps its bound.
    """
    start = stop = 0
    for first, end in zip(forest.trees[:-1].tolist(), forest.trees[1:].tolist(), strict=True):
        if end - start <= limit:
            stop = end
            continue
        if stop > start:
            yield Chunk(start, start, stop)
        start = stop = first
        if end - first <= limit:
            stop = end
            continue
        piece = max(1, min(limit, MASK_BYTES // (4 * (columns + end - first))))
        for here in range(first, end, piece):
            yield Chunk(first, here, min(here + piece, end))
        start = stop = end
    if stop > start:
        yield Chunk(start, start, stop)


def visible(columns: int, at: Tensor, row: Tensor, other: Tensor, end: Tensor) -> Tensor:
    """Which keys each row attends to, bool (..., R, columns + C).

    Args:
        columns: how many chain tokens the cache holds, padding included.
        at: (..., R) chain tokens that the row sees.
        row: (..., R) the row's number in its forest.
        other: (..., C) the numbers of the rows whose keys stand behind the chain's: the rows themselves, and before
            them those that are still cached.
        end: (..., C) the row behind the last descendant of each of those.
    """
    import torch

    chain = torch.arange(columns, device=at.device) < at[..., None]
    own = (other[..., None, :] <= row[..., None]) & (row[..., None] < end[..., None, :])
    return torch.cat([chain, own], dim=-1)
