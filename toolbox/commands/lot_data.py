"""lot-data: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

SETS = ("winobias", "winocontrol", "bbq", "alice", "mcq", "example")
SHAPES = ("auto", "aqua", "agieval", "mmlu", "commonsenseqa", "tofu", "strategyqa", "items")


class Paths(click.Argument):
    """Any number of names; in a recipe a list."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=-1, **kwargs)
        self.multiple = True  # what recipes ask; click itself has no such arguments

    def type_cast_value(self, ctx: click.Context, value: Any) -> tuple[Any, ...]:
        return () if value is None else tuple(self.type(one, self, ctx) for one in value)


def schema() -> dict[str, Any]:
    """JSON Schemas of the records read (bbq, mcq) and the items written."""
    from toolbox.lot.sets import INPUT_SHAPES, Question
    from toolbox.shell.records import json_schema

    return {"input": json_schema(INPUT_SHAPES), "output": json_schema([Question])}


def _sets() -> Decorator:
    return together(
        option("--type", "types", group="Data", metavar="LIST", help="winobias: 1, 2 or 1,2 (default: 1)."),
        option("--split", "splits", group="Data", metavar="LIST",
               help="winobias, winocontrol: dev, test or dev,test (default: test)."),
        option("--side", "sides", group="Data", metavar="LIST",
               help="winobias: pro, anti or pro,anti (default: both)."),
        option("--cells", group="Data", metavar="LIST",
               help="winocontrol: some of L0q0 L0q1 L0q2 L1q0 ... L2q2 (default: all)."),
        option("--distractors", group="Data", type=Number(4, 38, whole=True),
               help="winocontrol: distracting sentences in the q2 cells, an even number (default: 4)."),
        option("--max", "largest", group="Data", type=Number(1, 1000, whole=True),
               help="alice: largest number of brothers and of sisters (default: 10)."),
        option("--name", group="Data", metavar="NAME",
               help="mcq: what ids begin with (default: the file's name; '': nothing)."),
        option("--shape", group="Data", type=click.Choice(SHAPES),
               help="mcq: how the file's records are shaped (default: auto, told by their keys)."),
    )  # fmt: skip


@command(
    "lot-data",
    schema=schema,
    examples=[
        "lot-data | jq -r .question",
        "lot-data alice --limit 6 > alice.jsonl",
        "lot-data mcq questions.jsonl --name mine > items.jsonl",
    ],
)
@click.argument("set", default="example", type=click.Choice(SETS), metavar="[SET]")
@click.argument("paths", cls=Paths, type=PathType("PATH"), metavar="[PATH]...")
@option("--limit", group="Input/Output", type=Number(0, whole=True),
        help="Only the first so many questions; of winobias lines, of winocontrol sentences.")  # fmt: skip
@groups.record_options()
@_sets()
@groups.seed_option("Seed of winocontrol's draws.")
def main(call: Invocation, **values: Any) -> None:
    """Write a question set as items: {"id", "question", "choices", "answer", "context", "group", "meta"}.

    SET is winobias DIR, winocontrol DIR (WinoBias' folder), bbq FILE... or DIR, alice, mcq [FILE] (multiple-choice
    questions in public shapes, or items of your own; default: stdin), or example (the default: eight items that come
    with the command). What is irregular in a source is kept, marked in meta.irregular, and counted on stderr.
    """
    from toolbox.lot.sets import Options, run

    run(Options(**values), call)
