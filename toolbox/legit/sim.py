"""legit-sim: rows of a Bayesian network or of a pool, observed or under an intervention. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolbox.legit.data import Variable, decode
from toolbox.legit.network import Network, draw_rows, list_networks, read_network
from toolbox.legit.pool import Pool, read_pool
from toolbox.legit.records import AskedTarget
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Record, RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank

ROWS = 100
"""Rows where neither -n nor a target row says how many."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """legit-sim's options."""

    network: str | None = None
    pool: str | None = None
    n: int | None = None
    do: str | None = None
    values: str = "uniform"
    from_: str | None = None
    observational: bool = False
    list_: bool = False
    seed: int = 0
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None


def run(options: Options, call: Invocation) -> None:
    """Write the rows asked for, one JSON object each, in the order of the targets."""
    renames = parse_map(options.map_fields)
    if process_rank() != 0:
        return
    writer = JsonlWriter(call.streams)
    if options.list_:
        for record in list_networks():
            writer.write(record)
        writer.close()
        return
    _check(options)
    network = None if options.network is None else read_network(options.network)
    pool = None if options.pool is None else read_pool(options.pool, call.streams)
    rejected: list[bytes] = []
    reader = RecordReader(
        [AskedTarget], renames=renames, on_bad=options.on_bad, rejects=lambda raw, _: rejected.append(raw)
    )
    asked = 0
    planned = 0
    for target, record in _targets(options, reader, call):
        asked += 1
        planned += options.n or target.n or ROWS
        try:
            rows = _rows(options, target, network, pool)
        except BadData as problem:
            if record is None or problem.file is not None:
                raise
            raise record.bad(problem.reason, problem.advice, problem.field) from None
        if not call.dry_run:
            for row in rows:
                writer.write(row)
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")
        if options.rejects is not None:
            write_rejects(options.rejects, rejected)
    if options.from_ is not None and not asked:
        call.reporter.note("the input is empty: no target rows")
    if call.dry_run:
        writer.write({"event": "plan", "command": call.command, "experiments": asked, "rows": planned,
                      "settings": call.settings})  # fmt: skip
    writer.close()


def _check(options: Options) -> None:
    if (options.network is None) == (options.pool is None):
        raise UsageProblem("rows come from --network or from --pool", "give one of them")
    if options.do is not None and options.from_ is not None:
        raise UsageProblem("--do and --from exclude one another", "give one of them")
    if options.observational and (options.do is not None or options.from_ is not None):
        raise UsageProblem("--observational rows have no target", "leave --do or --from out")
    if options.pool is not None and options.from_ is None and not options.observational:
        raise UsageProblem("a pool hands out rows of targets", "--from - for target rows, or --observational")
    if options.pool is not None and options.values != "uniform":
        raise UsageProblem("--values has no use with --pool", "its rows are what they are")


def _targets(options: Options, reader: RecordReader, call: Invocation) -> Iterator[tuple[Any, Record | None]]:
    """The experiments asked for: those of ``--from``, the one of ``--do``, or none (observed rows)."""
    if options.from_ is not None:
        for record in read_records(options.from_, call.streams, reader, "--from"):
            yield record.value, record
        return
    name = (options.do or "").partition("=")[0]
    yield AskedTarget(target=name or "-"), None


def _rows(
    options: Options, target: AskedTarget, network: Network | None, pool: Pool | None
) -> Iterator[dict[str, Any]]:
    """The rows of one experiment; what is wrong is raised before the first."""
    if pool is not None:
        return _pooled(options, target, pool)
    assert network is not None
    place, value = _intervention(options, target, network)
    count = options.n or target.n or ROWS
    variables = [Variable(name, states) for name, states in zip(network.names, network.states, strict=True)]
    rows = draw_rows(network, count, options.seed, place, target.occurrence, value)
    extra: dict[str, Any] = {"targets": [] if place is None else [network.names[place]]}
    if options.from_ is not None:
        extra |= {"round": target.round, "occurrence": target.occurrence}
        extra = {key: one for key, one in extra.items() if one is not None}
    return ({"values": values, **extra} for values in decode(variables, rows.tolist()))


def _intervention(options: Options, target: AskedTarget, network: Network) -> tuple[int | None, int | None]:
    """The variable that is set, and the state it is set to (None: uniform over its states)."""
    if options.from_ is None and options.do is None:
        return None, None
    if target.target not in network.names:
        raise BadData(f"{target.target} is no variable of the network", f"it has {', '.join(network.names[:8])} ...")
    place = network.names.index(target.target)
    state = (options.do or "").partition("=")[2] or (options.values if options.values != "uniform" else target.values)
    if state == "uniform":
        return place, None
    if state not in network.states[place]:
        known = ", ".join(network.states[place])
        raise BadData(f"{target.target} has no state {state!r}", f"its states are {known}")
    return place, network.states[place].index(state)


def _pooled(options: Options, target: AskedTarget, pool: Pool) -> Iterator[dict[str, Any]]:
    if options.observational:
        count = len(pool.observed) if options.n is None else options.n
        if count > len(pool.observed):
            raise BadData(
                f"the pool has {len(pool.observed)} observed rows, {count} are asked for", None, file=pool.file
            )
        return iter(pool.observed[:count])
    rows = pool.draw(target.target, target.occurrence, options.n or target.n or ROWS, options.seed)
    marks = {"occurrence": target.occurrence} if target.round is None else {
        "round": target.round, "occurrence": target.occurrence
    }  # fmt: skip
    return ({**row, **marks} for row in rows)
