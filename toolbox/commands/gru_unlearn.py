"""gru-unlearn: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

OBJECTIVES = (
    *("ga", "graddiff", "klmin", "npo", "simnpo", "idk", "dpo"),
    *("wga", "satimp", "tnpo", "wtnpo", "rmu", "undial", "ceu"),
)


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.training.events import trainer_schema

    return trainer_schema()


def _method() -> Decorator:
    number = Number(0)
    return together(
        option("--objective", group="Method", type=click.Choice(OBJECTIVES), default="npo",
               help="What is descended to forget."),
        option("--rectify/--no-rectify", group="Method", default=True,
               help="Take from its gradient what would hurt retention; off: the bare objective, conflicts reported."),
        option("--ema", group="Method", type=Number(above=0, high=1), default=0.8,
               help="Weight of the NEW retain gradient in the average: .99 is almost no smoothing, 1 is none."),
        option("--retain-loss", group="Method", type=click.Choice(["nll", "kl"]), default="nll",
               help="Whose gradient must not be hurt; also the objective's own retain term."),
        groups.kl_positions_option(),
        option("--scope", group="Method", type=click.Choice(["model", "layer", "tensor"]), default="model",
               help="One test over all parameters (the method), or an ablation by layer or tensor."),
        option("--geometry", group="Method", type=click.Choice(["raw", "optimizer"]), default="raw",
               help="optimizer: also correct AdamW's step, which the projection of the gradient does not bind."),
        option("--cos-clip", group="Method", type=Number(-1, high=0),
               help="Remove no more than this cosine asks for, as the authors' code can (-.5 there)."),
        option("--add-retain", group="Method", type=number, default=0.0,
               help="Add so much of the retain gradient, unprojected."),
        option("--add-kl", group="Method", type=number, default=0.0,
               help="Add so much of the KL to the first model on retain rows, unprojected."),
        option("--ema-dtype", group="Method", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="Of the average."),
        option("--ema-device", group="Method", type=click.Choice(["auto", "cpu"]), default="auto",
               help="cpu: keep the average out of the GPU's memory."),
        option("--alpha", group="Objective", type=number,
               help="Factor of its own retain term (1 for graddiff, klmin, idk, rmu; .1 for satimp; else 0)."),
        option("--gamma", group="Objective", type=number,
               help="Factor of its forget term (.125 for simnpo, else 1)."),
        option("--beta", group="Objective", type=Number(above=0),
               help="npo, dpo: .1; simnpo: 4.5; undial: 10."),
        option("--delta-margin", group="Objective", type=Number(), help="simnpo: its margin (0)."),
        option("--beta1", group="Objective", type=number, help="satimp: saturation (5)."),
        option("--beta2", group="Objective", type=number, help="satimp: importance (.1)."),
        option("--layer", group="Objective", type=Number(0, whole=True), help="rmu: decoder layer, from 0 (7)."),
        option("--steer", group="Objective", type=number, help="rmu: length of the vector steered to (20)."),
        option("--refusals", group="Data", type=PathType(),
               help="idk, dpo: refusals, one a line, for rows without `alternate`."),
        option("--log-geffect", group="Watching", type=PathType(),
               help="Write each step's product of the two gradients by depth, and its figure beside it."),
    )  # fmt: skip


@command(
    "gru-unlearn",
    trainer=True,
    schema=schema,
    examples=[
        "gru-unlearn --model tuned --forget forget.jsonl --retain retain.jsonl --out unlearned | tail -n 1",
        "gru-unlearn --model tuned --objective satimp --forget forget.jsonl --retain retain.jsonl --out u \\\n"
        "    --plot u.svg --stop-when 'forget_es<=.1'",
        "gru-unlearn --model tuned --objective ga --no-rectify --forget forget.jsonl --retain retain.jsonl --out bare",
    ],
)
@groups.unlearning_options()
@groups.record_options()
@groups.output_options("Directory of the unlearned model, or of the adapter with --lora-r")
@_method()
@groups.row_options()
@groups.model_options()
@groups.training_options(
    epochs=5, batch_size=32, weight_decay=0.01, lr_help="auto: 5e-5 below 500 M parameters, 2e-5 up to 3 B, else 1e-5."
)
@groups.adapter_options()
@groups.watching_options(" beside forget and retain", eval_every="epoch")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Make a causal language model forget the rows of --forget without hurting those of --retain (GRU).

    Any unlearning objective of the field; from each step's gradient g the part against the averaged retain gradient r
    is removed: g - (<g,r>/<r,r>) r where <g,r> < 0. Rows are {"question", "answer"}, {"prompt", "completion"},
    {"messages"} or {"text"}. Events go to stdout as JSON lines, a table before/after to stderr, the model to --out.
    """
    from toolbox.unlearning.gru_run import Options, run

    run(Options(**values), call)
