"""lot-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the answered prompts read and the lines written."""
    from toolbox.lot.lines import Comparison, Judgement
    from toolbox.shell.items import PATH_SHAPES
    from toolbox.shell.records import json_schema

    return {"input": json_schema(PATH_SHAPES), "output": json_schema([Judgement, Comparison])}


def _outputs() -> Decorator:
    return together(
        option("--rows", group="Input/Output", type=PathType(),
               help="Write each row with the answer that was read (pred, pred_source) and whether it is correct."),
        option("--report", group="Input/Output", type=PathType(), help="Write all tables to this Markdown file."),
        option("--figure", group="Input/Output", type=PathType(), multiple=True,
               help="Draw accuracy with intervals, or WinoControl's heat maps (.svg, .png or .pdf; repeatable)."),
    )  # fmt: skip


def _reading() -> Decorator:
    return together(
        option("--format", group="Method", type=click.Choice(["auto", "letter", "number", "text"]), default="auto",
               help="What an answer is; auto: the row's `format`, else a letter with choices, a number or text."),
        option("--pick", group="Method", type=click.Choice(["first", "last"]), default="last",
               help="Which stated answer counts; first is for base models that run on into a next problem."),
        option("--extract", group="Method", type=click.Choice(["auto", "always", "never"]), default="auto",
               help="Read answers from the text; auto: where the row has no `pred`."),
    )  # fmt: skip


def _judging() -> Decorator:
    return together(
        option("--baseline", group="Method", metavar="VARIANT", help="Compare each other variant with this one."),
        option("--by", group="Method", metavar="LIST",
               help="Judge apart by these fields of the row or its `meta`, as in model,dataset."),
        option("--metrics", group="Method", metavar="LIST", default="auto",
               help="Any of accuracy, con (WinoBias), bbq, grid (WinoControl); auto: what `meta` is there for."),
        option("--vote", group="Method", metavar="LIST",
               help="Also make one answer of several: plurality, weighted (by `score`), mask (where `keep`)."),
        option("--blank", group="Method", type=click.Choice(["ignore", "count"]), default="ignore",
               help="count: an answer that could not be read is an answer that may win a vote."),
        option("--bootstrap", group="Method", type=Number(1, whole=True), default=2000, help="Bootstrap draws."),
    )  # fmt: skip


@command(
    "lot-eval",
    schema=schema,
    examples=[
        "lot-data alice --limit 6 | lot-prompt --variant cot,lot2 | lm-generate --n 2 --temperature 1 > paths.jsonl",
        "lot-eval --baseline cot paths.jsonl | jq -c 'select(.kind == \"variant\") | [.variant, .accuracy.estimate]'",
        "lot-eval --baseline cot --vote plurality --report report.md --figure report.svg \\\n"
        "    --rows judged.jsonl paths.jsonl > scores.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@_outputs()
@_reading()
@_judging()
@groups.seed_option("Seed of bootstrap draws and permutations.")
def main(call: Invocation, **values: Any) -> None:
    """Judge answered prompts: accuracy, consistency and bias with intervals, and variants against a baseline.

    Rows are those of lm-generate: "completion" (or "thoughts", or an answer "pred" that was read before) beside "id",
    "variant", "answer" and "choices". Answers are read strictly; one that is not found counts as wrong, and every
    table says how many were. One JSON line a variant, then one a comparison; tables for people on stderr.
    """
    from toolbox.lot.evaluate import Options, run

    run(Options(**values), call)
