"""``--stop-when``: a small expression over watched numbers, parsed here and never evaluated as Python.

expression = comparison { "and" comparison }
comparison = name ("<" | "<=" | ">" | ">=") term { "*" term }
term       = number | "start"            (start: the value of the comparison's name before the first step)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from toolbox.shell.errors import UsageProblem

_TOKEN = re.compile(r"\s*(?:([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)|([A-Za-z_][A-Za-z0-9_]*)|(<=|>=|<|>|\*))")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
STEP_NAMES = ("step", "loss")
"""Names known after every step; all others are known after an evaluation."""


@dataclass(frozen=True)
class Comparison:
    """``name <op> factor`` or, when ``relative``, ``name <op> factor · start(name)``."""

    name: str
    relation: str
    factor: float
    relative: bool


@dataclass(frozen=True)
class StopWhen:
    """A conjunction of comparisons. ``needs_evaluation`` tells when it can be judged."""

    text: str
    comparisons: tuple[Comparison, ...]

    @property
    def needs_evaluation(self) -> bool:
        return any(comparison.name not in STEP_NAMES for comparison in self.comparisons)

    def met(self, values: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Whether every comparison holds; a name without a value does not hold."""
        for comparison in self.comparisons:
            value = values.get(comparison.name)
            bound = comparison.factor
            if comparison.relative:
                if comparison.name not in start:
                    return False
                bound *= start[comparison.name]
            if value is None or not _COMPARE[comparison.relation](value, bound):
                return False
        return True


def parse(text: str, names: Collection[str]) -> StopWhen:
    """Parse ``text``, in which only ``names`` may occur. Raises UsageProblem naming what was found."""
    tokens = _tokens(text)
    comparisons = []
    while True:
        comparisons.append(_comparison(tokens, text, names))
        if not tokens:
            return StopWhen(text, tuple(comparisons))
        if tokens.pop(0) != "and":
            raise _bad(text, "comparisons are joined by `and`")


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _bad(text, f"{text[position:].strip()[:10]!r} is not understood")
        tokens.append(match.group().strip())
        position = match.end()
    return tokens


def _comparison(tokens: list[str], text: str, names: Collection[str]) -> Comparison:
    if len(tokens) < 3:
        raise _bad(text, "expected NAME < NUMBER")
    name, relation = tokens.pop(0), tokens.pop(0)
    if name not in names:
        raise _bad(text, f"`{name}` is not one of {', '.join(sorted(names))}")
    if relation not in _COMPARE:
        raise _bad(text, f"expected < <= > or >= after `{name}`")
    factor, relative = 1.0, False
    while True:
        term = tokens.pop(0) if tokens else ""
        if term == "start" and not relative and name not in STEP_NAMES:
            relative = True
        elif re.fullmatch(r"[0-9.].*", term):
            factor *= float(term)
        else:
            raise _bad(text, f"expected a number{'' if name in STEP_NAMES else ' or start'} after `{relation}`")
        if not tokens or tokens[0] != "*":
            return Comparison(name, relation, factor, relative)
        tokens.pop(0)


def _bad(text: str, what: str) -> UsageProblem:
    return UsageProblem(f"--stop-when {text!r}: {what}", "as in 'forget_es<=.1 and retain_es>=.9*start', or 'loss<.02'")
