"""lot-prompt: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the items read and the prompts written."""
    from toolbox.lot.prompts import Prompt
    from toolbox.shell.items import ITEM_SHAPES
    from toolbox.shell.records import json_schema

    return {"input": json_schema(ITEM_SHAPES), "output": json_schema([Prompt])}


def _method() -> Decorator:
    return together(
        option("--variant", group="Method", default="lot2", metavar="LIST",
               help="Wordings, with commas between them: direct, cot, rar, rar+cot, ltm, echo, expand, lot1, lot2, "
                    "those of --template; or all."),
        option("--with", "with_", group="Method", type=click.Choice(["cot", "none"]), default="cot",
               help="none takes \"Let's think step by step.\" from variants that have a clause besides."),
        option("--bold", group="Method", is_flag=True, help="Put the clause between ** in every variant that has one."),
        option("--template", group="Method", type=PathType("FILE.yaml"),
               help="More variants: a list of {id, prefix: cot|none, clause, source}."),
        option("--list", "list_", group="Method", is_flag=True, recipe=False,
               help="Print the variants and their sources, and stop."),
        option("--format", group="Method", type=click.Choice(["auto", "letter", "number", "text"]), default="auto",
               help="How to answer; auto: a letter with choices, a number if the answer is one, else text."),
        option("--shuffle-choices", group="Method", is_flag=True,
               help="Choices in another order, drawn by --seed and the item's id, the same for all variants."),
        option("--layout", group="Data", metavar="STR",
               help="Where things stand; slots are {context}, {question}, {choices}, {prefix}, {clause} and {format} "
                    "(default: in this order)."),
        option("--system", group="Data", metavar="TEXT", help="System turn (default: none)."),
    )  # fmt: skip


@command(
    "lot-prompt",
    schema=schema,
    examples=[
        "lot-prompt --variant cot,lot2 < questions.jsonl | jq -r .prompt",
        "lot-prompt --variant all --dry-run questions.jsonl",
        "lot-prompt --variant echo,expand --with none --bold questions.jsonl > prompts.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many items.")
@_method()
@groups.seed_option("Seed of --shuffle-choices.")
def main(call: Invocation, **values: Any) -> None:
    """Ask the questions in FILE (default: stdin) under the prompting variants of Language of Thoughts.

    An item is {"question"} and, where it has them, "choices", "labels", "answer", "context". It leaves once a variant,
    other fields untouched, with "variant", "prompt", "messages", "format" and "template_sha" added and its answer as a
    label: ready for lm-generate and lot-eval. Renders only: no model is loaded.
    """
    from toolbox.lot.prompts import Options, run

    run(Options(**values), call)
