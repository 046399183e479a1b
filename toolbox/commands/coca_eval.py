"""coca-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the verdicts written."""
    from toolbox.coca.answers import SHAPES, Judged
    from toolbox.shell.records import json_schema

    return {"input": json_schema(SHAPES), "output": json_schema([Judged])}


def check(values: dict[str, Any]) -> None:
    """What does not fit together among the options."""
    from toolbox.coca import evaluate

    evaluate.check(evaluate.Options(**values))


def _outputs() -> Decorator:
    return together(
        option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many rows."),
        option("--report", group="Input/Output", type=PathType(), multiple=True,
               help="Write all rates to this file (.json, .md or .csv; repeatable)."),
        option("--plot", group="Input/Output", type=PathType(), multiple=True,
               help="Draw all rates (.svg, .png or .pdf; repeatable)."),
        option("--log-text", group="Input/Output", type=PathType(), recipe=False,
               help="Keep prompts and answers in this file (readable for its owner alone)."),
    )  # fmt: skip


def _method() -> Decorator:
    return together(
        option("--intervention", group="Method", multiple=True, metavar="[NAME=]FILE",
               help="What coca-train made, hooked into the model; base is the model as it is (repeatable)."),
        option("--prompt-only", group="Method", is_flag=True, help="The guidelines as a system turn instead."),
        option("--run", group="Method", metavar="NAME", help="Name of the run (default: base, or the row's own)."),
        option("--baseline", group="Method", metavar="RUN", help="Compare every other run with this one."),
        option("--judge", group="Method", type=click.Choice(["string", "xstest", "jbb-prefix", "llm"]),
               default="string", help="Who says what a refusal is; llm is a model behind --base-url."),
        option("--judge-model", group="Method", metavar="NAME", help="The judging model, as the server knows it."),
        option("--rubric", group="Method", type=click.Choice(["strongreject", "refusal3"]), default="strongreject",
               help="What the judging model is asked."),
        option("--rates", group="Method", type=click.Choice(["auto", "asr"]), default="auto",
               help="asr: fail where no row is harmful."),
        option("--tag-style", group="Method", type=click.Choice(["spaced", "underscored"]), default="spaced",
               help="How the fourth tag is spelt."),
        option("--tag-prefix", group="Method", metavar="TEXT", default="", help="Before every tag's name."),
        option("--bootstrap", group="Method", type=Number(1, whole=True), default=2000, help="Bootstrap draws."),
        option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=320,
               help="Longest answer in tokens, reasoning included."),
        option("--final-tokens", group="Generation", type=Number(1, whole=True), default=96,
               help="Harmful prompts: stop when the text behind the reasoning has so many tokens."),
    )  # fmt: skip


@command(
    "coca-eval",
    schema=schema,
    before_workers=check,
    examples=[
        "cat harmful.jsonl pair.jsonl xstest.jsonl | coca-eval --report table.md --plot rates.svg > base.jsonl",
        "cat harmful.jsonl pair.jsonl xstest.jsonl | coca-eval --prompt-only > prompted.jsonl",
        "cat base.jsonl prompted.jsonl | coca-eval --baseline base --report table.csv > /dev/null",
        "lm-generate < xstest.jsonl | coca-eval --run served --judge xstest | jq -r .coca.verdict",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@_outputs()
@_method()
@groups.model_options()
@groups.endpoint_options()
@groups.inference_options("Prompts", window=64)
@groups.launch_options()
@groups.seed_option("Seed of bootstrap draws; answers are greedy.")
def main(call: Invocation, **values: Any) -> None:
    """Judge a model on attacks and harmless requests in FILE (default: stdin): attack success and over-refusal.

    Rows have a "label" (harmful, benign) and a "prompt", or a "completion" that is there already, or a verdict of an
    earlier run; "attack" and "split" (id, ood) say what they are. One verdict a row on stdout, without texts; rates
    with intervals on stderr and in --report. Answers to harmful prompts are cut short and not kept.
    """
    from toolbox.coca.evaluate import Options, run

    run(Options(**values), call)
