"""legit-score: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the graph lines read and the scores written."""
    from toolbox.legit.records import GRAPH_SHAPES, GraphScore
    from toolbox.shell.records import json_schema

    return {"input": json_schema(GRAPH_SHAPES), "output": json_schema([GraphScore])}


@command(
    "legit-score",
    schema=schema,
    examples=[
        "legit-score --truth asia graph.jsonl | jq '{shd, sid, bsf, shd_empty}'",
        "legit-fit --network asia --epochs 2 < d.jsonl | legit-score --truth asia",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--truth", group="Input/Output", metavar="NAME", required=True,
        help="A packaged network, a BIF file, or edges (.jsonl, .csv).")  # fmt: skip
@groups.seed_option("Not used: nothing is drawn.")
def main(call: Invocation, **values: Any) -> None:
    """Judge learned graphs (FILE, default: stdin) against the true one: SHD, SID, BSF and the usual rates.

    One JSON line a graph. SHD is of the graph as learned; SID is not defined for cyclic graphs and is of its projection
    to a DAG. `shd_empty` is what a graph without edges would score.
    """
    from toolbox.legit.score import Options, run

    run(Options(**values), call)
