"""What click knows of a command, as plain data: the one source of manual pages, completions and option tables."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import click

from toolbox.shell.command import GROUPS, ToolCommand
from toolbox.shell.params import Number, PathType, TemplateType

Takes = Literal["nothing", "file", "directory", "word", "text"]
"""What may stand behind an option: nothing, a path, one of some words, or anything."""


@dataclass(frozen=True)
class Described:
    """One option or argument.

    ``off`` are the names that switch a flag off, ``words`` what may be completed, ``variable`` its name in the
    environment. Of an argument ``names`` is empty.
    """

    names: tuple[str, ...]
    off: tuple[str, ...]
    metavar: str
    help: str
    default: str | None
    group: str
    takes: Takes
    words: tuple[str, ...]
    repeats: bool
    required: bool
    variable: str | None


@dataclass(frozen=True)
class DescribedCommand:
    """One command: its paragraphs of help, arguments, options by section, and examples."""

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    arguments: tuple[Described, ...]
    sections: tuple[tuple[str, tuple[Described, ...]], ...]
    examples: tuple[str, ...]

    @property
    def options(self) -> tuple[Described, ...]:
        """All options, in the order of --help."""
        return tuple(one for _, members in self.sections for one in members)

    @property
    def summary(self) -> str:
        """The first sentence of the help, without its full stop."""
        text = " ".join(self.paragraphs[0].split())
        return text.split(". ")[0].rstrip(".:")


def all_commands() -> Iterator[ToolCommand]:
    """Every command there is, by name. They are found by their files, as worker processes find theirs."""
    package = importlib.import_module("toolbox.commands")
    for module in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
        yield importlib.import_module(f"toolbox.commands.{module}").main


def describe(command: ToolCommand) -> DescribedCommand:
    """The command as plain data."""
    name = str(command.name)
    ctx = click.Context(command, info_name=name, **command.context_settings)
    arguments, options = [], []
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option):
            options.append(_option(ctx, parameter))
        else:
            arguments.append(_argument(ctx, parameter))
    sections = [(group, tuple(one for one in options if one.group == group)) for group in GROUPS]
    return DescribedCommand(
        name=name,
        usage=" ".join(command.collect_usage_pieces(ctx)),
        paragraphs=tuple(part.strip() for part in (command.help or "").split("\n\n") if part.strip()),
        arguments=tuple(arguments),
        sections=tuple(section for section in sections if section[1]),
        examples=tuple(line for example in command.examples for line in example.split("\n")),
    )


def _option(ctx: click.Context, option: click.Option) -> Described:
    takes, words = ("nothing", ()) if option.is_flag or option.count else _taken(option.type)
    variable = option.envvar if isinstance(option.envvar, str) else None
    return Described(
        names=tuple(option.opts),
        off=tuple(option.secondary_opts),
        metavar="" if takes == "nothing" else option.make_metavar(ctx),
        help=" ".join((option.help or "").split()),
        default=option.get_help_extra(ctx).get("default"),
        group=getattr(option, "group", "General"),
        takes=takes,
        words=words,
        repeats=option.multiple,
        required=option.required,
        variable=variable,
    )


def _argument(ctx: click.Context, argument: click.Parameter) -> Described:
    takes, words = _taken(argument.type)
    return Described(
        names=(),
        off=(),
        metavar=argument.make_metavar(ctx),
        help="",
        default=None,
        group="",
        takes=takes,
        words=words,
        repeats=argument.nargs == -1,
        required=argument.required,
        variable=None,
    )


def _taken(kind: click.ParamType) -> tuple[Takes, tuple[str, ...]]:
    if isinstance(kind, click.Choice):
        return "word", tuple(str(choice) for choice in kind.choices)
    if isinstance(kind, Number):
        return ("word", kind.words) if kind.words else ("text", ())
    if isinstance(kind, PathType):
        words = kind.words if isinstance(kind, TemplateType) else ("smollm2",) if kind.name == "MODEL" else ()
        return ("directory" if kind.name in ("DIR", "RUN") else "file"), words
    return "text", ()
