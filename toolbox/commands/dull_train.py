"""dull-train: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

_WHOLE = Number(1, whole=True)


def schema() -> dict[str, Any]:
    """JSON Schemas of the image rows read and of the events written."""
    from toolbox.dull.lines import IMAGES, TRAINED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(IMAGES), "output": json_schema(TRAINED)}


def _files() -> Decorator:
    return together(
        option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that the images' paths start from."),
        option("--eval", "eval_", group="Input/Output", type=PathType(),
               help="Clean images to report on; nothing is chosen by them."),
        option("--clean-field", group="Input/Output", metavar="NAME", default="dull.label_clean",
               help="Where clean labels are, if known: for figures only."),
        option("--limit", group="Input/Output", type=Number(2, whole=True), help="Take the first so many rows."),
        option("-o", "--out", group="Input/Output", type=PathType("DIR"), required=True,
               help="Directory of the model (made by this run)."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--resume", group="Input/Output", is_flag=True, recipe=False,
               help="Continue an interrupted run from its last saved state."),
    )  # fmt: skip


def _method() -> Decorator:
    def part(name: str, text: str) -> Decorator:
        return option(f"--{name}/--no-{name}", name.replace("-", "_"), group="Method", default=True, help=text)

    return together(
        option("--method", group="Method", type=click.Choice(["dull", "ce", "la", "elr"]), default="dull",
               help="DULL; cross entropy, logit adjustment or early-learning regularisation in the same harness."),
        part("ifd", "Inner-feature disentangling: a gate for each channel and class."),
        part("ifpu", "Inner-feature partial unlearning of labels taken for wrong."),
        part("aml", "Adaptive multi-labels in place of labels taken for wrong."),
        part("h2t", "Head-to-tail mixing."),
        part("logit-adjust", "The class prior in the loss."),
        option("--gate", group="Method", type=click.Choice(["auto", "open", "shut"]), default="auto",
               help="Who may touch labels: evidence in the data, always, never."),
        option("--h2t-always", group="Method", is_flag=True, help="Mix whether or not the gate is open."),
        option("--rho", group="Method", type=Number(0, 1), default=0.2, help="Density that gates are pressed to."),
        option("--lambda-gate", group="Method", type=Number(0, words=["auto"]), default="auto",
               help="Weight of that pressure."),
        option("--lr-gate", group="Method", type=Number(above=0, words=["auto"]), default="auto",
               help="Learning rate of gates (auto: ten times --lr)."),
        option("--alpha-ifd", group="Method", type=Number(0), default=0.5,
               help="Weight that the gated loss grows to over the run."),
        option("--beta", group="Method", type=Number(0, 1), default=0.7, help="Inertia of averaged predictions."),
        option("--ifpu-scope", group="Method", type=click.Choice(["t2h", "all"]), default="t2h",
               help="Doubt labels for smaller classes only, or for all."),
        option("--eta", group="Method", type=Number(0, 1), default=1.0, help="How far wrong channels are weakened."),
        option("--mixup-alpha", group="Method", type=Number(above=0), default=4.0,
               help="Mixing weights come from Beta(a, a)."),
        option("--remix-kappa", group="Method", type=Number(1), default=3.0,
               help="Mixed with a class this much smaller, the image takes that class's label ..."),
        option("--remix-tau", group="Method", type=Number(0, 1), default=0.5, help="... below this weight of its own."),
        option("--elr-lambda", group="Method", type=Number(0), default=3.0, help="elr: weight of its regulariser."),
        option("--warmup-epochs", group="Method", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Epochs before the gate is judged (auto: 30 % of them, 3 to 30)."),
        option("--holdout", group="Method", type=Number(0, 0.5), default=0.05,
               help="Share of the noisy rows set aside as the gate's evidence."),
    )  # fmt: skip


def _model() -> Decorator:
    return together(
        option("--model", "-m", group="Model", type=PathType("MODEL", model=True), default="cifar-resnet8",
               help="cifar-resnet8, -20, -32, preact-resnet18, or any Hugging Face image classifier."),
        option("--trust-remote-code", group="Model", is_flag=True, recipe=False,
               help="Run code that comes with the model."),
        option("--image-size", group="Model", type=Number(4, 4096, whole=True),
               help="Side of the images (default: the model's, 32 for ours)."),
        option("--aug", group="Data", type=click.Choice(["weak", "crop", "none"]), default="weak",
               help="Pad, crop and flip; without the flip; nothing."),
    )  # fmt: skip


def _training() -> Decorator:
    return together(
        option("--epochs", group="Training", type=_WHOLE, default=12, help="Passes over the rows."),
        option("--batch-size", group="Training", type=_WHOLE, default=64, help="Rows of one step, over all processes."),
        option("--micro-batch", group="Training", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="Rows of one backward pass of one process; batch norm sees no more."),
        option("--lr", group="Training", type=Number(above=0, high=1e30), default=0.1, help="Learning rate."),
        option("--weight-decay", group="Training", type=Number(0), default=5e-4, help="On all but gates."),
        option("--momentum", group="Training", type=Number(0, 1), default=0.9, help="Of sgd."),
        option("--optimizer", group="Training", type=click.Choice(["sgd", "adamw"]), default="sgd", help="Optimiser."),
        option("--schedule", group="Training", default="onecycle", help="How the learning rate moves.",
               type=click.Choice(["constant", "linear", "cosine", "step", "onecycle"])),
        option("--warmup", group="Training", type=Number(0), default=0.0,
               help="Linear warm-up of the learning rate: steps, or a share of them below 1."),
        option("--max-grad-norm", group="Training", type=Number(0), default=0.0,
               help="Clip the gradient norm (0: off)."),
        option("--ema", group="Training", type=Number(0, 1), default=0.999, help="Inertia of the averaged weights."),
        option("--precision", group="Training", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="bf16 is autocast over fp32 weights; gates and losses stay fp32."),
        groups.seed_option("Seed of order, initialisation, augmentation and hold-out."),
        option("--shots", group="Watching", metavar="auto|HIGH,LOW", default="auto",
               help="Many above HIGH training images, few below LOW; auto: thirds, or 100,20 from 100 classes."),
        option("--eval-every", group="Watching", type=Number(0, whole=True), default=1,
               help="Report on --eval every N epochs (0: at the end only)."),
        option("--save-every", group="Watching", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Save state every N steps; auto: about once a minute; 0: never."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw the run (.svg, .png or .pdf; repeatable)."),
    )  # fmt: skip


@command(
    "dull-train",
    trainer=True,
    schema=schema,
    examples=[
        "dull-noise digits#train --imbalance .1 --rate .2 --seed 1 > noisy.jsonl",
        "dull-train noisy.jsonl --image-size 16 --aug crop --eval digits#test -o run "
        "| jq -c 'select(.event==\"epoch\")'",
        "jq -c 'select(.dull.flagged)' run/samples.jsonl > to_review.jsonl",
    ],
)
@click.argument("source", default="-", type=PathType("MANIFEST|DIR|digits|idx:DIR", model=True))
@groups.record_options()
@_files()
@_method()
@_model()
@_training()
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Train an image classifier on long-tailed data whose small classes carry large classes' labels.

    Events go to stdout, the model to --out, and beside it samples.jsonl: for every row whether its label is doubtful
    and what it should be. Labels are touched only where a safety gate finds evidence in the noisy data itself; while it
    is shut, DULL is logit adjustment with light gates.
    """
    from toolbox.dull.options import Options
    from toolbox.dull.run import run

    run(Options(**values), call)
