"""lm-generate: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the prompts read and the paths written."""
    from toolbox.lm.generate import CompletedRow
    from toolbox.shell.records import PROMPT_SHAPES, json_schema

    return {"input": json_schema(PROMPT_SHAPES), "output": json_schema([CompletedRow])}


def check(values: dict[str, Any]) -> None:
    """What does not fit together among the options."""
    from toolbox.lm import generate

    generate.check(generate.Options(**values, given=groups.given_options()))


@command(
    "lm-generate",
    schema=schema,
    before_workers=check,
    examples=[
        "lm-generate --map prompt=question --max-new-tokens 40 < questions.jsonl | jq -r .completion",
        "lm-generate --model tuned --n 4 --temperature 1 --top-p .95 prompts.jsonl > paths.jsonl",
        "lm-generate --log answers.jsonl prompts.jsonl > completed.jsonl",
        "lm-generate --backend replay --replay answers.jsonl prompts.jsonl | cmp - completed.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many rows.")
@groups.template_options()
@option("--raw", group="Data", is_flag=True, help="No template at all: continue the text itself.")
@groups.model_options()
@groups.backend_options()
@groups.endpoint_options()
@groups.generation_options()
@groups.inference_options("Prompts", window=256)
@option("--batch-tokens", group="Launch", type=Number(1, whole=True),
        help="Bound a batch by padded tokens, new ones included.")  # fmt: skip
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Complete the prompts in FILE (default: stdin) with a language model, an endpoint or stored responses.

    Rows hold "prompt" (one user turn, where the model has a chat template) or "messages". Each row leaves with
    "completion", "path_id", "sample", "finish_reason" and token counts added, in input order, other fields untouched.
    Samples depend on --seed and the row's id alone, not on batching or the number of processes.
    """
    from toolbox.lm.generate import Options, run

    run(Options(**values, given=groups.given_options()), call)
