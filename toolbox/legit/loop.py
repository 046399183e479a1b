"""legit-loop: strategies x seeds over a simulator, a pool or a command; every round, then what they say together."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolbox.legit.compare import paired, summaries
from toolbox.legit.data import Variable, find_variables, network_variables
from toolbox.legit.estimate import cpu_seconds
from toolbox.legit.graphs import read_truth
from toolbox.legit.network import Network, read_network
from toolbox.legit.pool import Pool, read_pool
from toolbox.legit.records import DataRow
from toolbox.legit.runs import Run, Setting
from toolbox.legit.settings import Settings, opened
from toolbox.legit.sources import CommandSource, Lines, PoolSource, Simulator, Source
from toolbox.legit.stages import SHORTEST
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.lists import names_in
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """legit-loop's options."""

    observations: str | None = None
    pool: str | None = None
    experiment: str | None = None
    truth: str | None = None
    strategies: str = "round-robin,git"
    seeds: str = "5"
    n_obs: int = 5000
    baseline: str | None = None
    state: str | None = None
    resume: bool = False
    plot: tuple[str, ...] = ()

    @property
    def separate_network(self) -> bool:
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """The strategies."""
        return tuple(dict.fromkeys(names_in(self.strategies)))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The seeds: so many from ``--seed`` on, or those listed."""
        try:
            parts = [int(part) for part in names_in(self.seeds)]
        except ValueError:
            parts = []
        if not parts or min(parts) < 0 or ("," not in self.seeds and parts[0] == 0):
            raise UsageProblem(
                f"--seeds {self.seeds}: a number of seeds, or a list", "as in --seeds 5 or --seeds 0,3,7"
            )
        if "," not in self.seeds:
            return tuple(range(self.seed, self.seed + parts[0]))
        return tuple(dict.fromkeys(parts))


@dataclass(frozen=True)
class World:
    """What all runs share: where rows come from, what the variables are, the truth if known."""

    options: Options
    variables: Sequence[Variable] | None
    network: Network | None
    pool: Pool | None
    observed: Lines | None
    truth: Any

    def setting(self, seed: int) -> Setting:
        """The rows of one seed: shared by all its strategies."""
        options = self.options
        if self.pool is not None:
            source: Source = PoolSource(self.pool, seed)
        elif options.experiment is not None:
            source = CommandSource.of(options.experiment)
        else:
            assert self.network is not None
            assert self.variables is not None
            source = Simulator(self.network, self.variables, options.n_obs, seed)
        observed = self.observed if self.observed is not None else source.observed()
        return Setting(
            source, observed or [], self.variables, names_in(options.allow), names_in(options.forbid),
            options.bins or 0, options.binning, self.truth, self.network,
        )  # fmt: skip


def run(options: Options, call: Invocation) -> None:
    """All runs, in the order strategies x seeds."""
    parse_map(options.map_fields)
    _check(options, call)
    if call.dry_run:
        if process_rank() == 0:
            _dry_run(options, _world(options, call), call)
        return
    from toolbox.training.processes import start_processes

    accelerator = start_processes() if _launched() else None
    world = _world(options, call, accelerator)
    keys = list(itertools.product(options.names, options.numbers))
    began = time.process_time()
    writer = JsonlWriter(call.streams) if process_rank() == 0 else None
    runs, rounds = [], []
    for event in _events(options, world, keys, accelerator, call):
        if writer is None:
            continue
        writer.write(event)
        writer.flush()
        (runs if event["event"] == "run" else rounds).append(event)
    if writer is None:
        return
    baseline = options.baseline or ("round-robin" if "round-robin" in options.names else None)
    together = [*summaries(runs, options.seed), *paired(runs, baseline, options.seed)]
    for event in together:
        writer.write(event)
    writer.write(
        {"event": "done", "runs": len(runs), "strategies": list(options.names), "seeds": list(options.numbers)}
    )
    writer.close()
    call.reporter.note(f"{len(runs)} runs, {time.process_time() - began:.1f} CPU s in this process")
    from toolbox.legit.figures import draw
    from toolbox.legit.tables import table

    if world.truth is not None:
        call.reporter.show(table(runs, together))
    for path in options.plot:
        draw(rounds, runs, together, path, title=options.network or Path(options.pool or "experiments").name)


def _launched() -> bool:
    """Whether other processes were started with this one."""
    from toolbox.shell.launch import under_launcher

    return under_launcher()


def _check(options: Options, call: Invocation) -> None:
    from toolbox.legit.figures import check_plot

    if not options.names:
        raise UsageProblem("--strategies names nothing", "as in --strategies git,round-robin")
    _ = options.numbers
    options.check(options.names)
    sources = [one for one in (options.pool, options.experiment) if one is not None]
    if len(sources) > 1 or (not sources and options.network is None):
        raise UsageProblem("rows come from --network, --pool or --experiment", "give one of them")
    if options.experiment is not None and options.observations is None:
        raise UsageProblem("--experiment needs --observations", "the rows measured before any intervention")
    privileged = [one for one in options.names if one.endswith("git-privileged")]
    if privileged and (sources or options.network is None):
        raise UsageProblem("git-privileged needs a simulator", "it looks at the true system: --network only")
    if options.baseline is not None and options.baseline not in options.names:
        raise UsageProblem(f"--baseline {options.baseline}: not among --strategies", "name one that runs")
    if options.resume and options.state is None:
        raise UsageProblem("--resume goes on with a state, and there is none", "name it with --state DIR")
    for path in options.plot:
        check_plot(path)
    if options.backend != "none" and options.rounds < SHORTEST:
        call.reporter.warn(
            f"--rounds {options.rounds}: in the published curves LeGIT is behind GIT until its lists are done"
        )


def _world(options: Options, call: Invocation, accelerator: Any = None) -> World:
    """Read everything once; the first process reads stdin, the others are told."""
    simulated = options.pool is None and options.experiment is None
    network = None
    if options.network is not None and (simulated or options.variables is None):
        network = read_network(options.network)
    if options.variables is not None:
        variables = find_variables(options.variables, None, call.streams)
    else:
        variables = None if options.network is None else network_variables(options.network, call.streams, network)
    if simulated and network is not None and variables is not None:
        variables = _same(network, variables)
    pool = None if options.pool is None else read_pool(options.pool, call.streams)
    observed = None if options.observations is None else _observations(options, call, accelerator)
    if pool is not None and not pool.observed and observed is None:
        raise BadData("the pool has no observed rows", "give some with --observations", file=pool.file)
    truth = None
    name = options.truth or (options.network if simulated else None)
    if name is not None:
        first = observed or (pool.observed if pool is not None else None)
        names = [one.name for one in variables] if variables is not None else sorted(first[0]["values"])  # type: ignore[index]
        truth = read_truth(name, names, call.streams)
    return World(options, variables, network if simulated else None, pool, observed, truth)


def _same(network: Network, variables: Sequence[Variable]) -> list[Variable]:
    """The variables with the simulator's states; BadData (65) where they are others."""
    if tuple(one.name for one in variables) != network.names:
        odd = sorted(set(network.names) ^ {one.name for one in variables})
        raise BadData(f"--variables and --network differ: {', '.join(odd[:5])}", "they must be of the same variables")
    for one, states in zip(variables, network.states, strict=True):
        if one.states and one.states != states:
            raise BadData(f"the states of {one.name} are {', '.join(states)} in the network", "list them in its order")
    return [replace(one, states=states) for one, states in zip(variables, network.states, strict=True)]


