"""The command class: everything a user may expect of every command.

--help with examples, --version, --schema, --recipe, --print-recipe, --dry-run, -j and exit codes are here, so that
a command file only names its options and does one call. Values come from, in this order: flag, TOOLBOX_<OPTION>
in the environment, --recipe file, default.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from toolbox.shell.errors import BadRecipe, UsageProblem, die_of, top_level
from toolbox.shell.params import Decorator, Number, Option, PathType, option, together
from toolbox.shell.progress import Reporter
from toolbox.shell.streams import Streams, claim, open_closed_streams

GROUPS = (
    "Input/Output",
    "Method",
    "Objective",
    "Data",
    "Model",
    "Training",
    "Adapters",
    "Watching",
    "Generation",
    "Launch",
    "General",
)
_HELP_WIDTH = 100


@dataclass(frozen=True)
class Invocation:
    """One call of a command: what a room's job needs besides its options.

    ``settings`` are the effective values of all options by name.
    """

    command: str
    streams: Streams
    reporter: Reporter
    settings: dict[str, Any]
    dry_run: bool


class ToolCommand(click.Command):
    """A click command with the house's promises. Made by ``command``."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str],
        schema: Callable[[], dict[str, Any]],
        trainer: bool,
        before_workers: Callable[[dict[str, Any]], None] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.before_workers = before_workers
        self.examples = tuple(examples)
        self.schema = schema
        self.trainer = trainer

    # -- help ---------------------------------------------------------------------------------------------------------
    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write("".join(f"{' ' * formatter.current_indent}{line}\n" for line in example.splitlines()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in GROUPS:
            options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
            members = [p for p in options if getattr(p, "group", "General") == group]
            rows = [record for p in members if (record := p.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write_text(
            "Any option may also come from the environment (TOOLBOX_EPOCHS=3) or a recipe; a flag wins over both. "
            f"Exit codes and formats: docs/{self.name}.md."
        )

    # -- the call -----------------------------------------------------------------------------------------------------
    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Parse, run, and leave the process with the house's exit codes."""
        arguments = list(sys.argv[1:] if args is None else args)
        name = str(self.name)
        open_closed_streams()
        with top_level(name, debug="--debug" in arguments):
            try:
                with self.make_context(name, arguments.copy(), max_content_width=_HELP_WIDTH) as context:
                    self.invoke(context, arguments)  # type: ignore[call-arg]
            except click.exceptions.Exit as leave:
                sys.stdout.flush()
                sys.exit(leave.exit_code)
            except click.Abort:
                die_of(signal.SIGINT)
            except click.ClickException as error:
                raise UsageProblem(error.format_message(), f"see {name} --help") from None
            sys.stdout.flush()
        sys.exit(0)

    def invoke(self, ctx: click.Context, arguments: list[str] | None = None) -> None:  # type: ignore[override]
        """Run the callback in this process, or hand the same command line to worker processes."""
        from toolbox.shell import launch

        values = dict(ctx.params)
        house = {key: values.pop(key, None) for key in ("print_recipe", "num_processes", "accelerate", "debug")}
        if house["print_recipe"]:
            click.echo(self._recipe_text(ctx), nl=False)
            return
        dry_run = bool(values.pop("dry_run", False))
        wants_workers = house["accelerate"] or (house["num_processes"] or 1) > 1
        if wants_workers and not dry_run and not launch.under_launcher():
            if self.before_workers is not None:
                self.before_workers({key: value for key, value in values.items() if key != "quiet"})
            launch.run_workers(str(self.name), arguments or [], house["num_processes"], house["accelerate"])
            return
        launch.check_processes(house["num_processes"])
        launch.die_with_parent()
        launch.quiet_environment(values.get("threads"))
        streams = claim()
        reporter = Reporter(str(self.name), bool(values.pop("quiet", False)))
        settings = {parameter.name: ctx.params[parameter.name] for parameter in self._settable(ctx)}
        invocation = Invocation(str(self.name), streams, reporter, settings, dry_run)
        assert self.callback is not None
        self.callback(invocation, **values)

    # -- recipes ------------------------------------------------------------------------------------------------------
    def _settable(self, ctx: click.Context) -> list[click.Parameter]:
        return [p for p in self.get_params(ctx) if p.expose_value and getattr(p, "recipe", True) and p.name != "help"]

    def load_recipe(self, ctx: click.Context, path: str) -> dict[str, Any]:
        """The recipe's settings, each checked by its option's own type, ready as click's default map."""
        from toolbox.shell.recipes import read_recipe, unknown_key

        known = {_key(parameter): parameter for parameter in self._settable(ctx)}
        settings: dict[str, Any] = {}
        for entry in read_recipe(path):
            parameter = known.get(entry.key.replace("_", "-"))
            if parameter is None:
                raise unknown_key(path, entry, known)
            if parameter.name in settings:  # once with a hyphen and once with an underscore
                raise BadRecipe(f"{path}:{entry.line}: `{entry.key}` is set already", "keep one of them")
            settings[str(parameter.name)] = _recipe_value(ctx, parameter, entry, path)
        return settings

    def _recipe_text(self, ctx: click.Context) -> str:
        from toolbox.shell.recipes import write_recipe

        settings = {}
        for parameter in self._settable(ctx):
            value = ctx.params[str(parameter.name)]
            kind = parameter.type
            if isinstance(kind, PathType) and value is not None:
                many = isinstance(value, tuple)
                value = [kind.absolute(v, ".") for v in value] if many else kind.absolute(value, ".")
            if value != () or isinstance(parameter.default, list | tuple):
                settings[_key(parameter)] = value
        return write_recipe(settings)


def _key(parameter: click.Parameter) -> str:
    return parameter.key if isinstance(parameter, Option) else str(parameter.name).replace("_", "-")


def _recipe_value(ctx: click.Context, parameter: click.Parameter, entry: Any, path: str) -> Any:
    def bad(what: str) -> BadRecipe:
        return BadRecipe(f"{path}:{entry.line}: `{entry.key}`: {what}", f"see {ctx.command.name} --help")

    kind = parameter.type
    many = parameter.multiple or parameter.nargs == -1
    if isinstance(entry.value, list) and not many:
        raise bad("one value is expected, not a list")
    values, words = (entry.value, entry.text) if isinstance(entry.value, list) else ([entry.value], [entry.text])
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    for item in values:
        if item is None:
            raise bad("no value")
        if is_flag != isinstance(item, bool):
            raise bad(f"expected {'true or false' if is_flag else kind.name}, got {json.dumps(item)}")
        if isinstance(kind, Number) and isinstance(item, str) and item not in kind.words:
            raise bad(f"expected {kind.name}, got {json.dumps(item)}")
    if not isinstance(kind, Number) and not is_flag:
        values = words  # as written: 007 is three characters where text is expected
    value = values if many else values[0]
    try:
        parameter.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise bad(error.message) from None
    if isinstance(kind, PathType):
        values = [kind.absolute(item, os.path.dirname(path) or ".") for item in values]
    return values if many else values[0]


def command(
    name: str,
    *,
    examples: Sequence[str],
    schema: Callable[[], dict[str, Any]],
    trainer: bool = False,
    before_workers: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Callable[..., Any]], ToolCommand]:
    """Make a function the command ``name``; it is called as ``function(invocation, **options)``.

    ``schema`` gives ``{"input": ..., "output": ...}`` as JSON Schemas; ``trainer`` marks commands that run on when
    their stdout is closed. ``before_workers`` is given the options before worker processes are started, to refuse in a
    moment what they would refuse after many seconds.
    """

    def wrap(function: Callable[..., Any]) -> ToolCommand:
        decorated = _general_options(name)(function)
        return click.command(
            name,
            cls=ToolCommand,
            examples=examples,
            schema=schema,
            trainer=trainer,
            before_workers=before_workers,
            context_settings={"max_content_width": _HELP_WIDTH, "help_option_names": ["-h", "--help"]},
        )(decorated)

    return wrap


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"{ctx.command.name} (toolbox-ten) {version('toolbox-ten')}")
        ctx.exit()


def _show_schema(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        assert isinstance(ctx.command, ToolCommand)
        click.echo(json.dumps(ctx.command.schema(), indent=2))
        ctx.exit()


def _use_recipe(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    if path is not None:
        assert isinstance(ctx.command, ToolCommand)
        ctx.default_map = ctx.command.load_recipe(ctx, path)
    return path


def _general_options(name: str) -> Decorator:
    flag = {"group": "General", "is_flag": True, "recipe": False}
    eager = {**flag, "is_eager": True, "expose_value": False}
    return together(
        option("--recipe", group="General", type=PathType("FILE"), is_eager=True, expose_value=False, recipe=False,
               callback=_use_recipe, help="Take options from a YAML file (flags win)."),
        option("--print-recipe", **flag, help="Print the effective options as a recipe and stop."),
        option("--dry-run", **flag, help="Check everything and print the plan; load no weights."),
        option("--schema", **eager, callback=_show_schema, help="Print the JSON Schema of input and output."),
        option("--quiet", group="General", is_flag=True, help="Say nothing on stderr but warnings and errors."),
        option("--debug", **flag, help="Show the traceback of an error."),
        option("--version", **eager, callback=_show_version, help="Print the version."),
    )  # fmt: skip
