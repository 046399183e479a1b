"""The landscape as one HTML file that needs no network: every state can be pointed at and shows its thought.

The figures are made here as plotly.js takes them; of the package plotly (an extra) only that script is used. A policy
in the page's head forbids it to load anything.
"""

from __future__ import annotations

import html
import importlib.util
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np

from toolbox.landscape.features import Features
from toolbox.landscape.method import Floats, Integers, gaussian_density, mass_levels
from toolbox.landscape.metrics import facet_name, stages
from toolbox.landscape.picture import FEW_STATES
from toolbox.shell.errors import UsageProblem, without_escapes
from toolbox.shell.files import atomic_file

if TYPE_CHECKING:
    from toolbox.landscape.output import Figure, Result

GRID = 60  # points of a density a side
_WIDTH = 90  # characters of a line of hover text
_LONGEST = 1500  # characters of a thought that are shown
_DIGITS = 4

_ROWS = {
    0: ("wrong", "triangle-down", "253,238,230", "#dd7740", "#4a1d00"),
    1: ("correct", "circle", "232,241,248", "#4790c4", "#00263d"),
    -1: ("all", "circle", "240,240,240", "#8c8c8c", "#1a1a1a"),
}
"""By outcome: name, marker, light colour (r,g,b), dark colour, colour of the points; as in the drawn figure."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = "body{font-family:sans-serif;margin:1.5em;color:#1a1a1a}h2{font-size:1.05em}p{max-width:60em;color:#444}"


def needs_plotly() -> None:
    """UsageProblem (2) where the package is not installed."""
    if importlib.util.find_spec("plotly") is None:
        raise UsageProblem("--html needs plotly, which is not installed", "pip install plotly, or leave --html out")


def write_html(path: str | FilePath, result: Result) -> None:
    """Write all figures of ``result`` into one file, whole or not at all."""
    from plotly.offline import get_plotlyjs

    with atomic_file(path) as handle:
        handle.write(page(result, get_plotlyjs()).encode())


def page(result: Result, script: str) -> str:
    """The page; ``script`` is plotly.js."""
    title = "Landscape of thoughts"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        "<p>Every point is a state of reasoning: point at it to read the thought that led there. Areas hold 20, 40, "
        "60, 80 and 95 % of the density. Near points are alike; distances between islands mean little.</p>",
        f"<script>{script}</script>",
    ]
    for number, one in enumerate(result.figures):
        figure = make_figure(one, result)
        data, layout = (_embedded(figure[part]) for part in ("data", "layout"))
        config = _embedded({"displaylogo": False, "responsive": True})
        parts.append(f'<h2>{html.escape(_heading(one, result.features))}</h2><div id="figure{number}"></div>')
        parts.append(f'<script>Plotly.newPlot("figure{number}",{data},{layout},{config});</script>')
    return "\n".join([*parts, "</body></html>", ""])


def _embedded(value: Any) -> str:
    """JSON that cannot end the script it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _heading(one: Figure, features: Features) -> str:
    paths = int(one.paths.sum())
    questions = len(np.unique(features.question[one.paths]))
    told = f"{paths} paths of {questions} questions with {one.landscape.rows.k} choices"
    name = without_escapes(facet_name(one.facet))
    return f"{name}: {told}" if name else told


