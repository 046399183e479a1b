"""Where a design loop's rows come from: a simulator, a pool of real rows, or a command of the user's."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from toolbox.legit.data import Bins, RowReader, Table, Variable, decode
from toolbox.legit.network import Network, draw_rows
from toolbox.legit.pool import Pool
from toolbox.legit.records import DataRow
from toolbox.shell.errors import BadData, TryAgain, clean
from toolbox.shell.records import RecordReader

Lines = list[dict[str, Any]]
"""Data rows as they are written."""


class Source(Protocol):
    """Gives rows. ``available`` says which targets it can still serve, given how often each was asked for."""

    def observed(self) -> Lines | None:
        """Rows without an intervention; None where the source has none."""
        ...

    def experiment(self, target: Mapping[str, Any]) -> Lines:
        """The rows of one experiment, asked for by a target row."""
        ...

    def available(self, picks: Mapping[str, int], n: int) -> set[str] | None:
        """Names that can be had once more; None for all."""
        ...


@dataclass(frozen=True)
class Simulator:
    """Rows of a network; those of a seed's c-th experiment on a target are the same for every strategy."""

    network: Network
    variables: Sequence[Variable]
    n_observed: int
    seed: int

    def observed(self) -> Lines:
        rows = draw_rows(self.network, self.n_observed, self.seed)
        return [{"values": values, "targets": []} for values in decode(self.variables, rows.tolist())]

    def experiment(self, target: Mapping[str, Any]) -> Lines:
        place = self.network.names.index(target["target"])
        rows = draw_rows(self.network, target["n"], self.seed, place, target["occurrence"])
        return [
            {
                "values": values,
                "targets": [target["target"]],
                "round": target["round"],
                "occurrence": target["occurrence"],
            }
            for values in decode(self.variables, rows.tolist())
        ]

    def available(self, picks: Mapping[str, int], n: int) -> None:
        return None


@dataclass(frozen=True)
class PoolSource:
    """Rows that were measured, handed out without replacement; the seed decides which come first."""

    pool: Pool
    seed: int

    def observed(self) -> Lines:
        return list(self.pool.observed)

    def experiment(self, target: Mapping[str, Any]) -> Lines:
        rows = self.pool.draw(target["target"], target["occurrence"], target["n"], self.seed)
        return [{**row, "round": target["round"], "occurrence": target["occurrence"]} for row in rows]

    def available(self, picks: Mapping[str, int], n: int) -> set[str]:
        return {name for name in self.pool.by_target if picks.get(name, 0) < self.pool.batches(name, n)}


@dataclass(frozen=True)
class CommandSource:
    """A command that reads a target row on its stdin and writes the experiment's data rows to its stdout.

    Split into words as a shell would, but run without one. Raises: TryAgain (75) when it leaves with another status
    than 0, so that the design can go on later; BadData (65) for rows that are not of that target.
    """

    words: tuple[str, ...]

    @staticmethod
    def of(command: str) -> CommandSource:
        return CommandSource(tuple(shlex.split(command)))

    def observed(self) -> None:
        return None

    def experiment(self, target: Mapping[str, Any]) -> Lines:
        name = self.words[0]
        try:
            done = subprocess.run(self.words, input=json.dumps(dict(target)).encode() + b"\n", capture_output=True)
        except OSError as error:
            raise TryAgain(f"--experiment {name}: {error.strerror}", "check the command, then --resume") from None
        if done.returncode:
            said = clean(done.stderr.decode("utf-8", "replace"))[-300:]
            raise TryAgain(
                f"--experiment {name} left with {done.returncode}: {said}", "--resume goes on with this design"
            )
        import io

        reader = RecordReader([DataRow])
        rows = [record.data for record in reader(io.BufferedReader(io.BytesIO(done.stdout)), f"--experiment {name}")]
        if not rows:
            raise BadData(
                "wrote no rows", "it writes the data rows of the target on its stdin", file=f"--experiment {name}"
            )
        if any(row.get("targets") != [target["target"]] for row in rows):
            raise BadData(f"a row is not of the target {target['target']}", None, file=f"--experiment {name}")
        marks = {"round": target["round"], "occurrence": target["occurrence"]}
        return [{**row, **marks} for row in rows]

    def available(self, picks: Mapping[str, int], n: int) -> None:
        return None


def as_table(
    lines: Iterable[Mapping[str, Any]], variables: Sequence[Variable] | None, file: str, bins: int, binning: str,
    kept: Bins | None = None,
) -> Table:  # fmt: skip
    """Rows that a source gave, checked and coded like those of a file."""
    import io

    import msgspec

    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    reader = RowReader(variables, bins=bins, binning=binning, kept=kept)
    for record in RecordReader([DataRow])(io.BufferedReader(io.BytesIO(text)), file):  # type: ignore[arg-type]
        reader.add(record)
    return reader.table()
