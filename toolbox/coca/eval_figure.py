"""The picture of an evaluation: every rate with its interval, a mark a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolbox.coca.lines import ID, OOD_MEAN, Rate, RunRates
from toolbox.plot_style import freeze, legend_below, looks, new_figure, styled, written
from toolbox.plots import plot_format, save


def draw(found: Sequence[RunRates], path: str | Path | None) -> Any:
    """A row a rate (in distribution, attacks, their mean, over-refusal), a mark a run; returns the figure.

    UsageProblem: a path that is not svg, png or pdf.
    """
    from matplotlib.lines import Line2D

    if path is not None:
        plot_format(path)
    named = [(one.run, _rates(one)) for one in found]
    facets = list(dict.fromkeys(name for _, rates in named for name in rates))
    look = looks([run for run, _ in named])
    gap = 0.7 / max(1, len(named))
    with styled():
        height = 1.4 + (0.2 + 0.13 * len(named)) * len(facets)
        figure = new_figure((6.4, height), f"not refused, and refused needlessly, by {found[0].judge}")
        axes = figure.subplots()
        for row, facet in enumerate(facets):
            for place, (run, rates) in enumerate(named):
                if facet in rates:
                    _mark(axes, rates[facet], row + gap * (place - (len(named) - 1) / 2), look[run])
        axes.set_yticks(range(len(facets)), [written(name) for name in facets])
        axes.set_ylim(len(facets) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("% [95 % interval]")
        axes.grid(visible=False, axis="y")
        handles = [
            Line2D([], [], color=look[run].colour, marker=look[run].marker, ls="none", ms=6, label=written(run))
            for run, _ in named
        ]
        legend_below(figure, handles)
        freeze(figure)
        figure.set_label("\n".join(_told(run, rates) for run, rates in named))
    if path is not None:
        save(figure, path)
    return figure


def _rates(one: RunRates) -> dict[str, Rate]:
    found = {f"ASR {name} (n={attack.asr.n})": attack.asr for name, attack in one.attacks.items() if name == ID}
    found |= {f"ASR {name} (n={attack.asr.n})": attack.asr for name, attack in one.attacks.items() if name != ID}
    if one.ood_mean is not None:
        found[f"ASR {OOD_MEAN}"] = one.ood_mean
    if one.over_refusal is not None:
        found[f"over-refusal (n={one.over_refusal.n})"] = one.over_refusal
    return found


def _mark(axes: Any, rate: Rate, y: float, own: Any) -> None:
    if rate.low is not None and rate.high is not None:
        axes.hlines(y, 100 * rate.low, 100 * rate.high, color=own.colour, lw=1.3, alpha=0.6)
    axes.plot(100 * rate.estimate, y, own.marker, color=own.colour, ms=5.5, mec="white", mew=0.7, zorder=4)


def _told(run: str, rates: dict[str, Rate]) -> str:
    return written(f"{run}: " + "; ".join(f"{name} {100 * rate.estimate:.1f}" for name, rate in rates.items()), 4000)
