"""Figures in one style: curves with bands, trade-off scatters; readable in print and by the colour-blind.

Matplotlib's object API only: no pyplot, no global state, nothing imported before a figure is drawn. The style is set on
top of matplotlib's defaults, so a user's matplotlibrc changes nothing, and a figure drawn twice has the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.plot_style import (
    BAND_ALPHA,
    GREY,
    Look,
    counted,
    freeze,
    legend_below,
    looks,
    new_figure,
    short,
    styled,
    written,
)
from toolbox.shell.errors import UsageProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

FORMATS = ("svg", "png", "pdf")
_MOST_MARKERS = 14  # a line; more would hide it


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, with the bounds of its interval where known and the ``n`` its means are over.

    None, NaN and infinity in ``y`` leave a gap in the line, in ``low`` or ``high`` one in the band. ValueError: lengths
    that differ, an ``x`` that is not finite, one bound without the other.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.label!r} has one bound without the other")
        for name in ("x", "y", "low", "high"):
            values = getattr(self, name)
            if values is None:
                continue
            numbers = tuple(math.nan if v is None or not math.isfinite(v) else float(v) for v in values)
            if len(numbers) != len(self.x):
                raise ValueError(f"series {self.label!r}: {len(self.x)} x but {len(numbers)} {name}")
            object.__setattr__(self, name, numbers)
        if any(math.isnan(value) for value in self.x):
            raise ValueError(f"series {self.label!r}: every x must be finite")

    def told(self, index: int) -> str:
        """The value at ``index`` with its bounds, in words: ``.08 [.03, .15]``."""
        return short(self.y[index], *((self.low[index], self.high[index]) if self.low and self.high else ()))


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``ylim`` are the ends of the scale; a small margin is added so that markers stay whole."""

    title: str
    ylabel: str
    series: Sequence[Series]
    ylim: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One labelled point, with (low, high) in both directions where known; points of a ``group`` share a look.

    ValueError: a coordinate or bound that is not finite, a low above its high.
    """

    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    n: int | None = None
    group: str = ""

    def __post_init__(self) -> None:
        for bounds in ((self.x, self.x), (self.y, self.y), self.x_interval, self.y_interval):
            if bounds is not None and not (all(map(math.isfinite, bounds)) and bounds[0] <= bounds[1]):
                raise ValueError(f"point {self.label!r}: {bounds} cannot be drawn")


def plot_format(path: str | Path) -> str:
    """``svg``, ``png`` or ``pdf`` by the path's suffix, UsageProblem for any other. Costs nothing: ask early."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        what = f"of the kind {suffix!r}" if suffix else "without a suffix"
        raise UsageProblem(f"{path}: cannot write a figure {what}", "name it .svg, .png or .pdf")
    return suffix


