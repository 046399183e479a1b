"""Parameter types and the option class: help sections, environment names, numbers that are finite, paths in recipes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Option(click.Option):
    """An option with a help section (``group``); ``recipe=False`` bars it from recipe files and ``--print-recipe``.

    ``key`` is its name in recipes, TOOLBOX_<KEY> its name in the environment (a repeatable option's values are split
    at white space there).
    """

    def __init__(self, *args: Any, group: str = "General", recipe: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("show_default", True)
        super().__init__(*args, **kwargs)
        self.group = group
        self.recipe = recipe
        self.key = max(self.opts, key=len).lstrip("-")  # what the user types; `name` may be another where Python has it
        if self.envvar is None and recipe and self.expose_value:
            self.envvar = f"TOOLBOX_{self.key.upper().replace('-', '_')}"

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Who a complaint is about: the environment variable, where the value came from there."""
        source = None if ctx is None else ctx.get_parameter_source(str(self.name))
        if source is click.core.ParameterSource.ENVIRONMENT:
            return f"{self.envvar} in the environment"
        return super().get_error_hint(ctx)


class Number(click.ParamType):
    """A finite number within bounds; ``words`` are accepted as they are (``auto``)."""

    def __init__(
        self,
        low: float | None = None,
        high: float | None = None,
        *,
        above: float | None = None,
        whole: bool = False,
        words: Sequence[str] = (),
    ) -> None:
        self.low, self.high, self.above, self.whole, self.words = low, high, above, whole, tuple(words)
        self.name = "|".join([*self.words, "integer" if whole else "number"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in self.words:
            return value
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if self.whole:
                if number != int(number):
                    raise ValueError
                number = int(value) if isinstance(value, int) else int(str(value))
        except (ValueError, TypeError, OverflowError):
            wanted = " or ".join([*self.words, "an integer" if self.whole else "a number"])
            self.fail(f"{value!r} is not {wanted}", param)
        if not math.isfinite(number):
            self.fail(f"{value} is not finite", param)
        if self.low is not None and number < self.low:
            self.fail(f"{value} is below {self.low:g}", param)
        if self.high is not None and number > self.high:
            self.fail(f"{value} is above {self.high:g}", param)
        if self.above is not None and number <= self.above:
            self.fail(f"{value} is not above {self.above:g}", param)
        return number


class PathType(click.ParamType):
    """A file or directory name; in a recipe, relative to the recipe. Existence is checked where it is used."""

    name = "path"

    def __init__(self, metavar: str = "FILE", *, model: bool = False, named: bool = False) -> None:
        self.name = metavar
        self.model, self.named = model, named

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            self.fail("a path is expected", param)
        if self.named and not all(value.partition("=")):
            self.fail(f"{value!r}: expected NAME=FILE", param)
        return value

    def absolute(self, value: str, base: str) -> str:
        """``value`` as seen from directory ``base``; ``-``, hub ids and ``smollm2`` stay what they are."""
        if self.named:
            name, _, value = value.partition("=")
            return f"{name}={self.absolute_plain(value, base)}"
        is_name = value == "smollm2" or not (
            value.startswith(("./", "../")) or os.path.exists(os.path.join(base, value))
        )
        if self.model and is_name:
            return value
        return self.absolute_plain(value, base)

    @staticmethod
    def absolute_plain(value: str, base: str) -> str:
        return value if value == "-" else os.path.join(os.path.abspath(base), value)


class TemplateType(PathType):
    """``--template``: one of the named templates or a Jinja file."""

    words = ("auto", "chat", "qa", "llama2", "raw")

    def absolute(self, value: str, base: str) -> str:
        return value if value in self.words else super().absolute(value, base)


def option(*names: str, group: str, **kwargs: Any) -> Decorator:
    """``click.option`` with a help section."""
    return click.option(*names, cls=Option, group=group, **kwargs)


def together(*decorators: Decorator) -> Decorator:
    """Several option decorators as one; help shows them in the order given."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply
