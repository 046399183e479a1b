"""From a spec and the shapes of one checkpoint to a plan: every tensor claimed once, every size agreed on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

from toolbox.lwi.plan import Axis, Factor, Group, Plan, TensorPlan
from toolbox.lwi.spec import Pattern, Spec
from toolbox.shell.errors import BadData

Shapes = Mapping[str, tuple[int, ...]]

_EXPRESSION = re.compile(r"\{(?P<name>[a-z]+)(?P<kind>#|:last)?(?P<shift>[+-]\d+)?\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADVICE = "correct the spec; lwi-fuse MODEL --print-spec shows what it expands to"


@dataclass(frozen=True)
class _Level:
    """A factor as written: a group (with its parent) or fixed, and its size where that is told."""

    group: str | None
    parent: str | None = None
    size: int | None = None


@dataclass
class _Claimed:
    """A key of the checkpoint, the pattern that claims it, and its counters' values."""

    key: str
    pattern: Pattern
    place: int
    values: dict[str, int]
    block: int = 0


class _Expansion:
    """One run of ``expand``: what its steps share."""

    def __init__(self, spec: Spec, shapes: Shapes, config: Mapping[str, Any]) -> None:
        self.spec, self.shapes, self.config = spec, shapes, config
        self.stems: dict[str, str] = {}
        self.parents: dict[str, str] = {}
        self.same: dict[str, str] = {}
        self.ordinals: dict[str, list[int]] = {}

    def bad(self, what: str) -> BadData:
        return BadData(what, _ADVICE, file=self.spec.where)

    # -- keys ---------------------------------------------------------------------------------------------------------
    def claim(self) -> list[_Claimed]:
        """Every key with its one pattern, in the network's order; BadData for none or two."""
        self._count()
        claimed, unclaimed = [], []
        for key in sorted(self.shapes):
            found = [one for n, p in enumerate(self.spec.patterns) if (one := self._matches(key, n, p)) is not None]
            if len(found) > 1:
                texts = " and ".join(repr(one.pattern.text) for one in found)
                raise self.bad(f"tensor {key!r} is claimed twice, by {texts}")
            if not found:
                unclaimed.append(key)
            claimed += found
        if unclaimed:
            raise self.unclaimed(unclaimed)
        blocks, block = {}, -1
        for place, pattern in enumerate(self.spec.patterns):
            if not place or pattern.names != self.spec.patterns[place - 1].names:
                block += 1
            blocks[place] = block
        for one in claimed:
            one.block = blocks[one.place]
        return sorted(claimed, key=lambda one: (one.block, tuple(one.values.values()), one.place))

    def unclaimed(self, keys: list[str]) -> BadData:
        named = ", ".join(map(repr, keys[:5])) + (", ..." if len(keys) > 5 else "")
        return BadData(
            f"the spec {self.spec.name} leaves {len(keys)} of {len(self.shapes)} tensors unclaimed: {named}",
            "lwi-fuse MODEL --print-spec > mine.yaml starts a spec for --spec mine.yaml",
            file=self.spec.where if not self.spec.builtin else None,
        )

    def _count(self) -> None:
        """The values that each counter takes, sorted: what ``{i#}`` counts by."""
        found: dict[str, set[int]] = {}
        for pattern in self.spec.patterns:
            for key in self.shapes:
                if match := pattern.regex.fullmatch(key):
                    for counter, value in zip(pattern.counters, match.groups(), strict=True):
                        found.setdefault(counter["name"], set()).add(int(value))
        self.ordinals = {name: sorted(values) for name, values in found.items()}

    def _matches(self, key: str, place: int, pattern: Pattern) -> _Claimed | None:
        match = pattern.regex.fullmatch(key)
        if match is None:
            return None
        values = {}
        for counter, text in zip(pattern.counters, match.groups(), strict=True):
            value = int(text)
            counted = self.ordinals[counter["name"]].index(value) if counter["ordinal"] else value
            if counter["sign"]:
                bound = int(counter["bound"])
                if not (counted > bound if counter["sign"] == ">" else counted == bound):
                    return None
            values[counter["name"]] = value
        return _Claimed(key, pattern, place, values)

    # -- axes ---------------------------------------------------------------------------------------------------------
    def name(self, written: str, values: Mapping[str, int]) -> str:
        """The name of a group as written, for these counters: ``ff{i}`` is ``layers.3.ff`` in the scope ``layers``."""
        stem = _EXPRESSION.sub("", written).replace(".", "")
        if not _NAME.fullmatch(stem):
            raise self.bad(f"{written!r} is not the name of a group")
        numbers = [str(self._number(one, values, written)) for one in _EXPRESSION.finditer(written)]
        if self.spec.scope and numbers:
            name = ".".join([self.spec.scope, *numbers, stem])
        else:
            name = stem + ".".join(numbers)
        self.stems[name] = stem
        return name

    def _number(self, found: re.Match[str], values: Mapping[str, int], written: str) -> int:
        counter, shift = found["name"], int(found["shift"] or 0)
        if found["kind"] == ":last":
            if counter not in self.ordinals:
                raise self.bad(f"{written!r}: no tensor has a counter {counter!r}")
            return len(self.ordinals[counter]) - 1 + shift
        if counter not in values:
            raise self.bad(f"{written!r}: the pattern has no counter {counter!r}")
        value = values[counter]
        return (self.ordinals[counter].index(value) if found["kind"] else value) + shift

    def levels(self, axis: str, values: Mapping[str, int], key: str) -> list[list[_Level]]:
        """The segments of an axis as written, each a list of levels."""
        segments = []
        for segment in axis.replace(" ", "").split("|"):
            levels: list[_Level] = []
            for text in segment.split("/"):
                if text in ("-", "@labels"):
                    levels.append(_Level(None))
                    continue
                body, _, times = text.partition("*")
                if times and not times.isdigit():
                    raise self.bad(f"tensor {key!r}: {text!r}: NAME*4 is expected")
                name, bracket, parent = body.partition("[")
                group = self.name(name, values)
                above = self.name(parent.removesuffix("]"), values) if bracket else None
                if above is not None and (not levels or levels[-1].group is None):
                    raise self.bad(f"tensor {key!r}: {text!r} must stand below a group")
                if self.parents.setdefault(group, above or "") != (above or ""):
                    raise self.bad(f"tensor {key!r}: {group} is elsewhere a group of its own")
                levels.append(_Level(group, above))
                if times:
                    levels.append(_Level(None, size=int(times)))
            segments.append(levels)
        return segments

    def join(self) -> None:
        """Give groups that a plain skip connection holds together one name, the shallower one's."""
        for join in self.spec.joins:
            over = Pattern(join.over, "-")
            for key in sorted(self.shapes):
                found = self._matches(key, 0, over)
                if found is None:
                    continue
                values = found.values
                unless = re.sub(r"\{([a-z]+)\}", lambda one, v=values: str(v[one[1]]), join.unless)
                if unless not in self.shapes:
                    first, second = (self.final(self.name(group, values)) for group in join.groups)
                    self.same[second] = first

    def final(self, name: str) -> str:
        """The one name of a group."""
        while name in self.same:
            name = self.same[name]
        return name

    # -- sizes --------------------------------------------------------------------------------------------------------
    def told_size(self, stem: str) -> int | None:
        """The size of ``sizes``: whole numbers and names of the configuration with * and / between them."""
        text = self.spec.sizes.get(stem)
        if text is None:
            return None
        value, sign = Fraction(1), "*"
        for token in re.findall(r"[A-Za-z_][A-Za-z0-9_]*|\d+|\S", text):
            if token in "*/":
                sign = token
                continue
            number = int(token) if token.isdigit() else self.config.get(token)
            if not isinstance(number, int) or number < 1:
                raise self.bad(f"sizes.{stem}: the model's configuration has no {token!r} that counts something")
            value = value * number if sign == "*" else value / number
        if value.denominator != 1:
            raise self.bad(f"sizes.{stem}: {text} is {value}, not a whole number")
        return int(value)

    def sizes(self, tensors: dict[str, list[list[list[_Level]]]]) -> dict[str, int]:
        """The size of every group: told, or what is left of an axis when all others on it are known."""
        names = {level.group for axes in tensors.values() for axis in axes for seg in axis for level in seg}
        known = {name: size for name in names if name and (size := self.told_size(self.stems[name])) is not None}
        waiting = [(key, place) for key, axes in tensors.items() for place in range(len(axes))]
        while waiting:
            later = []
            for key, place in waiting:
                if not self._settle(key, place, tensors[key][place], known):
                    later.append((key, place))
            if len(later) == len(waiting):
                key, place = later[0]
                raise self.bad(f"tensor {key!r}: the sizes on axis {place} cannot be told apart; give `sizes`")
            waiting = later
        return known

    def _settle(self, key: str, place: int, axis: list[list[_Level]], known: dict[str, int]) -> bool:
        """Learn what one axis tells; True when nothing on it is open any more."""
        total = self.shapes[key][place]
        open_levels = [
            (segment, level)
            for segment in axis
            for level in segment
            if level.size is None and (level.group is None or level.group not in known)
        ]
        if not open_levels:
            found = sum(prod(level.size or known[level.group or ""] for level in segment) for segment in axis)
            if found != total:
                names = ", ".join(f"{one.group} {known[one.group]}" for s in axis for one in s if one.group)
                raise self.bad(f"tensor {key!r}: axis {place} has {total} entries, its groups ({names}) make {found}")
            return True
        if len(open_levels) > 1:
            return False
        segment, level = open_levels[0]
        rest = sum(prod(one.size or known[one.group or ""] for one in other) for other in axis if other is not segment)
        factor = prod(one.size or known[one.group or ""] for one in segment if one is not level)
        left = total - rest
        if left < factor or left % factor:
            raise self.bad(
                f"tensor {key!r}: axis {place} has {total} entries, not a multiple of its blocks of {factor}"
            )
        if level.group is not None:
            known[level.group] = left // factor
        else:
            segment[segment.index(level)] = _Level(None, size=left // factor)
        return True


def expand(spec: Spec, shapes: Shapes, config: Mapping[str, Any]) -> Plan:
    """The plan of ``spec`` for a checkpoint of these shapes and this configuration.

    Raises: BadData (65) for a tensor that no pattern or more than one claims, a wrong number of axes, sizes that
    differ, a group that is on one tensor twice, or a name that means nothing.
    """
    run = _Expansion(spec, shapes, config)
    claimed = {one.key: one for one in run.claim()}
    axes = {key: _written_axes(run, one, claimed) for key, one in claimed.items()}
    run.join()
    for tensor in axes.values():
        for axis in tensor:
            for segment in axis:
                segment[:] = [
                    _Level(*(name and run.final(name) for name in (one.group, one.parent)), one.size) for one in segment
                ]
    sizes = run.sizes(axes)
    fixed = _ends(axes, spec) if spec.fixed_ends else set()
    tensors = {}
    for key, tensor in axes.items():
        done: tuple[Axis, ...] = tuple(
            tuple(tuple(_factor(one, sizes, fixed) for one in segment) for segment in axis) for axis in tensor
        )
        first = claimed[key].pattern.text in spec.in_first
        labelled = bool(claimed[key].pattern.axes) and claimed[key].pattern.axes[0] == "@labels"
        tensors[key] = TensorPlan(key, done, writes=len(done) - 1 if first else 0, labels=labelled)
    _check_once(run, tensors)
    return _plan(spec, run, tensors, sizes)


def _written_axes(run: _Expansion, one: _Claimed, claimed: Mapping[str, _Claimed]) -> list[list[list[_Level]]]:
    """The axes of a tensor as levels; ``-`` and ``=KEY`` resolved."""
    written, values, dimensions = one.pattern.axes, one.values, len(run.shapes[one.key])
    if isinstance(written, str) and written.startswith("="):
        other = claimed.get(written[1:])
        if other is None or isinstance(other.pattern.axes, str):
            raise run.bad(f"tensor {one.key!r} is tied to {written[1:]!r}, which has no axes here")
        written, values = other.pattern.axes, other.values
    if isinstance(written, str):
        written = ("-",) * dimensions
    if len(written) != dimensions:
        raise run.bad(f"tensor {one.key!r} has {dimensions} axes, the spec gives {len(written)}")
    return [run.levels(axis, values, one.key) for axis in written]


def _factor(level: _Level, sizes: Mapping[str, int], fixed: set[str]) -> Factor:
    if level.group is None:
        assert level.size is not None
        return Factor(None, level.size)
    return Factor(None if level.group in fixed else level.group, sizes[level.group])


def _ends(axes: Mapping[str, list[list[list[_Level]]]], spec: Spec) -> set[str]:
    """Groups that no matrix writes (the network's input) or none reads (its output): those stay where they are."""
    matrices = [tensor for tensor in axes.values() if len(tensor) > 1]
    written = {one.group for tensor in matrices for segment in tensor[0] for one in segment if one.group}
    read = {one.group for tensor in matrices for axis in tensor[1:] for segment in axis for one in segment if one.group}
    return written ^ read


def _check_once(run: _Expansion, tensors: Mapping[str, TensorPlan]) -> None:
    for key, tensor in tensors.items():
        seen: set[str] = set()
        for axis in tensor.axes:
            here = {factor.group for segment in axis for factor in segment if factor.group is not None}
            if twice := here & seen:
                raise run.bad(f"tensor {key!r} has the group {min(twice)} on two axes, which no assignment can match")
            seen |= here


def _plan(spec: Spec, run: _Expansion, tensors: dict[str, TensorPlan], sizes: Mapping[str, int]) -> Plan:
    """Groups from shallow to deep: by the first tensor that computes them; deepest by the last that does."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for place, tensor in enumerate(tensors.values()):
        if len(tensor.axes) < 2:
            continue
        for axis in (tensor.axes[tensor.writes],):
            for name in (factor.group for segment in axis for factor in segment if factor.group is not None):
                first.setdefault(name, place)
                last[name] = place
    for place, tensor in enumerate(tensors.values()):
        for name in sorted(tensor.groups):
            first.setdefault(name, len(tensors) + place)
            last.setdefault(name, place)
    groups = {}
    for name in sorted(first, key=lambda one: first[one]):
        parent = run.final(run.parents.get(name) or "") or None
        groups[name] = Group(name, run.stems[name], sizes[name], parent, sizes[parent] if parent else 1)
    counted = [
        name
        for name in sorted(groups, key=lambda one: last[one])
        if groups[name].parent is None and (spec.deep is None or groups[name].stem in spec.deep)
    ]
    stream = spec.stream if spec.stream in groups else None
    return Plan(
        spec=spec.name,
        groups=groups,
        tensors=tensors,
        deepest=tuple(counted),
        deep_default=min(spec.deep_default, len(counted)),
        stream=stream,
        base=spec.base if spec.base in tensors else None,
        builtin=spec.builtin,
    )
