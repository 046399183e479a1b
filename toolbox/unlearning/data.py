"""Forget and retain rows: what is held out, what overlaps."""

from __future__ import annotations

from collections.abc import Sequence

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Row


def hold_out(rows: Sequence[Row], count: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """``(kept for evaluation, left for training)``: the first ``count`` rows are never trained on.

    Raises UsageProblem when nothing would be left to train on.
    """
    if count >= len(rows):
        raise UsageProblem(
            f"--holdout {count} leaves none of the {len(rows)} retain rows", "hold out fewer rows, or give more"
        )
    return tuple(rows[:count]), tuple(rows[count:])


def content(row: Row) -> tuple[object, ...]:
    """What makes two rows the same: their words, not their ids."""
    if row.text is not None:
        return (row.text.strip(),)
    assert row.messages is not None
    return tuple((message["role"], message["content"].strip()) for message in row.messages)


def overlap(forget: Sequence[Row], retain: Sequence[Row]) -> list[tuple[str, str]]:
    """Ids of rows that stand in both sets, as ``(forget id, retain id)``."""
    kept = {content(row): row.id for row in retain}
    return [(row.id, kept[content(row)]) for row in forget if content(row) in kept]


def check_overlap(forget: Sequence[Row], retain: Sequence[Row], strict: bool) -> str | None:
    """A warning about rows in both sets, or BadData when ``strict``; None without any."""
    both = overlap(forget, retain)
    if not both:
        return None
    shown = ", ".join(f"{a}={b}" for a, b in both[:5]) + (", ..." if len(both) > 5 else "")
    what = f"{len(both)} rows stand in both the forget and the retain set (ids forget=retain: {shown})"
    if strict:
        raise BadData(what, "take them out of one of the two")
    return what
