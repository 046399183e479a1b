"""longer-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the scored rows read and of the line written."""
    from toolbox.longer.lines import JUDGED, SCORED_ROWS
    from toolbox.shell.records import json_schema

    return {"input": json_schema(SCORED_ROWS), "output": json_schema(JUDGED)}


@command(
    "longer-eval",
    schema=schema,
    examples=[
        "longer-eval --bootstrap 1000 scored.jsonl | jq '[.auc, .auc_ci]'",
        "longer-eval --compare other.jsonl --bootstrap 1000 scored.jsonl | jq .difference",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--group", group="Method", type=click.Choice(["user", "request"]), default="user", help="Groups of GAUC.")
@option(
    "--bootstrap",
    group="Method",
    type=Number(0, whole=True),
    default=0,
    help="Draws of the 95 % intervals, over users (0: none).",
)
@option(
    "--compare",
    group="Input/Output",
    type=PathType(),
    help="Scores of another model on the same rows: differences, paired.",
)
@groups.seed_option("Seed of the bootstrap.")
def main(call: Invocation, **values: Any) -> None:
    """Judge scores: AUC, LogLoss, GAUC, calibration, in total and by length of history.

    Rows are {"label", "score"} with "user", "request" and "hist_len" where there are any, or requests with "labels" and
    "scores" as longer-score writes them. One JSON line comes out, a table for people on stderr.
    """
    from toolbox.longer.evaluate import Options, run

    run(Options(**values), call)