def _observations(options: Options, call: Invocation, accelerator: Any) -> Lines:
    """The rows of ``--observations``: none may have a target. Bad ones are dealt with as asked."""
    lines: Lines = []
    if process_rank() == 0:
        rejected: list[bytes] = []
        reader = RecordReader(
            [DataRow], renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: rejected.append(raw),
        )  # fmt: skip
        name = options.observations or "-"
        for record in read_records(name, call.streams, reader, "--observations"):
            if record.value.targets:
                raise record.bad("an observed row has no target", "experiments are the loop's to do", "$.targets")
            lines.append({"values": record.data["values"], "targets": []})
        if reader.skipped:
            call.reporter.warn(f"{reader.skipped} bad rows left out")
            if options.rejects is not None:
                write_rejects(options.rejects, rejected)
        if not lines:
            raise BadData("the input is empty", "give the rows measured so far", file="stdin" if name == "-" else name)
    if accelerator is not None:
        from toolbox.training.processes import broadcast_bytes

        lines = json.loads(broadcast_bytes(accelerator, json.dumps(lines).encode() if lines else None))
    return lines


# -- the runs ---------------------------------------------------------------------------------------------------------
def _events(
    options: Options, world: World, keys: Sequence[tuple[str, int]], accelerator: Any, call: Invocation
) -> Iterator[dict[str, Any]]:
    """The events of all runs in order; each process does its share and the first one tells them."""
    rank, ranks = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    share = _shares(options, keys, ranks)[rank]
    asks = options.asking(resume=options.resume) if rank == 0 else None
    with ExitStack() as stack:
        ask = stack.enter_context(opened(asks, call))
        bar = stack.enter_context(call.reporter.progress("round", len(share) * options.rounds))
        done = {}
        for key in share:
            events = []
            for event in _one(options, world, key, ask):
                bar.advance(1 if event["event"] == "round" else 0, f"{key[0]} seed {key[1]}")
                if ranks == 1:
                    yield event
                else:
                    events.append(event)
            done[keys.index(key)] = events
    if ranks == 1:
        return
    from toolbox.training.processes import gather_bytes

    parts = gather_bytes(accelerator, json.dumps(done).encode())
    found = {int(place): events for part in parts for place, events in json.loads(part).items()}
    for place in range(len(keys)):
        yield from found[place]


