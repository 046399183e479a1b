"""One design from its first row to its last round, kept in a directory or in memory."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.legit.data import Table, Variable
from toolbox.legit.design import Design, DesignOptions, allowed_places, stored_variables
from toolbox.legit.learner import Belief
from toolbox.legit.metrics import aushd, diversity, expected_shd, judge
from toolbox.legit.network import Network
from toolbox.legit.sources import Lines, Source, as_table
from toolbox.legit.stages import Ask
from toolbox.legit.state import STATE_FILE, StateDirectory
from toolbox.shell.atomic import atomic_file
from toolbox.shell.errors import BadData, CannotCreate

ROUNDS_FILE = "rounds.jsonl"


@dataclass(frozen=True)
class Setting:
    """What a run needs to know besides its design: rows, who may be set, how numbers are cut, the truth if known."""

    source: Source
    observed: Lines
    variables: Sequence[Variable] | None
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    bins: int = 0
    binning: str = "quantile"
    truth: NDArray[np.bool_] | None = None
    network: Network | None = None


class Run:
    """A design with one strategy and seed. ``directory`` keeps it; with ``resume`` it goes on from there.

    ``rounds`` are the events of the rounds done, those of an earlier process included.
    """

    def __init__(
        self, strategy: str, seed: int, options: DesignOptions, setting: Setting, directory: str | None, resume: bool
    ) -> None:
        self.strategy, self.seed, self.options, self.setting = strategy, seed, options, setting
        self.path = None if directory is None else Path(directory) / f"{strategy}-seed-{seed}"
        self.resume = resume
        self.rounds: list[dict[str, Any]] = []
        self._design: Design
        self._table: Table

    def events(self, ask: Ask | None) -> Iterator[dict[str, Any]]:
        """The event of each round, then that of the run. Experiments are recorded before anything is fitted."""
        with ExitStack() as stack:
            directory = None
            if self.path is not None:
                directory = stack.enter_context(StateDirectory(self.path))
            self._begin(directory)
            design = self._design
            yield from self.rounds
            if design.pending is None and design.round < self.options.rounds:
                self._choose_and_save(directory, ask)
            while design.round < self.options.rounds:
                asked = design.pending["rows"][0]  # type: ignore[index]
                self._table = self._table.extended(self._experiment(asked))
                design.absorb(self._table)
                self.rounds.append(self._event(asked))
                if design.round < self.options.rounds:
                    self._choose_and_save(directory, ask)
                else:
                    self._save(directory)
                yield self.rounds[-1]
            yield self.summary()

    # -- rows ---------------------------------------------------------------------------------------------------------
    def _begin(self, directory: StateDirectory | None) -> None:
        """Take up what was saved, or begin: the observed rows are recorded, then fitted."""
        stored = None if directory is None else directory.load()
        begun = stored is not None or self._recorded(0) is not None
        if begun and not self.resume:
            raise CannotCreate(f"{self.path}: holds a design already", "--resume goes on with it; or another --state")
        setting = self.setting
        variables = setting.variables
        if stored is None:
            lines = self._recorded(0) or self._record(0, setting.observed)
            self._table = as_table(lines, variables, "the observed rows", setting.bins, setting.binning)
            self._design = Design(self._table.variables, self._table.bins, self.options, setting.network)
            self._design.absorb(self._table)
            return
        place = str(self.path / STATE_FILE)  # type: ignore[operator]
        variables = stored_variables(stored[0], variables, place)
        self._design = Design.restored(*stored, variables, self.options, place, setting.network)
        parts = [self._recorded(number) for number in range(self._design.round + 1)]
        if None in parts:
            raise BadData(f"the rows of round {parts.index(None)} are missing", "they belong to the state", file=place)
        self._table = self._coded(parts[0] or [])
        for part in parts[1:]:
            self._table = self._table.extended(self._coded(part or []))
        self._design._check_rows(self._table)
        self.rounds = self._recorded_rounds()[: self._design.round]

    def _coded(self, lines: Lines) -> Table:
        design = getattr(self, "_design", None)
        assert design is not None
        return as_table(
            lines, design.variables, "the rows of an experiment", self.setting.bins, self.setting.binning, design.bins
        )

    def _experiment(self, asked: dict[str, Any]) -> Table:
        """The rows of the pending experiment: those recorded, where it was done already."""
        number = self._design.round + 1
        lines = self._recorded(number) or self._record(number, self.setting.source.experiment(asked))
        return self._coded(lines)

    def _file(self, number: int) -> Path | None:
        return None if self.path is None else self.path / f"rows-{number:06d}.jsonl.gz"

    def _recorded(self, number: int) -> Lines | None:
        path = self._file(number)
        if path is None or not path.is_file():
            return None
        try:
            return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        except (ValueError, OSError, EOFError) as error:
            raise BadData(f"damaged rows: {error}", "restore the file", file=str(path)) from None

    def _record(self, number: int, lines: Lines) -> Lines:
        path = self._file(number)
        if path is not None:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with atomic_file(path) as handle:
                handle.write(gzip.compress(text.encode(), mtime=0))
        return lines

    # -- choosing -----------------------------------------------------------------------------------------------------
    def _allowed(self) -> list[int]:
        design, setting = self._design, self.setting
        places = allowed_places(design.variables, setting.allow, setting.forbid)
        picks = Counter(one["target"] for one in design.history)
        left = setting.source.available(picks, self.options.n)
        return places if left is None else [one for one in places if design.variables[one].name in left]

    def _choose_and_save(self, directory: StateDirectory | None, ask: Ask | None) -> None:
        self._design.choose(self._allowed(), ask)
        self._save(directory)

    def _save(self, directory: StateDirectory | None) -> None:
        if directory is None:
            return
        with atomic_file(directory.path / ROUNDS_FILE) as handle:  # first: what is ahead of the state is cut off later
            handle.write("".join(json.dumps(one) + "\n" for one in self.rounds).encode())
        self._design.saves += 1
        directory.save(self._design.told(), self._design.tensors(), self._design.saves)

    def _recorded_rounds(self) -> list[dict[str, Any]]:
        path = self.path / ROUNDS_FILE  # type: ignore[operator]
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    # -- events -------------------------------------------------------------------------------------------------------
    def _event(self, asked: dict[str, Any]) -> dict[str, Any]:
        design = self._design
        belief = design.learner.belief()
        return {
            "event": "round",
            "strategy": self.strategy,
            "seed": self.seed,
            **{key: asked[key] for key in ("round", "target", "stage", "score", "votes", "fallback")},
            "rows": sum(one["n"] for one in design.history),
            **self._judged(belief),
            "acyclic": not belief.dropped,
            "dropped": len(belief.dropped),
        }

    def _judged(self, belief: Belief) -> dict[str, Any]:
        if self.setting.truth is None:
            return {"edges": int(belief.raw.sum())}
        found = judge(self.setting.truth, belief.raw, belief.dag)
        return {**found, "expected_shd": expected_shd(self.setting.truth, belief.p)}

    def summary(self) -> dict[str, Any]:
        """The event of the whole run."""
        rounds, plan = self.rounds, self._design.plan
        last = rounds[-1]
        figures = {}
        if self.setting.truth is not None:
            steps = np.diff([0, *(one["rows"] for one in rounds)]).tolist()
            figures = {
                "shd": last["shd"],
                "aushd": aushd([one["shd"] for one in rounds], steps),
                **{key: last[key] for key in ("shd_dag", "shd_empty", "sid", "bsf", "expected_shd")},
            }
        picks = Counter(one["target"] for one in rounds)
        return {
            "event": "run",
            "strategy": self.strategy,
            "seed": self.seed,
            "rounds": len(rounds),
            "rows": last["rows"],
            **figures,
            "edges": last["edges"],
            "picks": dict(sorted(picks.items())),
            "diversity": diversity(one["target"] for one in rounds),
            "stages": dict(Counter(one["stage"] for one in rounds)),
            "fallbacks": dict(Counter(one["fallback"] for one in rounds if one["fallback"])),
            "answers": plan.answers,
            "answers_without_names": plan.empty,
            "items_dropped": plan.dropped,
        }
