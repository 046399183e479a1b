"""lit-inspect: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the lines written."""
    from toolbox.lit.lines import CAPTIONS, TURNS, Inspected, Plan
    from toolbox.shell.records import json_schema

    return {"input": json_schema((*TURNS, *CAPTIONS)), "output": json_schema([Inspected, Plan])}


@command(
    "lit-inspect",
    schema=schema,
    examples=[
        "lit-inspect chats.jsonl --image-root photos --model llava --pretty --limit 2 > tokens.jsonl",
        "lit-inspect chats.jsonl --image-root photos --model llava --mode vit --counts | jq -c .counts",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("ROWS"))
@groups.record_options()
@vision.image_options()
@option("--counts", group="Input/Output", is_flag=True, help="Leave the tokens out.")
@option("--pretty", group="Input/Output", is_flag=True, help="Draw each row in colours on stderr.")
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Show only the first so many rows.")
@vision.label_options()
@vision.vision_model_options()
@groups.seed_option("Without effect: nothing here is random.")
def main(call: Invocation, **values: Any) -> None:
    """Show what every token of a row is, and whether lit-tune would learn from it.

    Needs the model's processor, not its weights. Each row leaves with `length`, `counts` by kind, `supervised` and
    `tokens` ([id, text, kind, 0 or 1] each); totals go to stderr.
    """
    from toolbox.lit.inspect import Options, run

    run(Options(**values), call)