def _shares(options: Options, keys: Sequence[tuple[str, int]], ranks: int) -> list[list[tuple[str, int]]]:
    """Who does which runs. Those that ask a language model are the first process's, since it alone asks."""
    asking = [key for key in keys if options.backend != "none" and options.stages(key[0], None).asks]
    others = [key for key in keys if key not in asking]
    shares: list[list[tuple[str, int]]] = [list(asking), *([] for _ in range(ranks - 1))]
    for key in others:
        min(shares, key=len).append(key)
    return [sorted(share, key=keys.index) for share in shares]


def _one(options: Options, world: World, key: tuple[str, int], ask: Any) -> Iterator[dict[str, Any]]:
    strategy, seed = key
    variables = world.variables
    if variables is None and options.plan is not None:
        names = sorted((world.observed or (world.pool.observed if world.pool else []))[0]["values"])
        variables = [Variable(name) for name in names]
    design = replace(options.design(strategy, seed, variables), rounds=options.rounds, n=options.n)
    run = Run(strategy, seed, design, world.setting(seed), options.state, options.resume)
    yield from run.events(ask if design.stages.asks else None)


def _dry_run(options: Options, world: World, call: Invocation) -> None:
    """Runs, rounds and an estimate of the CPU hours; nothing is fitted or asked."""
    variables = world.variables
    sizes = [len(one.states) or 2 for one in variables] if variables else [3] * 10
    hours = {
        name: cpu_seconds(sizes, options.design(name, 0, None)) * len(options.numbers) / 3600 for name in options.names
    }
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "runs": len(options.names) * len(options.numbers),
        "rounds": options.rounds, "rows": options.rounds * options.n, "variables": len(sizes),
        "observed_rows": len(world.observed) if world.observed is not None else
        len(world.pool.observed) if world.pool is not None else options.n_obs,
        "cpu_hours": round(sum(hours.values()), 3), "cpu_hours_by_strategy": {k: round(v, 3) for k, v in hours.items()},
        "settings": call.settings,
    })  # fmt: skip
    writer.close()
