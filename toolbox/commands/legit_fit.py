"""legit-fit: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import design_options as design
from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the data rows read and the graph lines written."""
    from toolbox.legit.records import GRAPH_SHAPES, DataRow
    from toolbox.shell.records import json_schema

    return {"input": json_schema([DataRow]), "output": json_schema(GRAPH_SHAPES)}


@command(
    "legit-fit",
    schema=schema,
    examples=[
        "legit-fit --network asia --epochs 2 < d.jsonl | legit-score --truth asia",
        "legit-fit --network asia --epochs 2 < d.jsonl | jq -c 'select(.source) | [.source, .target, .p]'",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@design.variable_options()
@option("-o", "--output", group="Input/Output", type=PathType(), help="Also write the belief (safetensors).")
@option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing --output.")
@option("--state", group="Input/Output", type=PathType("DIR"),
        help="Begin with a running design's belief; its directory is left as it is.")  # fmt: skip
@option("--all-pairs", group="Input/Output", is_flag=True, help="A line for every ordered pair, with `in_graph`.")
@option("--epochs", group="Method", type=Number(1, whole=True), default=30, help="Rounds of both kinds of steps.")
@design.learner_options(obs_iters=False)
@option("--device", group="Launch", default="cpu", metavar="DEVICE", help="Of the learner: cpu, cuda, ...")
@design.threads_option()
@groups.seed_option("Seed of weights and samples.")
def main(call: Invocation, **values: Any) -> None:
    """Learn the causal graph from observed and interventional rows (FILE, default: stdin) with ENCO.

    Writes {"record": "graph", "nodes": [...]} and one line an edge with its probabilities. Rows are those of
    legit-target.
    """
    from toolbox.legit.fit import Options, run

    run(Options(**values, given_options=groups.given_options()), call)
