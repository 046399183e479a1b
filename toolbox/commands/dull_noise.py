"""dull-noise: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the image rows read and the rows written."""
    from toolbox.dull.lines import IMAGES, NOISED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(IMAGES), "output": json_schema(NOISED)}


def _tail() -> Decorator:
    return together(
        option("--imbalance", group="Method", type=Number(above=0),
               help="Smallest class over largest, as in .1 (above 1: largest over smallest); default: as it is."),
        option("--max-per-class", group="Method", type=Number(1, whole=True),
               help="Images of the largest class (default: as many as there are)."),
        option("--class-order", group="Method", metavar="WORD|FILE", default="count",
               help="Which class is the head: count, asis, seed, confusion (with --mode field), or a file, a class a "
                    "line."),
    )  # fmt: skip


def _noise() -> Decorator:
    modes = ["t2h", "uniform", "pair", "cifar-asym", "imb", "matrix", "field", "none"]
    return together(
        option("--mode", group="Method", type=click.Choice(modes), default="t2h",
               help="Tail to head, symmetric, to the next class, CIFAR-10's pairs, to any class by its size, a matrix, "
                    "labels in a field, or none."),
        option("--profile", group="Method", type=click.Choice(["auto", "rank", "log", "flat"]), default="auto",
               help="t2h: how the rate grows towards the tail."),
        option("--rate", group="Method", type=Number(0, 1), help="Mislabelled share of all images (default: .2)."),
        option("--rate-nonhead", group="Method", type=Number(0, 1), help="The share of those beyond the head instead."),
        option("--p-max", group="Method", type=Number(0, 1), default=0.9, help="t2h: most that one class loses."),
        option("--power", group="Method", type=Number(0), default=1.0,
               help="t2h: destinations in proportion to their size to this power."),
        option("--min-clean", group="Method", type=Number(0, whole=True), default=5,
               help="t2h: images of each class that keep their label at least."),
        option("--own", group="Method", is_flag=True, help="uniform: a class may be drawn for itself."),
        option("--matrix", group="Method", type=PathType(), help="matrix: T as JSON; a --report is one."),
        option("--field", "field_", group="Method", metavar="NAME", help="field: where the noisy labels are."),
        option("--t2h-only", group="Method", is_flag=True,
               help="field: keep what is labelled right or as a larger class."),
        option("--stochastic", group="Method", is_flag=True, help="Draw each label on its own, not exact counts."),
    )  # fmt: skip


@command(
    "dull-noise",
    schema=schema,
    examples=[
        "dull-noise digits --imbalance .1 --rate .2 --seed 1 --report noise.json > noisy.jsonl",
        "dull-noise photos/ --mode none > manifest.jsonl",
    ],
)
@click.argument("source", default="-", type=PathType("MANIFEST|DIR|digits|idx:DIR", model=True))
@groups.record_options()
@option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that paths start from.")
@option("--report", group="Input/Output", type=PathType(), help="Write counts, rates and the matrix as JSON.")
@_tail()
@_noise()
@groups.seed_option()
def main(call: Invocation, **values: Any) -> None:
    """Make a labelled image manifest long-tailed and mislabel it, by default from tail to head.

    Counts are exact: what is planned is what comes out. Rows keep their order and their other fields; label becomes the
    noisy one, and dull.label_clean keeps the first.
    """
    from toolbox.dull.noising import Options, run

    run(Options(**values), call)