def curves(
    panels: Sequence[Panel],
    *,
    xlabel: str,
    title: str = "",
    band: str = "95 % interval",
    xlim: tuple[float, float] | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw panels side by side (at most three a row) over a common x-axis, and write the figure if ``path`` is given.

    A label has one look in all panels and one entry, with its n, in the legend below. ``band`` says what the shaded
    bands are, ``xlim`` the ends of the x scale. The last value of each line stands at the panel's right edge.
    ValueError: no panel. UsageProblem: a path whose suffix is not svg, png or pdf, before anything is drawn.
    """
    if not panels:
        raise ValueError("curves needs at least one panel")
    if path is not None:
        plot_format(path)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    look = looks(series.label for panel in panels for series in panel.series)
    with styled():
        figure = new_figure((7.0 if columns < 3 else 9.5, 0.7 + 2.5 * rows), title)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for spare in grid[len(panels) :]:
            spare.remove()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, look)
        for axes in grid[len(panels) - columns : len(panels)]:
            axes.set_xlabel(written(xlabel))
            axes.xaxis.set_tick_params(labelbottom=True)
        if xlim is not None:
            grid[0].set_xlim(*_widened(xlim))
        _integer_ticks(grid[0], [x for panel in panels for series in panel.series for x in series.x])
        legend_below(figure, _curve_handles(panels, look, band))
        ends = [_end_values(axes, panel, look) for axes, panel in zip(grid, panels, strict=False)]
        freeze(figure)
        for axes, texts in zip(grid, ends, strict=False):
            _spread(axes, texts)
        figure.set_label("\n".join(_describe_panel(panel, xlabel) for panel in panels))
    if path is not None:
        save(figure, path)
    return figure


def scatter(
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    join: bool = False,
    bars: str = "95 % interval",
    path: str | Path | None = None,
) -> Figure:
    """Draw points with error bars in both directions, each named where it stands; ``join`` links a group in order.

    Names are placed where they cover neither points, bars nor one another. Groups go into a legend below; an n shared
    by all points is said there once, else beside each name. ``bars`` says what the error bars are. ``xlim`` and
    ``ylim`` are the ends of the scales, as in ``Panel``.
    ValueError: no point. UsageProblem: a path whose suffix is not svg, png or pdf, before anything is drawn.
    """
    if not points:
        raise ValueError("scatter needs at least one point")
    if path is not None:
        plot_format(path)
    look = looks(point.group for point in points)
    with styled():
        figure = new_figure((5.6, 4.0), title)
        axes = figure.subplots()
        axes.set(xlabel=written(xlabel), ylabel=written(ylabel))
        axes.margins(0.12)
        _draw_points(axes, points, look, join)
        if xlim is not None:
            axes.set_xlim(*_widened(xlim))
        if ylim is not None:
            axes.set_ylim(*_widened(ylim))
        common = len({point.n for point in points}) == 1
        legend_below(figure, _scatter_handles(points, look, bars, join, points[0].n if common else None))
        names = [_name(axes, point, look[point.group], None if common else point.n) for point in points]
        freeze(figure)
        _place(axes, points, names, join)
        figure.set_label("\n".join(_describe_point(point, xlabel, ylabel) for point in points))
    if path is not None:
        save(figure, path)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as svg, png or pdf by the suffix of ``path``, whole or not at all; equal figures, equal bytes.

    Title and a description of what is drawn (the figure's label) go into the metadata; no date does.
    UsageProblem: another suffix. OSError, CannotCreate: as ``toolbox.shell.files.atomic_file``.
    """
    from toolbox.shell.files import atomic_file

    kind = plot_format(path)
    told = {"Title": figure.get_suptitle(), "Subject" if kind == "pdf" else "Description": str(figure.get_label())}
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    drawn = io.BytesIO()  # a pipe cannot seek, and a failure while drawing should not touch the disk
    with styled():
        figure.savefig(drawn, format=kind, metadata={**undated, **{key: text for key, text in told.items() if text}})
    with atomic_file(path) as handle:
        handle.write(drawn.getbuffer())


# --- curves ---


def _draw_panel(axes: Axes, panel: Panel, look: Mapping[str, Look]) -> None:
    axes.set_title(written(panel.title))
    axes.set_ylabel(written(panel.ylabel))
    for series in panel.series:
        colour = look[series.label].colour
        if series.low is not None and len(series.x) == 1:  # a band over a single x has no area
            axes.vlines(series.x, series.low, series.high, color=colour, lw=1.6, alpha=0.4)
        elif series.low is not None:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=BAND_ALPHA, lw=0)
        every = max(1, math.ceil(len(series.x) / _MOST_MARKERS))
        axes.plot(series.x, series.y, markevery=every, **_line(look[series.label]))
    if all(math.isnan(value) for series in panel.series for value in series.y):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=GREY)
    if panel.ylim is not None:
        axes.set_ylim(*_widened(panel.ylim))


def _line(look: Look) -> dict[str, Any]:
    return {
        "color": look.colour,
        "ls": look.dash,
        "lw": 1.5,
        "marker": look.marker,
        "ms": 4.5,
        "mec": "white",
        "mew": 0.6,
    }


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    margin = 0.04 * (limits[1] - limits[0])
    return limits[0] - margin, limits[1] + margin


