"""lwi-fuse: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the model lists read and the lines written."""
    from toolbox.lwi.lines import DoneLine, GroupLine, ModelRow, PlanLine
    from toolbox.shell.records import json_schema

    return {"input": json_schema([ModelRow]), "output": json_schema([GroupLine, DoneLine, PlanLine])}


def _outputs() -> Decorator:
    return together(
        option("-o", "--out", group="Input/Output", type=PathType("DIR|FILE|-"),
               help="A directory like NEW's, a file for bare weights, or - for one safetensors stream."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--resume", group="Input/Output", is_flag=True, recipe=False,
               help="Continue an interrupted run from its last saved state."),
        option("--report", group="Input/Output", type=PathType(), help="Write the lines to this file too."),
        option("--root", group="Input/Output", type=PathType("DIR"), help="Folder that the models' paths start from."),
        option("--max-shard-size", group="Input/Output", metavar="SIZE", default="5GB",
               help="Cut the output into files of at most this size."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw each group's likeness before and after (.svg, .png or .pdf; repeatable)."),
    )  # fmt: skip


def _fusing() -> Decorator:
    return together(
        option("--k", group="Method", metavar="NUMBER|auto", default="0.5",
               help="Weight of OLD, 0 to 1; auto: t/(t+1) after t learned tasks."),
        option("--weights", group="Method", metavar="LIST", help="Weights of all models instead, as in .5,.3,.2."),
        option("--anchor", group="Method", type=click.Choice(["order", "first"]), default="order",
               help="More than two models: fuse one after another, or align all to the first and take one mean (the "
                    "two differ)."),
        option("--align-only", group="Method", is_flag=True, help="Write aligned OLD, without averaging."),
        option("--recalibrate", group="Method", type=PathType("IMAGES", model=True),
               help="Estimate batch-norm statistics anew by one pass over these images (manifest, folder or digits)."),
        option("--groups", group="Method", metavar="REGEX",
               help="Only these groups move (default: all, but the residual stream of models with one base)."),
        option("--deep", group="Method", metavar="N|REGEX",
               help="Put the least similar channels together in the last N groups, or in these (default: 1, and 0 for "
                    "transformers)."),
        option("--no-diversion", group="Method", is_flag=True, help="The same as --deep 0."),
    )  # fmt: skip


def _matching() -> Decorator:
    return together(
        option("--matching", group="Method", type=click.Choice(["coordinate", "greedy", "identity"]),
               default="coordinate", help="Descend to a fixed point, pass once by the inputs, or leave all in place."),
        option("--metric", group="Method", type=click.Choice(["sqeuclidean", "euclidean", "cosine", "gamf", "edge"]),
               default="sqeuclidean", help="Distance of two channels (gamf, edge: small nets)."),
        option("--solver", group="Method", type=click.Choice(["lsa", "sinkhorn"]), default="lsa",
               help="Exact assignment, or an entropic plan that is read out hard."),
        option("--tau", group="Method", type=Number(above=0), default=0.05, help="--solver sinkhorn: temperature."),
        option("--sinkhorn-iters", group="Method", type=Number(1, whole=True), default=200,
               help="--solver sinkhorn: iterations."),
        option("--soft", group="Method", is_flag=True,
               help="--solver sinkhorn: mix channels by the plan itself; loses OLD's function."),
        option("--max-sweeps", group="Method", type=Number(1, whole=True),
               help="Most passes over groups that depend on one another (100; 10 for other metrics and solvers)."),
        option("--shuffle-seed", group="Method", type=Number(0, 2**63 - 1, whole=True),
               help="Self-check: relabel OLD at random first; with NEW the same model every group must come back."),
        option("--spec", group="Model", type=PathType(), help="A permutation spec of your own (YAML)."),
        option("--print-spec", group="Model", is_flag=True, recipe=False,
               help="Print the expanded spec of the last model, or a template for an unknown one, and stop."),
        option("--verify-limit", group="Model", type=Number(0), default=2e9,
               help="Above so many parameters two layers of the same class stand for the model."),
        option("--no-verify", group="Model", is_flag=True, help="Write without proof (recorded in the header)."),
    )  # fmt: skip


@command(
    "lwi-fuse",
    trainer=True,
    schema=schema,
    examples=[
        "lwi-fuse tuned unlearned --k 0.5 -o fused | jq -c 'select(.event==\"group\") | {group, mode, moved}'",
        "lwi-fuse tuned tuned --shuffle-seed 1 --groups . --no-diversion -o back | tail -n 1",
    ],
)
@click.argument("models", nargs=-1, type=PathType("OLD NEW [MORE...] | -", model=True))
@groups.record_options()
@_outputs()
@_fusing()
@_matching()
@option("--device", group="Launch", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
        help="Where products are computed.")  # fmt: skip
@option("--workers", group="Launch", type=Number(1, whole=True), default=1,
        help="Independent groups matched at a time; does not change the result.")  # fmt: skip
@groups.launch_options()
@groups.seed_option("Seed of the order of groups and of the proof.")
def main(call: Invocation, **values: Any) -> None:
    """Fuse checkpoints of one architecture: align the channels of OLD with NEW's, then average (LwI).

    OLD is relabelled by permutations that leave its function unchanged, which is proved by running it; similar channels
    come together in shallow groups, dissimilar ones in the --deep groups. Models are Hugging Face directories, bare
    .safetensors files or smollm2; - reads a list {"model": "path"}, the oldest first. One JSON line a permutation group
    goes to stdout (to --report with -o -), the fused model to --out.
    """
    from toolbox.lwi.choices import Options
    from toolbox.lwi.fuse import run

    run(Options(**values), call)
