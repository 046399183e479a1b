"""coca-probe: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and written."""
    from toolbox.coca.probe import SHAPES, Plan, ProbeRow
    from toolbox.shell.records import json_schema

    return {"input": json_schema(SHAPES), "output": json_schema((ProbeRow, Plan))}


def reading_options() -> Decorator:
    """What is erased, where it is read, and on which rows."""
    return together(
        option("--eraser", group="Method", multiple=True, type=click.Choice(["none", "leace", "dim", "inlp"]),
               help="Erase before reading; repeatable (default: none and leace)."),
        option("--layers", group="Method", metavar="all|A-B", default="all",
               help="States to probe: 0 are the embeddings, the last is behind the final norm."),
        option("--position", group="Method", metavar="last|after:TAG", default="last",
               help="The prompt's last token, or the end of </TAG> in what the model writes behind it."),
        option("--max-new-tokens", group="Method", type=Number(1, whole=True), default=160,
               help="after:TAG: tokens in which the tag must come."),
        option("--shrinkage", group="Method", type=click.Choice(["linear", "none"]), default="linear",
               help="leace: shrink the covariance towards the identity."),
        option("--splits", group="Method", type=click.Choice(["2", "3"]), default="3",
               help="3: eraser, reader and judgement on disjoint rows; 2: eraser and reader share theirs."),
        option("--split-seeds", group="Method", type=Number(1, whole=True), default=10, help="How many such splits."),
        option("--fit-groups", group="Method", multiple=True, metavar="GROUP", help="Fit erasers on these groups."),
        option("--test-groups", group="Method", multiple=True, metavar="GROUP", help="Read and judge on these."),
    )  # fmt: skip


@command(
    "coca-probe",
    schema=schema,
    examples=[
        "cat harmful.jsonl harmless.jsonl | coca-probe --eraser none --eraser leace --out erasers.safetensors"
        " | jq -r '[.layer,.eraser,.linear_acc,.rbf_acc]|@tsv'",
        "cat harmful.jsonl harmless.jsonl | coca-probe --layers 1-2 --split-seeds 3 --plot probe.png > probe.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("-o", "--out", group="Input/Output", type=PathType(), help="Write the erasers, fitted on all rows, here.")
@option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output.")
@option("--states", group="Input/Output", type=PathType(),
        help="Save the hidden states to this file, or take them from it where it exists.")  # fmt: skip
@option("--kl", group="Input/Output", type=PathType(),
        help="Benign prompts: what each eraser does to their next token.")  # fmt: skip
@option("--plot", group="Input/Output", type=PathType(), help="Draw planes and curves (.svg, .png or .pdf).")
@reading_options()
@groups.template_options()
@groups.model_options()
@option("--intervention", group="Model", type=PathType("PATH"), help="Probe the model with this output of coca-train.")
@option("--dtype", group="Model", type=click.Choice(["fp32", "bf16"]), default="fp32", help="Precision of the model.")
@option("--batch-size", group="Model", type=Number(1, whole=True), default=16, help="Prompts of one forward pass.")
@groups.seed_option("Seed of the first split; the others follow.")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """What readers find of a label in a model's hidden states, with and without linear erasure.

    Rows are {"prompt", "label"} or {"messages", "label"}, as JSON lines or one array from FILE (default: stdin). One
    line a layer and eraser goes to stdout: accuracy of a linear and of a Gaussian reader on rows that neither eraser
    nor reader was fitted on.
    """
    from toolbox.coca.probe import Options, run

    run(Options(**values), call)
