"""dull-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the image rows read and the lines written."""
    from toolbox.dull.lines import IMAGES, JUDGED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(IMAGES), "output": json_schema(JUDGED)}


@command(
    "dull-eval",
    schema=schema,
    examples=[
        "dull-eval digits --model run --summary-only --plot confusion.png | jq '{acc, many, medium, few, macro_f1}'",
        "dull-eval noisy.jsonl --model run --samples run/samples.jsonl --summary-only | jq .detection",
    ],
)
@click.argument("source", default="-", type=PathType("MANIFEST|DIR|digits|idx:DIR", model=True))
@groups.record_options()
@option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that the images' paths start from.")
@option("--summary-only", group="Input/Output", is_flag=True, help="Write the last line alone.")
@option("--samples", group="Input/Output", type=PathType(), help="A samples.jsonl: judge its flags too.")
@option("--clean-field", group="Input/Output", metavar="NAME", default="dull.label_clean",
        help="Where rows have their clean label (default: that, else the label itself).")  # fmt: skip
@option("--model", "-m", group="Model", type=PathType("MODEL", model=True), required=True,
        help="A directory of dull-train, or any Hugging Face image classifier.")  # fmt: skip
@option("--trust-remote-code", group="Model", is_flag=True, recipe=False, help="Run code that comes with the model.")
@option("--image-size", group="Model", type=Number(4, 4096, whole=True), help="Side of the images (default: stored).")
@option("--shots", group="Method", metavar="auto|HIGH,LOW", default="auto",
        help="Many above HIGH training images, few below LOW; auto: thirds, or 100,20 from 100 classes.")  # fmt: skip
@option("--batch-size", group="Generation", type=Number(1, whole=True), default=256, help="Images of one pass.")
@option("--plot", group="Watching", type=PathType(), multiple=True,
        help="Draw the confusion of classes (.svg, .png or .pdf; repeatable).")  # fmt: skip
@option("--threads", group="Launch", type=Number(1, whole=True), help="CPU threads.")
@groups.seed_option("Of no use here; for recipes that are shared with dull-train.")
def main(call: Invocation, **values: Any) -> None:
    """Judge an image classifier on a long tail: accuracy of many-, medium- and few-shot classes, recall, macro-F1.

    Rows leave with the class they are taken for; the last line sums up. Shot groups come from the training counts that
    dull-train stores with the model. With --samples the list of doubtful labels is judged too.
    """
    from toolbox.dull.evaluate import Options, run

    run(Options(**values), call)
