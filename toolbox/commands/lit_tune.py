"""lit-tune: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.lit.lines import CAPTIONS, EVENTS, TURNS
    from toolbox.shell.records import json_schema

    return {"input": json_schema((*TURNS, *CAPTIONS)), "output": json_schema(EVENTS)}


def check(values: dict[str, Any]) -> None:
    """What does not fit together among the options."""
    from toolbox.lit import options

    options.check(options.Options(**values), groups.given_options())


def _weighing() -> Decorator:
    return together(
        option("--stage", group="Method", type=click.Choice(["finetune", "pretrain"]), default="finetune",
               help="pretrain: image and caption alone, to align the connector."),
        option("--force", group="Method", is_flag=True, help="Take --mode at its word at --stage pretrain too."),
        option("--instruct-weight", group="Method", type=Number(0), default=1.0,
               help="Weight of an instruction token."),
        option("--response-weight", group="Method", type=Number(0), default=1.0, help="Weight of a response token."),
        option("--normalize", group="Method", type=click.Choice(["tokens", "segment", "sample"]), default="tokens",
               help="Mean over tokens, of the means of either side, or over rows."),
    )  # fmt: skip


def _parts() -> Decorator:
    return together(
        option("--train-parts", group="Training", metavar="LIST",
               help="connector, lm (lm:4 its last layers), vision; default by stage."),
        option("--connector-lr", group="Training", type=Number(above=0), help="Its own learning rate."),
        option("--vision-lr", group="Training", type=Number(above=0), help="Its own learning rate."),
        option("--max-steps", group="Training", type=Number(1, whole=True), help="So many steps, not --epochs."),
        option("--cache-vision", group="Training", type=PathType(),
               help="Keep the frozen tower's features in this safetensors file."),
        option("--max-length", group="Data", type=Number(2, whole=True), default=2048, help="Longest row in tokens."),
        option("--overlong", group="Data", type=click.Choice(["drop", "truncate-response", "error"]), default="drop",
               help="What becomes of longer rows; an image is never cut."),
        option("--group-by-length", group="Training", is_flag=True,
               help="Rows of like length in a step: less padding, less evenly mixed steps."),
    )  # fmt: skip


def _watching() -> Decorator:
    return together(
        option("--eval", "eval_rows", group="Watching", type=vision.RowsType("ROWS"), help="Held-out rows."),
        option("--eval-every", group="Watching", type=Number(0, whole=True, words=["epoch"]), default="epoch",
               help="Evaluate each epoch, every N steps, or (0) only at start and end."),
        option("--save-every", group="Watching", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Save state every N steps; auto: about once a minute; 0: never."),
    )  # fmt: skip


@command(
    "lit-tune",
    schema=schema,
    trainer=True,
    before_workers=check,
    examples=[
        "lit-tune chats.jsonl --image-root photos --model llava --out tuned | jq -c '[.step, .loss_response]'",
        "lit-tune chats.jsonl --image-root photos --model llava --mode vit --epochs 3 --out answers-only",
        "lit-tune captions.jsonl --image-root photos --stage pretrain --model llava --out aligned",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("ROWS"))
@groups.record_options()
@vision.image_options()
@groups.output_options("Directory of the tuned model")
@vision.label_options()
@_weighing()
@vision.vision_model_options()
@_parts()
@groups.training_options(
    epochs=1, warmup=0.03, schedule="cosine", max_grad_norm=1.0, whole_model=False,
    lr_help="auto: 2e-5, or 1e-3 at --stage pretrain.",
)  # fmt: skip
@groups.adapter_options()
@_watching()
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Fine-tune an image-text model on conversations about images, on the instruction as well as on the answer.

    Images, system prompt, role words and boilerplate sentences are left out of the loss. Rows are LLaVA's
    `conversations`, `messages` or captions; easy-vqa:train stands for the installed data set. Events go to stdout as
    JSON lines; the model goes to --out.
    """
    from toolbox.lit.options import Options
    from toolbox.lit.run import run

    run(Options(**values), call, groups.given_options())
