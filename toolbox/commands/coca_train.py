"""coca-train: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.shell.records import ANSWER_SHAPES, json_schema
    from toolbox.training.events import trainer_schema

    return {**trainer_schema(), "input": json_schema(ANSWER_SHAPES)}


def method_options() -> Decorator:
    """What is trained, where."""
    return together(
        option("--method", group="Method", type=click.Choice(["lofit", "loreft", "lora"]), default="lofit",
               help="Offsets at attention heads, edits at prompt positions, or a LoRA adapter."),
        option("--heads", group="Method", metavar="K",
               help="lofit: heads with offsets, as a share of all (3%, the default), a number, or L.H,L.H,..."),
        option("--stage", group="Method", type=click.Choice(["auto", "a", "b"]), default="auto",
               help="lofit: a chooses heads, b trains offsets at given ones; auto does a, then b."),
        option("--heads-from", group="Method", type=PathType(), help="lofit: take the heads of this output."),
        option("--heads-lr", group="Method", type=Number(above=0), default=5e-3,
               help="lofit: learning rate of stage a."),
        option("--heads-epochs", group="Method", type=Number(above=0),
               help="lofit: passes of stage a (default: those of stage b)."),
        option("--l1", group="Method", type=Number(0), default=5e-4, help="lofit: weight of the scales' sum, stage a."),
        option("--layers", group="Method", metavar="A-B",
               help="loreft: decoder layers, counted from 0 (default: 10-18 of 32, scaled to the depth)."),
        option("--positions", group="Method", metavar="fN+lM", default="f6+l6",
               help="loreft: the first N and last M tokens of the prompt, each at most half of it."),
        option("--reft-form", group="Method", type=click.Choice(["loreft", "noreft", "lobireft", "direft"]),
               default="loreft", help="loreft: the whole edit, or without a part of it."),
        option("--rank", group="Method", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="loreft: 4, lora: 16."),
        option("--balance", group="Method", metavar="H:B",
               help="Keep harmful and benign rows in this ratio; rows need a label."),
    )  # fmt: skip


@command(
    "coca-train",
    trainer=True,
    schema=schema,
    examples=[
        "cat enhanced.jsonl benign.jsonl | coca-train --method lofit --out trained | tail -n 1",
        "coca-train --method loreft --positions f4+l4 --out edits enhanced.jsonl",
        "coca-train --method lofit --heads-from trained --merge merged --out again enhanced.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@groups.output_options("Directory of the intervention, or of the adapter with --method lora")
@option("--merge", group="Input/Output", type=PathType("DIR"),
        help="Also write the model with what was trained inside it (lofit, lora).")  # fmt: skip
@method_options()
@groups.template_options()
@option("--max-length", group="Data", type=Number(2, whole=True), default=1024, help="Leave out longer rows.")
@groups.model_options()
@groups.training_options(
    epochs="auto",
    batch_size=8,
    lr_help="auto: lofit 1e-2, loreft 9e-4, lora 2e-4.",
    epochs_help="Passes over the rows; auto: 5, lora 3.",
    whole_model=False,
)
@option("--lora-alpha", group="Adapters", type=Number(above=0), help="lora: scale (default: twice the rank).")
@option("--lora-targets", group="Adapters", multiple=True, metavar="NAME",
        help="lora: modules to adapt (default: every linear layer but the head).")  # fmt: skip
@groups.watching_options("", eval_every="epoch")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Train a small intervention on the answers in FILE (default: stdin); the model itself stays frozen.

    Rows are conversations, prompts with completions, questions with answers, Alpaca's instructions or ShareGPT's
    conversations, refactored by coca-refactor or as they are. The loss is the mean negative log-likelihood of the last
    answer's tokens. Events go to stdout as JSON lines.
    """
    from toolbox.coca.train import Options, run

    run(Options(**values), call, groups.given_options())
