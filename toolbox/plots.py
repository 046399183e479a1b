"""Figures in one style: curves with bands, trade-off scatters; readable in print and by the colour-blind.

Matplotlib's object API only: no pyplot, no global state, nothing imported before a figure is drawn. The style is set on
top of matplotlib's defaults, so a user's matplotlibrc changes nothing, and a figure saved twice has the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.shell.errors import UsageProblem, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

FORMATS = ("svg", "png", "pdf")

# Okabe and Ito's palette without its yellow (too pale on paper), ordered so that neighbours differ in lightness too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.3)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.2)))
_INK, _GREY, _GRID = "#262626", "#6e6e6e", "#e4e4e4"
_LONGEST_LABEL = 48
_MOST_MARKERS = 14

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 8.5,
    "text.color": _INK,
    "text.parse_math": False,  # a label is data: two dollar signs are not a formula
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "axes.linewidth": 0.7,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    # Outlines instead of text: labels are placed by their measured size, and a viewer without the font would substitute
    # another one. What is drawn is also said in the file's metadata, where search and screen readers find it.
    "svg.fonttype": "path",
    "svg.hashsalt": "toolbox",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, with the bounds of its interval where known and the ``n`` its means are over.

    None, NaN and infinity in ``y`` leave a gap, in ``low`` or ``high`` a gap in the band. ValueError: lengths that
    differ, an ``x`` that is not finite, one bound without the other.
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
            numbers = tuple(_number(value) for value in values)
            if len(numbers) != len(self.x):
                raise ValueError(f"series {self.label!r}: {len(self.x)} x but {len(numbers)} {name}")
            object.__setattr__(self, name, numbers)
        if any(math.isnan(value) for value in self.x):
            raise ValueError(f"series {self.label!r}: every x must be finite")


@dataclass(frozen=True)
class Panel:
    """One pair of axes. ``ylim`` are the ends of the scale; a small margin is added so that markers stay whole."""

    title: str
    ylabel: str
    series: Sequence[Series]
    ylim: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One labelled point, with (low, high) in both directions where known; points of a ``group`` share a colour.

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
    """``svg``, ``png`` or ``pdf`` by the path's suffix; UsageProblem for any other. Costs nothing: call it early."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise UsageProblem(f"{path}: a figure cannot be written as {suffix or 'a file without suffix'!r}", _ADVICE)
    return suffix


_ADVICE = "name it .svg, .png or .pdf"


def curves(
    panels: Sequence[Panel],
    *,
    xlabel: str,
    title: str = "",
    band: str = "95 % interval",
    path: str | Path | None = None,
) -> Figure:
    """Draw panels side by side (at most three a row) over a common x-axis, and write the figure if ``path`` is given.

    A label has one colour, dash and marker in all panels and one entry, with its n, in the legend below. ``band`` says
    what the shaded bands are. The last value of each line stands at the panel's right edge.
    ValueError: no panel. UsageProblem: a path whose suffix is not svg, png or pdf, before anything is drawn.
    """
    if not panels:
        raise ValueError("curves needs at least one panel")
    if path is not None:
        plot_format(path)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    styles = _styles(series.label for panel in panels for series in panel.series)
    with _styled():
        figure = _figure((7.0 if columns < 3 else 9.5, 0.7 + 2.5 * rows), title)
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for spare in grid[len(panels) :]:
            spare.remove()
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel, styles)
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel(_text(xlabel))
            axes.xaxis.set_tick_params(labelbottom=True)
        _integer_ticks(grid[0], [x for panel in panels for series in panel.series for x in series.x])
        _curve_legend(figure, panels, styles, band)
        ends = [_end_values(axes, panel, styles) for axes, panel in zip(grid, panels, strict=False)]
        _freeze(figure)
        for axes, texts in zip(grid, ends, strict=False):
            _spread(axes, texts)
        figure.set_label("\n".join(_describe(panel, xlabel) for panel in panels))
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
    by all points is said there once, else beside each name. ``bars`` says what the error bars are.
    ValueError: no point. UsageProblem: a path whose suffix is not svg, png or pdf, before anything is drawn.
    """
    if not points:
        raise ValueError("scatter needs at least one point")
    if path is not None:
        plot_format(path)
    styles = _styles(point.group for point in points)
    common_n = len({point.n for point in points}) == 1
    with _styled():
        figure = _figure((5.6, 4.0), title)
        axes = figure.subplots()
        axes.set(xlabel=_text(xlabel), ylabel=_text(ylabel))
        axes.margins(0.12)
        for group, (colour, marker, dash) in styles.items():
            members = [point for point in points if point.group == group]
            if join:
                axes.plot([p.x for p in members], [p.y for p in members], color=colour, ls=dash, lw=1.1, alpha=0.7)
            for point in members:
                for (low, high), draw, at in (
                    (point.x_interval or (0, 0), axes.hlines, point.y),
                    (point.y_interval or (0, 0), axes.vlines, point.x),
                ):
                    if low < high:
                        draw(at, low, high, color=colour, lw=1.1, alpha=0.55, capstyle="round")
                axes.plot(point.x, point.y, marker, color=colour, ms=6, mec="white", mew=0.8, zorder=4)
        for limits, setter in ((xlim, axes.set_xlim), (ylim, axes.set_ylim)):
            if limits is not None:
                setter(*_widened(limits))
        _scatter_legend(figure, points, styles, bars, join, common_n)
        names = [
            axes.annotate(
                _text(point.label) if common_n else _counted(point.label, point.n),
                (point.x, point.y),
                xytext=(0, 0),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=8,
                color=_darker(styles[point.group][0]),
                zorder=5,
            )
            for point in points
        ]
        for name in names:
            name.set_in_layout(False)
        _freeze(figure)
        _place(axes, points, names, join)
        figure.set_label("\n".join(_describe_point(point, xlabel, ylabel) for point in points))
    if path is not None:
        save(figure, path)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` as svg, png or pdf by the suffix of ``path``, whole or not at all; equal figures, equal bytes.

    Title and a description of the lines (the figure's label) go into the metadata; no date does.
    UsageProblem: another suffix. OSError, CannotCreate: as ``toolbox.shell.files.atomic_file``.
    """
    from toolbox.shell.files import atomic_file

    kind = plot_format(path)
    title, description = figure.get_suptitle(), str(figure.get_label())
    metadata: dict[str, Any] = {
        "svg": {"Date": None, "Title": title or None, "Description": description or None},
        "png": {"Title": title, "Description": description},
        "pdf": {"CreationDate": None, "Title": title, "Subject": description},
    }[kind]
    drawn = io.BytesIO()  # a pipe cannot seek, and a failure while drawing should not touch the disk
    with _styled():
        figure.savefig(drawn, format=kind, metadata=metadata)
    with atomic_file(path) as handle:
        handle.write(drawn.getbuffer())


# --- style ---


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    """Matplotlib's defaults with the style on top, for this block only; the user's settings come back afterwards."""
    import matplotlib

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **_STYLE}):
        yield


def _figure(size: tuple[float, float], title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.04)
    if title:
        figure.suptitle(_text(title, 90), x=0.012, ha="left", fontsize=10, fontweight="bold")
    return figure


def _styles(labels: Iterator[str]) -> dict[str, tuple[str, str, Any]]:
    """(colour, marker, dash) a label in order of appearance; 7, 8 and 5 share no factor, so the first 280 differ."""
    return {
        label: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)])
        for i, label in enumerate(dict.fromkeys(labels))
    }


def _number(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)


def _text(text: str, longest: int = _LONGEST_LABEL) -> str:
    """``text`` on one line without control characters (they would break an SVG), cut where it is too long to show."""
    text = clean(str(text)).strip()
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def _counted(label: str, *counts: int | None) -> str:
    known = sorted({count for count in counts if count is not None})
    return _text(label) + (f" (n={'/'.join(map(str, known))})" if known else "")


def _short(value: float) -> str:
    """Two decimals and no leading zero where that shows something, else three significant digits."""
    if value != 0 and not 0.005 <= abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"


def _darker(colour: str) -> tuple[float, ...]:
    """The colour for text: the palette is made for areas and lines, thin glyphs need more contrast."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * part for part in to_rgb(colour))


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _integer_ticks(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if all(value == int(value) for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def _freeze(figure: Figure) -> None:
    """Lay out once and keep it: labels are placed in this layout, whatever the format's resolution."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


# --- curves ---


