"""A design: rows come in, the belief is fitted, the next target goes out; the same for one call and for whole loops."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from toolbox.legit.data import Bins, Table, Variable
from toolbox.legit.learner import Enco, LearnerOptions
from toolbox.legit.network import Network
from toolbox.legit.scores import SCORED, ScoreOptions, Situation, rate
from toolbox.legit.stages import Ask, Now, Plan, Planner, StageOptions
from toolbox.shell.errors import BadData, UsageProblem

_NOT_SHAPING = ("on_llm_error",)


@dataclass(frozen=True, kw_only=True)
class DesignOptions:
    """All that decides a design besides its rows; ``rounds`` and ``n`` may change between calls."""

    seed: int = 0
    rounds: int = 33
    n: int = 32
    per_cost: bool = False
    device: str = "cpu"
    stages: StageOptions = field(default_factory=StageOptions)
    learner: LearnerOptions = field(default_factory=LearnerOptions)
    scores: ScoreOptions = field(default_factory=ScoreOptions)

    def check(self) -> None:
        """UsageProblem (2) for what does not fit together."""
        self.stages.check()
        if self.per_cost and self.stages.numeric not in SCORED:
            raise UsageProblem(f"--per-cost divides a score, and {self.stages.strategy} has none", "leave it out")

    def shaping(self) -> dict[str, Any]:
        """What must stay the same from one call to the next."""
        parts = {"seed": self.seed, **asdict(self.stages), **asdict(self.learner), **asdict(self.scores)}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in parts.items()}
        return {key: value for key, value in plain.items() if key not in _NOT_SHAPING}


@dataclass(frozen=True)
class Chosen:
    """One choice: the target row's fields for each allowed target from first to last, and all scores by name."""

    rows: list[dict[str, Any]]
    scores: dict[str, float]


