"""legit-sim: the command line."""

from __future__ import annotations

from typing import Any

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the target rows read and the data rows written."""
    from toolbox.legit.records import AskedTarget, DataRow
    from toolbox.shell.records import json_schema

    return {"input": json_schema([AskedTarget]), "output": json_schema([DataRow])}


@command(
    "legit-sim",
    schema=schema,
    examples=[
        "legit-sim --network asia -n 5000 --seed 1 > d.jsonl",
        "legit-sim --network asia -n 32 --do smoke=yes | jq -r .values.lung | sort | uniq -c",
        "legit-sim --list | jq -c 'select(.nodes < 40)'",
    ],
)
@groups.record_options()
@option("--network", group="Input/Output", metavar="NAME",
        help="A packaged network (asia, child, insurance, alarm, sachs, ...) or a BIF file.")  # fmt: skip
@option("--pool", group="Input/Output", type=PathType(), help="Hand out rows of this file instead of sampling.")
@option(
    "--from", "from_", group="Input/Output", type=PathType(), help="Target rows to do the experiments of (- is stdin)."
)
@option(
    "--list", "list_", group="Input/Output", is_flag=True, recipe=False, help="List the packaged networks and stop."
)
@option("-n", "--n", "n", group="Method", type=Number(1, whole=True),
        help="Rows (default: what a target row says, else 100; of a pool all observed ones).")  # fmt: skip
@option("--do", group="Method", metavar="NAME[=STATE]", help="Intervene on a variable, at random or to one state.")
@option("--values", group="Method", default="uniform", metavar="STATE", help="What targets are set to.")
@option("--observational", group="Method", is_flag=True, help="The pool's rows without a target.")
@groups.seed_option()
def main(call: Invocation, **values: Any) -> None:
    """Sample rows of a Bayesian network, observed or under interventions, or hand out rows of a pool.

    With --from each target row is an experiment. Its rows depend on the seed, the target's name and its occurrence
    alone, not on what was asked before.
    """
    from toolbox.legit.sim import Options, run

    run(Options(**values), call)
