"""What a permutation spec says about one checkpoint: which axis of which tensor carries which group.

An axis is a concatenation of segments (fused q|k|v); a segment is nested blocks, outermost first (KV head / query head
in it / its dimensions); each level of a segment is a factor: a permutation group, or fixed. A group with a ``parent``
has one permutation for each member of the parent, and stands directly below it wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod


@dataclass(frozen=True)
class Factor:
    """One level of a segment: ``size`` entries that the group permutes, or that stay where they are (None)."""

    group: str | None
    size: int


Segment = tuple[Factor, ...]
Axis = tuple[Segment, ...]


def axis_size(axis: Axis) -> int:
    """Entries of an axis."""
    return sum(prod(factor.size for factor in segment) for segment in axis)


_STATISTICS = frozenset({"running_mean", "running_var"})
"""What torch's batch norms call the statistics that they keep."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: an ``Axis`` a dimension. ``writes`` is the axis whose groups this tensor computes (its outputs).

    ``labels``: the first axis is the rows of class labels, paired between models by name.
    """

    key: str
    axes: tuple[Axis, ...]
    writes: int = 0
    labels: bool = False

    @property
    def statistic(self) -> bool:
        """Whether it was measured and not learned: batch norm's running mean and variance.

        They move with their group and are left out of every comparison of channels: they tell what the images of a
        task were like, on the scale of activations, and would outweigh the kernels.
        """
        return self.key.rpartition(".")[2] in _STATISTICS

    @cached_property
    def groups(self) -> frozenset[str]:
        """The groups on any axis."""
        return frozenset(f.group for axis in self.axes for segment in axis for f in segment if f.group is not None)

    @cached_property
    def written(self) -> frozenset[str]:
        """The groups on the axis of its outputs; of a vector all its groups."""
        if len(self.axes) < 2:
            return self.groups
        return frozenset(f.group for segment in self.axes[self.writes] for f in segment if f.group is not None)


@dataclass(frozen=True)
class Group:
    """``size`` channels that may be permuted among themselves; with a ``parent``, within each of its members.

    ``stem`` is its name without counters (``ff``), ``parents`` the number of the parent's members (1 without one).
    """

    name: str
    stem: str
    size: int
    parent: str | None = None
    parents: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its permutation."""
        return (self.size,) if self.parent is None else (self.parents, self.size)


@dataclass(frozen=True)
class Plan:
    """A spec expanded over one checkpoint. ``groups`` run from shallow to deep, ``tensors`` in the network's order.

    ``deepest``: the groups that ``--deep N`` counts from, the deepest last, and ``deep_default`` of them are deep if
    nothing is said. ``stream`` is the residual group that two models with a common base need not move, told by the
    tensor ``base``.
    """

    spec: str
    groups: dict[str, Group]
    tensors: dict[str, TensorPlan]
    deepest: tuple[str, ...]
    deep_default: int
    stream: str | None = None
    base: str | None = None
    builtin: bool = True

    @cached_property
    def children(self) -> dict[str, tuple[str, ...]]:
        """The groups below each group that has any."""
        found: dict[str, tuple[str, ...]] = {}
        for group in self.groups.values():
            if group.parent is not None:
                found[group.parent] = (*found.get(group.parent, ()), group.name)
        return found

    @cached_property
    def carriers(self) -> dict[str, tuple[str, ...]]:
        """The tensors that carry each group, in the network's order."""
        found: dict[str, list[str]] = {name: [] for name in self.groups}
        for key, tensor in self.tensors.items():
            for name in tensor.groups:
                found[name].append(key)
        return {name: tuple(keys) for name, keys in found.items()}

    @cached_property
    def compared(self) -> dict[str, tuple[str, ...]]:
        """The tensors that tell how alike the channels of each group are: its carriers without running statistics."""
        return {
            name: tuple(key for key in keys if not self.tensors[key].statistic) for name, keys in self.carriers.items()
        }

    def components(self, moving: Collection[str]) -> list[tuple[str, ...]]:
        """The ``moving`` groups in sets that share no tensor (nor parent), each and all from shallow to deep."""
        root = {name: name for name in self.groups if name in moving}

        def find(name: str) -> str:
            while root[name] != name:
                name = root[name]
            return name

        for tensor in self.tensors.values():
            met = [name for name in self.groups if name in tensor.groups and name in root]
            for name in met[1:]:
                root[find(name)] = find(met[0])
        sets: dict[str, list[str]] = {}
        for name in root:
            sets.setdefault(find(name), []).append(name)
        return [tuple(names) for names in sets.values()]


def shapes_text(tensors: Mapping[str, TensorPlan], groups: Mapping[str, Group]) -> dict[str, list[str]]:
    """The axes of each tensor as a spec writes them, with every size told: ``kv:3/qin:3[kv]/-:64``."""

    def factor(one: Factor) -> str:
        if one.group is None:
            return f"-:{one.size}"
        parent = groups[one.group].parent
        return f"{one.group}:{one.size}" + (f"[{parent}]" if parent else "")

    def axis(one: Axis) -> str:
        return "|".join("/".join(factor(level) for level in segment) for segment in one)

    return {key: [axis(one) for one in tensor.axes] for key, tensor in tensors.items()}