class Design:
    """A running design over ``variables``. ``network`` is known to a privileged strategy only.

    ``history`` has an entry a finished experiment, ``issued`` one a choice, ``pending`` is the choice whose rows have
    not come yet.
    """

    def __init__(
        self, variables: Sequence[Variable], bins: Bins, options: DesignOptions, network: Network | None = None
    ) -> None:
        self.variables, self.bins, self.options = tuple(variables), bins, options
        self.learner = Enco(tuple(len(one.states) for one in variables), options.learner, options.seed, options.device)
        self.plan = Plan()
        self.history: list[dict[str, Any]] = []
        self.issued: list[dict[str, Any]] = []
        self.pending: dict[str, Any] | None = None
        self.fingerprints = np.zeros(0, dtype=np.int64)
        self.saves = 0
        self._network = network
        self._never = torch.ones(len(self.variables), dtype=torch.bool)

    @property
    def round(self) -> int:
        """Finished experiments."""
        return len(self.history)

    def picks(self) -> list[int]:
        """How often each variable was the target so far."""
        names = [one["target"] for one in self.history]
        return [names.count(one.name) for one in self.variables]

    # -- rows ---------------------------------------------------------------------------------------------------------
    def absorb(self, table: Table) -> list[dict[str, Any]]:
        """Take in the rows that are new, fit a round for each experiment among them, and return these experiments.

        ``table`` holds all rows, the earlier ones first and unchanged: BadData (65) names the first that is not.
        """
        self._check_rows(table)
        known = len(self.fingerprints)
        experiments = table.experiments(known)
        if known == 0:
            start = experiments[0].start if experiments else len(table)
            first = table.head(start)
            self.learner.fit_first(first if len(first) and (first.targets < 0).any() else table)
        done = []
        ends = [*(one.start for one in experiments[1:]), len(table)][: len(experiments)]
        for one, end in zip(experiments, ends, strict=True):
            name = self.variables[one.target].name
            occurrence = sum(past["target"] == name for past in self.history)
            entry = {"round": self.round + 1, "target": name, "n": one.stop - one.start, "occurrence": occurrence}
            self.history.append(entry)
            self.learner.fit_round(table.head(end), self.round)
            done.append(entry)
        self.fingerprints = table.fingerprints()
        self._rows_hash = hashlib.sha256(self.fingerprints.tobytes()).hexdigest()
        self._never = self.learner.never(table)
        if done:
            self.pending = None
        return done

    def _check_rows(self, table: Table) -> None:
        known = len(self.fingerprints)
        advice = "a state goes on from the rows it has seen: append new rows behind them, or begin another --state"
        if len(table) < known:
            what = f"{len(table)} rows, and the state has seen {known}"
            raise BadData(what, advice, file=table.file)
        differs = np.flatnonzero(table.head(known).fingerprints() != self.fingerprints)
        if len(differs):
            row = int(differs[0])
            raise BadData("not the row that the state has seen here", advice, file=table.file, line=table.lines[row])

    # -- the next target ----------------------------------------------------------------------------------------------
    def now(self, allowed: Sequence[int]) -> Now:
        """What the planner may know in this round."""
        place = {one.name: index for index, one in enumerate(self.variables)}
        tried = [place[one["target"]] for one in self.history]
        p = self.learner.belief().p
        edges = [(int(i), int(j)) for i, j in zip(*np.nonzero(p > 0.5), strict=True)]
        return Now(tuple(allowed), tuple(tried), tuple(edges))

    def choose(self, allowed: Sequence[int], ask: Ask | None) -> dict[str, Any]:
        """The pending choice, or a new one among ``allowed`` variables: target rows by rank, and all scores.

        BadData (65) where nothing is allowed.
        """
        if self.pending is not None:
            return self.pending
        if not allowed:
            raise BadData("no variable can be a target", "all are forbidden or used up: see --allow and --forbid")
        number = self.round + 1
        entry = Planner(self.options.stages, self.variables, self.options.seed, self.plan).entry(
            number, self.now(allowed), ask
        )
        place = {one.name: index for index, one in enumerate(self.variables)}
        scores: dict[int, float] = {}
        if entry is None or entry.name is None:
            scores, order = self._rated(allowed)
            stage, votes = "numeric", None
        else:
            first = place[entry.name]
            order = [first, *(one for one in allowed if one != first)]
            stage, votes = entry.stage, entry.votes
        picks = self.picks()
        rows = [
            {
                "round": number,
                "target": self.variables[one].name,
                "stage": stage if rank == 1 or stage == "numeric" else "numeric",
                "strategy": self.options.stages.strategy,
                "score": _finite(scores.get(one)),
                "rank": rank,
                "n": self.options.n,
                "values": "uniform",
                "occurrence": picks[one],
                "votes": votes if rank == 1 else None,
                "seed": self.options.seed,
                "fallback": None if entry is None else entry.fallback,
            }
            for rank, one in enumerate(order, 1)
        ]
        told = {self.variables[one].name: _finite(scores[one]) for one in sorted(scores)}
        self.pending = {"rows": rows, "scores": told}
        self.issued.append({key: rows[0][key] for key in ("round", "target", "stage", "fallback")})
        return self.pending

    def _rated(self, allowed: Sequence[int]) -> tuple[dict[int, float], list[int]]:
        strategy = self.options.stages.numeric
        here = Situation(
            self.learner, self._never, self.picks(), self.round + 1, self.options.seed,
            self._network if strategy == "git-privileged" else None,
        )  # fmt: skip
        scores, order = rate(strategy, allowed, here, self.options.scores)
        if not self.options.per_cost:
            return scores, order
        scores = {one: value / self.variables[one].cost for one, value in scores.items()}
        return scores, sorted(scores, key=lambda one: (-scores[one], one))

    # -- the state ----------------------------------------------------------------------------------------------------
    def told(self) -> dict[str, Any]:
        """What ``state.json`` says."""
        return {
            "variables": [{"name": one.name, "states": list(one.states)} for one in self.variables],
            "bins": {name: list(edges) for name, edges in self.bins.edges.items()},
            "options": self.options.shaping(),
            "round": self.round,
            "plan": msgspec.to_builtins(self.plan),
            "history": self.history,
            "issued": self.issued,
            "pending": self.pending,
            "rows": len(self.fingerprints),
            "sha256": self._rows_hash,
            "saves": self.saves,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What its tensor file holds."""
        return {**self.learner.tensors(), "fingerprints": torch.from_numpy(self.fingerprints)}

    @staticmethod
    def restored(
        told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], variables: Sequence[Variable],
        options: DesignOptions, file: str, network: Network | None = None,
    ) -> Design:  # fmt: skip
        """The design that was saved; ``variables`` bring descriptions and costs. BadData (65) for other options."""
        check_options(told["options"], options.shaping(), file)
        try:
            bins = Bins({name: tuple(edges) for name, edges in told["bins"].items()})
            design = Design(variables, bins, options, network)
            design.learner.restore(tensors)
            design.fingerprints = tensors["fingerprints"].numpy()
            design.plan = msgspec.convert(told["plan"], Plan)
            design.history, design.issued = list(told["history"]), list(told["issued"])
            design.pending, design._rows_hash, design.saves = told["pending"], told["sha256"], told["saves"]
            design._never = torch.tensor([count == 0 for count in design.picks()])
        except (KeyError, RuntimeError, TypeError, AttributeError, msgspec.ValidationError) as error:
            raise BadData(f"not a state of this command: {error}", "was it edited?", file=file) from None
        return design


def stored_variables(told: Mapping[str, Any], given: Sequence[Variable] | None, file: str) -> list[Variable]:
    """The variables of a state, with what ``given`` adds. BadData (65) naming the first difference."""
    try:
        stored = [Variable(str(one["name"]), tuple(map(str, one["states"]))) for one in told["variables"]]
    except (KeyError, TypeError) as error:
        raise BadData(f"not a state of this command: {error}", "was it edited?", file=file) from None
    if given is None:
        return stored
    names, others = [one.name for one in stored], [one.name for one in given]
    if names != others:
        odd = sorted(set(names) ^ set(others))
        raise BadData(f"a state of other variables: {', '.join(odd[:5])}", "begin another --state", file=file)
    merged = []
    for mine, other in zip(stored, given, strict=True):
        if other.states and other.states != mine.states and len(other.states) == len(mine.states):
            raise BadData(f"a state of other variables: the states of {mine.name}", "begin another --state", file=file)
        merged.append(Variable(mine.name, mine.states, other.description, other.domain, other.cost, other.allowed))
    return merged


def check_options(before: Mapping[str, Any], now: Mapping[str, Any], file: str) -> None:
    """BadData (65) naming the first option that shapes a design and is not what it was."""
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            flag = "--" + {"graph_iters": "graph-iters"}.get(key, key.replace("_", "-"))
            what = f"{flag} was {before.get(key)} when this state began, and is {now.get(key)}"
            raise BadData(what, "give it as before, or begin another --state", file=file)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def allowed_places(variables: Sequence[Variable], allow: Sequence[str] = (), forbid: Sequence[str] = ()) -> list[int]:
    """Who may be a target: those of ``allow``, else those whose line says ``allowed``; less those of ``forbid``."""
    names = {one.name for one in variables}
    for option, listed in (("--allow", allow), ("--forbid", forbid)):
        if unknown := [name for name in listed if name not in names]:
            raise UsageProblem(f"{option} {unknown[0]}: no such variable", "names are those of the data")
    return [
        place for place, one in enumerate(variables)
        if (one.name in allow if allow else one.allowed) and one.name not in forbid
    ]  # fmt: skip
