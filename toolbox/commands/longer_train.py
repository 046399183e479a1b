"""longer-train: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

_WHOLE = Number(1, whole=True)


def schema() -> dict[str, Any]:
    """JSON Schemas of the events that the data set came from and of those written."""
    from toolbox.longer.lines import EVENTS, TRAINED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(EVENTS), "output": json_schema(TRAINED)}


def _method() -> Decorator:
    return together(
        option("--arch", group="Method", default="longer", help="LONGER, or a simpler model in the same harness.",
               type=click.Choice(["longer", "transformer", "hstu", "din", "sumpool", "base"])),
        option("--max-len", group="Method", type=_WHOLE, default=2048, help="Events of a history, the newest."),
        option("--dim", group="Method", type=_WHOLE, default=32, help="Width of an event."),
        option("--merge", group="Method", type=_WHOLE, default=8, help="Adjacent events that become one token."),
        option("--inner-layers", group="Method", type=Number(0, whole=True), default=1,
               help="Blocks within a group before it is merged."),
        option("--queries", group="Method", metavar="N|SHARE", default="100",
               help="Merged tokens that are queries, as in 100 or 40%; keys are always all."),
        option("--query-strategy", group="Method", default="recent", help="Which tokens are queries.",
               type=click.Choice(["recent", "uniform", "recent+uniform", "learnable"])),
        option("--layers", group="Method", type=Number(0, whole=True), default=1,
               help="Self-attention layers behind the cross-attention."),
        option("--heads", group="Method", type=_WHOLE, help="Attention heads (default: one per 64 of width)."),
        option("--globals", "globals_", group="Method", metavar="LIST",
               help="User-side global tokens, any of cls,uid, or none (default: uid only where test users are known)."),
        option("--cls", group="Method", type=_WHOLE, default=1, help="Learned CLS tokens."),
        option("--time-delta/--no-time-delta", "time_delta", group="Method", default=True,
               help="Tell events how long ago they were."),
        option("--position/--no-position", group="Method", default=True, help="Tell events their place."),
        option("--readout", group="Method", type=click.Choice(["target", "target+cls"]), default="target",
               help="Rows that the head reads."),
        option("--dropout", group="Method", type=Number(0, high=0.9), default=0.0, help="Inside blocks."),
        option("--attention", group="Method", type=click.Choice(["auto", "sdpa", "flex"]), default="auto",
               help="auto: sdpa; flex needs CUDA."),
        option("--embedding", group="Method", type=click.Choice(["dense", "torchrec"]), default="dense",
               help="Tables as plain embeddings, or sharded by TorchRec."),
        option("--torchrec-kernel", group="Method", default="fused", help="Where TorchRec keeps tables.",
               type=click.Choice(["fused", "fused_uvm", "fused_uvm_caching", "key_value"])),
        option("--init-from", group="Method", type=PathType("RUN"),
               help="Begin from this model; its --max-len may be smaller."),
    )  # fmt: skip


def _budget() -> Decorator:
    return together(
        option("--batch-requests", group="Training", type=_WHOLE, default=64, help="Requests of one step."),
        option("--max-candidates", group="Training", type=_WHOLE, default=64,
               help="Cut larger requests into pieces of so many candidates."),
        option("--micro-batch", group="Training", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="Requests of one backward pass of one process; changes memory and speed, not the result."),
        option("--epochs", group="Training", type=Number(above=0), default=1.0,
               help="Passes over the requests; click models over-fit from the second."),
        option("--max-labels", group="Training", type=_WHOLE, help="End with the step that reaches so many labels."),
        option("--max-steps", group="Training", type=_WHOLE, help="End after so many steps."),
        option("--order", group="Training", type=click.Choice(["shuffle", "time"]), default="shuffle",
               help="Requests in random order, or by their time."),
        option("--early-stop", group="Training", type=click.Choice(["auc", "logloss", "gauc"]),
               help="Stop when this does not improve on valid, and keep the best."),
        option("--patience", group="Training", type=_WHOLE, default=2, help="--early-stop: evaluations to wait."),
    )  # fmt: skip


def _optimising() -> Decorator:
    return together(
        option("--lr", group="Training", type=Number(above=0), default=1e-3, help="Of the dense part, by AdamW."),
        option("--emb-lr", group="Training", type=Number(above=0), default=0.05,
               help="Of the tables, by row-wise Adagrad."),
        option("--weight-decay", group="Training", type=Number(0), default=0.01, help="On matrices of the dense part."),
        option("--warmup", group="Training", type=Number(0), default=0.02,
               help="Linear warm-up: steps, or a share of them below 1."),
        option("--schedule", group="Training", type=click.Choice(["constant", "linear", "cosine"]), default="cosine",
               help="Learning rates after the warm-up."),
        option("--max-grad-norm", group="Training", type=Number(0), default=1.0,
               help="Clip the dense part's gradient norm (0: off)."),
        option("--optimizer", group="Training", type=click.Choice(["adamw", "sgd"]), default="adamw",
               help="adamw: with row-wise Adagrad for tables; sgd: for both."),
        option("--precision", group="Training", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32",
               help="bf16 is autocast; tables, time, logits and loss stay fp32."),
        option("--recompute", group="Training", type=click.Choice(["none", "attention", "blocks"]), default="none",
               help="What is computed again in backward instead of being kept."),
        groups.seed_option("Seed of order and initialisation."),
    )  # fmt: skip


def _watching() -> Decorator:
    return together(
        option("--eval-every", group="Watching", type=Number(0, whole=True), default=0,
               help="Evaluate valid every N steps (0: at the end only)."),
        option("--save-every", group="Watching", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Save state every N steps; auto: about once a minute; 0: never."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw loss and evaluations (.svg, .png or .pdf; repeatable)."),
    )  # fmt: skip


@command(
    "longer-train",
    trainer=True,
    schema=schema,
    examples=[
        "longer-train data --out run --max-len 128 --merge 4 --queries 40% | tail -n 1 | jq .test.auc",
        "longer-train data --out din --arch din --max-len 50",
    ],
)
@click.argument("data", type=PathType("DIR"))
@groups.output_options("Directory of the model")
@_method()
@_budget()
@_optimising()
@_watching()
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Learn P(label | whole history, candidate) from a dataset that longer-prep made.

    Each history is read once for all candidates of its request. Events go to stdout as JSON lines, the last with AUC,
    LogLoss and GAUC on valid and test; the model goes to --out.
    """
    from toolbox.longer.options import Options
    from toolbox.longer.run import run

    run(Options(**values), call)
