"""Pictures of a run and of a confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolbox.plots import Panel, Series, curves


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
