"""Forget and retain rows: what is held out, what overlaps, what is answered instead, which words matter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Row
from toolbox.shell.streams import Streams, iter_lines, open_source

if TYPE_CHECKING:
    from torch import Tensor

    from toolbox.models.chat import Encoded


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


def read_refusals(path: str, streams: Streams) -> list[str]:
    """Refusals, one a line of plain text; blank lines are passed over. BadData where there is none."""
    with open_source(path, streams, "the refusals") as handle:
        lines = [(number, line) for number, line in iter_lines(handle, path)]
    found = []
    for number, line in lines:
        try:
            text = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise BadData("not UTF-8 text", "convert the file to UTF-8", file=path, line=number) from None
        if text:
            found.append(text)
    if not found:
        raise BadData("no refusal in it", "one a line, as in: I don't know.", file=path)
    return found


def refusing(rows: Sequence[Row], refusals: Sequence[str] | None, seed: int) -> tuple[Row, ...]:
    """The rows with another last answer: their ``alternate``, else one drawn from ``refusals`` by seed and place.

    Raises: BadData for a row without either, and for plain text, which answers nothing.
    """
    return tuple(_refusing(row, place, refusals, seed) for place, row in enumerate(rows))


def _refusing(row: Row, place: int, refusals: Sequence[str] | None, seed: int) -> Row:
    where = {"file": row.file, "line": row.line}
    if row.messages is None:
        raise BadData("plain text has no answer to refuse", "give questions and answers", **where)
    instead = row.alternate
    if instead is None:
        if not refusals:
            raise BadData(
                "this objective teaches refusals, and the row has no `alternate`", "or give --refusals FILE", **where
            )
        instead = refusals[random.Random(f"{seed}/{place}").randrange(len(refusals))]
    last = max(at for at, message in enumerate(row.messages) if message["role"] == "assistant")
    answered = (*row.messages[:last], {"role": "assistant", "content": instead})
    return replace(row, messages=answered)


def with_key_words(rows: Sequence[Row], words: Mapping[int, tuple[str, ...] | str]) -> tuple[Row, ...]:
    """The rows with ``words`` by their place in the place of their own."""
    return tuple(replace(row, key_words=words.get(place, row.key_words)) for place, row in enumerate(rows))


def importances(rows: Sequence[Row], encoded: Sequence[Encoded], tokenizer: Any) -> Tensor:
    """Importance of every labelled token, row after row: 1 on key words, 0 elsewhere, times the row's ``weight``.

    A row without key words but with a weight counts whole. Raises: BadData for a row without either, or whose key
    words match nothing.
    """
    import torch

    from toolbox.unlearning.key_words import check_marks, mark_tokens
    from toolbox.unlearning.satimp import annotated_weights

    without = [row for row in rows if row.key_words is None and row.weight is None]
    if without:
        shown = ", ".join(row.id for row in without[:5])
        raise BadData(
            f"{len(without)} forget rows have neither `key_words` nor `weight` (ids {shown})",
            "annotate them in the rows or with --key-words FILE, or leave them out",
            file=without[0].file,
            line=without[0].line,
        )
    marks = {
        place: mark_tokens(one, tokenizer, row.key_words)
        for place, (row, one) in enumerate(zip(rows, encoded, strict=True))
        if row.key_words is not None
    }
    check_marks(rows, marks)
    parts = [torch.tensor(marks.get(place, (1.0,) * one.n_labelled)) for place, one in enumerate(encoded)]
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
    weight = torch.tensor([1.0 if row.weight is None else row.weight for row in rows])
    return annotated_weights(torch.cat(parts), owner, weight)
