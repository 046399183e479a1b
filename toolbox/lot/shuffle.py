"""Choices in another order under the same labels, and what has to move with them."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from toolbox.shell.items import Choices
from toolbox.shell.records import Record

LABEL_FIELDS = ("unknown", "target", "common_wrong")
"""Fields of ``meta`` that name a choice, and so follow it when choices are shuffled."""

_OF_OTHERS = re.compile(
    r"\b(?i:all|any|both|each|either|neither|none|most|some|one|two|three) (?i:of (?:the )?)"
    r"(?i:above|below|following|these|those|preceding|previous|others?|choices|options|answers)\b"
    r"|\b(?i:all|both|none) (?i:the )?(?i:above)\b"
    r"|^(?i:all|both|neither|none)\W*$"
    r"|^(?i:both |either |neither |only )?\(?[A-H]\)?(?:(?:, and|, or|,| and| or| nor| &) \(?[A-H]\)?)+(?i: only)?\W*$"
)
"""Choices that mean something else, or nothing, in another place: "All of the above", "None of these", "A and C"."""


def speaks_of_others(text: str) -> bool:
    """Whether a choice is about other choices, or about its place among them."""
    return _OF_OTHERS.search(text) is not None


def permutation(seed: int, id: str, n: int) -> list[int]:
    """An order of ``n`` things that depends on the seed and the item alone: place i gets what was at [i]."""

    def key(place: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{place}/{id}".encode(), digest_size=16).digest()

    return sorted(range(n), key=key)


def shuffle(
    record: Record, choices: Choices, gold: str | None, seed: int
) -> tuple[dict[str, Any], Choices, str | None]:
    """The changed fields, the choices and the gold label once the texts have changed places under fixed labels.

    ``meta.permutation[i]`` is the former place of choice i; labels in ``meta`` follow their choices (``LABEL_FIELDS``).
    """
    meta = dict(record.value.meta)
    if "permutation" in meta:
        raise record.bad("the choices were shuffled already", "shuffle the items as they were", "$.meta.permutation")
    order = permutation(seed, record.id, len(choices.texts))
    moved = {label: choices.labels[order.index(old)] for old, label in enumerate(choices.labels)}
    for name in LABEL_FIELDS:
        if name in meta:
            meta[name] = _followed(meta[name], moved)
    meta["permutation"] = order
    texts = tuple(choices.texts[old] for old in order)
    return {"choices": list(texts), "meta": meta}, Choices(choices.labels, texts), None if gold is None else moved[gold]


def _followed(value: Any, moved: dict[str, str]) -> Any:
    """The new label of the choice that ``value`` names by label or by index from 0, as an ``answer`` would."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    if isinstance(value, int) and str(value) not in moved and 0 <= value < len(moved):
        return list(moved.values())[value]
    return moved.get(str(value), value)
