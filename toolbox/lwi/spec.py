"""Permutation specs as data: YAML files that say which axes of which tensors belong together.

A spec maps patterns of tensor names to their axes. ``{i}`` in a pattern is a counter, which axes may use:

    model.layers.{i}.self_attn.q_proj.weight: [kv{i}/qin{i}[kv{i}]/-, residual]

An axis is ``-`` (fixed), a group ``NAME``, ``NAME*4`` (each member 4 contiguous entries), ``A|B|C`` (a concatenation),
``kv/qin[kv]/-`` (nested blocks, outermost first; ``[kv]``: one permutation for each member of kv), or ``@labels`` (rows
paired by class label). Instead of axes a tensor may have ``-`` (all fixed) or ``=KEY`` (the axes of another tensor).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from toolbox.shell.errors import BadData, MissingInput

_COUNTER = re.compile(r"\{(?P<name>[a-z]+)(?P<ordinal>#?)(?:(?P<sign>[>=])(?P<bound>\d+))?\}")
_KEYS = {"name", "match", "scope", "sizes", "in-first", "stream", "deep", "joins", "ends", "tensors"}
_ADVICE = "see docs/lwi-fuse.md, or lwi-fuse MODEL --print-spec for one to start from"


@dataclass(frozen=True)
class Pattern:
    """A pattern of tensor names, with its counters, and the axes as written (a list, ``-`` or ``=KEY``)."""

    text: str
    axes: tuple[str, ...] | str

    @property
    def regex(self) -> re.Pattern[str]:
        """What a key must look like; a group a counter."""
        return _compiled(self.text)

    @property
    def counters(self) -> tuple[re.Match[str], ...]:
        """The counters as written."""
        return tuple(_COUNTER.finditer(self.text))

    @property
    def names(self) -> tuple[str, ...]:
        """The counters' names."""
        return tuple(one["name"] for one in self.counters)


@cache
def _compiled(text: str) -> re.Pattern[str]:
    parts, end = [], 0
    for counter in _COUNTER.finditer(text):
        parts += [re.escape(text[end : counter.start()]), r"(\d+)"]
        end = counter.end()
    return re.compile("".join(parts) + re.escape(text[end:]))


@dataclass(frozen=True)
class Join:
    """Two names of one group wherever no tensor ``unless`` exists: a skip connection without a projection."""

    groups: tuple[str, str]
    over: str
    unless: str


@dataclass(frozen=True)
class Spec:
    """A spec as written. ``where`` is its file, ``builtin`` whether it is one of ours."""

    where: str
    name: str
    builtin: bool
    patterns: tuple[Pattern, ...]
    match: Mapping[str, Any] = field(default_factory=dict)
    scope: str | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    in_first: frozenset[str] = frozenset()
    stream: str | None = None
    base: str | None = None
    deep: tuple[str, ...] | None = None
    deep_default: int = 0
    joins: tuple[Join, ...] = ()
    fixed_ends: bool = False

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether the spec is meant for a model of this configuration."""
        architectures = config.get("architectures") or []
        wanted = {key: value for key, value in self.match.items() if key != "architectures"}
        return any(name in self.match.get("architectures", ()) for name in architectures) and all(
            config.get(key) == value for key, value in wanted.items()
        )


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is there twice: the second would hide the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                what = "stands twice" if key in seen else "is not text"
                raise yaml.MarkedYAMLError(problem=f"{key!r} {what}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_spec(path: str | Path, *, builtin: bool = False) -> Spec:
    """Read a spec file. Raises: MissingInput (66); BadData (65) naming file and line, or the field."""
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"{path}: no such spec", "lwi-fuse MODEL --print-spec writes one to start from")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadData(
            f"not valid YAML: {what}", _ADVICE, file=str(path), line=mark.line + 1 if mark else None
        ) from None
    return parse_spec(content, str(path), builtin=builtin)


def parse_spec(content: Any, where: str, *, builtin: bool = False) -> Spec:
    """A spec from the content of its file. Raises: BadData (65) naming the field."""

    def bad(what: str, at: str) -> BadData:
        return BadData(what, _ADVICE, file=where, field=f"$.{at}" if at else None)

    def text_map(name: str) -> dict[str, Any]:
        value = content.get(name) or {}
        if not isinstance(value, dict):
            raise bad("a mapping is expected", name)
        return value

    if not isinstance(content, dict) or not content.get("tensors"):
        raise bad("a mapping with `tensors` is expected", "")
    if unknown := sorted(set(content) - _KEYS):
        raise bad(f"unknown; known are {', '.join(sorted(_KEYS))}", unknown[0])
    patterns = []
    for text, axes in text_map("tensors").items():
        whole = isinstance(axes, str) and (axes == "-" or axes.startswith("="))
        if not whole and not (isinstance(axes, list) and all(isinstance(axis, str) for axis in axes)):
            raise bad("a list of axes is expected, `-` or `=KEY`", f"tensors.{text}")
        if "{" in _COUNTER.sub("", text):
            raise bad("a counter is {i}, {i>0} or {i#=0}", f"tensors.{text}")
        patterns.append(Pattern(text, axes if isinstance(axes, str) else tuple(axes)))
    joins = []
    for place, one in enumerate(content.get("joins") or []):
        groups = one.get("groups") if isinstance(one, dict) else None
        if not isinstance(groups, list) or len(groups) != 2 or not {"over", "unless"} <= set(one):
            raise bad("groups (two), over and unless are expected", f"joins[{place}]")
        joins.append(Join((str(groups[0]), str(groups[1])), str(one["over"]), str(one["unless"])))
    stream, deep = text_map("stream"), text_map("deep")
    counted = deep.get("count")
    return Spec(
        where=where,
        name=str(content.get("name") or Path(where).stem),
        builtin=builtin,
        patterns=tuple(patterns),
        match=text_map("match"),
        scope=content.get("scope"),
        sizes={str(name): str(value) for name, value in text_map("sizes").items()},
        in_first=frozenset(map(str, content.get("in-first") or [])),
        stream=stream.get("group"),
        base=stream.get("base"),
        deep=tuple(map(str, counted)) if counted is not None else None,
        deep_default=int(deep.get("default", 0)),
        joins=tuple(joins),
        fixed_ends=content.get("ends") == "fixed",
    )


@cache
def builtin_specs() -> tuple[Spec, ...]:
    """The specs that come with the package."""
    folder = Path(__file__).parent / "specs"
    return tuple(read_spec(path, builtin=True) for path in sorted(folder.glob("*.yaml")))


def template(shapes: Mapping[str, tuple[int, ...]], architectures: Iterable[str] = ()) -> str:
    """A spec to start from for a checkpoint that none fits: every tensor with fixed axes, numbers as counters.

    It permutes nothing. A person replaces ``-`` by the same name wherever channels belong together.
    """
    letters = "ijklmn"
    tensors: dict[str, list[str]] = {}
    for key in sorted(shapes):
        count = iter(letters)
        text = re.sub(r"(?<=\.)\d+(?=\.)", lambda found, left=count: "{" + next(left, found[0]) + "}", key)
        tensors.setdefault(text, ["-"] * len(shapes[key]))
    lines = [
        "# Replace - by a group's name on every axis that its channels are on; see docs/lwi-fuse.md.",
        "name: mine",
    ]
    names = list(architectures)
    lines += [f"match: {{architectures: [{', '.join(names)}]}}"] if names else []
    lines += ["scope: layers", "tensors:"]
    lines += [f"  {text}: [{', '.join(axes)}]" for text, axes in tensors.items()]
    return "\n".join(lines) + "\n"
