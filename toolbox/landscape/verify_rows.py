"""What landscape-verify asks of rows beyond what they are to a map: what stays together, and what has been seen.

No numerical library is needed here, so that schemas cost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from typing import Annotated

import msgspec

from toolbox.landscape.data import Path, Paths
from toolbox.shell.errors import UsageProblem
from toolbox.weights.provenance import canonical


class ScoredPath(msgspec.Struct, kw_only=True):
    """A path as it came in, with the probability that its answer is right: the weight of its vote."""

    score: Annotated[float, msgspec.Meta(ge=0, le=1, description="null for a path without thoughts")] | None
    pred: Annotated[
        str | int | float | bool | None, msgspec.Meta(description="as it came in, else the answer that was read")
    ]


def polls_of(paths: Paths) -> Iterator[Hashable]:
    """The poll that each path votes in: its question, model and variant."""
    for path in paths.paths:
        yield path.question, path.record.value.model, path.record.value.variant


def groups_of(paths: Paths, name: str) -> list[Hashable]:
    """What folds keep together, a path each: the value of the field ``name`` of the row or of its ``meta``; a row that
    has none goes by its question, as all do for ``id``.

    Raises: UsageProblem where no row has the field, BadData for values that are no scalars and for a question whose
    paths are in several groups: folds would divide it.
    """
    groups = [_group(path, name) for path in paths.paths]
    if name != "id" and not any(isinstance(group, tuple) for group in groups):
        raise UsageProblem(f"--group {name}: no row has such a field", "the default is id")
    known: dict[int, Hashable] = {}
    for path, group in zip(paths.paths, groups, strict=True):
        if known.setdefault(path.question, group) != group:
            what = f"another {name} than earlier rows of the id {path.record.id}, which folds would divide"
            raise path.record.bad(what, "--group needs a field that is the same for all paths of a question")
    return groups


def _group(path: Path, name: str) -> Hashable:
    """The question's index, or the field's value in a tuple."""
    for where, found in (("$", path.record.data), ("$.meta", path.record.value.meta)):
        if name != "id" and found.get(name) is not None:
            if isinstance(found[name], dict | list):
                raise path.record.bad("neither text nor number, so no group", "see --group", f"{where}.{name}")
            return (found[name],)
    return path.question


def digests(paths: Paths) -> list[bytes]:
    """Eight bytes a question, of its id, its words and its choices: what tells it again without naming it."""
    words = {path.question: path.record.value.question for path in reversed(paths.paths)}
    told = [
        (one.id, words.get(number), one.choices.labels, one.choices.texts) for number, one in enumerate(paths.questions)
    ]
    return [hashlib.sha256(canonical(one).encode()).digest()[:8] for one in told]
