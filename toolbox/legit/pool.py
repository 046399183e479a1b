"""Pools of rows that were really measured: an experiment is handed out of them instead of being sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolbox.legit.network import keyed_generator
from toolbox.legit.records import DataRow
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.records import RecordReader, read_records
from toolbox.shell.streams import Streams


@dataclass(frozen=True)
class Pool:
    """Rows by target, as they came; ``observed`` are those without one."""

    file: str
    observed: Sequence[dict[str, Any]]
    by_target: dict[str, Sequence[dict[str, Any]]]

    def batches(self, target: str, n: int) -> int:
        """How many experiments of ``n`` rows the pool holds for a target."""
        return len(self.by_target.get(target, ())) // n

    def draw(self, target: str, occurrence: int, n: int, seed: int) -> list[dict[str, Any]]:
        """The ``occurrence``-th batch of ``n`` rows: rows [c n, (c + 1) n) of the target's seeded permutation.

        Without replacement as long as ``n`` stays the same. BadData (65): used up, or no such target; it names what is
        left.
        """
        rows = self.by_target.get(target, ())
        if (occurrence + 1) * n > len(rows):
            left = ", ".join(f"{name} {len(own)}" for name, own in sorted(self.by_target.items())) or "nothing"
            what = f"the pool has {len(rows)} rows of {target}, and batch {occurrence + 1} of {n} is asked for"
            raise BadData(what, f"rows by target: {left}", file=self.file)
        order = keyed_generator(seed, target).permutation(len(rows))
        return [rows[place] for place in order[occurrence * n : (occurrence + 1) * n].tolist()]


def read_pool(path: str, streams: Streams) -> Pool:
    """The pool in a file of data rows. BadData (65) for two targets in a row, MissingInput (66)."""
    if path != "-" and not Path(path).is_file():
        raise MissingInput(f"{path}: no such file", "a pool is a file of data rows")
    observed: list[dict[str, Any]] = []
    by_target: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(path, streams, RecordReader([DataRow]), "--pool"):
        targets = record.value.targets
        if len(targets) > 1:
            raise record.bad("two targets in a row", "the learner takes one intervention at a time", "$.targets")
        own = by_target.setdefault(targets[0], []) if targets else observed
        own.append({"targets": [], **record.data})
    if not observed and not by_target:
        raise BadData("the pool is empty", None, file=path)
    return Pool(path, observed, dict(by_target))
