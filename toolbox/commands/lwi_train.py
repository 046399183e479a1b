"""lwi-train: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

_WHOLE = Number(1, whole=True)


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.classify.rows import IMAGE_SHAPES
    from toolbox.lwi.task_lines import TRAINED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(IMAGE_SHAPES), "output": json_schema(TRAINED)}


def _files() -> Decorator:
    return together(
        option("-o", "--out", group="Input/Output", type=PathType("DIR"), required=True,
               help="Directory of the model (made by this run)."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--resume", group="Input/Output", is_flag=True, recipe=False,
               help="Continue an interrupted run from its last saved state."),
        option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that the images' paths start from."),
        option("--val", group="Input/Output", type=PathType("IMAGES", model=True),
               help="Images to validate with each epoch (manifest, folder or digits#test)."),
    )  # fmt: skip


def _tasks() -> Decorator:
    return together(
        option("--tasks", group="Method", type=_WHOLE, help="Split the classes into so many tasks."),
        option("--task", group="Method", type=Number(0, whole=True),
               help="Which one to learn, from 0 (default: the one behind those --init has learned)."),
        option("--task-field", group="Method", metavar="NAME", help="Tasks by this field of the rows instead."),
        option("--class-order", group="Method", metavar="sorted|seed|FILE", default="sorted",
               help="Order of the classes that --tasks cuts: as sorted, drawn by --seed, or one a line of a file."),
        option("--kd", group="Method", type=Number(0), default=1.0, help="Weight λ of the distillation (0: none)."),
        option("--kd-temperature", group="Method", type=Number(above=0), default=2.0, help="Its temperature T."),
        option("--aug", group="Data", type=click.Choice(["weak", "none"]), default="weak",
               help="weak: pad by 4, crop, mirror."),
        option("--image-size", group="Data", type=Number(4, whole=True),
               help="Pixels of a side (default: the model's, else 32)."),
        option("--model", "-m", group="Model", type=PathType("MODEL", model=True),
               help="First task: cifar-resnet8, -20, -32, preact-resnet18, or an image classifier's directory "
                    "(default: cifar-resnet32)."),
        option("--init", group="Model", type=PathType("DIR"), help="Later tasks: the old model, start and teacher."),
    )  # fmt: skip


def _optimising() -> Decorator:
    return together(
        option("--epochs", group="Training", type=Number(above=0), default=200.0, help="Passes over the images."),
        option("--batch-size", group="Training", type=_WHOLE, default=64, help="Images of one step, over all "
               "processes."),
        option("--lr", group="Training", type=Number(above=0, high=1e30), default=0.1, help="Learning rate of SGD."),
        option("--momentum", group="Training", type=Number(0, high=0.9999), default=0.9, help="Of SGD."),
        option("--weight-decay", group="Training", type=Number(0), default=0.0, help="On matrices and kernels only."),
        option("--schedule", group="Training", type=click.Choice(["step", "cosine", "patience"]), default="step",
               help="step: a tenth at 40 % and at 60 % of the run; patience: FACIL's, by the loss on --val."),
        option("--max-grad-norm", group="Training", type=Number(0), default=10_000.0,
               help="Clip the gradient norm (0: off)."),
        option("--precision", group="Training", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="bf16 is autocast over fp32 weights."),
        groups.seed_option("Seed of order, augmentation and new weights."),
        option("--save-every", group="Watching", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Save state every N steps; auto: about once a minute; 0: never."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw losses and accuracies (.svg, .png or .pdf; repeatable)."),
    )  # fmt: skip


@command(
    "lwi-train",
    trainer=True,
    schema=schema,
    examples=[
        "lwi-train digits --model cifar-resnet8 --image-size 16 --tasks 5 --task 0 --epochs 3 -o d0",
        "lwi-train digits --init d0 --tasks 5 --task 1 --epochs 3 -o n1 | jq -c 'select(.event==\"epoch\")'",
    ],
)
@click.argument("manifest", type=PathType("MANIFEST|DIR|digits|-", model=True), default="-")
@groups.record_options()
@_files()
@_tasks()
@_optimising()
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Learn one more task of an image classifier from the old model, without old images (LwI).

    Classes are split into tasks; each comes with its own rows of the head. With --init training starts from the old
    model, which also teaches: what it says of its classes is kept by distillation, and its rows of the head are frozen.
    Events go to stdout as JSON lines, the model to --out; lwi-fuse then fuses it with the old one.
    """
    from toolbox.lwi.train import run
    from toolbox.lwi.training_options import Options

    if values["init"] is not None and "model" not in groups.given_options():
        values["model"] = None  # what the environment says is for the first task
    run(Options(**values), call)
