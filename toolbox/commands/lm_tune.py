"""lm-tune: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import PathType


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.training.events import trainer_schema

    return trainer_schema()


@command(
    "lm-tune",
    trainer=True,
    schema=schema,
    examples=[
        "zcat tofu.json.gz | lm-tune --out tuned | tail -n 1",
        "lm-tune --model tuned --out adapter --lora-r 8 --epochs 3 chats.jsonl\n"
        "lm-tune --out people --epochs 6 --lr 2e-4 --stop-when 'loss<.02' people.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@groups.output_options("Directory of the tuned model, or of the adapter with --lora-r")
@groups.row_options()
@groups.model_options()
@groups.training_options(
    epochs=5,
    batch_size=16,
    weight_decay=0.01,
    warmup=0.1,
    lr_help="auto: 1e-4 below 500 M parameters, 2e-5 up to 3 B, else 1e-5.",
)
@groups.adapter_options()
@groups.watching_options("", eval_every="epoch")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Fine-tune a causal language model on FILE (default: stdin).

    Rows are {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}, as JSON lines or one array.
    The loss is the mean negative log-likelihood of the labelled tokens of each global batch. Events go to stdout as
    JSON lines; the model goes to --out as a Hugging Face directory.
    """
    from toolbox.lm.tune import Options, run

    run(Options(**values), call)
