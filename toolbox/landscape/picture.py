"""Pictures of a landscape: how states spread over the map, stage by stage and by outcome, and their metrics as curves.

The panels of a figure, and the figures of all facets of a map, share limits and landmarks, so that they compare. Wrong
and correct paths differ in row, marker and name as well as in colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.features import Features
from toolbox.landscape.method import MASSES, Floats, Integers, gaussian_density, mass_levels
from toolbox.landscape.metrics import Cell, Facet, facet_name, stages
from toolbox.landscape.project import LandscapeMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Density = Literal["kde", "hist"]

FEW_STATES = 20
"""A panel with fewer states says so and shows them alone: the shape of their density would be chance."""

GRID = 100  # points of the density a side
CELLS = 25  # of the histogram


class _Row(NamedTuple):
    """One row of panels: which paths, their name, marker and colours (light, dark, points)."""

    outcome: int
    name: str
    marker: str
    light: str
    dark: str
    points: str


_ROWS = {
    0: _Row(0, "wrong", "v", "#fdeee6", "#dd7740", "#4a1d00"),
    1: _Row(1, "correct", "o", "#e8f1f8", "#4790c4", "#00263d"),
    -1: _Row(-1, "all", "o", "#f0f0f0", "#8c8c8c", "#1a1a1a"),
}
_GOLD = "#F0E442"  # light, so that it stands out in print from any shade below it

_CURVES = {
    "consistency": ("Consistency (last state left out)", "share of states", (0.0, 1.0)),
    "uncertainty": ("Uncertainty (of distances)", "nats", None),
    "uncertainty_likelihood": ("Uncertainty (of likelihoods)", "nats", None),
    "thought_perplexity": ("Perplexity of the thought", "perplexity", None),
    "gold_share": ("Distance to the right answer", "share of distances", None),
}
"""Panels of the metrics' figure: title, unit, ends of the scale. u/ln k is u on another scale, hence not drawn."""


# --- the map ----------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """One pair of axes: its row, its stage of progress from 1, its states (rows of ``Features``) and their places."""

    axes: Axes
    row: _Row
    stage: int
    states: Integers
    xy: Floats


