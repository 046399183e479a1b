"""The figure of coca-probe: the classes in the plane of their first components, and what readers find over layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLANES = 4
"""Layers shown as planes: spread over those probed, the last of them always."""


def draw_probe(
    rows: Sequence[Mapping[str, Any]], planes: Mapping[int, Mapping[str, Any]], path: str, title: str
) -> None:
    """Above, planes of up to four layers; below, accuracy of the linear and the Gaussian reader and their gap over the
    layers, a line an eraser with its standard deviation over the splits. svg, png or pdf by ``path``."""
    from toolbox.plot_style import freeze, legend_below, looks, new_figure, styled
    from toolbox.plots import save

    shown = _spread(sorted(planes))
    read = [row for row in rows if row["status"] != "constant"]
    erasers = list(dict.fromkeys(row["eraser"] for row in read))
    classes = list(planes[shown[0]]["points"])
    look = looks([*classes, *erasers])
    with styled():
        figure = new_figure((9.5, 5.2), title)
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1.15])
        for axes, layer in zip(above.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            _draw_plane(axes, layer, planes[layer], look)
        panels = below.subplots(1, 3, sharex=True)
        kinds = (("linear_acc", "Linear reader, accuracy"), ("rbf_acc", "Gaussian reader, accuracy"),
                 ("gap", "Gap: Gaussian less linear"))  # fmt: skip
        for axes, (key, heading) in zip(panels, kinds, strict=True):
            _draw_curves(axes, [row for row in read if row["eraser"] in erasers], key, heading, look)
        legend_below(figure, _handles(erasers, classes, look, read))
        freeze(figure)
        figure.set_label("\n".join(_describe(row) for row in read))
    save(figure, path)


def _spread(layers: Sequence[int]) -> list[int]:
    if len(layers) <= PLANES:
        return list(layers)
    step = (len(layers) - 1) / (PLANES - 1)
    return [layers[round(place * step)] for place in range(PLANES)]


def _draw_plane(axes: Axes, layer: int, plane: Mapping[str, Any], look: Mapping[str, Any]) -> None:
    for name, points in plane["points"].items():
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, look[name].marker, color=look[name].colour, ms=3, mew=0, alpha=0.55)
    first, second = plane["shares"]
    axes.set(title=f"Layer {layer}", xlabel=f"component 1 ({first:.0%})", ylabel=f"component 2 ({second:.0%})")
    axes.tick_params(labelbottom=False, labelleft=False)


def _draw_curves(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, heading: str, look: Mapping[str, Any]
) -> None:
    from matplotlib.ticker import MaxNLocator

    from toolbox.plot_style import BAND_ALPHA, GREY

    for name in dict.fromkeys(row["eraser"] for row in rows):
        own = [row for row in rows if row["eraser"] == name]
        layers, values = [row["layer"] for row in own], [row[key] for row in own]
        spread = [row.get(f"{key}_sd") or 0.0 for row in own]
        low, high = ([v + sign * s for v, s in zip(values, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(layers, low, high, color=look[name].colour, alpha=BAND_ALPHA, lw=0)
        axes.plot(layers, values, color=look[name].colour, ls=look[name].dash, marker=look[name].marker, ms=3, lw=1.3)
    if key == "gap":
        axes.axhline(0, color=GREY, lw=0.7)
    else:
        axes.axhline(rows[0]["chance"], color=GREY, lw=0.7)
        axes.set_ylim(top=1.02)
    axes.set(title=heading, xlabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def _handles(erasers: Sequence[str], classes: Sequence[str], look: Mapping[str, Any], rows: Sequence[Any]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    from toolbox.plot_style import BAND_ALPHA, GREY, written

    lines = [
        Line2D([], [], label=f"eraser {name}", color=look[name].colour, ls=look[name].dash, marker=look[name].marker,
               ms=3, lw=1.3)
        for name in erasers
    ]  # fmt: skip
    points = [
        Line2D([], [], label=written(name), color=look[name].colour, marker=look[name].marker, ls="none", ms=4)
        for name in classes
    ]
    band = f"± sd over {rows[0]['seeds']} {rows[0]['split']} splits; grey: chance"
    return [*lines, *points, Patch(color=GREY, alpha=1.6 * BAND_ALPHA, lw=0, label=band)]


def _describe(row: Mapping[str, Any]) -> str:
    return (
        f"layer {row['layer']}, eraser {row['eraser']}: linear {row['linear_acc']:.3f}, rbf {row['rbf_acc']:.3f} "
        f"({row['split']}, {row['seeds']} splits)"
    )
