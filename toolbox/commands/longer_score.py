"""longer-score: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together

_WHOLE = Number(1, whole=True)


def schema() -> dict[str, Any]:
    """JSON Schemas of the requests read and of what is added to them."""
    from toolbox.longer.lines import REQUESTS, SCORED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(REQUESTS), "output": json_schema(SCORED)}


def _cache() -> Decorator:
    return together(
        option("--kv-cache/--no-kv-cache", "kv_cache", group="Method", default=True,
               help="Read a history once for all candidates of a request; off: once for each."),
        option("--cache-mb", group="Method", type=Number(0), default=256.0, help="Keep so much between requests."),
        option("--cache-time-bucket", group="Method", type=Number(0, whole=True), default=0,
               help="Score all requests of so long a time as if asked at its start (0: exact)."),
        option("--cache-dtype", group="Method", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="How what is kept is stored."),
        option("--cache-save", group="Input/Output", type=PathType(), help="Write what is kept to this file."),
        option("--cache-load", group="Input/Output", type=PathType(), help="Begin with what this file keeps."),
        option("--check", group="Method", is_flag=True,
               help="Score again without the cache, and end with 1 where a score differs."),
    )  # fmt: skip


@command(
    "longer-score",
    schema=schema,
    examples=[
        "longer-score --model run --data data --split test | longer-eval - --bootstrap 1000",
        'printf \'{"user":"u1","ts":99,"candidates":["i1","i2"]}\\n\' |\n'
        "    longer-score --model run --data data --topk 1 --check",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@option("--model", group="Model", type=PathType("RUN"), required=True, help="A directory that longer-train wrote.")
@option(
    "--data",
    group="Input/Output",
    type=PathType("DIR"),
    help="A dataset of the same vocabularies: histories of requests that bring none.",
)
@option(
    "--split",
    group="Input/Output",
    type=click.Choice(["train", "valid", "test"]),
    help="Score the requests of this split of --data instead of FILE.",
)
@_cache()
@option("--batch-requests", group="Method", type=_WHOLE, default=1, help="Read so many requests' histories together.")
@option("--batch-candidates", group="Method", type=_WHOLE, default=4096, help="Candidates scored at once.")
@option("--topk", group="Method", type=Number(0, whole=True), default=0, help="Add the best so many candidates.")
@option("--timings", group="Method", is_flag=True, help="Add milliseconds.")
@option("--threads", group="Launch", type=_WHOLE, help="CPU threads (default: all cores).")
@groups.seed_option("Accepted as everywhere; scoring draws nothing.")
def main(call: Invocation, **values: Any) -> None:
    """Score the candidates of requests with a model of longer-train.

    A request is {"user", "ts", "candidates"}, perhaps with "history" and "labels". Each line leaves in input order and
    at once, without its history and with "scores" (probabilities), "oov", "hist_len" and "cache".
    """
    from toolbox.longer.score import Options, run

    run(Options(**values), call)
