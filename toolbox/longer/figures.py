"""Pictures: a run's loss and validation, and the same-budget curves of several architectures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw_run(events: Sequence[dict[str, Any]], paths: Sequence[str], title: str) -> None:
    """The loss of every step, and the validation AUC where it was measured, to each path."""
    from toolbox.plots import Panel, Series, curves

    steps = [event for event in events if event["event"] == "step"]
    panels = [
        Panel("Loss", "BCE of the step", [Series("loss", [e["step"] for e in steps], [e["loss"] for e in steps])])
    ]
    seen = [event for event in events if event["event"] == "eval"]
    if seen:
        values = [event["sets"]["valid"]["auc"] for event in seen]
        panels.append(Panel("Validation", "AUC", [Series("valid", [e["step"] for e in seen], values)]))
    for path in paths:
        curves(panels, title=title, xlabel="step", path=path)
