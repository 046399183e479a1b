"""landscape-verify: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the paths read and the paths written."""
    from toolbox.landscape.lines import ScoredPath
    from toolbox.shell.items import PATH_SHAPES
    from toolbox.shell.records import json_schema

    return {"input": json_schema(PATH_SHAPES), "output": json_schema([ScoredPath])}


def _files() -> Decorator:
    return together(
        option("--features", group="Input/Output", type=PathType(), required=True,
               help="features.safetensors of landscape-plot, made from these paths."),
        option("--save", group="Input/Output", type=PathType(),
               help="Fit to all paths after the cross-validation and write the verifier to this file."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing --save."),
        option("--load", group="Input/Output", type=PathType(), help="Score by a saved verifier; fit nothing."),
        option("--report", group="Input/Output", type=PathType(),
               help="Write the whole judgement to this Markdown file."),
    )  # fmt: skip


def _method() -> Decorator:
    return together(
        option("--verifier", group="Method", type=click.Choice(["rf", "logreg"]), default="rf",
               help="Random forest, or logistic regression as the simple yardstick."),
        option("--feature-set", group="Method", type=click.Choice(["states", "summary"]), default="states",
               help="What describes a path; summary also takes questions of different numbers of choices together."),
        option("--points", group="Method", type=Number(1, 1000, whole=True), default=10,
               help="Stages of progress at which a path is looked at."),
        option("--folds", group="Method", type=Number(2, whole=True), default=5,
               help="Folds of the cross-validation (at most one a question)."),
        option("--group", group="Method", default="id", metavar="FIELD",
               help="What folds never divide: a field of the row or of its `meta`."),
        option("--shuffles", group="Method", type=Number(0, whole=True), default=20,
               help="Controls that learn labels shuffled inside questions."),
    )  # fmt: skip


@command(
    "landscape-verify",
    schema=schema,
    examples=[
        "landscape-verify --features land/features.safetensors < paths.jsonl | lot-eval --vote plurality,weighted",
        "landscape-verify --features land/features.safetensors --report report.md --save verifier.safetensors \\\n"
        "    paths.jsonl > scored.jsonl",
        "landscape-verify --features new/features.safetensors --load verifier.safetensors new.jsonl > scored.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@_files()
@_method()
@groups.seed_option("Seed of forests, folds, shuffles and bootstrap draws.")
def main(call: Invocation, **values: Any) -> None:
    """Score reasoning paths by how their states move between the choices, and judge the scores on held-out questions.

    Rows are those that landscape-plot made its features from: "id", "choices", "answer", and "thoughts" or
    "completion". Each leaves unchanged with "score", the probability that its answer is right, and "pred" where it had
    none. Scores are out of fold: no model saw a path of the same question. A table and a verdict go to stderr.
    """
    from toolbox.landscape.verify import Options, run

    run(Options(**values, given=groups.given_options()), call)
