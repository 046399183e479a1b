"""Aligning one model to another: which groups move, the matching, its proof, and the lines that tell of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolbox.lwi.checkpoint import Checkpoint, Model, Paired, Relabelled, Rows
from toolbox.lwi.choices import Options, deep_groups, moving_groups
from toolbox.lwi.descent import Descent, Found, Settings, State, recovered, start
from toolbox.lwi.groups import Permutations, identity, random_relabelling, relabel
from toolbox.lwi.lines import GroupLine
from toolbox.lwi.match import sinkhorn_plan
from toolbox.lwi.plan import Plan, TensorPlan

_COMMON_BASE = 0.9
"""Cosine of two embeddings above which the models share a base: their residual streams are in one order already."""


@dataclass
class Job:
    """One alignment: the plan, the models (OLD shuffled if asked for), and which groups do what."""

    plan: Plan
    old: Model
    new: Model
    rows: Rows | None
    moving: list[str]
    similar: list[str]
    deep: list[str]
    shuffle: dict[str, Tensor] | None
    settings: Settings
    state: State

    @property
    def pairs(self) -> Paired:
        return Paired(self.old, self.new, self.plan, self.rows)


def likeness(pairs: Paired, key: str) -> float:
    """The cosine of one tensor of OLD and NEW."""
    old, new = pairs(key)
    return float(torch.nn.functional.cosine_similarity(old.flatten(), new.flatten(), dim=0, eps=1e-30))


def prepare(plan: Plan, old: Model, new: Model, rows: Rows | None, options: Options, device: str) -> Job:
    """Settle which groups move. Raises: UsageProblem (2) for groups that do not exist."""
    common = plan.base is not None and likeness(Paired(old, new, plan, rows), plan.base) > _COMMON_BASE
    moving = moving_groups(options, plan, common)
    deep = deep_groups(options, plan, moving)
    still = options.matching == "identity"
    shuffle = None
    if options.shuffle_seed is not None:
        shuffle = random_relabelling(plan, options.shuffle_seed, moving)
        old = Relabelled(old, plan, shuffle)
    settings = Settings(options.metric, options.matching, options.max_sweeps, options.seed, options.assignment, device)
    similar = [] if still else [name for name in moving if name not in deep]
    return Job(plan, old, new, rows, moving, similar, deep, shuffle, settings, start(plan, moving))


def match(job: Job, workers: int, save: Callable[[], None], rank: int = 0, ranks: int = 1) -> None:
    """The similar phase: every ``ranks``-th set of independent groups, from ``rank`` on. Changes ``job.state``."""
    mine = _whose(job, ranks)
    if workers == 1:
        Descent(job.plan, job.pairs, job.settings, job.similar, [], job.state).run(save, lambda n: mine[n] == rank)
        return
    todo = [
        names
        for index, names in enumerate(job.plan.components(job.similar))
        if mine[index] == rank and names[0] not in job.state.finished
    ]

    def one(names: tuple[str, ...]) -> State:
        own = State({name: job.state.perms[name] for name in names})
        Descent(job.plan, job.pairs, job.settings, names, [], own).settle(names)
        return own

    with ThreadPoolExecutor(workers) as pool:  # products and assignments run outside Python's lock
        for names, own in zip(todo, pool.map(one, todo), strict=True):
            absorb(job.state, own)
            job.state.finished.append(names[0])
            save()


def absorb(state: State, own: State) -> None:
    """Take over what was found about some of the groups."""
    state.perms.update(own.perms)
    state.found.update(own.found)
    state.sweeps = max(state.sweeps, own.sweeps)


def _whose(job: Job, ranks: int) -> list[int]:
    """Which rank has each component: the costliest first, each to the rank with least to do."""
    load = [0.0] * ranks
    components = job.plan.components(job.similar)
    cost = [sum(flops(job.plan, name) for name in names) for names in components]
    owner = [0] * len(components)
    for index in sorted(range(len(components)), key=lambda one: -cost[one]):
        owner[index] = min(range(ranks), key=lambda rank: load[rank])
        load[owner[index]] += cost[index]
    return owner


def divert(job: Job) -> None:
    """The dissimilar phase."""
    Descent(job.plan, job.pairs, job.settings, job.similar, job.deep, job.state).divert()


def flops(plan: Plan, name: str) -> float:
    """Multiplications and additions of one cost matrix: 2 n^2 m, with m numbers a channel over its tensors."""
    group = plan.groups[name]
    total = 0
    for key in plan.compared[name]:
        total += int(np.prod([sum(np.prod([f.size for f in seg]) for seg in axis) for axis in plan.tensors[key].axes]))
    return 2.0 * group.size * total


# -- telling --------------------------------------------------------------------------------------------------------
@dataclass
class _Sums:
    """Inner products over the tensors of a group."""

    before: float = 0.0
    after: float = 0.0
    old: float = 0.0
    new: float = 0.0

    def add(self, other: _Sums) -> None:
        for name in ("before", "after", "old", "new"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def cosine(self, inner: float) -> float:
        norm = (self.old * self.new) ** 0.5
        return inner / norm if norm > 0 else 0.0


def group_lines(job: Job, solver: str, step: int | None, soft: dict[str, Tensor] | None = None) -> list[GroupLine]:
    """One line a group, shallow to deep, from one pass over the tensors."""
    sums = {name: _Sums() for name in job.plan.groups}
    for key, tensor in job.plan.tensors.items():
        if not tensor.groups or tensor.statistic:
            continue
        old, new = job.pairs(key)
        after = relabel(job.plan, tensor, old, job.state.perms)
        if soft:
            after = mix(tensor, after, soft)
        one = _Sums(_dot(old, new), _dot(after, new), _dot(old, old), _dot(new, new))
        for name in tensor.groups:
            sums[name].add(one)
    back = recovered(job.plan, job.shuffle, job.state.perms) if job.shuffle is not None else {}
    return [_line(job, name, sums[name], solver, step, back.get(name)) for name in job.plan.groups]


def _line(job: Job, name: str, sums: _Sums, solver: str, step: int | None, back: float | None) -> GroupLine:
    plan, found = job.plan, job.state.found.get(name)
    if found is None:
        apart = sums.old + sums.new - 2 * sums.before
        found = Found(apart, apart, "identity")
    perm = job.state.perms.get(name, identity(plan, [name])[name])
    moved = float((perm != torch.arange(perm.shape[-1])).double().mean())
    return GroupLine(
        group=name, size=plan.groups[name].size, tensors=len(plan.carriers[name]), mode=found.mode,
        solver=solver if found.mode != "identity" else "none", cost_identity=_short(found.cost_identity),
        cost=_short(found.cost), moved=_short(moved), cos_before=_short(sums.cosine(sums.before)),
        cos_after=_short(sums.cosine(sums.after)), recovered=None if back is None else _short(back), step=step,
    )  # fmt: skip


def _dot(one: Tensor, two: Tensor) -> float:
    if not one.is_floating_point():
        return 0.0
    return float((one * two).sum(dtype=torch.float64))


def _short(value: float) -> float:
    """Six significant digits: more would be rounding of the sums."""
    return float(f"{value:.6g}")


# -- soft plans -----------------------------------------------------------------------------------------------------
def soft_plans(job: Job, tau: float, iterations: int) -> dict[str, Tensor]:
    """The doubly stochastic plan of each similar group of its own: M[d, c], on OLD as it is aligned already."""
    descent = Descent(job.plan, job.pairs, job.settings, job.similar, [], State(dict(job.state.perms)))
    descent.keep_costs = True
    plans = {}
    for name in job.similar:
        group = job.plan.groups[name]
        if group.parent is not None or name in job.plan.children:
            continue
        descent.state.perms = dict(job.state.perms)
        descent.solve(name, descent.parts([name]), "similar")
        cost, _ = descent.kept_costs.pop(name)
        plans[name] = torch.from_numpy(sinkhorn_plan(cost, tau, iterations)).to(torch.float32)
    return plans


def mix(tensor: TensorPlan, values: Tensor, plans: dict[str, Tensor]) -> Tensor:
    """``values`` with every channel of a soft group replaced by its plan's mean over channels: sum_c M[d, c] x_c."""
    for place, axis in enumerate(tensor.axes):
        if not any(factor.group in plans for segment in axis for factor in segment):
            continue
        parts, begin = [], 0
        for segment in axis:
            sizes = [factor.size for factor in segment]
            part = values.narrow(place, begin, int(np.prod(sizes))).unflatten(place, sizes)
            begin += int(np.prod(sizes))
            for level, factor in enumerate(segment):
                if factor.group in plans:
                    moved = part.movedim(place + level, 0)
                    mixed = (plans[factor.group] @ moved.reshape(factor.size, -1)).reshape(moved.shape)
                    part = mixed.movedim(0, place + level)
            parts.append(part.flatten(place, place + len(sizes) - 1))
        values = torch.cat(parts, place)
    return values


