"""Pictures of lwi-train and lwi-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw_training(events: Sequence[dict[str, Any]], paths: Sequence[str], title: str) -> None:
    """Loss and accuracy over the epochs, to each path (svg, png, pdf)."""
    from toolbox.plots import Panel, Series, curves

    epochs = [event for event in events if event["event"] == "epoch"]
    x = [event["epoch"] for event in epochs]

    def line(label: str, name: str) -> Series:
        return Series(label, x, [event[name] for event in epochs])

    losses = [line("cross entropy, training", "ce"), line("distillation", "kd")]
    right = [line("new classes, training", "right")]
    if any(event["taw"] is not None for event in epochs):
        losses.append(line("cross entropy, validation", "val_loss"))
        right += [line("TAw, validation", "taw"), line("TAg, validation", "tag")]
    panels = [Panel("Loss", "mean over images", losses), Panel("Accuracy", "share right", right, ylim=(0, 1))]
    for path in paths:
        curves(panels, title=title, xlabel="epoch", path=path)


def draw_matrix(summaries: Sequence[dict[str, Any]], path: str) -> None:
    """Average TAw and TAg and forgetting after each task, a line a series."""
    from toolbox.plots import Panel, Series, curves

    def lines(name: str) -> list[Series]:
        return [Series(one["name"], [t + 1 for t in one["t"]], one[name]) for one in summaries]

    panels = [
        Panel("Task known (TAw)", "mean accuracy", lines("avg_taw"), ylim=(0, 1)),
        Panel("Task not known (TAg)", "mean accuracy", lines("avg_tag"), ylim=(0, 1)),
        Panel("Forgetting", "mean fall of TAw", lines("forgetting")),
    ]
    curves(panels, title="After each task", xlabel="tasks learned", path=path)