def make_figure(one: Figure, result: Result) -> dict[str, Any]:
    """``{"data": traces, "layout": layout}`` of a figure: a row an outcome, a column a stage of progress."""
    options, features, rows = result.options, result.features, one.landscape.rows
    stage = stages(features, one.paths, options.bins, options.reference)
    outcomes = [0, 1] if rows.gold_first else [-1]
    outcome = np.where(one.paths[features.path], features.correct[features.path], -2)
    place = np.full((len(features.path), 2), np.nan)
    place[rows.state[rows.state >= 0]] = one.landscape.xy[rows.state >= 0]
    low, high = _limits(one.landscape.xy)
    data: list[dict[str, Any]] = []
    titles: list[str] = []
    for line, value in enumerate(outcomes):
        for column in range(options.bins):
            axis = line * options.bins + column + 1
            states = np.flatnonzero((outcome == value) & (stage == column + 1) & ~np.isnan(place[:, 0]))
            xy = place[states]
            if options.density == "kde" and len(states) >= FEW_STATES:
                data.append(_density(xy, low, high, value, axis))
            data.append(_points(xy, states, value, axis, result))
            data.append(_landmarks(one, features, axis))
            if column == 0:
                data.append(_starts(one, features, axis))
            titles.append(f"{_ROWS[value][0]}, {_stage(column, options.bins, options.reference)}: {len(states)} states")
    return {"data": data, "layout": _layout(titles, len(outcomes), options.bins, low, high)}


def _stage(column: int, bins: int, compat: bool) -> str:
    if compat:
        return f"stage {column + 1}"
    return f"{100 * column / bins:.3g}–{100 * (column + 1) / bins:.3g} %"


def _limits(xy: Floats) -> tuple[Floats, Floats]:
    centre = (xy.min(axis=0) + xy.max(axis=0)) / 2
    half = 0.57 * float(np.max(np.ptp(xy, axis=0))) or 1.0
    return centre - half, centre + half


# --- traces -----------------------------------------------------------------------------------------------------------


def _on(axis: int, **trace: Any) -> dict[str, Any]:
    """A trace on the panel of that number."""
    suffix = "" if axis == 1 else str(axis)
    return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "showlegend": False, **trace}


def _numbers(values: Floats) -> list[Any]:
    return np.round(values, _DIGITS).tolist()


def _density(xy: Floats, low: Floats, high: Floats, outcome: int, axis: int) -> dict[str, Any]:
    """Areas of fixed shares of the density. Heights are moved so that their borders lie at 1, 2, ...: plotly's contours
    are evenly spaced."""
    x, y = (np.linspace(low[at], high[at], GRID) for at in (0, 1))
    density = gaussian_density(xy, x, y)
    levels = mass_levels(density)
    heights = np.interp(density, [0.0, *levels, density.max() * 1.0001], np.arange(len(levels) + 2))
    light, dark = _ROWS[outcome][2:4]
    # What lies below the first border has the first colour, the area of border i the one at i / n.
    scale = [[0, f"rgba({light},0)"], [1 / len(levels), f"rgb({light})"], [1, dark]]
    if len(levels) == 1:
        scale = [[0, f"rgba({light},0)"], [1, dark]]
    return _on(
        axis, type="contour", x=_numbers(x), y=_numbers(y), z=np.round(heights, 2).tolist(), hoverinfo="skip",
        contours={"start": 1, "end": len(levels), "size": 1, "coloring": "fill"}, colorscale=scale, showscale=False,
        line={"width": 0.4, "color": _ROWS[outcome][4]},
    )  # fmt: skip


def _points(xy: Floats, states: Integers, outcome: int, axis: int, result: Result) -> dict[str, Any]:
    _, marker, _, _, colour = _ROWS[outcome]
    return _on(
        axis, type="scatter", mode="markers", x=_numbers(xy[:, 0]), y=_numbers(xy[:, 1]),
        text=list(_hover(states, result)), hovertemplate="%{text}<extra></extra>",
        marker={"symbol": marker, "size": 5, "color": colour, "opacity": 0.6},
    )  # fmt: skip


def _hover(states: Integers, result: Result) -> Iterator[str]:
    """Path, place and thought of each state; plotly takes some tags for formatting, so that texts are escaped."""
    features = result.features
    for state in states.tolist():
        number = int(features.path[state])
        path, step = result.paths[number], int(features.step[state])
        yield f"<b>{_shown(path.id)}</b>, thought {step} of {len(path.thoughts)}<br>{_shown(path.thoughts[step - 1])}"


