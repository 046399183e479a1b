"""Figures of judgements: intervals a variant, or WinoControl's grid as heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.lot.lines import CELLS, DISTRACTORS, LEVELS, Comparison, Difference, Judgement, Rate
from toolbox.plot_style import GREY, counted, freeze, legend_below, looks, new_figure, short, styled, written
from toolbox.plots import plot_format, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 80
MOST_MAPS = 24
_FINEST = 0.05
"""A scale of gains reaches at least so far: differences of a point or two should not look like a change of colour."""

_MARKS = ("accuracy", "Pro", "Anti", "Con")


def draw(
    lines: Sequence[Judgement],
    comparisons: Sequence[Comparison],
    path: str | Path | None,
    *,
    baseline: str | None = None,
    title: str = "",
) -> Any:
    """The WinoControl grid where a line has one, else intervals a variant; written to ``path`` where given.

    Returns the figure. ValueError: no line with an accuracy. UsageProblem: a path that is not svg, png or pdf.
    """
    if any(map(_has_map, lines)):
        return draw_grids(lines, comparisons, path, baseline=baseline, title=title)
    return draw_intervals(lines, path, title=title)


def drawable(lines: Sequence[Judgement]) -> bool:
    """Whether ``draw`` finds something in these lines."""
    return any(_has_map(line) or _rates(line) for line in lines)


def _has_map(line: Judgement) -> bool:
    return any(cell.accuracy is not None for cell in (line.grid or {}).values())


# -- intervals --------------------------------------------------------------------------------------------------------
def draw_intervals(lines: Sequence[Judgement], path: str | Path | None, *, title: str = "") -> Any:
    """A row a facet and variant: accuracy with its interval, or Pro, Anti and Con where there are pairs.

    The first ``MOST_ROWS`` are drawn; the title says so where there are more. Returns the figure. ValueError: nothing
    to draw. UsageProblem: a path that is not svg, png or pdf.
    """
    if path is not None:
        plot_format(path)
    every = [(line, found) for line in lines if (found := _rates(line))]
    if not every:
        raise ValueError("no line has an accuracy: no figure to draw")
    rows = every[:MOST_ROWS]
    marks = [mark for mark in _MARKS if any(mark in found for _, found in rows)]
    look = looks(_MARKS)
    gap = 0.8 / len(marks)
    with styled():
        figure = new_figure((6.2, 1.2 + (0.17 + 0.11 * len(marks)) * len(rows)), _titled(title, len(rows), len(every)))
        axes = figure.subplots()
        for row, (_, found) in enumerate(rows):
            for place, mark in enumerate(marks):
                if mark in found:
                    _mark(axes, found[mark], row + gap * (place - (len(marks) - 1) / 2), look[mark])
        axes.set_yticks(range(len(rows)), [named(line) for line, _ in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("%")
        axes.grid(visible=False, axis="y")
        for row in range(1, len(rows)):
            new_facet = rows[row][0].by != rows[row - 1][0].by
            axes.axhline(row - 0.5, color=GREY if new_facet else "#e4e4e4", lw=0.7)
        legend_below(figure, _legend(rows, marks, look))
        freeze(figure)
        figure.set_label("\n".join(_told(line, found) for line, found in rows))
    if path is not None:
        save(figure, path)
    return figure


def named(line: Judgement) -> str:
    """A line's variant, and the facet it is of."""
    return written(", ".join([*(str(value) for value in line.by.values()), line.variant]))


def _titled(title: str, drawn: int, there: int) -> str:
    return title if drawn == there else f"{title} (first {drawn} of {there})".strip()


def _rates(line: Judgement) -> dict[str, Rate]:
    if line.con is not None and line.con.con is not None:
        found = {"Pro": line.con.pro, "Anti": line.con.anti, "Con": line.con.con}
    else:
        found = {"accuracy": line.accuracy or (line.bbq and line.bbq.all.accuracy)}
    return {mark: rate for mark, rate in found.items() if rate is not None}


def _mark(axes: Axes, rate: Rate, y: float, own: Any) -> None:
    if (bounds := rate.shown) is not None:
        axes.hlines(y, 100 * bounds[0], 100 * bounds[1], color=own.colour, lw=1.3, alpha=0.6)
    axes.plot(100 * rate.estimate, y, own.marker, color=own.colour, ms=5.5, mec="white", mew=0.7, zorder=4)


def _legend(rows: Sequence[tuple[Judgement, dict[str, Rate]]], marks: Sequence[str], look: Any) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = []
    for mark in marks:
        style = {"color": look[mark].colour, "marker": look[mark].marker, "ls": "none", "ms": 6, "mec": "white"}
        counts = (found[mark].n for _, found in rows if mark in found)
        handles.append(Line2D([], [], label=counted(mark, *_ends(counts)), **style))
    if any(rate.shown for _, found in rows for rate in found.values()):
        handles.append(Line2D([], [], color=GREY, lw=1.3, alpha=0.6, label="95 % interval"))
    return handles


def _ends(counts: Any) -> list[int]:
    """The smallest and the largest: a legend has no room for all."""
    known = sorted(counts)
    return known[:1] + known[-1:]