def _draw_panel(axes: Axes, panel: Panel, styles: dict[str, tuple[str, str, Any]]) -> None:
    axes.set_title(_text(panel.title))
    axes.set_ylabel(_text(panel.ylabel))
    for series in panel.series:
        colour, marker, dash = styles[series.label]
        if series.low is not None and series.high is not None:
            alone = len(series.x) == 1  # a band over a single x has no area
            if alone:
                axes.vlines(series.x, series.low, series.high, color=colour, lw=1.6, alpha=0.4)
            else:
                axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.15, lw=0)
        every = max(1, math.ceil(len(series.x) / _MOST_MARKERS))
        axes.plot(
            *(series.x, series.y),
            color=colour,
            ls=dash,
            lw=1.5,
            marker=marker,
            markevery=every,
            ms=4.5,
            mec="white",
            mew=0.6,
            label=series.label,
        )
    if all(math.isnan(value) for series in panel.series for value in series.y):
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=_GREY)
    if panel.ylim is not None:
        axes.set_ylim(*_widened(panel.ylim))


def _curve_legend(figure: Figure, panels: Sequence[Panel], styles: dict[str, tuple[str, str, Any]], band: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = [series for panel in panels for series in panel.series]
    handles: list[Any] = []
    for label, (colour, marker, dash) in styles.items():
        text = _counted(label, *(series.n for series in drawn if series.label == label))
        look = {"color": colour, "marker": marker, "ls": dash, "lw": 1.5, "ms": 4.5, "mec": "white", "mew": 0.6}
        handles.append(Line2D([], [], label=text, **look))
    if any(series.low is not None for series in drawn):
        handles.append(Patch(color=_GREY, alpha=0.25, lw=0, label=_text(band)))
    _legend(figure, handles)


def _legend(figure: Figure, handles: list[Any]) -> None:
    """One legend below the axes in as few rows as the width allows."""
    if not handles:
        return
    width = figure.bbox.width * 0.98
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.8)
        if columns == 1 or legend.get_window_extent(figure.canvas.get_renderer()).width <= width:
            return
        legend.remove()


def _end_values(axes: Axes, panel: Panel, styles: dict[str, tuple[str, str, Any]]) -> list[Annotation]:
    """Write the last finite value of every line at the right edge, in the line's colour."""
    texts = []
    for series in panel.series:
        finite = [value for value in series.y if not math.isnan(value)]
        if finite:
            texts.append(
                axes.annotate(
                    _short(finite[-1]),
                    (1, finite[-1]),
                    xycoords=axes.get_yaxis_transform(),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=_darker(styles[series.label][0]),
                    annotation_clip=False,
                )
            )
    return texts


def _spread(axes: Axes, texts: list[Annotation]) -> None:
    """Move texts vertically, as little as possible in squares, until none covers another and none leaves the axes."""
    if not texts:
        return
    renderer = axes.figure.canvas.get_renderer()
    gap = 1.02 * max(text.get_window_extent(renderer).height for text in texts)
    floor, ceiling = axes.bbox.y0, axes.bbox.y1
    wanted = [min(max(axes.transData.transform((0, text.xy[1]))[1], floor), ceiling) for text in texts]
    order = sorted(range(len(texts)), key=wanted.__getitem__)
    # y_i - i·gap must not fall: isotonic regression by pooling neighbours that violate it.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([wanted[index] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight = pools.pop()
            pools[-1] = [(pools[-1][0] * pools[-1][1] + mean * weight) / (pools[-1][1] + weight), pools[-1][1] + weight]
    level = [mean for mean, weight in pools for _ in range(int(weight))]
    top = ceiling - (len(texts) - 1) * gap
    for rank, index in enumerate(order):
        place = min(max(level[rank], floor), max(top, floor)) + rank * gap
        exact = axes.transData.transform((0, texts[index].xy[1]))[1]
        texts[index].set_position((3, (place - exact) * 72 / axes.figure.dpi))


# --- scatter ---


def _scatter_legend(
    figure: Figure,
    points: Sequence[Point],
    styles: dict[str, tuple[str, str, Any]],
    bars: str,
    join: bool,
    common_n: bool,
) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for group, (colour, marker, dash) in styles.items():
        if group:
            look = {"color": colour, "marker": marker, "ls": dash if join else "none", "lw": 1.1, "ms": 6}
            handles.append(Line2D([], [], label=_text(group), mec="white", mew=0.8, **look))
    has_bars = any(point.x_interval or point.y_interval for point in points)
    n = f"n={points[0].n}" if common_n and points[0].n is not None else ""
    note = ", ".join(part for part in (_text(bars) if has_bars else "", n) if part)
    if note:
        handles.append(Line2D([], [], color=_GREY, lw=1.1 if has_bars else 0, alpha=0.6, label=note))
    _legend(figure, handles)


