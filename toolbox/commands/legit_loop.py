"""legit-loop: the command line."""

from __future__ import annotations

from typing import Any

from toolbox.shell import design_options as design
from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the observed rows read and the events written."""
    from toolbox.legit.records import DataRow, RoundEvent, RunEvent
    from toolbox.shell.records import json_schema

    return {"input": json_schema([DataRow]), "output": json_schema([RoundEvent, RunEvent])}


@command(
    "legit-loop",
    schema=schema,
    examples=[
        "legit-loop --network asia --strategies round-robin,git,random --seeds 5 --plot asia.svg |\n"
        '    jq -c \'select(.event=="summary" or .event=="paired")\'',
        "legit-loop --network asia --strategies legit+git,git --backend replay --replay replies.jsonl > again.jsonl",
    ],
)
@groups.record_options()
@design.variable_options()
@option("--pool", group="Input/Output", type=PathType(), help="Rows that were really measured, handed out by target.")
@option("--experiment", group="Input/Output", metavar="CMD",
        help="A command: target row on its stdin, data rows on its stdout.")  # fmt: skip
@option("--observations", group="Input/Output", type=PathType(),
        help="Observed rows to begin with (- is stdin), instead of the simulator's or the pool's.")  # fmt: skip
@option("--truth", group="Input/Output", metavar="NAME",
        help="Judge against this network or these edges (default: --network where it is the simulator).")  # fmt: skip
@option("--state", group="Input/Output", type=PathType("DIR"), help="Keep each run in a directory below this one.")
@option("--resume", group="Input/Output", is_flag=True, recipe=False, help="Go on with what --state and --log hold.")
@option("--plot", group="Input/Output", type=PathType(), multiple=True,
        help="Draw the runs (.svg, .png, .pdf, .html; repeatable).")  # fmt: skip
@option("--strategies", group="Method", default="round-robin,git", metavar="LIST",
        help="git, ait, cbed, random, round-robin, degree, git-privileged; legit+X, plan+X, llm-only.")  # fmt: skip
@option("--seeds", group="Method", default="5", metavar="N", help="So many seeds from --seed on, or a list as 0,3,7.")
@option("--n-obs", group="Method", type=Number(1, whole=True), default=5000, help="Observed rows of the simulator.")
@option("--baseline", group="Method", metavar="NAME", help="Compare the others with it (default: round-robin).")
@design.budget_options()
@design.stage_options()
@design.score_options()
@design.learner_options()
@design.asking_options()
@groups.launch_options()
@groups.seed_option("First seed, and that of bootstrap draws.")
def main(call: Invocation, **values: Any) -> None:
    """Run whole designs, strategies x seeds, over a simulator, a pool of real rows, or a command of yours.

    Writes an event a round and a run, then a summary a strategy and paired tests. Strategies of one seed share observed
    rows, initial weights, and the rows that the c-th experiment on a target yields.
    """
    from toolbox.legit.loop import Options, run

    run(Options(**values, given_options=groups.given_options()), call)
