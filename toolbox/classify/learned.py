"""Which classes a model learned in which task, as its config.json tells. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolbox.shell.errors import BadData

TASKS_KEY = "lwi_tasks"
"""Where config.json lists the labels of each learned task, in the order they were learned."""


def learned_tasks(config: Mapping[str, Any], labels: Sequence[str], source: str) -> tuple[tuple[str, ...], ...]:
    """The tasks that a model has learned, by its configuration; one of all its classes where it does not say.

    Raises: BadData (65) where the list does not name each of its ``labels`` once.
    """
    stored = config.get(TASKS_KEY)
    if stored is None:
        return (tuple(labels),)
    file = str(Path(source) / "config.json")
    if not isinstance(stored, list) or not all(isinstance(task, list) and task for task in stored):
        raise BadData(f"{TASKS_KEY} is no list of lists of labels", "write it as lwi-train does", file=file)
    named = [str(label) for task in stored for label in task]
    if sorted(named) != sorted(labels):
        raise BadData(f"{TASKS_KEY} and id2label name different classes", "write them as lwi-train does", file=file)
    return tuple(tuple(str(label) for label in task) for task in stored)


def tasks_with(config: Mapping[str, Any], labels: Sequence[str], source: str) -> tuple[tuple[str, ...], ...]:
    """The tasks behind a run on ``labels`` that begins from a model: those it has learned, then one of what is new.

    One task of all ``labels`` where some class of the model is not among them: such a head is not gone on with.
    Raises: BadData (65) as ``learned_tasks``.
    """
    names = config.get("id2label")
    before = [str(names[key]) for key in sorted(names, key=int)] if isinstance(names, dict) else []
    if not before or not set(before) <= set(labels):
        return (tuple(labels),)
    learned = learned_tasks(config, before, source)
    new = tuple(label for label in labels if label not in set(before))
    return (*learned, new) if new else learned
