"""Recipes: flat YAML files whose keys are option names, read strictly.

A key that is no option, a duplicate, a tag, an anchor or a nested value is an error with its line, because a
recipe that is half understood trains the wrong model. Scalars follow the YAML 1.2 core schema: ``1e-4`` is a
number and ``no`` is a word (PyYAML's 1.1 rules say the opposite of both).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolbox.shell.errors import BadRecipe, MissingInput

MAX_RECIPE = 1 << 20

_WANTED = "a recipe is a list of `option: value` lines"

_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_LONGEST_INT = 1000
"""Digits; Python refuses to read more than 4300, and no option means so many."""

_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting of a recipe, the line it stands on, and its scalar or list of scalars as written (``text``)."""

    key: str
    value: Any
    line: int
    text: Any = None


def scalar(text: str) -> Any:
    """A plain (unquoted) YAML scalar by the 1.2 core schema; what is not finite stays text, as do endless integers."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base) if len(text) <= _LONGEST_INT else text
    if _FLOAT.fullmatch(text) and math.isfinite(number := float(text)):
        return number
    return text


def read_recipe(path: str | Path) -> list[Entry]:
    """The settings in the file ``path``, in order.

    Raises MissingInput (66) or BadRecipe (78) naming file and line.
    """
    import yaml

    try:
        with open(path, "rb") as handle:
            text = handle.read(MAX_RECIPE + 1)
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such recipe", "recipes of this project lie under recipes/") from None
    if len(text) > MAX_RECIPE:
        raise BadRecipe(f"{path}: larger than {MAX_RECIPE:,} bytes", _WANTED)
    try:
        _refuse_shapes(yaml.parse(text, Loader=yaml.SafeLoader), path)
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise BadRecipe(f"{where}: not valid YAML: {what}", _WANTED) from None
    except (
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:  # an escape that is no character is one of the last two
        raise BadRecipe(f"{path}: not valid YAML: {error}", _WANTED) from None
    if len(documents) > 1:
        raise BadRecipe(f"{path}: more than one YAML document", "one recipe a file")
    if not documents or documents[0] is None:
        return []
    return list(_entries(documents[0], str(path)))


def _refuse_shapes(events: Iterable[Any], path: str | Path) -> None:
    """Raise at the first anchor, alias, tag or nested value, before anything is built from the text."""
    import yaml

    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise BadRecipe(f"{path}:{line}: anchors and aliases are not allowed", "write the value out")
        if getattr(event, "tag", None):
            raise BadRecipe(f"{path}:{line}: tags are not allowed", "write the plain value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:  # settings, and the list that one may have
            raise _nested(path, line)


def _nested(path: str | Path, line: int) -> BadRecipe:
    return BadRecipe(f"{path}:{line}: a value is a scalar or a flat list", "recipes are flat")


def _entries(root: Any, path: str) -> Iterable[Entry]:
    import yaml

    if not isinstance(root, yaml.MappingNode):
        raise BadRecipe(f"{path}:1: not a list of settings", _WANTED)
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise BadRecipe(f"{path}:{line}: a key must be an option name", _WANTED)
        key = key_node.value
        if key in seen:
            raise BadRecipe(f"{path}:{line}: `{key}` stands on line {seen[key]} already", "keep one of them")
        seen[key] = line
        if isinstance(value_node, yaml.ScalarNode):
            yield Entry(key, _value(value_node, path), line, value_node.value)
        elif isinstance(value_node, yaml.SequenceNode):
            items = value_node.value
            yield Entry(key, [_value(item, path) for item in items], line, [item.value for item in items])
        else:
            raise _nested(path, value_node.start_mark.line + 1)


def _value(node: Any, path: str) -> Any:
    try:
        node.value.encode()
    except UnicodeEncodeError:
        where = f"{path}:{node.start_mark.line + 1}"
        raise BadRecipe(f"{where}: half of a surrogate pair is no character", "write the character itself") from None
    return scalar(node.value) if node.style is None else node.value


def unknown_key(path: str, entry: Entry, known: Collection[str]) -> BadRecipe:
    """The complaint about a key that is no option, with the nearest option name."""
    near = difflib.get_close_matches(entry.key, sorted(known), n=1)
    advice = f"did you mean `{near[0]}`?" if near else "see --help for the option names"
    return BadRecipe(f"{path}:{entry.line}: `{entry.key}` is not an option of this command", advice)


def write_recipe(settings: Mapping[str, Any]) -> str:
    """``settings`` as recipe text that ``read_recipe`` reads back to the same values; None is left out.

    Numbers are finite, text is Unicode without lone surrogates.
    """
    lines = [f"{_render(key)}: {_render(value)}" for key, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"


def _render(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_render(item) for item in value) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./+=-]*", text) and isinstance(scalar(text), str):
        return text
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    # Not json.dumps: its two \\u for one character beyond the basic plane are two characters in YAML.
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