def _place(axes: Axes, points: Sequence[Point], names: list[Annotation], join: bool) -> None:
    """Move each name to the cheapest of 48 places around its point, three rounds so that early ones can give way.

    Cost: what it would cover (marks, bars, joining lines, other names), what would leave the axes, the distance.
    """
    import numpy as np

    renderer, scale = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    spots = axes.transData.transform([(point.x, point.y) for point in points])
    sizes = [(box.width, box.height) for box in (name.get_window_extent(renderer) for name in names)]
    segments = []
    for point in points:
        if point.x_interval:
            segments.append([(bound, point.y) for bound in point.x_interval])
        if point.y_interval:
            segments.append([(point.x, bound) for bound in point.y_interval])
    if join:
        for group in dict.fromkeys(point.group for point in points):
            members = [(point.x, point.y) for point in points if point.group == group]
            segments.extend([list(pair) for pair in zip(members, members[1:], strict=False)])
    ink = [spots + shift for shift in np.array([(0, 0), (4, 4), (-4, 4), (4, -4), (-4, -4)]) * scale * 0.8]
    for segment in segments:
        start, end = axes.transData.transform(segment)
        steps = np.linspace(0, 1, max(2, int(np.hypot(*(end - start)) / 3)))[:, None]
        ink.append(start + steps * (end - start))
    marks = np.concatenate(ink)
    places = [(math.tau * k / 16, radius * scale) for radius in (7, 13, 21) for k in range(16)]

    def box(index: int, angle: float, radius: float) -> np.ndarray:
        """(x0, y0, x1, y1) of the name whose edge, not centre, is ``radius`` away from the point."""
        width, height = sizes[index]
        centre = spots[index] + np.array(
            [math.cos(angle) * (radius + width / 2), math.sin(angle) * (radius + height / 2)]
        )
        return np.array([*(centre - (width / 2, height / 2)), *(centre + (width / 2, height / 2))])

    def cost(index: int, candidate: np.ndarray, radius: float) -> float:
        x0, y0, x1, y1 = candidate
        covered = (marks[:, 0] > x0) & (marks[:, 0] < x1) & (marks[:, 1] > y0) & (marks[:, 1] < y1)
        total = 8.0 * np.count_nonzero(covered) + radius / scale
        for other, placed in enumerate(chosen):
            if other != index and placed is not None:
                wide = min(x1, placed[2]) - max(x0, placed[0]) + 2 * scale
                high = min(y1, placed[3]) - max(y0, placed[1]) + 1 * scale
                total += 200.0 + wide * high if wide > 0 and high > 0 else 0.0
        frame = axes.bbox
        outside = max(0, frame.x0 - x0) + max(0, x1 - frame.x1) + max(0, frame.y0 - y0) + max(0, y1 - frame.y1)
        return total + 20.0 * outside

    chosen: list[np.ndarray | None] = [None] * len(points)
    for _ in range(3):
        for index in range(len(points)):
            candidates = [(box(index, *place), place[1]) for place in places]
            chosen[index] = min(candidates, key=lambda pair: cost(index, *pair))[0]
    for name, spot, placed in zip(names, spots, chosen, strict=True):
        name.set_position(tuple(((placed[:2] + placed[2:]) / 2 - spot) / scale))


# --- words for the metadata ---


def _describe(panel: Panel, xlabel: str) -> str:
    parts = []
    for series in panel.series:
        known = [index for index, value in enumerate(series.y) if not math.isnan(value)]
        if not known:
            parts.append(f"{_counted(series.label, series.n)}: no data")
            continue
        words = [
            f"{_short(series.y[i])}{_bounds(series, i)} at {xlabel} {series.x[i]:g}" for i in (known[0], known[-1])
        ]
        parts.append(f"{_counted(series.label, series.n)}: {', '.join(dict.fromkeys(words))}")
    return _text(f"{panel.title}: {'; '.join(parts)}", 4000)


def _bounds(series: Series, index: int) -> str:
    if series.low is None or series.high is None or math.isnan(series.low[index] + series.high[index]):
        return ""
    return f" [{_short(series.low[index])}, {_short(series.high[index])}]"


def _describe_point(point: Point, xlabel: str, ylabel: str) -> str:
    words = []
    for name, value, interval in ((xlabel, point.x, point.x_interval), (ylabel, point.y, point.y_interval)):
        words.append(
            f"{name} {_short(value)}" + (f" [{_short(interval[0])}, {_short(interval[1])}]" if interval else "")
        )
    group = f"{point.group}, " if point.group else ""
    return _text(f"{group}{_counted(point.label, point.n)}: {', '.join(words)}", 4000)
