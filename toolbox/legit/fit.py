"""legit-fit: all rows in, the learned graph out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from toolbox.legit.data import Bins, Table, constant_columns
from toolbox.legit.design import Design, DesignOptions, stored_variables
from toolbox.legit.graphs import graph_lines
from toolbox.legit.learner import Enco, LearnerOptions
from toolbox.legit.scores import ScoreOptions
from toolbox.legit.settings import Rows, check_device
from toolbox.legit.stages import StageOptions
from toolbox.legit.state import STATE_FILE, StateDirectory
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.streams import JsonlWriter, process_rank


@dataclass(frozen=True, kw_only=True)
class Options(Rows):
    """legit-fit's options."""

    file: str = "-"
    output: str | None = None
    overwrite: bool = False
    state: str | None = None
    all_pairs: bool = False
    epochs: int = 30
    model_iters: int = 1000
    graph_iters: int = 100
    hidden: int = 64
    num_graphs: int = 100
    batch: int = 128
    lambda_sparse: float = 0.004
    fit_rows: str = "obs"
    no_mask_states: bool = False
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    given_options: frozenset[str] = frozenset()

    def learner(self) -> LearnerOptions:
        """ENCO's settings; an epoch is a round."""
        return LearnerOptions(
            hidden=self.hidden, num_graphs=self.num_graphs, batch=self.batch, lambda_sparse=self.lambda_sparse,
            obs_iters=0, model_iters=self.model_iters, graph_iters=self.graph_iters, fit_rows=self.fit_rows,
            mask_states=not self.no_mask_states,
        )  # fmt: skip


_OF_STATE = ("hidden", "num_graphs", "batch", "lambda_sparse", "fit_rows", "no_mask_states", "epochs", "model_iters",
             "graph_iters", "seed", "bins", "binning")  # fmt: skip


def run(options: Options, call: Invocation) -> None:
    """Fit, and write the graph: a header, then a line an edge."""
    if process_rank() != 0:
        return
    check_device(options.device)
    if options.variables is not None and options.network is not None:
        raise UsageProblem("--variables and --network exclude one another", "give one of them")
    if options.state is not None:
        if unused := sorted(options.given_options & set(_OF_STATE)):
            flag = "--" + unused[0].replace("_", "-")
            raise UsageProblem(f"{flag} has no use with --state", "the state's own settings are used")
        table, learner = _from_state(options, call)
    else:
        table, learner = _afresh(options, call)
    if learner is None:
        return
    for name in constant_columns(table):
        call.reporter.warn(f"{name} never varies in these rows: nothing can be learned about it")
    belief = learner.belief()
    if options.output is not None:
        _save(options, learner, table)
    writer = JsonlWriter(call.streams)
    for line in graph_lines([one.name for one in table.variables], belief, len(table), all_pairs=options.all_pairs):
        writer.write(line)
    writer.close()


def _afresh(options: Options, call: Invocation) -> tuple[Table, Enco | None]:
    """``epochs`` times both kinds of steps, from initial weights."""
    table = options.read(options.file, call, options.given(call))
    if not (table.targets >= 0).any():
        raise BadData(
            "no row has a target", "without an experiment no edge can be directed: legit-target says which to do",
            file=table.file,
        )  # fmt: skip
    learner = Enco(table.sizes, options.learner(), options.seed, options.device)
    if call.dry_run:
        _dry_run(options, table, options.epochs, call)
        return table, None
    with call.reporter.progress("epoch", options.epochs) as bar:
        for epoch in range(1, options.epochs + 1):
            learner.fit_round(table, epoch)
            bar.advance()
    return table, learner


def _from_state(options: Options, call: Invocation) -> tuple[Table, Enco | None]:
    """A running design's belief; rows that it has not seen are absorbed in memory, its directory stays as it is."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(StateDirectory(options.state or "", read_only=True))
        stored = directory.load() if directory.path.is_dir() else None
    if stored is None:
        raise MissingInput(f"{options.state}: no state is here", "legit-target --state makes one")
    told = stored[0]
    place = str(directory.path / STATE_FILE)
    variables = stored_variables(told, options.given(call), place)
    kept = Bins({name: tuple(edges) for name, edges in told["bins"].items()}) if told["bins"] else None
    table = options.read(options.file, call, variables, kept)
    design = Design.restored(*stored, variables, _options_of(told, place, options.device), place)
    if call.dry_run:
        _dry_run(options, table, len(table.experiments(len(design.fingerprints))), call)
        return table, None
    design.absorb(table)
    if not design.round:
        raise BadData("no row has a target", "the state has seen no experiment yet", file=table.file)
    return table, design.learner


def _options_of(told: dict, place: str, device: str) -> DesignOptions:
    """The options that a state was made with."""
    try:
        parts = dict(told["options"])
        parts["plan"] = tuple(parts["plan"])

        def pick(kind: type) -> dict:
            return {key: parts[key] for key in kind.__dataclass_fields__ if key in parts}

        return DesignOptions(
            seed=parts["seed"], device=device, stages=StageOptions(**pick(StageOptions)),
            learner=LearnerOptions(**pick(LearnerOptions)), scores=ScoreOptions(**pick(ScoreOptions)),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise BadData(f"not a state of this command: {error}", "was it edited?", file=place) from None


def _save(options: Options, learner: Enco, table: Table) -> None:
    """The belief as safetensors: weights, gamma, theta; names and states in its header."""
    import json

    from toolbox.shell.atomic import atomic_file
    from toolbox.weights.provenance import header
    from toolbox.weights.write import write_file

    told = {key: getattr(options, key) for key in _OF_STATE}
    metadata = header("legit-fit", told, options.seed, {})
    metadata["variables"] = json.dumps([{"name": one.name, "states": one.states} for one in table.variables])
    kept = {name: tensor for name, tensor in learner.tensors().items() if "adam" not in name}
    assert options.output is not None
    with atomic_file(options.output, overwrite=options.overwrite) as handle:
        write_file(handle, kept, metadata)


def _dry_run(options: Options, table: Table, rounds: int, call: Invocation) -> None:
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "rows": len(table), "variables": len(table.variables),
        "experiments": len(table.experiments()), "distribution_steps": rounds * options.model_iters,
        "graph_steps": rounds * options.graph_iters, "settings": call.settings,
    })  # fmt: skip
    writer.close()
