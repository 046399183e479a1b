"""Permutations of groups: their algebra, and what they do to tensors. One index convention, here and in files:

    aligned = old[perm],   perm[i] = the index in OLD that lands at position i.

A group with a parent has a permutation for each member of the parent, counted by where the member LANDS: with kv the
parent's and q the child's permutation, position (g, j) gets OLD's entry (kv[g], q[g][j]). So

    compose(p, r): first p, then r:  kv = p.kv[r.kv],  q[g] = p.q[r.kv[g]][r.q[g]];
    invert(p):                       kv = argsort(p.kv),  q[h] = argsort(p.q[kv[h]]).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from toolbox.lwi.plan import Axis, Factor, Plan, TensorPlan, axis_size

Permutations = Mapping[str, Tensor]
"""int64 by group: shape (size,), or (members of the parent, size)."""


def identity(plan: Plan, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The permutations that move nothing, of all groups or of ``names``."""
    wanted = plan.groups if names is None else names
    return {name: torch.arange(plan.groups[name].size).expand(plan.groups[name].shape).clone() for name in wanted}


def _draw(size: int, generator: torch.Generator) -> Tensor:
    """A random permutation; of three or more not its own inverse, which would hide a mistaken direction."""
    while True:
        perm = torch.randperm(size, generator=generator)
        if size < 3 or not torch.equal(perm[perm], torch.arange(size)):
            return perm


def random_member(plan: Plan, generator: torch.Generator, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """A random permutation of each group of ``names`` (default: all), drawn in the plan's order."""
    drawn = {}
    for name, group in plan.groups.items():
        if names is None or name in names:
            rows = [_draw(group.size, generator) for _ in range(group.parents)]
            drawn[name] = rows[0] if group.parent is None else torch.stack(rows)
    return drawn


def compose(plan: Plan, first: Permutations, then: Permutations) -> dict[str, Tensor]:
    """``first`` and then ``then``, as one; a group that only one of them has is taken from that one."""
    result = {}
    for name in plan.groups:
        if name not in first and name not in then:
            continue
        group = plan.groups[name]
        one = first.get(name, identity(plan, [name])[name])
        two = then.get(name, identity(plan, [name])[name])
        if group.parent is not None:
            if group.parent in then:  # children go where their parent goes
                one = one[then[group.parent]]
            result[name] = one.gather(1, two)
        else:
            result[name] = one[two]
    return result


def invert(plan: Plan, perms: Permutations) -> dict[str, Tensor]:
    """The permutations that undo ``perms``."""
    result = {}
    for name, perm in perms.items():
        parent = plan.groups[name].parent
        if parent is not None and parent in perms:
            perm = perm[perms[parent].argsort()]
        result[name] = perm.argsort(-1)
    return result


def axis_index(plan: Plan, axis: Axis, perms: Permutations) -> Tensor | None:
    """Where each entry of an aligned axis comes from in OLD: int64 (entries,); None where nothing moves."""
    if not any(factor.group in perms for segment in axis for factor in segment):
        return None
    parts, start = [], 0
    for segment in axis:
        index = torch.full((1,), start)
        landed: dict[str, Tensor] = {}
        """For each group above: which of its members each entry of ``index`` stands at."""
        for factor, below in _strides(segment):
            step = _level(plan, factor, perms, landed, len(index))
            index = (index[:, None] + below * step).reshape(-1)
            landed = {name: place.repeat_interleave(factor.size) for name, place in landed.items()}
            if factor.group is not None:
                landed[factor.group] = torch.arange(factor.size).repeat(len(index) // factor.size)
        parts.append(index)
        start += axis_size((segment,))
    return torch.cat(parts)


def _strides(segment: tuple[Factor, ...]) -> list[tuple[Factor, int]]:
    """Each level with the number of entries that one step on it passes."""
    result, below = [], 1
    for factor in reversed(segment):
        result.append((factor, below))
        below *= factor.size
    return result[::-1]


def _level(plan: Plan, factor: Factor, perms: Permutations, landed: Mapping[str, Tensor], count: int) -> Tensor:
    """Old indices on one level, (1, size), or (entries above, size) below a parent."""
    if factor.group is None or factor.group not in perms:
        return torch.arange(factor.size)[None]
    perm = perms[factor.group]
    parent = plan.groups[factor.group].parent
    return perm[None] if parent is None else perm[landed[parent]].reshape(count, factor.size)


def relabel(plan: Plan, tensor: TensorPlan, values: Tensor, perms: Permutations) -> Tensor:
    """``values`` of the tensor with every axis gathered by ``perms``: the same function under other channel numbers."""
    for place, axis in enumerate(tensor.axes):
        index = axis_index(plan, axis, perms)
        if index is not None:
            values = values.index_select(place, index.to(values.device))
    return values


def random_relabelling(plan: Plan, seed: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """``random_member`` by a seed."""
    return random_member(plan, torch.Generator().manual_seed(seed), names)
