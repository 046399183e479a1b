"""Figures of what was forgotten and kept: the trade-off, and what survives an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.plot_style import GREY, counted, freeze, legend_below, looks, new_figure, styled, written
from toolbox.plots import Point, plot_format, save, scatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from toolbox.stats import Interval

_TENTHS = 10


def draw_tradeoff(
    lines: Sequence[Mapping[str, Any]], path: str | Path | None, title: str = "", *, sweep: str | None = None
) -> Any:
    """ES on the forget rows against ES on the retain rows, a point a model, towards the corner that is wanted.

    ``lines`` are what unlearn-eval writes: ``model``, ``es.forget`` and ``es.retain``, ``low``, ``high`` and ``n`` of
    each in ``intervals.es`` where known, and ``run.method`` and ``run.options`` for a model that an unlearning run
    made. Models of one method look alike; an objective with rectification and without are two methods. With ``sweep``,
    the name of an option, those that a method made with it are joined in its order and named by its value; others stand
    alone.

    Returns the figure (written to ``path`` where given). ValueError: no line with both numbers. UsageProblem: a path
    that is not svg, png or pdf.
    """
    if path is not None:
        plot_format(path)
    known = [line for line in lines if _es(line, "forget") is not None and _es(line, "retain") is not None]
    if not known:
        raise ValueError("a trade-off needs ES on the forget and on the retain rows")
    if sweep is not None:
        known.sort(key=lambda line: _order(_setting(line, sweep)))  # stable: models without it keep their order, first
    points = [_point(line, sweep) for line in known]
    right, bottom = _reach(points)
    figure = scatter(
        points,
        xlabel=counted("ES forget", *_counts(known, "forget")),
        ylabel=counted("ES retain", *_counts(known, "retain")),
        title=title,
        xlim=(0.0, right),
        ylim=(bottom, 1.0),
        join=sweep is not None,
    )
    _mark_corner(figure.axes[0])
    if path is not None:
        save(figure, path)
    return figure


def _es(line: Mapping[str, Any], which: str) -> float | None:
    return (line.get("es") or {}).get(which)


def _method(line: Mapping[str, Any]) -> str:
    method = (line.get("run") or {}).get("method") or ""
    return f"{method}, rectified" if _setting(line, "rectify") is True else method


def _setting(line: Mapping[str, Any], name: str) -> Any:
    return ((line.get("run") or {}).get("options") or {}).get(name)


def _order(value: Any) -> tuple[int, float, str]:
    """Models without the setting first, then numbers by size, then words."""
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def _point(line: Mapping[str, Any], sweep: str | None) -> Point:
    method = _method(line)
    swept = _setting(line, sweep) if sweep is not None else None
    model = str(line["model"])
    return Point(
        model if swept is None else f"{sweep} {swept}",
        _es(line, "forget"),  # type: ignore[arg-type]
        _es(line, "retain"),  # type: ignore[arg-type]
        _bounds(line, "forget"),
        _bounds(line, "retain"),
        # A model without the swept setting is no part of the method's line.
        group=method if sweep is None or swept is not None else model,
    )


def _interval(line: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    return ((line.get("intervals") or {}).get("es") or {}).get(which) or {}


def _bounds(line: Mapping[str, Any], which: str) -> tuple[float, float] | None:
    found = _interval(line, which)
    low, high = found.get("low"), found.get("high")
    return None if low is None or high is None else (float(low), float(high))


def _counts(lines: Sequence[Mapping[str, Any]], which: str) -> list[int | None]:
    return [_interval(line, which).get("n") for line in lines]


def _reach(points: Sequence[Point]) -> tuple[float, float]:
    """The largest x and the smallest y that must be seen, to the next tenth."""
    right = max(max(point.x, *(point.x_interval or (0.0,))) for point in points)
    bottom = min(min(point.y, *(point.y_interval or (1.0,))) for point in points)
    return (
        max(1, math.ceil(right * _TENTHS - 1e-9)) / _TENTHS,
        min(_TENTHS - 1, math.floor(bottom * _TENTHS + 1e-9)) / _TENTHS,
    )


def _mark_corner(axes: Axes) -> None:
    """Where to go: along the axes in words, and a star where all is forgotten and all kept.

    The star's name stands above the axes, clear of every point.
    """
    axes.set_xlabel(f"← less is left     {axes.get_xlabel()}")
    axes.set_ylabel(f"{axes.get_ylabel()}     more is kept →")
    axes.plot([0], [1], marker="*", ms=13, color="#c9c9c9", mec=GREY, mew=0.6, ls="none", zorder=1, clip_on=False)
    axes.annotate(
        "all forgotten, all kept", (0, 1), (9, 5), textcoords="offset points", fontsize=7.5, color=GREY, va="bottom"
    )


def draw_survival(
    models: Mapping[str, Mapping[str, Interval | None]], path: str | Path | None, title: str = "", *, bars: str = ""
) -> Any:
    """ES on the forget rows a model, as it is and under each trial: a row a model, a mark a trial.

    ``models`` maps a model's name to its ES by trial ("as is", "at equal retention", "relearned", "4 bits", ...), None
    where it was not tried; trials come in the order in which they first occur, models from top to bottom. Marks further
    right than the first say how much came back.

    Returns the figure (written to ``path`` where given). ValueError: nothing to draw. UsageProblem: a path that is not
    svg, png or pdf.
    """
    if path is not None:
        plot_format(path)
    look = looks(trial for found in models.values() for trial, es in found.items() if es is not None)
    if not look:
        raise ValueError("nothing was measured: no figure to draw")
    gap = 0.8 / len(look)
    with styled():
        figure = new_figure((5.6, 1.1 + 0.16 * (len(look) + 1) * len(models)), title)
        axes = figure.subplots()
        for row, found in enumerate(models.values()):
            for place, (trial, own) in enumerate(look.items()):
                if (es := found.get(trial)) is not None:
                    _mark(axes, es, row + gap * (place - (len(look) - 1) / 2), own)
        axes.set_yticks(range(len(models)), [written(name) for name in models])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_xlim(-0.04, 1.04)
        axes.set_xlabel("ES forget")
        axes.grid(visible=False, axis="y")
        for border in range(1, len(models)):
            axes.axhline(border - 0.5, color="#e4e4e4", lw=0.7)
        legend_below(figure, _survival_legend(models, look, bars or "95 % interval"))
        freeze(figure)
        figure.set_label("\n".join(_told(name, found) for name, found in models.items()))
    if path is not None:
        save(figure, path)
    return figure


def _mark(axes: Axes, es: Interval, y: float, own: Any) -> None:
    if not math.isnan(es.low):
        axes.hlines(y, es.low, es.high, color=own.colour, lw=1.1, alpha=0.55)
    axes.plot(es.estimate, y, own.marker, color=own.colour, ms=6, mec="white", mew=0.8, zorder=4, clip_on=False)


def _survival_legend(models: Mapping[str, Mapping[str, Interval | None]], look: Mapping[str, Any], bars: str) -> Any:
    from matplotlib.lines import Line2D

    handles = []
    for trial, own in look.items():
        counts = [es.n for found in models.values() if (es := found.get(trial)) is not None]
        style = {"color": own.colour, "marker": own.marker, "ls": "none", "ms": 6, "mec": "white", "mew": 0.8}
        handles.append(Line2D([], [], label=counted(trial, *counts), **style))
    drawn = [es for found in models.values() for es in found.values() if es is not None]
    if any(not math.isnan(es.low) for es in drawn):
        handles.append(Line2D([], [], color=GREY, lw=1.1, alpha=0.6, label=bars))
    return handles


def _told(name: str, found: Mapping[str, Interval | None]) -> str:
    words = "; ".join(f"{trial} {es}" for trial, es in found.items() if es is not None)
    return written(f"{name}: {words or 'no data'}", 4000)
