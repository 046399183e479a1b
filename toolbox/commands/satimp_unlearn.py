"""satimp-unlearn: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.shell.records import TRAINING_SHAPES, json_schema
    from toolbox.training.events import EVENTS

    return {"input": json_schema(TRAINING_SHAPES), "output": json_schema(EVENTS)}


def _inputs() -> Decorator:
    return together(
        option("--forget", group="Input/Output", type=PathType(), required=True, help="Rows to forget (- is stdin)."),
        option("--retain", group="Input/Output", type=PathType(), help="Rows to keep (- is stdin)."),
        option("--strict", group="Input/Output", is_flag=True, help="Rows in both sets are an error, not a warning."),
        option("--delta", group="Input/Output", type=PathType(),
               help="Write the change of the weights to this safetensors file too."),
    )  # fmt: skip


def _method() -> Decorator:
    number = Number(0)
    return together(
        option("--weighting", group="Method", type=click.Choice(["satimp", "simsat", "simimp", "ga", "wga"]),
               default="satimp",
               help="Token weight: p^b1 (1-p)^b2, p^b1, (1-p)^b2, 1 (gradient ascent), p."),
        option("--beta1", group="Method", type=number, default=5.0, help="Saturation: spare what is forgotten."),
        option("--beta2", group="Method", type=number, default=0.1, help="Importance: spare what is near certain."),
        option("--gamma", group="Method", type=number, default=1.0, help="Factor of the forget loss."),
        option("--alpha", group="Method", type=number, default=0.1, help="Factor of the retain loss."),
        option("--retain-loss", group="Method", type=click.Choice(["nll", "none"]), default="nll",
               help="none: the retain rows are only watched."),
        option("--retain-batch", group="Data", type=Number(0, whole=True), default=0,
               help="Retain rows of one step (0: as many as forget rows)."),
        option("--holdout", group="Data", type=Number(0, whole=True), default=0,
               help="Keep the first so many retain rows for evaluation only."),
    )  # fmt: skip


@command(
    "satimp-unlearn",
    trainer=True,
    schema=schema,
    examples=[
        "satimp-unlearn --model tuned --forget forget.jsonl --retain retain.jsonl --out unlearned | tail -n 1",
        "jq -c 'select(.person==\"Ada Quill\")' people.jsonl |\n"
        "  satimp-unlearn --model tuned --forget - --retain rest.jsonl --out u --plot u.svg \\\n"
        "    --stop-when 'forget_es<=.1 and retain_es>=.9*start'",
    ],
)
@_inputs()
@groups.record_options()
@groups.output_options("Directory of the unlearned model, or of the adapter with --lora-r")
@_method()
@groups.row_options()
@groups.model_options()
@groups.training_options(
    epochs=5, batch_size=16, lr_help="auto: 5e-5 below 500 M parameters, 2e-5 up to 3 B, else 1e-5."
)
@groups.adapter_options()
@groups.watching_options(" beside forget and retain", eval_every="epoch")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Make a causal language model forget the rows of --forget and keep those of --retain (SatImp).

    Gradient ascent on the forget rows, each token weighted by p^beta1 (1-p)^beta2, plus alpha times the usual loss on
    as many retain rows. Rows are {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}. Events
    go to stdout as JSON lines, a table before/after to stderr, the model to --out.
    """
    from toolbox.unlearning.run import Options, run

    run(Options(**values), call)