@dataclass
class Mixed(Model):
    """``model``, aligned, with soft plans applied: not the same function any more."""

    model: Model
    plan: Plan
    plans: dict[str, Tensor]

    def __post_init__(self) -> None:
        self.name, self.labels = self.model.name, self.model.labels

    def names(self) -> list[str]:
        return self.model.names()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.model.shape(key)

    def read(self, key: str) -> Tensor:
        values = self.model.read(key)
        return mix(self.plan.tensors[key], values, self.plans) if values.is_floating_point() else values


# -- restarts -------------------------------------------------------------------------------------------------------
def state_bytes(state: State) -> bytes:
    """A state as JSON."""
    return json.dumps({
        "perms": {name: perm.tolist() for name, perm in state.perms.items()},
        "found": {name: [one.cost_identity, one.cost, one.mode] for name, one in state.found.items()},
        "finished": state.finished, "current": state.current, "sweeps": state.sweeps,
    }).encode()  # fmt: skip


def state_from(content: dict[str, Any]) -> State:
    """The state that ``state_bytes`` wrote."""
    return State(
        {name: torch.tensor(perm, dtype=torch.int64) for name, perm in content["perms"].items()},
        {name: Found(*one) for name, one in content["found"].items()},
        list(content["finished"]), dict(content["current"]), int(content["sweeps"]),
    )  # fmt: skip


@dataclass
class Aligned:
    """What came of one alignment."""

    job: Job
    perms: Permutations
    lines: list[GroupLine]
    soft: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """OLD in NEW's order."""
        hard = Relabelled(self.job.old, self.job.plan, self.perms)
        return Mixed(hard, self.job.plan, self.soft) if self.soft else hard

    def of_original(self, original: Checkpoint, key: str) -> Tensor:
        """A tensor of OLD's file, aligned, in its own type: bit for bit a relabelling."""
        tensor, values = self.job.plan.tensors[key], original.original(key)
        if self.job.shuffle is not None:
            values = relabel(self.job.plan, tensor, values, self.job.shuffle)
        return relabel(self.job.plan, tensor, values, self.perms)
