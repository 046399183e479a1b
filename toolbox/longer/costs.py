"""What LONGER costs: floating-point operations, parameters and cache bytes, by formula.

One multiply-add counts as 2 FLOPs; a matrix product of (a, b) by (b, c) is 2abc. Feed-forward networks are four times
as wide as their block. Symbols: L events of width d, merged K at a time into L' = ⌈L/K⌉ tokens of width D = Kd, k of
them queries; m user-side global tokens; N self layers behind the cross layer; R candidates of one request.

Source: Chai et al., "LONGER" (arXiv 2505.04421), section 3.2 for plain and merged layers; the rest follows from the
same counting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PAPER_TABLE = {
    "no merge, all 2000 queries": (1, False, 2000, 3.73),
    "K=4, concatenated": (4, False, 500, 2.13),
    "K=8, concatenated": (8, False, 250, 3.03),
    "K=8 + inner, all 250 queries": (8, True, 250, 3.52),
    "K=8 + inner, recent 50": (8, True, 50, 1.27),
    "K=8 + inner, recent 80": (8, True, 80, 1.59),
    "K=8 + inner, recent 100": (8, True, 100, 1.91),
    "K=8 + inner, recent 150": (8, True, 150, 2.36),
    "K=8 + inner, recent 200": (8, True, 200, 2.93),
}
"""The distinct rows of the paper's Table 2 that have a count of their own: merge, inner block, queries, GFLOPs."""

_FITTED_BLOCKS, _FITTED_INNER = 3.30, 10.3


def block_parameters(width: int) -> int:
    """Parameters of one transformer block of ``width`` w: 12w² + 13w (six matrices with biases, two layer norms)."""
    return 12 * width**2 + 13 * width


def plain_layer_flops(length: int, dim: int) -> float:
    """Forward FLOPs of one transformer layer over ``length`` L tokens of width d: 24Ld² + 4L²d."""
    return 24 * length * dim**2 + 4 * length**2 * dim


def merged_layer_flops(length: int, dim: int, merge: int) -> float:
    """The same layer after K tokens became one: ``plain_layer_flops(L/K, Kd)`` = 24LKd² + 4L²d/K."""
    return plain_layer_flops(length / merge, dim * merge)  # type: ignore[arg-type]


def merged_ratio(length: int, dim: int, merge: int) -> float:
    """Merged over plain: (6dK + L/K) / (6d + L)."""
    return (6 * dim * merge + length / merge) / (6 * dim + length)


def break_even_length(dim: int, merge: int) -> int:
    """L* = 6dK: with no more events than this, merging saves nothing."""
    return 6 * dim * merge


def best_merge(length: int, dim: int) -> float:
    """K* = √(L/(6d)), the merge factor of fewest FLOPs."""
    return math.sqrt(length / (6 * dim))


@dataclass(frozen=True)
class Sizes:
    """The sizes that a cost depends on. ``queries`` counts merged tokens; ``user_globals`` is m."""

    length: int
    dim: int
    merge: int
    inner_layers: int
    queries: int
    layers: int
    user_globals: int

    @property
    def width(self) -> int:
        """D = Kd."""
        return self.dim * self.merge

    @property
    def tokens(self) -> int:
        """L' = ⌈L/K⌉."""
        return -(-self.length // self.merge)

    @property
    def keys(self) -> int:
        """Rows that the cross layer attends to: L' + m."""
        return self.tokens + self.user_globals

    @property
    def rows(self) -> int:
        """Rows of the self layers: k + m, k at most L'."""
        return min(self.queries, self.tokens) + self.user_globals


def inner_flops(sizes: Sizes) -> float:
    """The blocks within groups, forward: (24Ld² + 4LKd) each."""
    one = 24 * sizes.length * sizes.dim**2 + 4 * sizes.length * sizes.merge * sizes.dim
    return sizes.inner_layers * one


def request_flops(sizes: Sizes, *, executed: bool = False, read_rows: int = 0) -> dict[str, float]:
    """Forward FLOPs of a request's user side, by part.

    The cross layer takes 20(k+m)D² + 4(L'+m)D² + 4(k+m)(L'+m)D, each self layer 24(k+m)D² + 4(k+m)²D. ``executed``
    counts what this implementation does: of the last layer only keys and values, 4D² a row, and ``read_rows`` whole
    rows (CLS tokens where the head reads them).
    """
    d2 = sizes.width**2
    parts = {"inner": inner_flops(sizes)}
    for layer in range(1 + sizes.layers):
        keys = sizes.keys if layer == 0 else sizes.rows
        queries = sizes.rows if layer < sizes.layers or not executed else read_rows
        parts["cross" if layer == 0 else f"self{layer}"] = (
            20 * queries * d2 + 4 * keys * d2 + 4 * queries * keys * sizes.width
        )
    return parts


def candidate_flops(sizes: Sizes) -> dict[str, float]:
    """Forward FLOPs of one candidate's row: cross 24D² + 4(L'+m+1)D, each self layer 24D² + 4(k+m+1)D."""
    d2 = 24 * sizes.width**2
    parts = {"cross": d2 + 4 * (sizes.keys + 1) * sizes.width}
    for layer in range(1, 1 + sizes.layers):
        parts[f"self{layer}"] = d2 + 4 * (sizes.rows + 1) * sizes.width
    return parts


def flops_per_label(sizes: Sizes, candidates: float, *, executed: bool = True, read_rows: int = 0) -> float:
    """Forward FLOPs of the sequence part for one label when a request has ``candidates`` of them; training is 3×."""
    user = sum(request_flops(sizes, executed=executed, read_rows=read_rows).values())
    return user / candidates + sum(candidate_flops(sizes).values())


def cache_bytes(sizes: Sizes, bytes_a_number: int = 4) -> int:
    """Keys and values of all layers: 2·D·b·[(L'+m) + N(k+m)]."""
    return 2 * sizes.width * bytes_a_number * (sizes.keys + sizes.layers * sizes.rows)


def paper_gflops(merge: int, inner: bool, queries: int, length: int = 2000, dim: int = 32) -> float:
    """A row of the paper's Table 2 by the counting above, in GFLOPs.

    3.30·[20kD² + 4L'D² + 4kL'D + 24kD² + 4k²D] + 10.3·[24Ld² + 4LKd]: one cross and one self layer. Both factors are
    FITTED to the table (the first is forward and backward and a tenth more, the second is unexplained), so agreement
    makes the counting plausible and proves nothing.
    """
    width, tokens = merge * dim, length // merge
    blocks = 44 * queries * width**2 + 4 * tokens * width**2 + 4 * queries * tokens * width + 4 * queries**2 * width
    within = 24 * length * dim**2 + 4 * length * merge * dim if inner else 0
    return (_FITTED_BLOCKS * blocks + _FITTED_INNER * within) / 1e9