def _integer_ticks(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if all(value.is_integer() for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def _curve_handles(panels: Sequence[Panel], look: Mapping[str, Look], band: str) -> list[Any]:
    """Legend entries; none where a single line without n and band is named by its axes already."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = [series for panel in panels for series in panel.series]
    banded = any(series.low is not None for series in drawn)
    if len(look) == 1 and not banded and all(series.n is None for series in drawn):
        return []
    handles: list[Any] = [
        Line2D([], [], label=counted(label, *(one.n for one in drawn if one.label == label)), **_line(own))
        for label, own in look.items()
    ]
    return [*handles, Patch(color=GREY, alpha=1.6 * BAND_ALPHA, lw=0, label=written(band))] if banded else handles


def _end_values(axes: Axes, panel: Panel, look: Mapping[str, Look]) -> list[Annotation]:
    """Write the last finite value of every line at the right edge, in the line's colour."""
    lasts = [(series, [value for value in series.y if not math.isnan(value)][-1:]) for series in panel.series]
    return [
        axes.annotate(
            short(last[0]),
            (1, last[0]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=look[series.label].dark,
            annotation_clip=False,
        )
        for series, last in lasts
        if last
    ]


def _spread(axes: Axes, texts: list[Annotation]) -> None:
    """Move texts up or down until none covers another."""
    from toolbox.plot_labels import spread

    if not texts:
        return
    renderer = axes.figure.canvas.get_renderer()
    gap = 1.02 * max(text.get_window_extent(renderer).height for text in texts)
    exact = [float(axes.transData.transform((0, text.xy[1]))[1]) for text in texts]
    for text, at, place in zip(texts, exact, spread(exact, gap, axes.bbox.y0, axes.bbox.y1), strict=True):
        text.set_position((3, (place - at) * 72 / axes.figure.dpi))


def _describe_panel(panel: Panel, xlabel: str) -> str:
    """Panel, lines, n, first and last value in words, for the metadata."""
    parts = []
    for series in panel.series:
        known = [index for index, value in enumerate(series.y) if not math.isnan(value)]
        ends = sorted({known[0], known[-1]}) if known else []
        words = ", ".join(f"{series.told(index)} at {xlabel} {series.x[index]:g}" for index in ends)
        parts.append(f"{counted(series.label, series.n)}: {words or 'no data'}")
    return written(f"{panel.title}: {'; '.join(parts) or 'no data'}", 4000)


# --- scatter ---


def _draw_points(axes: Axes, points: Sequence[Point], look: Mapping[str, Look], join: bool) -> None:
    for group, own in look.items():
        members = [point for point in points if point.group == group]
        if join:
            axes.plot([p.x for p in members], [p.y for p in members], color=own.colour, ls=own.dash, lw=1.1, alpha=0.7)
        for point in members:
            bar = {"color": own.colour, "lw": 1.1, "alpha": 0.55, "capstyle": "round"}
            if point.x_interval:
                axes.hlines(point.y, *point.x_interval, **bar)
            if point.y_interval:
                axes.vlines(point.x, *point.y_interval, **bar)
            axes.plot(point.x, point.y, own.marker, color=own.colour, ms=6, mec="white", mew=0.8, zorder=4)


def _scatter_handles(
    points: Sequence[Point], look: Mapping[str, Look], bars: str, join: bool, n: int | None
) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            *([], []),
            label=written(group),
            color=own.colour,
            marker=own.marker,
            ls=own.dash if join else "none",
            lw=1.1,
            ms=6,
            mec="white",
            mew=0.8,
        )
        for group, own in look.items()
        if group
    ]
    barred = any(point.x_interval or point.y_interval for point in points)
    note = ", ".join(part for part in (written(bars) if barred else "", "" if n is None else f"n={n}") if part)
    if note:
        handles.append(Line2D([], [], color=GREY, lw=1.1 if barred else 0, alpha=0.6, label=note))
    return handles


def _name(axes: Axes, point: Point, look: Look, n: int | None) -> Annotation:
    name = axes.annotate(
        counted(point.label, n),
        (point.x, point.y),
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        color=look.dark,
        zorder=5,
        bbox={"boxstyle": "square,pad=0.06", "facecolor": "white", "alpha": 0.75, "linewidth": 0},
        arrowprops={"arrowstyle": "-", "lw": 0.6, "color": look.colour, "alpha": 0.7, "shrinkA": 0, "shrinkB": 4},
    )
    name.set_in_layout(False)
    return name


def _place(axes: Axes, points: Sequence[Point], names: list[Annotation], join: bool) -> None:
    """Move each name beside its point, off all marks, bars and joining lines; far ones keep a thin line to it."""
    import numpy as np

    from toolbox.plot_labels import place

    renderer, unit = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    segments = [((bound[0], p.y), (bound[1], p.y)) for p in points if (bound := p.x_interval)]
    segments += [((p.x, bound[0]), (p.x, bound[1])) for p in points if (bound := p.y_interval)]
    for group in dict.fromkeys(point.group for point in points if join):
        segments += itertools.pairwise([(point.x, point.y) for point in points if point.group == group])
    spots = axes.transData.transform([(point.x, point.y) for point in points])
    corners = np.array([(0, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)]) * 3 * unit
    marks = [spots + corner for corner in corners] * 4  # hiding a point is worse than crossing a bar
    for segment in segments:
        start, end = axes.transData.transform(segment)
        steps = np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / 3)))[:, None]
        marks.append(start + steps * (end - start))
    # The text alone: get_window_extent would add the connecting line, which is hidden or follows the text.
    boxes = [_text_box(name, renderer) for name in names]
    centres, distances = place(spots, np.array(boxes), np.concatenate(marks), axes.bbox.extents, unit)
    for name, spot, centre, distance in zip(names, spots, centres, distances, strict=True):
        name.set_position(tuple((centre - spot) / unit))
        name.arrow_patch.set_visible(bool(distance > 10 * unit))


def _text_box(name: Annotation, renderer: Any) -> tuple[float, float]:
    from matplotlib.text import Text

    box = Text.get_window_extent(name, renderer)
    return box.width, box.height


def _describe_point(point: Point, xlabel: str, ylabel: str) -> str:
    x, y = short(point.x, *(point.x_interval or ())), short(point.y, *(point.y_interval or ()))
    group = f"{point.group}, " if point.group else ""
    return written(f"{group}{counted(point.label, point.n)}: {xlabel} {x}, {ylabel} {y}", 4000)
