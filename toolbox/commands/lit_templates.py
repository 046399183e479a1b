"""lit-templates: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell import vision_options as vision
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the sentences written."""
    from toolbox.lit.lines import CAPTIONS, TURNS, Plan, Sentence
    from toolbox.shell.records import json_schema

    return {"input": json_schema((*TURNS, *CAPTIONS)), "output": json_schema([Sentence, Plan])}


@command(
    "lit-templates",
    schema=schema,
    examples=[
        "lit-templates chats.jsonl > templates.jsonl",
        "lit-templates --limit 3 chats.jsonl | jq -c '[.sentence, .count, .template]'",
        "lit-tune chats.jsonl --image-root photos --task-templates templates.jsonl --model llava --out tuned",
    ],
)
@click.argument("file", default="-", type=vision.RowsType("ROWS"))
@groups.record_options()
@option("--limit", group="Input/Output", type=Number(0, whole=True), help="Write only the first so many sentences.")
@option("--split", group="Method", default="newline,punct,colon", metavar="LIST", help="Where sentences end.")
@option("--min-share", group="Method", type=Number(0, 1), default=0.15,
        help="Flag sentences of at least this share of the user turns.")  # fmt: skip
@option("--top-k", group="Method", type=Number(0, whole=True), help="Flag the first so many instead.")
@groups.seed_option("Without effect: nothing here is random.")
def main(call: Invocation, **values: Any) -> None:
    """Find boilerplate: the sentences of user turns by how often they occur, as a list to edit.

    A sentence that says nothing of an image ("Answer the question using a single word or phrase.") should not be
    learned; a frequent question about images should. Only you can tell them apart: flip `template`, add or delete
    lines, and give the list to lit-tune.
    """
    from toolbox.lit.mine import Options, run

    run(Options(**values), call)