def _told(line: Judgement, found: dict[str, Rate]) -> str:
    words = "; ".join(
        f"{mark} {short(100 * rate.estimate, *(100 * bound for bound in rate.shown or ()))} (n={rate.n})"
        for mark, rate in found.items()
    )
    return written(f"{named(line)}: {words}", 4000)


# -- the grid ---------------------------------------------------------------------------------------------------------
def draw_grids(
    lines: Sequence[Judgement],
    comparisons: Sequence[Comparison],
    path: str | Path | None,
    *,
    baseline: str | None = None,
    title: str = "",
) -> Any:
    """A map a facet and variant, levels down and distractors across: accuracy of the baseline, gains of the others.

    Without a baseline each map shows an accuracy. One colour scale serves all accuracies and one, with its centre at
    0, all gains; each cell has its 95 % interval. The first ``MOST_MAPS`` are drawn; the title says so where there are
    more. Returns the figure. ValueError: no line with a grid. UsageProblem: a path that is not svg, png or pdf.
    """
    if path is not None:
        plot_format(path)
    every = [_map(line, comparisons) for line in lines if _has_map(line)]
    if not every:
        raise ValueError("no line has a grid: no figure to draw")
    maps = every[:MOST_MAPS]
    columns = min(3, len(maps))
    rows = math.ceil(len(maps) / columns)
    reach = max([_FINEST, *(abs(value) for _, gains, values, _ in maps if gains for value, _ in values.values())])
    with styled():
        figure = new_figure((0.9 + 2.5 * columns, 0.9 + 2.0 * rows), _titled(title, len(maps), len(every)))
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        for spare in places[len(maps) :]:
            spare.remove()
        for axes, (name, gains, values, n) in zip(places, maps, strict=False):
            what = f"gain over {baseline}" if gains else "accuracy"
            axes.set_title(f"{name}: {what}{'' if n is None else f' (n={n} a cell)'}", fontsize=8)
            _heat(axes, values, gains, reach)
        freeze(figure)
        figure.set_label("\n".join(_map_told(*one) for one in maps))
    if path is not None:
        save(figure, path)
    return figure


_Bounds = tuple[float, float] | None
_Map = tuple[str, bool, dict[str, tuple[float, _Bounds]], int | None]
"""Name, whether it shows gains, share and interval by cell, and the n of a cell where all are equal."""


def _map(line: Judgement, comparisons: Sequence[Comparison]) -> _Map:
    one = next(
        (one for one in comparisons if one.grid and (one.by, one.variant) == (line.by, line.variant)),
        None,
    )
    cells: Any = line.grid if one is None else one.grid
    found = {cell: part.accuracy for cell, part in cells.items() if part.accuracy is not None}
    counts = {rate.n for rate in found.values()}
    values = {cell: (rate.estimate, _bounds(rate)) for cell, rate in found.items()}
    return named(line), one is not None, values, counts.pop() if len(counts) == 1 else None


def _bounds(rate: Rate | Difference) -> _Bounds:
    if isinstance(rate, Rate):
        return rate.shown
    return None if rate.low is None or rate.high is None else (rate.low, rate.high)


def _heat(axes: Axes, values: dict[str, tuple[float, _Bounds]], gains: bool, reach: float) -> None:
    import numpy as np

    empty = (np.nan, None)
    shares = np.array([[values.get(level + around, empty)[0] for around in DISTRACTORS] for level in LEVELS])
    scale = {"cmap": "RdBu", "vmin": -reach, "vmax": reach} if gains else {"cmap": "Blues", "vmin": 0, "vmax": 1}
    image = axes.imshow(shares, aspect="auto", **scale)
    for row in range(len(LEVELS)):
        for column in range(len(DISTRACTORS)):
            share = shares[row, column]
            if math.isnan(share):
                continue
            # Luminance of the cell decides: dark words vanish on dark blue.
            red, green, blue, _ = image.cmap(image.norm(share))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            ink = {"ha": "center", "color": "white" if dark else "black"}
            sign = "+" if gains else ""
            axes.text(column, row, f"{100 * share:{sign}.1f}", va="bottom", fontsize=8.5, **ink)
            bounds = values[LEVELS[row] + DISTRACTORS[column]][1]
            if bounds is not None:
                told = ", ".join(f"{100 * bound:{sign}.1f}" for bound in bounds)
                axes.text(column, row + 0.06, f"[{told}]", va="top", fontsize=6.5, **ink)
    axes.set_xticks(range(len(DISTRACTORS)), DISTRACTORS)
    axes.set_yticks(range(len(LEVELS)), LEVELS)
    axes.tick_params(length=0)
    axes.set_xlabel("distractors")
    axes.set_ylabel("wording")
    axes.grid(visible=False)


def _map_told(name: str, gains: bool, values: dict[str, tuple[float, _Bounds]], n: int | None) -> str:
    words = ", ".join(f"{cell} {100 * values[cell][0]:.1f}" for cell in CELLS if cell in values)
    return written(f"{counted(name, n)}, {'gain in points' if gains else 'accuracy %'}: {words or 'no data'}", 4000)
