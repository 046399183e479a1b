"""The picture of a design loop: SHD over what it cost, and which targets were chosen when."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolbox.plot_style import BAND_ALPHA, GREY, Look, freeze, legend_below, looks, new_figure, styled, written
from toolbox.plots import plot_format, save
from toolbox.shell.errors import CannotCreate, UsageProblem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TARGETS = 40
"""Rows of the second panel; more variables are summed up in a last one."""


def check_plot(path: str) -> None:
    """UsageProblem (2) for a kind that cannot be drawn, CannotCreate (73) where there is no such directory."""
    if path == "-":
        raise UsageProblem("--plot -: stdout has the events already", "name a file")
    if Path(path).suffix.lower() != ".html":
        try:
            plot_format(path)
        except UsageProblem as problem:
            raise UsageProblem(problem.what, "name it .svg, .png, .pdf or .html") from None
    if not Path(path).absolute().parent.is_dir():
        raise CannotCreate(f"--plot {path}: no such directory", "make it first")


def draw(
    rounds: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]], path: str,
    *, title: str = "",
) -> None:  # fmt: skip
    """Draw all runs into ``path``: .svg, .png, .pdf, or a self-contained .html with the figure and its numbers."""
    figure = picture(rounds, title=title)
    if Path(path).suffix.lower() != ".html":
        save(figure, path)
        return
    from toolbox.shell.atomic import atomic_file

    drawn = io.BytesIO()
    with styled():
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue().decode()
    with atomic_file(path) as handle:
        handle.write(_page(svg[svg.index("<svg") :], runs, together, title).encode())


def picture(rounds: Sequence[dict[str, Any]], *, title: str = "") -> Figure:
    """The figure: one colour a strategy, thin lines the seeds, a thick one their mean, the band a population sd.

    Without a truth there is no SHD and only the targets are drawn.
    """
    strategies = list(dict.fromkeys(one["strategy"] for one in rounds))
    look = looks(strategies)
    judged = "shd" in rounds[0]
    names = sorted({one["target"] for one in rounds})[:MOST_TARGETS]
    panels = min(len(strategies), 8)
    height = 1.0 + 0.16 * len(names)
    with styled():
        size = (max(7.0, 2.3 * panels), (3.4 if judged else 0.4) + height)
        figure = new_figure(size, title and f"{title}: design over rounds")
        layout = figure.add_gridspec(2 if judged else 1, panels, height_ratios=[3.0, height] if judged else [1])
        if judged:
            _curves(figure.add_subplot(layout[0, :]), rounds, look)
        grid = [figure.add_subplot(layout[-1, place]) for place in range(panels)]
        for place, strategy in zip(grid, strategies[:panels], strict=True):
            _heat(place, [one for one in rounds if one["strategy"] == strategy], names, strategy, look[strategy])
            place.set_yticks(range(len(names)), [written(name, 24) for name in names] if place is grid[0] else [])
        if judged:
            legend_below(figure, _handles(rounds, look))
        freeze(figure)
        figure.set_label("; ".join(_described(rounds, strategies)))
    return figure


def _by_seed(rounds: Sequence[dict[str, Any]], strategy: str) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for one in rounds:
        if one["strategy"] == strategy:
            found.setdefault(one["seed"], []).append(one)
    return found


def _curves(axes: Axes, rounds: Sequence[dict[str, Any]], look: dict[str, Look]) -> None:
    for strategy, own in look.items():
        seeds = _by_seed(rounds, strategy)
        for line in seeds.values():
            axes.plot([one["rows"] for one in line], [one["shd"] for one in line], color=own.colour, lw=0.5, alpha=0.45)
        shortest = min(len(line) for line in seeds.values())
        values = np.array([[one["shd"] for one in line[:shortest]] for line in seeds.values()], dtype=float)
        x = [one["rows"] for one in next(iter(seeds.values()))[:shortest]]
        mean, spread = values.mean(0), values.std(0)
        axes.fill_between(x, mean - spread, mean + spread, color=own.colour, alpha=BAND_ALPHA, lw=0)
        axes.plot(x, mean, color=own.colour, lw=1.9, ls=own.dash)
        _ticks(axes, next(iter(seeds.values())), own)
    axes.axhline(rounds[0]["shd_empty"], color=GREY, lw=1, ls=":")
    axes.set(xlabel="interventional rows", ylabel="SHD (lower is better)")
    axes.set_ylim(bottom=0)


def _ticks(axes: Axes, line: Sequence[dict[str, Any]], own: Look) -> None:
    """Short strokes on the x-axis where a run's stage changes."""
    changes = [b["rows"] - b["rows"] / b["round"] for a, b in itertools.pairwise(line) if a["stage"] != b["stage"]]
    strokes = axes.plot(changes, [0] * len(changes), ls="", marker="|", ms=11, mew=1.4, color=own.colour, zorder=5)
    strokes[0].set_clip_on(False)
    strokes[0].set_in_layout(False)


