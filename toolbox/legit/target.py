"""legit-target: all rows so far in, the next experiment out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolbox.legit.data import Bins, Table, constant_columns
from toolbox.legit.design import Design, DesignOptions, allowed_places, stored_variables
from toolbox.legit.settings import Settings, opened
from toolbox.legit.stages import SHORTEST, Planner
from toolbox.legit.state import STATE_FILE, StateDirectory
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.lists import names_in
from toolbox.shell.streams import JsonlWriter, process_rank


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """legit-target's options."""

    file: str = "-"
    state: str | None = None
    stateless: bool = False
    top_k: int = 1
    explain: bool = False


def run(options: Options, call: Invocation) -> None:
    """Absorb what is new, choose, save, and then print: a choice that is printed is one that the state knows."""
    if process_rank() != 0:
        return
    _check(options, call)
    with contextlib.ExitStack() as stack:
        directory = None
        if options.state is not None:
            directory = stack.enter_context(StateDirectory(options.state, read_only=call.dry_run))
        stored = None if directory is None else directory.load()
        given = options.given(call)
        place = str(directory.path / STATE_FILE) if directory is not None else ""
        variables = given if stored is None else stored_variables(stored[0], given, place)
        kept = None if stored is None else _bins(stored[0])
        table = options.read(options.file, call, variables, kept)
        if stored is None:
            _tell(options, call)
        design = _design(options, table, stored, place)
        allowed = allowed_places(design.variables, names_in(options.allow), names_in(options.forbid))
        if call.dry_run:
            _dry_run(design, table, allowed, options, call)
            return
        for name in constant_columns(table):
            call.reporter.warn(f"{name} never varies in these rows: nothing can be learned about it")
        before, pending = len(design.fingerprints), design.pending
        _tell_surprises(design, design.absorb(table), pending, call)
        with opened(options.asking(resume=True), call) as ask:
            chosen = design.choose(allowed, ask)
        if directory is not None and (len(table) != before or design.pending is not pending):
            design.saves += 1
            directory.save(design.told(), design.tensors(), design.saves)
    _write(chosen, options, call)


def _check(options: Options, call: Invocation) -> None:
    options.check([options.strategy])
    if (options.state is None) == (not options.stateless):
        raise UsageProblem("a design needs --state DIR, or --stateless to fit anew each time", "give one of them")
    if options.strategy.endswith("git-privileged"):
        raise UsageProblem("git-privileged needs a simulator", "legit-loop has one")


def _tell(options: Options, call: Invocation) -> None:
    """What a user should know of the strategy before it is used."""
    if options.backend == "none" and not options.stateless:
        call.reporter.note("numeric targeting only (no --backend)")
    if options.backend != "none" and options.rounds < SHORTEST:
        call.reporter.warn(
            f"--rounds {options.rounds}: in the published curves LeGIT is behind GIT until its lists are done"
        )


def _bins(told: dict[str, Any]) -> Bins | None:
    return Bins({name: tuple(edges) for name, edges in told.get("bins", {}).items()}) if told.get("bins") else None


def _design(options: Options, table: Table, stored: Any, place: str) -> Design:
    chosen = options.design(options.strategy, options.seed, table.variables)
    if stored is None:
        return Design(table.variables, table.bins, chosen)
    return Design.restored(*stored, table.variables, chosen, place)


def _tell_surprises(design: Design, done: Sequence[dict[str, Any]], pending: Any, call: Invocation) -> None:
    if pending is None or not done:
        return
    wanted = pending["rows"][0]["target"]
    others = [one["target"] for one in done if one["target"] != wanted]
    if others:
        call.reporter.warn(f"{wanted} was to be the target, the new rows have {', '.join(others)}: taken as they are")


def _write(chosen: dict[str, Any], options: Options, call: Invocation) -> None:
    writer = JsonlWriter(call.streams)
    for row in chosen["rows"][: options.top_k]:
        row = {**row, "n": options.n}
        writer.write({**row, "scores": chosen["scores"]} if options.explain else row)
    writer.close()


def _dry_run(design: Design, table: Table, allowed: list[int], options: Options, call: Invocation) -> None:
    """Stage, prompt, rows and steps; no fitting, no question, no change of the state."""
    fresh = table.experiments(len(design.fingerprints))
    number = design.round + len(fresh) + 1
    planner = Planner(design.options.stages, design.variables, options.seed, design.plan)
    question = planner.next_question(number)
    learner = design.options.learner
    entries = design.plan.entries
    known = entries[number - 1].stage if number <= len(entries) else None
    plan = {
        "event": "plan",
        "command": call.command,
        "round": number,
        "stage": known
        or {"again": "resample", "list": "warmup"}.get(question or "", question)
        or _later(design.options),
        "id": None if question is None else planner.request_id(question),
        "prompt": None if question is None else planner.prompt(question, design.now(allowed)),
        "rows": len(table),
        "experiments": len(fresh),
        "variables": len(design.variables),
        "allowed": [design.variables[one].name for one in allowed],
        "distribution_steps": len(fresh) * learner.model_iters
        + (learner.obs_iters if not len(design.fingerprints) else 0),
        "graph_steps": len(fresh) * learner.graph_iters,
        "settings": call.settings,
    }
    writer = JsonlWriter(call.streams)
    writer.write(plan)
    writer.close()


def _later(options: DesignOptions) -> str:
    return "plan" if options.stages.plan else "numeric"
