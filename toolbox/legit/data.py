"""Data rows as small integers: variables and their states, bins for numbers, experiments, fingerprints."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.legit.network import MOST_STATES, Network, packaged_networks, read_network
from toolbox.legit.records import DataRow, VariableRow
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.records import Record, RecordReader, read_records
from toolbox.shell.streams import Streams

SHIPPED = Path(__file__).parent / "variables"
"""Descriptions of asia, child, insurance, alarm and sachs, written for this project."""


@dataclass(frozen=True)
class Variable:
    """One variable; ``states`` is empty until rows have told them."""

    name: str
    states: tuple[str, ...] = ()
    description: str | None = None
    domain: str | None = None
    cost: float = 1.0
    allowed: bool = True


def read_variables(name: str, streams: Streams) -> list[Variable]:
    """The variables in a file of JSON lines, in alphabetical order. BadData (65): a name twice, too few states."""
    found: dict[str, Variable] = {}
    for record in read_records(name, streams, RecordReader([VariableRow]), "--variables"):
        row: VariableRow = record.value
        if row.name in found:
            raise record.bad(f"the variable {row.name} is there twice", "give each one line", "$.name")
        if row.states is not None and (
            len(set(row.states)) < len(row.states) or not 2 <= len(row.states) <= MOST_STATES
        ):
            raise record.bad(f"{row.name} needs 2 to {MOST_STATES} different states", None, "$.states")
        states = tuple(row.states or ())
        found[row.name] = Variable(row.name, states, row.description, row.domain, row.cost, row.allowed)
    if len(found) < 2:
        raise BadData(f"{len(found)} variables: at least two are needed", "one JSON object a line", file=name)
    return [found[key] for key in sorted(found)]


def network_variables(name: str, streams: Streams, network: Network | None = None) -> list[Variable]:
    """The variables of a network, with the shipped descriptions where there are some."""
    network = network or read_network(name)
    bare = [Variable(one, states) for one, states in zip(network.names, network.states, strict=True)]
    shipped = SHIPPED / f"{name}.jsonl"
    if name not in packaged_networks() or not shipped.is_file():
        return bare
    told = {one.name: one for one in read_variables(str(shipped), streams)}
    return [told.get(one.name, one) if told.get(one.name, one).states == one.states else one for one in bare]


def find_variables(variables: str | None, network: str | None, streams: Streams) -> list[Variable] | None:
    """What ``--variables`` or ``--network`` names; None where neither is given: rows tell them then."""
    if variables is not None and network is not None:
        raise UsageProblem("--variables and --network exclude one another", "give one of them")
    if variables is not None:
        return read_variables(variables, streams)
    return None if network is None else network_variables(network, streams)


# -- rows -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bins:
    """How numbers become states: the inner ``edges`` of each variable that holds numbers."""

    edges: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def place(self, name: str, value: float) -> int:
        return int(np.searchsorted(self.edges[name], value, side="right"))


@dataclass(frozen=True)
class Experiment:
    """Consecutive rows [start, stop) of one target; ``round`` and ``occurrence`` as the rows bear them."""

    target: int
    start: int
    stop: int


@dataclass(frozen=True)
class Table:
    """All rows so far: ``states`` int8 [rows, N] in the variables' order, ``targets`` int16 [rows], -1 where nothing
    was set. ``lines`` are their places in the input, ``marks`` the (round, occurrence) that they bear."""

    variables: tuple[Variable, ...]
    bins: Bins
    states: NDArray[np.int8]
    targets: NDArray[np.int16]
    marks: Sequence[tuple[int | None, int | None]]
    lines: Sequence[int | None]
    file: str = "stdin"

    def __len__(self) -> int:
        return len(self.states)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(one.states) for one in self.variables)

    def head(self, stop: int) -> Table:
        """The first ``stop`` rows."""
        return replace(
            self,
            states=self.states[:stop],
            targets=self.targets[:stop],
            marks=self.marks[:stop],
            lines=self.lines[:stop],
        )

    def extended(self, other: Table) -> Table:
        """These rows and those of ``other`` behind them, about the same variables."""
        return replace(
            self,
            states=np.concatenate([self.states, other.states]),
            targets=np.concatenate([self.targets, other.targets]),
            marks=[*self.marks, *other.marks],
            lines=[*self.lines, *other.lines],
        )

    def fingerprints(self) -> NDArray[np.int64]:
        """A CRC-32 a row, over its target and states: what tells a row that was changed."""
        whole = np.concatenate([self.targets.astype("<i2")[:, None].view(np.int8), self.states], axis=1)
        return np.fromiter((zlib.crc32(row) for row in np.ascontiguousarray(whole)), np.int64, len(whole))

    def experiments(self, start: int = 0) -> list[Experiment]:
        """The runs of rows from ``start`` on that have one target, one round and one occurrence."""
        found: list[Experiment] = []
        key: Any = None
        for row in range(start, len(self)):
            target = int(self.targets[row])
            now = None if target < 0 else (target, self.marks[row])
            if now is not None and now == key:
                found[-1] = Experiment(target, found[-1].start, row + 1)
            elif now is not None:
                found.append(Experiment(target, row, row + 1))
            key = now
        return found


class RowReader:
    """Reads data rows: checks each against the variables, and codes them when all are there.

    ``bins`` is how many states numbers are cut into (0: numbers are refused), ``binning`` how: quantile or equal width
    over the observed rows. ``kept`` holds the edges of an earlier call, which then stand.
    """

    def __init__(
        self,
        variables: Sequence[Variable] | None,
        *,
        bins: int = 0,
        binning: str = "quantile",
        kept: Bins | None = None,
    ) -> None:
        self.variables = None if variables is None else tuple(variables)
        self.bins, self.binning, self.kept = bins, binning, kept
        self._names = None if variables is None else tuple(one.name for one in variables)
        self._known = {} if variables is None else {one.name: set(one.states) for one in variables if one.states}
        self._values: list[list[Any]] = []
        self._targets: list[int] = []
        self._marks: list[tuple[int | None, int | None]] = []
        self._lines: list[int | None] = []
        self.file = "stdin"

    def add(self, record: Record) -> None:
        """Take one row; BadData (65) naming file, line and field."""
        row: DataRow = record.value
        if self._names is None:
            if len(row.values) < 2:
                raise record.bad("at least two variables are needed", None, "$.values")
            self._names = tuple(sorted(row.values))
        if row.values.keys() != set(self._names):
            missing, unknown = (
                sorted(set(self._names) - row.values.keys()),
                sorted(row.values.keys() - set(self._names)),
            )
            what = f"no value for {', '.join(missing[:5])}" if missing else f"unknown variable {', '.join(unknown[:5])}"
            raise record.bad(what, "every row measures the same variables", "$.values")
        values = [self._checked(record, name, row.values[name]) for name in self._names]
        target = self._target(record, row)
        self._values.append(values)
        self._targets.append(target)
        self._marks.append((row.round, row.occurrence))
        self._lines.append(record.line if record.line is not None else record.index + 1)
        self.file = record.file

    def _checked(self, record: Record, name: str, value: Any) -> Any:
        where = f"$.values.{name}"
        if value is None:
            raise record.bad(f"no value for {name}", "rows with missing values cannot be used", where)
        if isinstance(value, str):
            if name in self._known and value not in self._known[name]:
                some = ", ".join(sorted(self._known[name])[:8])
                raise record.bad(f"{name} has no state {value!r}", f"its states are {some}", where)
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise record.bad(f"the value of {name} is neither a state nor a number", "states are text", where)
        if not self.bins and self.kept is None:
            raise record.bad(f"the value of {name} is a number", "cut numbers into states with --bins 3", where)
        if not math.isfinite(value) or abs(value) > 1e300:
            raise record.bad(f"the value of {name} is not finite", None, where)
        return float(value)

    def _target(self, record: Record, row: DataRow) -> int:
        assert self._names is not None
        if len(row.targets) > 1:
            raise record.bad("two targets in a row", "the learner takes one intervention at a time", "$.targets")
        if not row.targets:
            return -1
        if row.targets[0] not in self._names:
            raise record.bad(f"the target {row.targets[0]} is no variable", None, "$.targets[0]")
        return self._names.index(row.targets[0])

    def table(self) -> Table:
        """All rows coded. BadData (65): no rows, a column of text and numbers, fewer than two states."""
        if not self._values or self._names is None:
            raise BadData("the input is empty", "pipe in the rows measured so far", file=self.file)
        if len(self._names) > 2**15 - 1:
            raise BadData(f"{len(self._names)} variables are too many", None, file=self.file)
        targets = np.array(self._targets, dtype=np.int16)
        told = {one.name: one for one in self.variables or ()}
        variables, columns, edges = [], [], {}
        for place, name in enumerate(self._names):
            column = [row[place] for row in self._values]
            own, codes, cuts = self._coded(told.get(name, Variable(name)), column, targets < 0)
            variables.append(own)
            columns.append(codes)
            if cuts is not None:
                edges[name] = cuts
        states = np.stack(columns, axis=1)
        return Table(tuple(variables), Bins(edges), states, targets, self._marks, self._lines, self.file)

    def _coded(
        self, own: Variable, column: list[Any], observed: NDArray[np.bool_]
    ) -> tuple[Variable, NDArray[np.int8], tuple[float, ...] | None]:
        numbers = [isinstance(value, float) for value in column]
        if any(numbers):
            if not all(numbers):
                row = numbers.index(not numbers[0])
                raise BadData(
                    f"{own.name} holds text and numbers", "one kind a variable", file=self.file, line=self._lines[row]
                )
            return self._binned(own, np.array(column), observed)
        states = own.states or tuple(sorted(set(column)))
        if not 2 <= len(states) <= MOST_STATES:
            raise BadData(
                f"{own.name} has {len(states)} state{'' if len(states) == 1 else 's'} in these rows",
                f"2 to {MOST_STATES} are needed: list them with --variables", file=self.file,
            )  # fmt: skip
        place = {state: index for index, state in enumerate(states)}
        codes = np.array([place[value] for value in column], dtype=np.int8)
        return _with_states(own, states), codes, None

    def _binned(
        self, own: Variable, column: NDArray[np.float64], observed: NDArray[np.bool_]
    ) -> tuple[Variable, NDArray[np.int8], tuple[float, ...]]:
        if self.kept is not None and own.name in self.kept.edges:
            cuts = tuple(self.kept.edges[own.name])
        else:
            cuts = self._cuts(own.name, column[observed] if observed.any() else column)
        count = len(cuts) + 1
        states = own.states if len(own.states) == count else tuple(f"bin{n}" for n in range(count))
        return _with_states(own, states), np.searchsorted(cuts, column, side="right").astype(np.int8), cuts

    def _cuts(self, name: str, values: NDArray[np.float64]) -> tuple[float, ...]:
        inner = np.arange(1, self.bins) / self.bins
        low, high = float(values.min()), float(values.max())
        cuts = np.quantile(values, inner) if self.binning == "quantile" else low + inner * (high - low)
        found = tuple(float(cut) for cut in np.unique(cuts))
        if low == high or len(found) < self.bins - 1 or found[0] <= low:
            what = f"{name} cannot be cut into {self.bins} bins: too many equal values"
            raise BadData(what, "fewer --bins, or --binning equal", file=self.file)
        return found


def _with_states(own: Variable, states: tuple[str, ...]) -> Variable:
    return Variable(own.name, states, own.description, own.domain, own.cost, own.allowed)


def constant_columns(table: Table) -> list[str]:
    """The variables that never vary among the observed rows (all rows without one): nothing is learned about them."""
    seen = table.states[table.targets < 0] if (table.targets < 0).any() else table.states
    return [one.name for one, same in zip(table.variables, (seen == seen[0]).all(0), strict=True) if same]


def decode(variables: Sequence[Variable], states: Iterable[Sequence[int]]) -> Iterable[dict[str, str]]:
    """Rows of integers as ``values``: names in alphabetical order, states by name."""
    for row in states:
        yield {one.name: one.states[int(state)] for one, state in zip(variables, row, strict=True)}


def read_table(name: str, streams: Streams, reader: RowReader, records: RecordReader) -> Table:
    """All rows of ``name``, checked as they come and then coded; ``records`` says what becomes of bad ones."""
    import msgspec

    for record in read_records(name, streams, records, "the data"):
        try:
            reader.add(record)
        except BadData as problem:
            records.bad(problem, msgspec.json.encode(record.data))
    return reader.table()


def load_table(
    path: str, streams: Streams, variables: Sequence[Variable] | None, bins: int = 0, binning: str = "quantile"
) -> Table:
    """The rows of one file; MissingInput (66) as the system says."""
    if path != "-" and not Path(path).is_file():
        raise MissingInput(f"{path}: no such file", "check the path")
    return read_table(path, streams, RowReader(variables, bins=bins, binning=binning), RecordReader([DataRow]))
