"""One run of lwi-fuse: every model aligned in turn, proved, told, and saved for a restart."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolbox.lwi import align
from toolbox.lwi.checkpoint import Checkpoint, Fused, Model, check_alike, pair_labels
from toolbox.lwi.choices import Options
from toolbox.lwi.inputs import find_spec
from toolbox.lwi.ranks import Ranks, device_of
from toolbox.lwi.verify import Verdict, check_aligned, check_spec
from toolbox.shell.atomic import remove
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.files import atomic_directory

SAVE_EVERY = 20.0
"""Seconds of matching between two saved states."""


@dataclass
class Fusion:
    """One run: the models, and what has been aligned so far."""

    options: Options
    call: Invocation
    ranks: Ranks
    models: list[Checkpoint]
    k: list[float]
    fingerprint: str = ""
    directory: Path | None = None
    steps: list[align.Aligned] = field(default_factory=list)
    verdict: Verdict = field(default_factory=lambda: Verdict("off", None))
    seconds: dict[str, float] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)
    _number: int = 0

    @property
    def like(self) -> Checkpoint:
        """The model whose files the output resembles."""
        if self.options.align_only:
            return self.models[0]
        return self.models[0] if self.options.anchor == "first" else self.models[-1]

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 3)

    def run(self) -> Model:
        """Align and fuse all models in turn; what is returned makes its tensors when they are read."""
        first = self.options.anchor == "first"
        fused: Model = self.models[0]
        for number, added in enumerate(self.models[1:]):
            old, new = (added, self.models[0]) if first else (fused, added)
            aligned, rows = self._step(number, old, new)
            if first:
                # The mean so far has its share k, the model that was aligned the rest.
                fused = Fused(aligned.model, fused, aligned.job.plan, rows, 1 - self.k[number])
            else:
                fused = Fused(aligned.model, new, aligned.job.plan, rows, self.k[number])
        return fused

    def _step(self, number: int, old: Model, new: Checkpoint) -> tuple[align.Aligned, Any]:
        options, several = self.options, len(self.models) > 2
        spec, plan = find_spec(new, options)
        check_alike(old, new, plan)
        rows = pair_labels(old, new, plan)
        job = align.prepare(plan, old, new, rows, options, device_of(options, self.ranks))
        limit = options.verify_limit
        run_as = new if isinstance(old, Fused) else old
        assert isinstance(run_as, Checkpoint)
        if not options.no_verify and self.ranks.rank == 0:
            with self.timed("verify"):
                self._take(check_spec(spec, new, plan, options.seed, limit))
        with self.timed("match"):
            self._match(number, job)
        soft = {}
        if self.ranks.rank == 0:
            if not options.no_verify:
                with self.timed("verify"):
                    worst = check_aligned(spec, run_as, job.old, plan, job.state.perms, options.seed, limit)
                self._take(Verdict(self.verdict.how, worst))
            if options.soft:
                soft = align.soft_plans(job, options.tau, options.sinkhorn_iters)
            with self.timed("measure"):
                lines = align.group_lines(job, options.solver, number + 1 if several else None, soft)
        else:
            lines = []
        self.steps.append(align.Aligned(job, job.state.perms, lines, soft))
        return self.steps[-1], rows

    def _take(self, verdict: Verdict) -> None:
        """Keep the weaker kind of proof and the larger difference."""
        hows = {self.verdict.how, verdict.how} - {"off"}
        how = "shrunk" if "shrunk" in hows else verdict.how
        self.verdict = Verdict(how, max(self.verdict.worst or 0.0, verdict.worst or 0.0))

    def _match(self, number: int, job: align.Job) -> None:
        """Both phases, from a saved state where there is one; every rank ends with the same permutations."""
        saved = self.ranks.from_first(self._load(number) if self.ranks.rank == 0 else None)
        if saved:
            job.state = align.state_from(json.loads(saved))
        save = lambda: self._save(number, job)  # noqa: E731
        align.match(job, self.options.workers, save, self.ranks.rank, self.ranks.count)
        for part in self.ranks.from_all(align.state_bytes(job.state)) if self.ranks.count > 1 else []:
            own = align.state_from(json.loads(part))
            own.perms = {name: perm for name, perm in own.perms.items() if name in own.found}
            align.absorb(job.state, own)
        align.divert(job)
        self._save(number, job, force=True)

    # -- restarts
    def _save(self, number: int, job: align.Job, force: bool = False) -> None:
        if self.directory is None or self.ranks.rank != 0 or (self.ranks.count > 1 and not force):
            return
        if not force and time.monotonic() - self._saved < SAVE_EVERY:
            return
        older = sorted(self.directory.glob("step-*"))
        self._number += 1
        content = {"fingerprint": self.fingerprint, "number": number, "deep": force}
        done = [json.loads(align.state_bytes(step.job.state)) for step in self.steps]
        with atomic_directory(self.directory / f"step-{self._number:06d}") as folder:
            state = json.loads(align.state_bytes(job.state))
            (folder / "state.json").write_text(json.dumps({**content, "done": done, "state": state}))
        for path in older:
            remove(path)
        self._saved = time.monotonic()

    def _load(self, number: int) -> bytes:
        """The saved state of this step, or nothing. Raises: UsageProblem (2) for a run with other inputs."""
        states = sorted(self.directory.glob("step-*/state.json")) if self.directory is not None else []
        if not states:
            return b""
        self._number = max(self._number, int(states[-1].parent.name.removeprefix("step-")))
        content = json.loads(states[-1].read_bytes())
        if content["fingerprint"] != self.fingerprint:
            raise UsageProblem(
                "--resume with other models or options than the interrupted run had",
                "repeat the interrupted command, or start anew with --overwrite",
            )
        if number < len(content["done"]):
            return json.dumps(content["done"][number]).encode()
        return json.dumps(content["state"]).encode() if number == content["number"] else b""
