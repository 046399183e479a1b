"""lit-pope: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the images read and the questions written."""
    from toolbox.lit.lines import LABELLED, Asked, Plan
    from toolbox.shell.records import json_schema

    return {"input": json_schema(LABELLED), "output": json_schema([Asked, Plan])}


@command(
    "lit-pope",
    schema=schema,
    examples=[
        "lit-pope captions.jsonl > questions.jsonl",
        "lit-pope --strategy popular --strategy adversarial --per-image 2 captions.jsonl | jq -c '[.object, .answer]'",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--strategy", group="Method", multiple=True, type=click.Choice(["random", "popular", "adversarial"]),
        default=["random"], help="Which absent objects are asked about (repeatable).")  # fmt: skip
@option("--per-image", group="Method", type=Number(1, whole=True), default=3,
        help="Most present objects of an image, and as many absent ones.")  # fmt: skip
@option("--question", group="Method", default="Is there {a} {object} in the image?", metavar="TEXT",
        help="The wording; {a} becomes a, an or nothing.")  # fmt: skip
@option("--suffix", group="Method", default="", metavar="TEXT", help="Put behind each question.")
@option("--chair-synonyms", group="Method", type=PathType(),
        help="Words for objects, one class a line (default: the 80 of COCO).")  # fmt: skip
@option("--chair-drop", group="Method", default="", metavar="LIST", help="Words to leave out of that list.")
@groups.seed_option("Seed of the draws.")
def main(call: Invocation, **values: Any) -> None:
    """Make yes-or-no questions about objects (POPE) from images with labelled objects or captions.

    Half the answers are yes. Absent objects are drawn evenly, or are the most frequent ones, or those that occur most
    with what the image has. "Absent" is as good as the labels and captions are.
    """
    from toolbox.lit.ask import Options, run

    run(Options(**values), call)
