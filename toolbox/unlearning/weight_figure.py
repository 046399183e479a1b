"""The weights of a step against the probabilities they were given at: a record that adds up, and its figure.

A step's forget tokens are counted in cells of probability p and weight w, and their weights summed in each interval of
p. Counts and sums are one vector, so those of micro-batches and processes add up, and it tells no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from torch import Tensor

BINS = 20

P_EDGES: tuple[float, ...] = tuple(round(place / BINS, 10) for place in range(BINS + 1))
"""Edges of the intervals of p: of equal width, each with its lower edge, the last one with 1 too."""

WEIGHT_EDGES: tuple[float | None, ...] = (
    0.0,
    *(round(10 ** (4 * place / (BINS - 2) - 4), 10) for place in range(BINS - 1)),
    None,
)
"""Edges of the intervals of w: 0, then 1e-4 to 1 in equal ratios, then open (None), because weights may exceed 1. Each
interval has its lower edge. Logarithmic, because SatImp's weights with (5, 1) do not reach .07."""

SIZE = BINS * BINS + BINS
"""Numbers of the vector: the counts, cell after cell of the first p interval, then of the next; then the sums of w."""


def bin_counts(nll: Tensor, weights: Tensor) -> Tensor:
    """(SIZE,) float64: tokens by p = exp(−l) and weight, and the sum of weights by p. Vectors of parts add up.

    Args:
        nll: (n,) l in nats; ``weights``: (n,) w ≥ 0. Tokens of which either is NaN are left out.
    """
    import torch

    known = ~(nll.isnan() | weights.isnan())
    p, w = torch.exp(-nll.detach()[known].double()), weights.detach()[known].double()
    column, level = _interval(p, P_EDGES[1:-1]), _interval(w, WEIGHT_EDGES[1:-1])
    counts = torch.bincount(column * BINS + level, minlength=BINS * BINS).double()
    return torch.cat([counts, w.new_zeros(BINS).index_add(0, column, w)])


def _interval(values: Tensor, inner: Sequence[float | None]) -> Tensor:
    import torch

    return torch.bucketize(values, torch.tensor(inner, dtype=values.dtype, device=values.device), right=True)


def histogram(step: int, vector: Sequence[float]) -> dict[str, Any]:
    """One line of the record: ``bin_counts`` of a whole step as JSON.

    ``n`` tokens; ``counts``: a list for each interval of ``p_edges`` of the tokens in each interval of
    ``weight_edges`` (the last, null, is open); ``weight_mean``: the mean weight in each interval of p, null without
    tokens. Six digits, so that the order of summation does not show.
    """
    values = [float(value) for value in vector]
    counts = [[round(value) for value in values[start : start + BINS]] for start in range(0, BINS * BINS, BINS)]
    means = [
        float(f"{total / sum(column):.6g}") if sum(column) else None
        for total, column in zip(values[BINS * BINS :], counts, strict=True)
    ]
    return {
        "step": step,
        "n": sum(map(sum, counts)),
        "p_edges": list(P_EDGES),
        "weight_edges": list(WEIGHT_EDGES),
        "counts": counts,
        "weight_mean": means,
    }


def draw_weights(lines: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw the first and the last of the lines side by side and write the figure (svg, png or pdf).

    Above, the share of a step's tokens in each cell of p and w, and the mean weight over p; below, the share of tokens
    over p. ValueError: no line. UsageProblem: a path of another kind, before anything is drawn.
    """
    from toolbox.plot_style import freeze, legend_below, new_figure, styled
    from toolbox.plots import plot_format, save

    if not lines:
        raise ValueError("no step to draw")
    plot_format(path)
    shown = [lines[0], lines[-1]] if len(lines) > 1 else [lines[0]]
    with styled():
        figure = new_figure((2.2 + 2.6 * len(shown), 4.6), title)
        heights = {"height_ratios": [3, 1]}
        grid = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False, gridspec_kw=heights)
        for (above, below), line in zip(grid.T, shown, strict=True):
            cells = _draw_cells(above, line)
            _draw_mass(below, line)
        grid[0][0].set_ylabel("weight")
        grid[1][0].set_ylabel("share of tokens")
        bar = figure.colorbar(cells, ax=list(grid[0]), label="share of tokens in the cell", pad=0.02, aspect=26)
        bar.outline.set_visible(False)
        bar.ax.minorticks_off()
        bar.ax.set_yticks([0.001, 0.01, 0.1, 1], [".001", ".01", ".1", "1"])
        legend_below(figure, grid[0][0].get_legend_handles_labels()[0])
        freeze(figure)
        figure.set_label("\n".join(_describe(line) for line in shown))
    save(figure, path)


_ZERO, _OVER = 10**-4.4, 10**0.4
"""From where the first interval of w is drawn, to where the last one: a logarithmic scale has no 0 and no infinity."""


def _draw_cells(axes: Axes, line: Mapping[str, Any]) -> QuadMesh:
    """Cells in the shade of their share of tokens, on a scale common to all panels; the mean weight as a line."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    from toolbox.plot_style import INK, looks

    shares = np.array(line["counts"], dtype=float).T / max(line["n"], 1)
    shades = LinearSegmentedColormap.from_list("share", ["#e3eef7", "#7fb3d8", looks(["share"])["share"].colour])
    axes.set_yscale("log")
    levels = [_ZERO, *WEIGHT_EDGES[1:-1], _OVER]
    cells = axes.pcolormesh(P_EDGES, levels, np.ma.masked_equal(shares, 0), cmap=shades, norm=LogNorm(1e-3, 1))
    inside = [math.nan if mean is None else min(max(mean, _ZERO), _OVER) for mean in line["weight_mean"]]
    axes.plot(_centres(), inside, color=INK, lw=1.2, marker="o", ms=3, mec="white", mew=0.4, label="mean weight")
    axes.set(xlim=(0, 1), ylim=(_ZERO, _OVER), title=f"Step {line['step']} (n={line['n']} tokens)")
    axes.set_yticks([_ZERO, 1e-4, 1e-3, 1e-2, 1e-1, 1], ["0", ".0001", ".001", ".01", ".1", "1"])
    axes.minorticks_off()
    return cells


def _draw_mass(axes: Axes, line: Mapping[str, Any]) -> None:
    from toolbox.plot_style import GREY

    shares = [sum(column) / max(line["n"], 1) for column in line["counts"]]
    axes.bar(_centres(), shares, width=0.9 / BINS, color=GREY)
    axes.set(ylim=(0, 1), xlabel="probability p of the token")


def _centres() -> list[float]:
    return [(low + high) / 2 for low, high in pairwise(P_EDGES)]


def _describe(line: Mapping[str, Any]) -> str:
    """The mean weight at the ends of p and where it is highest, in words, for the metadata."""
    from toolbox.plot_style import short

    known = [(at, mean) for at, mean in zip(_centres(), line["weight_mean"], strict=True) if mean is not None]
    if not known:
        return f"step {line['step']}: no tokens"
    best = max(known, key=lambda pair: pair[1])
    told = ", ".join(f"{short(mean)} at p {short(at)}" for at, mean in dict.fromkeys((known[0], best, known[-1])))
    return f"step {line['step']} (n={line['n']}): mean weight {told}"
