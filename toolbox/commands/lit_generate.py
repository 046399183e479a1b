"""lit-generate: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the answers written."""
    from toolbox.lit.lines import ASKABLE, Plan, Proposed, Told
    from toolbox.shell.records import json_schema

    return {"input": json_schema(ASKABLE), "output": json_schema([Told, Proposed, Plan])}


def check(values: dict[str, Any]) -> None:
    """What does not fit together among the options."""
    from toolbox.lit import answer

    answer.check(answer.Options(**values, given=groups.given_options()))


def _asking() -> Decorator:
    return together(
        option("--prompt", group="Data", metavar="TEXT", help="The question about rows that have an image alone."),
        option("--all-turns", group="Data", is_flag=True, help="Answer every user turn, earlier answers as given."),
        option("--propose", group="Method", type=Number(0, whole=True), default=0, metavar="N",
               help="Ask N questions of its own about each image and answer them: rows for lit-tune."),
        option("--suffix", group="Method", default="", metavar="TEXT", help="Put behind each proposed question."),
        option("--image-position", group="Data", type=click.Choice(["first", "keep"]), default="first",
               help="first: an image moves to the front of its user turn, as lit-tune has it."),
        option("--control-tokens", group="Data", type=click.Choice(["escape", "reject", "keep"]), default="escape",
               help="A text that spells a control token: make it plain text, refuse the row, or leave it."),
    )  # fmt: skip


def _decoding() -> Decorator:
    return together(
        option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=64,
               help="Longest answer in tokens."),
        option("--temperature", group="Generation", type=Number(0),
               help="0 is greedy: the default of answers; proposed questions are drawn at 1."),
        option("--top-p", group="Generation", type=Number(above=0, high=1), default=1.0,
               help="Sample from the smallest set of tokens with this probability."),
        option("--stop", group="Generation", multiple=True, metavar="STR", help="End an answer before this string."),
        groups.seed_option("Seed of sampling."),
    )  # fmt: skip


@command(
    "lit-generate",
    schema=schema,
    before_workers=check,
    examples=[
        "lit-generate chats.jsonl --image-root photos --model llava --max-new-tokens 8 | jq -r .text",
        "lit-generate captions.jsonl --image-root photos --model llava --prompt 'Describe the image.' \\\n"
        "    --max-new-tokens 8 | lit-eval --metric cider,chair --refs captions.jsonl",
        "lit-generate captions.jsonl --image-root photos --model llava --propose 2 > proposed.jsonl",
        "lit-generate chats.jsonl --image-root photos --model llava --log said.jsonl > answers.jsonl",
        "lit-generate chats.jsonl --image-root photos --backend replay --replay said.jsonl | cmp - answers.jsonl",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("ROWS"))
@groups.record_options()
@vision.image_options()
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many rows.")
@_asking()
@vision.vision_model_options()
@option("--dtype", group="Model", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
        help="auto: bf16 on a GPU, fp32 on a CPU.")  # fmt: skip
@groups.backend_options()
@groups.endpoint_options()
@_decoding()
@option("--batch-size", group="Launch", type=Number(1, whole=True), default=8, help="Answers decoded together.")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Answer questions about images with an image-text model, an endpoint that sees, or stored responses.

    The last answer of a conversation is left out and answered anew. Each row leaves with "turn", "prompt", "text",
    "logprob", "tokens" and "finish_reason" added, in input order. With --propose rows for lit-tune leave instead: the
    model asks about each image, then answers.
    """
    from toolbox.lit.answer import Options, run

    run(Options(**values, given=groups.given_options()), call)
