"""Pictures of a run and of a confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.plot_style import freeze, new_figure, styled, written
from toolbox.plots import Panel, Series, curves, save


def draw_run(events: Sequence[Mapping[str, Any]], paths: Sequence[str | Path], title: str) -> None:
    """Loss, accuracy by shot group, gate density and shares of labels, by epoch."""
    epochs = [event for event in events if event["event"] == "epoch"]
    if not epochs:
        return
    at = [event["epoch"] for event in epochs]

    def series(name: str, label: str) -> Series:
        return Series(label, at, [event.get(name) for event in epochs])

    panels = [Panel("Training", "loss", [series("loss", "loss")])]
    if any("acc" in event for event in epochs):
        names = (("acc", "all"), ("many", "many"), ("medium", "medium"), ("few", "few"))
        panels.append(Panel("Reporting set", "accuracy", [series(*pair) for pair in names], (0, 1)))
    if any("gate_density" in event for event in epochs):
        names = (("gate_density", "gate density"), ("flagged_share", "flagged"), ("acting_share", "acted upon"))
        panels.append(Panel("Gates and labels", "share", [series(*pair) for pair in names], (0, 1)))
    for path in paths:
        curves(panels, xlabel="epoch", title=title, path=path)


def draw_confusion(
    table: NDArray[np.int64],
    labels: Sequence[str],
    counts: Sequence[int] | None,
    paths: Sequence[str | Path],
    title: str,
) -> None:
    """Shares of each true class by prediction, classes by their training counts where known, the largest first."""
    order = sorted(range(len(labels)), key=lambda n: (-(counts[n] if counts else 0), n))
    sizes = table.sum(1)
    shares = (table / np.maximum(sizes, 1)[:, None])[np.ix_(order, order)]
    names = [written(labels[n], 14) for n in order]
    side = min(14.0, max(4.2, 0.42 * len(labels) + 1.6))
    with styled():
        figure = new_figure((side, side * 0.9), f"{title} (n = {int(sizes.sum())})")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        axes.grid(False)
        axes.set(xlabel="predicted", ylabel="true")
        if len(labels) <= 40:
            axes.set_xticks(range(len(labels)), names, rotation=90)
            axes.set_yticks(range(len(labels)), [f"{name} ({sizes[n]})" for name, n in zip(names, order, strict=True)])
        if len(labels) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.005:
                    colour = "white" if share < 0.55 else "black"
                    axes.text(column, row, f"{share:.2f}".lstrip("0"), ha="center", va="center", color=colour, size=7)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
        freeze(figure)
    for path in paths:
        save(figure, path)