def _heat(axes: Axes, rounds: Sequence[dict[str, Any]], names: Sequence[str], strategy: str, own: Look) -> None:
    """Targets by round: how many of the seeds chose each."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    last = max(one["round"] for one in rounds)
    seeds = len({one["seed"] for one in rounds})
    share = np.zeros((len(names), last))
    for one in rounds:
        if one["target"] in names:
            share[names.index(one["target"]), one["round"] - 1] += 1 / seeds
    colours = LinearSegmentedColormap.from_list("share", ["white", own.colour])
    axes.imshow(share, aspect="auto", cmap=colours, vmin=0, vmax=1, extent=(0.5, last + 0.5, len(names) - 0.5, -0.5))
    axes.set_title(f"targets of {written(strategy, 24)} (share of {seeds} seeds)", fontsize=7.5)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.grid(False)


def _handles(rounds: Sequence[dict[str, Any]], look: dict[str, Look]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D(
            [], [], color=own.colour, ls=own.dash, lw=1.9, label=f"{written(name)} (n={len(_by_seed(rounds, name))})"
        )
        for name, own in look.items()
    ]
    handles.append(Patch(color=GREY, alpha=1.6 * BAND_ALPHA, lw=0, label="mean ± population sd"))
    handles.append(Line2D([], [], color=GREY, ls=":", lw=1, label="empty graph"))
    if any(one["stage"] != "numeric" for one in rounds):
        handles.append(Line2D([], [], color=GREY, ls="", marker="|", ms=9, label="a stage begins"))
    return handles


def _described(rounds: Sequence[dict[str, Any]], strategies: Sequence[str]) -> list[str]:
    told = []
    for strategy in strategies:
        lasts = [line[-1] for line in _by_seed(rounds, strategy).values()]
        ends = f", SHD at the end {', '.join(str(one['shd']) for one in lasts)}" if "shd" in lasts[0] else ""
        told.append(written(f"{strategy}: {len(lasts)} seeds, {lasts[0]['round']} rounds{ends}", 400))
    return told


def _page(svg: str, runs: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]], title: str) -> str:
    """The figure and two tables; no script, nothing from elsewhere."""
    summary = [one for one in together if one["event"] == "summary"]
    pairs = [one for one in together if one["event"] == "paired"]
    first = _html_table(
        ("strategy", "metric", "seeds", "mean", "sd (population)", "sd (sample)", "95 % interval", "by seed"),
        [(o["strategy"], o["metric"], o["n"], o["mean"], o["sd_population"], o["sd_sample"], o["ci95"], o["values"])
         for o in summary],
    )  # fmt: skip
    second = _html_table(
        ("a", "b", "metric", "mean a - b", "95 % interval", "p", "least possible p", "by seed"),
        [(o["a"], o["b"], o["metric"], o["mean"], o["ci95"], o["p"], o["p_floor"], o["differences"]) for o in pairs],
    )
    third = _html_table(
        ("strategy", "seed", "edges", "diversity", "targets", "fallbacks"),
        [(o["strategy"], o["seed"], o["edges"], o["diversity"], o["picks"], o["fallbacks"]) for o in runs],
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title or 'design loop')}</title>"
        "<style>body{font:14px/1.5 sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse;margin:1em 0}"
        "td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:left}svg{max-width:100%;height:auto}</style>"
        f"<h1>{html.escape(title or 'design loop')}</h1>{svg}<h2>After the last round</h2>{first}"
        f"<h2>Paired by seed</h2>{second}<h2>Runs</h2>{third}</html>\n"
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "<p>nothing to show</p>"
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(_shown(cell))}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(name)}" for name in head) + cells + "</table>"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items()) or "none"
    return "none" if value is None else str(value)
