"""satimp-unlearn: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the events written."""
    from toolbox.training.events import trainer_schema

    return trainer_schema()


def _method() -> Decorator:
    number, share = Number(0), Number(0, high=1)
    return together(
        option("--weighting", group="Method",
               type=click.Choice(["satimp", "simsat", "simimp", "ga", "wga", "annotated", "tnpo", "wtnpo"]),
               default="satimp",
               help="Token weight: p^b1 (1-p)^b2, p^b1, (1-p)^b2, 1 (gradient ascent), p, 1 on key words, or against "
                    "the first model's p."),
        option("--beta1", group="Method", type=number, help="satimp, simsat: saturation, spare what is forgotten (5)."),
        option("--beta2", group="Method", type=number, help="satimp, simimp: importance, spare what is certain (.1)."),
        option("--gamma", group="Method", type=number, default=1.0, help="Factor of the forget loss."),
        option("--alpha", group="Method", type=number, default=0.1, help="Factor of the retain loss."),
        option("--retain-loss", group="Method", type=click.Choice(["nll", "kl", "none"]), default="nll",
               help="kl: stay near the first model; none: the retain rows are only watched."),
        groups.kl_positions_option(),
        option("--granularity", group="Method", type=click.Choice(["token", "group", "instance", "batch"]),
               default="token", help="What one weight covers."),
        option("--group-size", group="Method", type=Number(1, whole=True),
               help="--granularity group: tokens of a group, of like weight (10)."),
        option("--instance-prob", group="Method", type=click.Choice(["sum", "mean"]),
               help="--granularity instance, batch: an answer's probability is the product over its tokens (sum, the "
                    "default), or their geometric mean."),
        option("--sampling", group="Method", type=click.Choice(["soft", "topk", "bottomk", "random"]), default="soft",
               help="Keep only the tokens of each row with high loss, with low loss, or a random share."),
        option("--fraction", group="Method", type=share, help="k of --sampling (.15 for topk, else .5)."),
        option("--soft-p", group="Method", type=share, help="--sampling random: weight of the share (1)."),
        option("--reduction", group="Method", type=click.Choice(["token", "sequence", "sum"]), default="token",
               help="Mean over tokens, over rows of their means, or the plain sum."),
        option("--base", group="Method", type=click.Choice(["ga", "npo"]), default="ga",
               help="npo: put the weighted l - l_ref of a row into NPO's bounded loss."),
        option("--beta", group="Method", type=Number(above=0), help="--base npo: its beta (.1)."),
        option("--key-words", group="Data", type=PathType(),
               help="Annotations of the forget rows, joined by id or index (--weighting annotated)."),
        option("--log-weights", group="Watching", type=PathType(),
               help="Write each step's weights against probability, and their figure beside it."),
    )  # fmt: skip


@command(
    "satimp-unlearn",
    trainer=True,
    schema=schema,
    examples=[
        "satimp-unlearn --model tuned --forget forget.jsonl --retain retain.jsonl --out unlearned | tail -n 1",
        "jq -c 'select(.person==\"Ada Quill\")' people.jsonl |\n"
        "  satimp-unlearn --model tuned --forget - --retain rest.jsonl --out u --plot u.svg \\\n"
        "    --stop-when 'forget_es<=.1 and retain_es>=.9*start'",
    ],
)
@groups.unlearning_options()
@groups.record_options()
@groups.output_options("Directory of the unlearned model, or of the adapter with --lora-r")
@_method()
@groups.row_options()
@groups.model_options()
@groups.training_options(
    epochs=5, batch_size=16, lr_help="auto: 5e-5 below 500 M parameters, 2e-5 up to 3 B, else 1e-5."
)
@groups.adapter_options()
@groups.watching_options(" beside forget and retain", eval_every="epoch")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Make a causal language model forget the rows of --forget and keep those of --retain (SatImp).

    Gradient ascent on the forget rows, each token weighted by p^beta1 (1-p)^beta2, plus alpha times the usual loss on
    as many retain rows. Rows are {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}. Events
    go to stdout as JSON lines, a table before/after to stderr, the model to --out.
    """
    from toolbox.unlearning.run import Options, run

    run(Options(**values), call)
