"""lwi-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Number, PathType, option


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the lines written."""
    from toolbox.classify.rows import IMAGE_SHAPES
    from toolbox.lwi.task_lines import EVALUATED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(IMAGE_SHAPES), "output": json_schema(EVALUATED)}


@command(
    "lwi-eval",
    schema=schema,
    examples=[
        "lwi-eval digits#test d0 n1 --plot tasks.svg | tail -n 1 | jq '{avg_taw, avg_tag, forgetting}'",
        "lwi-eval digits#test d0 m1 --name LwI --baseline LwF=d0,n1 | jq -c 'select(.event==\"baseline\").difference'",
    ],
)
@click.argument("manifest", type=PathType("MANIFEST|DIR|digits|-", model=True))
@click.argument("models", type=PathType("M0 [M1...]"), nargs=-1, required=True)
@groups.record_options()
@option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that the images' paths start from.")
@option("--predictions", group="Input/Output", type=PathType(), help="Write what the last state says of each image.")
@option("--plot", group="Watching", type=PathType(), multiple=True,
        help="Draw averages and forgetting over the tasks (.svg, .png or .pdf; repeatable).")  # fmt: skip
@option("--name", group="Method", metavar="NAME", default="model", help="What the states are called beside others.")
@option("--baseline", group="Method", multiple=True, metavar="NAME=DIR,DIR",
        help="States of another way of learning, judged on the same images.")  # fmt: skip
@option("--stats", group="Method", type=PathType(),
        help="Write how each task uses the channels of the last state (.safetensors); print overlaps.")  # fmt: skip
@option("--bootstrap", group="Method", type=Number(1, whole=True), default=2000,
        help="Draws behind the intervals of averages.")  # fmt: skip
@groups.launch_options()
@groups.seed_option("Seed of the bootstrap.")
def main(call: Invocation, **values: Any) -> None:
    """Judge continual learning: accuracy on each task after each task, averages, forgetting.

    Models are the states after each task, the earliest first; their config.json tells the tasks. A[t,u] is the accuracy
    of the state after task t on the images of task u: TAw by the arg-max over task u's classes, TAg over all classes
    learned so far. avg[t] is the mean over u <= t, wavg weighs by classes, and forgetting is the best A[s,u] of an
    earlier state minus A[t,u], averaged over u < t.
    """
    from toolbox.lwi.evaluate import Options, run

    run(Options(**values), call)