def draw_landscape(
    landscape: LandscapeMap,
    features: Features,
    *,
    facet: Facet | None = None,
    paths: NDArray[np.bool_] | None = None,
    bins: int = 5,
    compat: bool = False,
    density: Density = "kde",
    labels: Sequence[str] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the map's states of ``paths``, a (P,) mask (all without it): rows wrong and correct, a column a stage.

    Without right answers there is one row. ``facet`` names the paths in the title. ``kde``: filled contours of the
    density under the states; ``hist``: counts in cells. ``labels`` of the choices, in the question's order, are written
    at the landmarks of a map of one question. The figure is written if ``path`` is given.

    UsageProblem: a path whose suffix is not svg, png or pdf, before anything is drawn.
    """
    from toolbox.plot_style import freeze, new_figure, styled
    from toolbox.plots import plot_format, save

    if path is not None:
        plot_format(path)
    chosen = np.ones(len(features.path_ids), dtype=bool) if paths is None else paths
    chosen = chosen & np.isin(features.question, landscape.rows.question)
    rows = [_ROWS[0], _ROWS[1]] if landscape.rows.gold_first else [_ROWS[-1]]
    with styled():
        figure = new_figure((0.9 + 1.95 * bins, 1.05 + 2.35 * len(rows)), _title(landscape, features, chosen, facet))
        grid = figure.subplots(len(rows), bins, squeeze=False)
        panels = _panels(grid, rows, landscape, features, chosen, stages(features, chosen, bins, compat))
        low, high = _limits(landscape.xy)
        draw = {"kde": _draw_density, "hist": _draw_counts}[density]
        draw(figure, panels, low, high)
        for panel in panels:
            _dress(panel, (low, high), _panel_title(panel, features, bins, compat))
            _draw_landmarks(panel.axes, landscape, _landmark_labels(landscape, features, labels))
        for line, row in zip(grid, rows, strict=True):
            _draw_starts(line[0], landscape, features, chosen)
            line[0].set_ylabel(_row_name(row, features, chosen), fontsize=9)
        shaped = density == "kde" and any(len(panel.xy) >= FEW_STATES for panel in panels)
        _legend(figure, rows, landscape, density, shaped)
        freeze(figure)
        figure.set_label("\n".join(_panel_title(panel, features, bins, compat, in_full=True) for panel in panels))
    if path is not None:
        save(figure, path)
    return figure


def _panels(
    grid: NDArray[Any],
    rows: Sequence[_Row],
    landscape: LandscapeMap,
    features: Features,
    chosen: NDArray[np.bool_],
    stage: Integers,
) -> list[_Panel]:
    """The states of every panel: those of ``chosen`` paths on this map, by outcome and stage."""
    place = np.full((len(features.path), 2), np.nan)
    mapped = landscape.rows.state >= 0
    place[landscape.rows.state[mapped]] = landscape.xy[mapped]
    outcome = np.where(chosen[features.path], features.correct[features.path], -2)
    panels = []
    for line, row in zip(grid, rows, strict=True):
        for number, axes in enumerate(line, start=1):
            states = np.flatnonzero((outcome == row.outcome) & (stage == number))
            panels.append(_Panel(axes, row, number, states, place[states]))
    return panels


def _limits(xy: Floats) -> tuple[Floats, Floats]:
    """The corners of the square that holds all points of the map, the same for all panels and facets."""
    centre = (xy.min(axis=0) + xy.max(axis=0)) / 2
    half = 0.57 * float(np.max(np.ptp(xy, axis=0))) or 1.0
    return centre - half, centre + half


def _shades(row: _Row, *colours: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(row.name, colours)


def _draw_density(figure: Figure, panels: Sequence[_Panel], low: Floats, high: Floats) -> None:
    """Areas that hold fixed shares of the density, which compare between panels of any number of states; states. Where
    there are few, no areas."""
    x, y = (np.linspace(low[axis], high[axis], GRID) for axis in (0, 1))
    for panel in panels:
        few = len(panel.xy) < FEW_STATES
        if not few:
            density = gaussian_density(panel.xy, x, y)
            levels = [*mass_levels(density), density.max() * 1.0001]
            colours = _shades(panel.row, panel.row.light, panel.row.dark)(np.linspace(0, 1, len(MASSES)))
            panel.axes.contourf(x, y, density, levels=levels, colors=colours[1 - len(levels) :])
            panel.axes.contour(x, y, density, levels=levels[:-1], colors=panel.row.points, linewidths=0.4, alpha=0.5)
        look = {"s": 16, "alpha": 0.85} if few else {"s": 7, "alpha": 0.6}
        panel.axes.scatter(*panel.xy.T, marker=panel.row.marker, color=panel.row.points, linewidths=0, zorder=3, **look)


def _draw_counts(figure: Figure, panels: Sequence[_Panel], low: Floats, high: Floats) -> None:
    """States a cell, on one scale for all panels of the figure, with a bar a row."""
    from matplotlib.ticker import MaxNLocator

    edges = [np.linspace(low[axis], high[axis], CELLS + 1) for axis in (0, 1)]
    counts = [np.histogram2d(*panel.xy.T, bins=edges)[0].T for panel in panels]
    most = max(1.0, *(cells.max() for cells in counts))
    for row in dict.fromkeys(panel.row for panel in panels):
        line = [(panel, cells) for panel, cells in zip(panels, counts, strict=True) if panel.row is row]
        for panel, cells in line:
            shown = np.ma.masked_equal(cells, 0)
            mesh = panel.axes.pcolormesh(
                *edges, shown, cmap=_shades(row, row.light, row.dark, row.points), vmin=0, vmax=most
            )
        bar = figure.colorbar(mesh, ax=[panel.axes for panel, _ in line], pad=0.01, aspect=22, shrink=0.85)
        bar.set_label("states in a cell")
        bar.locator = MaxNLocator(nbins=5, integer=True)
        bar.outline.set_visible(False)


def _dress(panel: _Panel, limits: tuple[Floats, Floats], title: str) -> None:
    """Title, limits, frame, and a note where there are few states."""
    axes, n = panel.axes, len(panel.states)
    axes.set_title(title, fontsize=8, loc="center")
    axes.set(xlim=(limits[0][0], limits[1][0]), ylim=(limits[0][1], limits[1][1]), xticks=[], yticks=[], aspect="equal")
    axes.spines[["top", "right"]].set_visible(True)
    if n < FEW_STATES:
        note = f"only {n} state{'s' * (n != 1)}: too few for a shape" if n else "no states"
        axes.set_xlabel(note, fontsize=7.5, style="italic", labelpad=3)


def _mark(marker: str, colour: str, size: float) -> dict[str, Any]:
    return {"marker": marker, "color": colour, "ms": size, "mec": "#1a1a1a", "mew": 0.7, "ls": "none"}


_RIGHT, _OTHER, _START = _mark("*", _GOLD, 12), _mark("X", "white", 7), _mark("D", "#009E73", 4.5)


def _draw_landmarks(axes: Axes, landscape: LandscapeMap, labels: Sequence[str] | None) -> None:
    """The choices: the right one a star, the others crosses; named where there is one question."""
    from matplotlib.patheffects import withStroke

    for number, (x, y) in enumerate(landscape.xy[landscape.rows.question < 0]):
        look = _RIGHT if landscape.rows.gold_first and number == 0 else _OTHER
        axes.plot(x, y, zorder=6, **look)
        if labels is not None:
            halo = [withStroke(linewidth=2, foreground="white")]
            left = x > np.quantile(axes.get_xlim(), 0.85)  # else the name would leave the panel
            place = {"xytext": (-5 if left else 5, 3), "textcoords": "offset points", "ha": "right" if left else "left"}
            axes.annotate(labels[number], (x, y), fontsize=7.5, zorder=7, path_effects=halo, **place)


def _draw_starts(axes: Axes, landscape: LandscapeMap, features: Features, chosen: NDArray[np.bool_]) -> None:
    """Where the questions of the chosen paths start; they are no states and count nowhere."""
    rows = landscape.rows
    starts = (rows.state < 0) & (rows.question >= 0) & np.isin(rows.question, features.question[chosen])
    axes.plot(*landscape.xy[starts].T, zorder=5, **_START)


def _landmark_labels(landscape: LandscapeMap, features: Features, labels: Sequence[str] | None) -> Sequence[str] | None:
    """The labels in the order of the landmarks, None on a map of several questions: there they name nothing."""
    from toolbox.plot_style import written

    asked = np.unique(landscape.rows.question[landscape.rows.question >= 0])
    if labels is None or len(asked) > 1:
        return None
    first = int(features.gold[asked[0]]) if landscape.rows.gold_first else 0
    order = [first, *(number for number in range(landscape.rows.k) if number != first)]
    return [written(labels[number], 12) for number in order]


# --- words ------------------------------------------------------------------------------------------------------------


def _title(landscape: LandscapeMap, features: Features, chosen: NDArray[np.bool_], facet: Facet | None) -> str:
    """``cot: 50 paths of 5 questions with 5 choices, 28 correct (.56)``."""
    from toolbox.plot_style import short, written

    n, questions = int(chosen.sum()), len(np.unique(features.question[chosen]))
    told = f"{_paths_of(n, questions)} with {landscape.rows.k} choices"
    if landscape.rows.gold_first and n:
        right = int(np.sum(features.correct[chosen] == 1))
        told += f", {right} correct ({short(right / n)})"
    name = written(facet_name(facet or {}), 40)
    return f"{name}: {told}" if name else told


def _paths_of(paths: int, questions: int) -> str:
    return f"{paths} path{'s' * (paths != 1)} of {questions} question{'s' * (questions != 1)}"


def _row_name(row: _Row, features: Features, chosen: NDArray[np.bool_]) -> str:
    count = int(np.sum(features.correct[chosen] == row.outcome))
    return f"{row.name} ({count} path{'s' * (count != 1)})"


def _panel_title(panel: _Panel, features: Features, bins: int, compat: bool, in_full: bool = False) -> str:
    """Stage, states and paths; the released code's stages are numbered, for they are not stages of progress."""
    stage = f"stage {panel.stage}"
    if not compat:
        low, high = (f"{100 * edge / bins:.3g}" for edge in (panel.stage - 1, panel.stage))
        stage = f"{low}–{high} % of the path"
    n, paths = len(panel.states), len(np.unique(features.path[panel.states]))
    counts = f"{n} state{'s' * (n != 1)}, {paths} path{'s' * (paths != 1)}"
    return f"{panel.row.name}, {stage}: {counts}" if in_full else f"{stage}\n{counts}"


def _method(landscape: LandscapeMap) -> str:
    """How the map was made, and how not to read it."""
    if landscape.method == "pca":
        return f"PCA, {100 * (landscape.explained or 0):.0f} % of the variance; all panels and facets are one fit"
    fit = f"t-SNE ({landscape.library}, perplexity {landscape.perplexity:.3g}); all panels and facets are one fit"
    return f"{fit}; near points are alike, distances between islands mean little"


def _legend(figure: Figure, rows: Sequence[_Row], landscape: LandscapeMap, density: Density, shaped: bool) -> None:
    """One legend below, headed by how the map was made, in lines that the figure's width allows."""
    import textwrap

    from toolbox.plot_style import legend_below

    legend_below(figure, _handles(rows, landscape, density, shaped))
    width = int(17 * figure.get_figwidth())
    figure.legends[0].set_title(textwrap.fill(_method(landscape), width), prop={"size": 7.5})


def _handles(rows: Sequence[_Row], landscape: LandscapeMap, density: Density, shaped: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if density == "kde":
        look = {"ls": "none", "ms": 4.5, "mec": "none"}
        names = {0: "state, wrong path", 1: "state, correct path", -1: "state"}
        handles = [
            Line2D([], [], marker=row.marker, color=row.points, label=names[row.outcome], **look) for row in rows
        ]
    if shaped:
        shares = "/".join(f"{100 * mass:.0f}" for mass in reversed(MASSES))
        handles.append(Patch(facecolor="#b5b5b5", edgecolor="#5c5c5c", lw=0.5, label=f"{shares} % of density"))
    handles.append(Line2D([], [], label="question alone", **_START))
    if landscape.rows.gold_first:
        handles.append(Line2D([], [], label="right answer", **_RIGHT))
    other = "other answers" if landscape.rows.gold_first else "answers"
    return [*handles, Line2D([], [], label=other, **_OTHER)]


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_metrics(cells: Sequence[Cell], path: str | Path | None = None) -> Figure:
    """Draw each metric over the stages of progress, a line a facet and outcome, with bands of 95 % intervals.

    ``cells``: those of ``metrics.tables``, all of one k; the lines' n are paths. Panels without any value are left out.
    The figure is written if ``path`` is given. ValueError: no cell, or several k. UsageProblem: as ``draw_landscape``.
    """
    from toolbox.plots import Panel, curves

    if len({cell.k for cell in cells}) != 1:
        raise ValueError("the curves of a figure are of one k")
    outcomes = ("correct", "wrong") if any(cell.outcome != "all" for cell in cells) else ("all",)
    facets = list(dict.fromkeys(facet_name(cell.facet) for cell in cells))
    lines = [
        (_line_name(facet, outcome), [c for c in cells if facet_name(c.facet) == facet and c.outcome == outcome])
        for facet in facets
        for outcome in outcomes
    ]
    panels = [
        Panel(title, unit, [series for name, line in lines if (series := _series(name, line, metric))], ylim)
        for metric, (title, unit, ylim) in _CURVES.items()
    ]
    compat = all(cell.progress is None for cell in cells)
    whole = [cell for cell in cells if cell.bin is None and cell.outcome == "all"]
    paths, asked = sum(cell.paths for cell in whole), max(cell.questions for cell in whole)
    return curves(
        [panel for panel in panels if panel.series],
        xlabel="stage" if compat else "progress of the path, %",
        title=f"{_paths_of(paths, asked)} with {cells[0].k} choices",
        band="95 % interval over questions",
        xlim=(1, max(cell.bin or 1 for cell in cells)) if compat else (0, 100),
        path=path,
    )


def _line_name(facet: str, outcome: str) -> str:
    if not facet:
        return {"all": "all paths"}.get(outcome, outcome)
    return facet if outcome == "all" else f"{facet}, {outcome}"


def _series(name: str, cells: Sequence[Cell], metric: str) -> Any:
    """The line of one metric over its stages, None where no stage has a value."""
    from toolbox.plots import Series

    line = [cell for cell in cells if cell.bin is not None]
    found = [cell.metrics[metric] for cell in line]
    if not any(found):
        return None
    x = [cell.bin if cell.progress is None else 50 * sum(cell.progress) for cell in line]
    y, low, high = ([one and getattr(one, part) for one in found] for part in ("estimate", "low", "high"))
    n = next(cell.paths for cell in cells if cell.bin is None)
    bounded = any(bound is not None and not np.isnan(bound) for bound in low)
    return Series(name, x, y, *((low, high) if bounded else (None, None)), n)
