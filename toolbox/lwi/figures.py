"""The picture of a fusion: how alike OLD and NEW are in each group, before and after the alignment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolbox.lwi.lines import GroupLine
from toolbox.plot_style import GREY, freeze, legend_below, looks, new_figure, styled, written
from toolbox.plots import save

_MODES = ("similar", "dissimilar", "identity")
_MOST_NAMES = 60


def draw(lines: Sequence[GroupLine], path: str | Path | None) -> Any:
    """Draw the cosine of each group before (grey) and after (its mode's mark), from shallow to deep, top to bottom.

    Written to ``path`` unless that is None; returns the figure.
    """
    from matplotlib.lines import Line2D

    with styled():
        rows = len(lines)
        figure = new_figure((6.4, 1.3 + min(0.17 * rows, 11.0)), "Likeness of OLD and NEW, before and after alignment")
        axes = figure.subplots()
        look = looks(_MODES)
        for place, line in enumerate(lines):
            mark = look[line.mode]
            axes.plot([line.cos_before, line.cos_after], [place, place], color=GREY, linewidth=0.8, zorder=1)
            axes.plot([line.cos_before], [place], "|", color=GREY, markersize=6, zorder=2)
            axes.plot([line.cos_after], [place], mark.marker, color=mark.colour, markersize=4.5, zorder=3)
        axes.set_ylim(rows - 0.4, -0.6)
        if rows <= _MOST_NAMES:
            axes.set_yticks(range(rows), [f"{written(line.group)} ({line.size})" for line in lines])
        else:
            axes.set_ylabel(f"{rows} groups, from shallow to deep")
        axes.set_xlabel("cosine of the weights that carry the group")
        axes.grid(axis="y", visible=False)
        shown = [mode for mode in _MODES if any(line.mode == mode for line in lines)]
        handles: list[Any] = [Line2D([], [], color=GREY, marker="|", linestyle="none", label="before")]
        for mode in shown:
            count = sum(line.mode == mode for line in lines)
            handles.append(
                Line2D([], [], color=look[mode].colour, marker=look[mode].marker, linestyle="none",
                       label=f"after, {mode} (n={count})")
            )  # fmt: skip
        legend_below(figure, handles)
        freeze(figure)
        told = (f"{line.group}: {line.cos_before:.3f} to {line.cos_after:.3f}, {line.mode}" for line in lines)
        figure.set_label("\n".join(told))
        if path is not None:
            save(figure, path)
    return figure
