"""legit-target: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import design_options as design
from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the data rows read and the target rows written."""
    from toolbox.legit.records import DataRow, TargetRow
    from toolbox.shell.records import json_schema

    return {"input": json_schema([DataRow]), "output": json_schema([TargetRow])}


@command(
    "legit-target",
    schema=schema,
    examples=[
        "legit-sim --network asia -n 5000 --seed 1 > d.jsonl",
        "legit-target --network asia --state s --strategy git < d.jsonl | tee -a t.jsonl |\n"
        "    legit-sim --network asia -n 32 --from - --seed 1 >> d.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@design.variable_options()
@option("--state", group="Input/Output", type=PathType("DIR"),
        help="What is believed and planned between two calls; made by the first.")  # fmt: skip
@option("--stateless", group="Input/Output", is_flag=True, help="Keep nothing: fit anew from all rows.")
@option("--top-k", group="Input/Output", type=Number(1, whole=True), default=1, help="So many targets, best first.")
@option("--explain", group="Input/Output", is_flag=True, help="Add the scores of all targets.")
@option("--strategy", group="Method", default="git", metavar="NAME",
        help="git, ait, cbed, random, round-robin, degree; legit+X, plan+X or llm-only.")  # fmt: skip
@design.budget_options()
@design.stage_options()
@design.score_options()
@design.learner_options()
@design.asking_options()
@design.threads_option()
@groups.seed_option("Seed of weights, samples, votes and choices.")
def main(call: Invocation, **values: Any) -> None:
    """Choose the next variable to intervene on, given ALL rows measured so far (FILE, default: stdin).

    Rows are {"values": {name: state}, "targets": []}; "targets": ["smoke"] marks an experiment on smoke. Append the
    rows of the experiment that was asked for and run the same command again. Without new rows the answer is repeated.
    """
    from toolbox.legit.target import Options, run

    run(Options(**values, given_options=groups.given_options()), call)