def _shown(text: str) -> str:
    text = without_escapes(text)
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, _WIDTH) or [""])


def _landmarks(one: Figure, features: Features, axis: int) -> dict[str, Any]:
    """The choices: the right one a star, the others crosses; with their labels on the map of one question."""
    rows = one.landscape.rows
    x, y = one.landscape.xy[rows.question < 0].T
    right = [rows.gold_first and number == 0 for number in range(rows.k)]
    names = ["right answer" if first else "another answer" if rows.gold_first else "an answer" for first in right]
    if one.labels is not None:
        asked = rows.question[rows.question >= 0][0]
        ordered = _ordered(one.labels, int(features.gold[asked]) if rows.gold_first else 0)
        names = [f"{label}, {name}" for label, name in zip(ordered, names, strict=True)]
    return _on(
        axis, type="scatter", mode="markers", x=_numbers(x), y=_numbers(y), text=[_shown(name) for name in names],
        hovertemplate="%{text}<extra></extra>",
        marker={
            "symbol": ["star" if first else "x" for first in right], "size": [13 if first else 8 for first in right],
            "color": ["#F0E442" if first else "#ffffff" for first in right], "line": {"width": 1, "color": "#1a1a1a"},
        },
    )  # fmt: skip


def _ordered(labels: Sequence[str], gold: int) -> list[str]:
    """The labels in the order of the landmarks: the right one's first."""
    return [labels[gold], *labels[:gold], *labels[gold + 1 :]]


def _starts(one: Figure, features: Features, axis: int) -> dict[str, Any]:
    """The questions alone, where the chosen paths start."""
    rows = one.landscape.rows
    chosen = (rows.state < 0) & (rows.question >= 0) & np.isin(rows.question, features.question[one.paths])
    x, y = one.landscape.xy[chosen].T
    names = [_shown(f"question {features.question_ids[number]} alone") for number in rows.question[chosen]]
    return _on(
        axis, type="scatter", mode="markers", x=_numbers(x), y=_numbers(y), text=names,
        hovertemplate="%{text}<extra></extra>",
        marker={"symbol": "diamond", "size": 7, "color": "#009E73", "line": {"width": 1, "color": "#1a1a1a"}},
    )  # fmt: skip


def _layout(titles: Sequence[str], lines: int, columns: int, low: Floats, high: Floats) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "height": 330 * lines, "margin": {"l": 20, "r": 20, "t": 30, "b": 20}, "hovermode": "closest",
        "plot_bgcolor": "#ffffff", "hoverlabel": {"align": "left"}, "annotations": [],
    }  # fmt: skip
    for number, title in enumerate(titles):
        line, column = divmod(number, columns)
        suffix = "" if number == 0 else str(number + 1)
        across = [(column + 0.03) / columns, (column + 0.97) / columns]
        up = [1 - (line + 0.97) / lines, 1 - (line + 0.1) / lines]
        common = {"showticklabels": False, "showgrid": False, "zeroline": False, "showline": True, "mirror": True,
                  "linecolor": "#b5b5b5"}  # fmt: skip
        first = number == 0
        layout[f"xaxis{suffix}"] = {
            **common, "domain": across, "anchor": f"y{suffix}", "range": _numbers(np.array([low[0], high[0]])),
            **({} if first else {"matches": "x"}),
        }  # fmt: skip
        layout[f"yaxis{suffix}"] = {
            **common, "domain": up, "anchor": f"x{suffix}", "range": _numbers(np.array([low[1], high[1]])),
            **({} if first else {"matches": "y"}),
        }  # fmt: skip
        layout["annotations"].append({
            "text": title, "x": sum(across) / 2, "y": up[1], "xref": "paper", "yref": "paper", "xanchor": "center",
            "yanchor": "bottom", "showarrow": False, "font": {"size": 11},
        })  # fmt: skip
    return layout
