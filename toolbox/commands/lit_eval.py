"""lit-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.design_options import threads_option
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of what is judged and of the figures written."""
    from toolbox.lit.lines import PREDICTIONS, TURNS, Figure, Plan
    from toolbox.shell.records import json_schema

    return {"input": json_schema((*PREDICTIONS, *TURNS)), "output": json_schema([Figure, Plan])}


@command(
    "lit-eval",
    schema=schema,
    examples=[
        "lit-eval --metric cider,chair --refs captions.jsonl captioned.jsonl | jq -c '[.metric, .value, .ci]'",
        "lit-eval --metric vqa --refs chats.jsonl --compare other.jsonl answered.jsonl | jq -c .compare",
        "lit-eval --metric vc,nll --model llava --image-root photos chats.jsonl | jq -c '[.metric, .value]'",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("FILE"))
@groups.record_options()
@option("--refs", group="Input/Output", type=vision.RowsType("ROWS"), help="What predictions are compared with.")
@option("--compare", group="Input/Output", type=PathType(),
        help="Other predictions, or another model's --rows-out: add the paired difference.")  # fmt: skip
@option("--rows-out", group="Input/Output", type=PathType(), help="Write the values of single rows to this file.")
@vision.image_options(per_row=False)
@option("--metric", group="Method", required=True, metavar="LIST",
        help="Of predictions: cider, chair, pope, vqa; of a model: vc, nll, gap.")  # fmt: skip
@option("--strict", group="Method", is_flag=True, help="POPE: an answer that is neither yes nor no is wrong.")
@option("--tokenizer", group="Method", type=click.Choice(["simple", "ptb"]), default="simple",
        help="CIDEr: plain words, or Stanford's tokens (needs pycocoevalcap and Java).")  # fmt: skip
@option("--chair-synonyms", group="Method", type=PathType(),
        help="Words for objects, one class a line (default: the 80 of COCO).")  # fmt: skip
@option("--chair-drop", group="Method", default="", metavar="LIST", help="Words to leave out of that list.")
@option("--train-rows", group="Method", type=vision.RowsType("ROWS"), help="gap: rows the model was trained on.")
@option("--null", group="Method", type=click.Choice(["noise", "mean-colour", "shuffled"]), default="noise",
        help="vc: the image that shows nothing.")  # fmt: skip
@option("--bootstrap", group="Method", type=Number(1, whole=True), default=2000, help="Bootstrap draws over images.")
@vision.vision_model_options(default=None, required=False)
@option("--batch-size", group="Launch", type=Number(1, whole=True), default=8, help="Rows scored together.")
@groups.seed_option("Seed of the bootstrap.")
@threads_option()
def main(call: Invocation, **values: Any) -> None:
    """Judge captions, answers and yes-or-no answers, or how a model uses images.

    Predictions are lit-generate's lines ("id" and "text"), matched with --refs by id and turn. One line a figure with a
    95 % interval over images. vc, nll and gap read conversations and need --model.
    """
    from toolbox.lit.evaluate import Options, run

    run(Options(**values), call)
