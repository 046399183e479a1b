"""lit-generate: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the answers written."""
    from toolbox.lit.lines import ASKABLE, Plan, Told
    from toolbox.shell.records import json_schema

    return {"input": json_schema(ASKABLE), "output": json_schema([Told, Plan])}


@command(
    "lit-generate",
    schema=schema,
    examples=[
        "lit-generate chats.jsonl --image-root photos --model llava --max-new-tokens 8 | jq -r .text",
        "lit-generate captions.jsonl --image-root photos --model llava --prompt 'Describe the image.' \\\n"
        "    --max-new-tokens 8 | lit-eval --metric cider,chair --refs captions.jsonl",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("ROWS"))
@groups.record_options()
@vision.image_options()
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many rows.")
@option("--prompt", group="Data", metavar="TEXT", help="The question about rows that have an image alone.")
@option("--all-turns", group="Data", is_flag=True, help="Answer every user turn, earlier answers as given.")
@option("--image-position", group="Data", type=click.Choice(["first", "keep"]), default="first",
        help="first: an image moves to the front of its user turn, as lit-tune has it.")  # fmt: skip
@option("--control-tokens", group="Data", type=click.Choice(["escape", "reject", "keep"]), default="escape",
        help="A text that spells a control token: make it plain text, refuse the row, or leave it.")  # fmt: skip
@vision.vision_model_options()
@option("--dtype", group="Model", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
        help="auto: bf16 on a GPU, fp32 on a CPU.")  # fmt: skip
@option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=64,
        help="Longest answer in tokens.")  # fmt: skip
@option("--temperature", group="Generation", type=Number(0), default=0.0, help="0 is greedy.")
@option("--top-p", group="Generation", type=Number(above=0, high=1), default=1.0,
        help="Sample from the smallest set of tokens with this probability.")  # fmt: skip
@option("--stop", group="Generation", multiple=True, metavar="STR", help="End an answer before this string.")
@option("--batch-size", group="Launch", type=Number(1, whole=True), default=8, help="Answers decoded together.")
@groups.seed_option("Seed of sampling.")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Answer questions about images with an image-text model.

    The last answer of a conversation is left out and answered anew. Each row leaves with "turn", "prompt", "text",
    "logprob", "tokens" and "finish_reason" added, in input order.
    """
    from toolbox.lit.answer import Options, run

    run(Options(**values), call)
