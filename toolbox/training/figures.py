"""The figure of a training run: the watched sets over the steps, or the loss where nothing was watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def draw_training(events: Sequence[dict[str, Any]], paths: Sequence[str], title: str) -> None:
    """Draw ES and probability of every watched set over the steps, with intervals, to each path (svg, png, pdf)."""
    for path in paths:
        _draw(events, path, title)


def _draw(events: Sequence[dict[str, Any]], path: str, title: str) -> None:
    from toolbox.plots import Panel, Series, curves

    evaluations = [event for event in events if event["event"] == "eval"]
    if not evaluations:
        steps = [event for event in events if event["event"] == "step"]
        loss = Series("loss", [event["step"] for event in steps], [event["loss"] for event in steps])
        curves([Panel("Loss", "mean loss of the step", [loss])], title=title, xlabel="step", path=path)
        return
    names = evaluations[0]["sets"]
    panels = [
        Panel(heading, heading.lower(), [_series(evaluations, name, key) for name in names], ylim=(0, 1))
        for heading, key in (("Extraction strength", "es"), ("Probability", "prob"))
    ]
    curves(panels, title=title, xlabel="step", path=path)


def _series(evaluations: Sequence[dict[str, Any]], name: str, key: str) -> Any:
    from toolbox.plots import Series

    found = [event["sets"][name] for event in evaluations]
    return Series(
        name,
        [event["step"] for event in evaluations],
        [one[key] for one in found],
        low=[one[f"{key}_interval"][0] for one in found],
        high=[one[f"{key}_interval"][1] for one in found],
        n=found[0]["n"],
    )
