"""longer-prep: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the events read and the line written."""
    from toolbox.longer.lines import EVENTS, PREPARED
    from toolbox.shell.records import json_schema

    return {"input": json_schema(EVENTS), "output": json_schema(PREPARED)}


def _files() -> Decorator:
    return together(
        option("--out", group="Input/Output", type=PathType("DIR"),
               help="Directory of the dataset, made by this run."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--verify", group="Input/Output", type=PathType("DIR"), recipe=False,
               help="Check a dataset instead: hashes, and that no history holds its own request or later."),
        option("--format", group="Input/Output", type=click.Choice(["auto", "jsonl", "csv", "tsv", "inter"]),
               default="auto", help="auto: by the file's name, else JSON lines."),
        option("--samples", group="Input/Output", type=PathType(),
               help="Labelled impressions; FILE is then history only."),
        option("--items", group="Input/Output", type=PathType(), help="Features of items, joined by `item`."),
    )  # fmt: skip


def _features() -> Decorator:
    many = {"multiple": True, "metavar": "LIST"}
    return together(
        option("--side", group="Method", help="Features known of candidates and of past events, as in cat,brand.",
               **many),
        option("--event-side", group="Method", help="Features of past events only, such as what was done.", **many),
        option("--context", group="Method", help="Features of the request, such as the hour.", **many),
        option("--history-label/--no-history-label", "history_label", group="Method", default=True,
               help="Let past events carry their own label."),
        option("--min-count", group="Method", type=Number(1, whole=True), default=2,
               help="Items rarer than this in training share one row."),
        option("--hash-buckets", group="Method", type=Number(1, whole=True),
               help="Hash items into so many rows instead of keeping a vocabulary."),
        option("--ts-scale", group="Method", type=Number(above=0), default=1.0, help="Multiply times by this."),
    )  # fmt: skip


def _samples() -> Decorator:
    return together(
        option("--split", group="Method", metavar="HOW", default="temporal:.8,.1,.1",
               help="temporal:SHARES, user:FOLDS (one is test), or column:NAME=VALUE (those rows are test)."),
        option("--request-window", group="Method", type=Number(1, whole=True),
               help="So many samples of a user in a row are one request; default: equal user, request and time."),
        option("--negatives", group="Method", type=Number(0, whole=True), default=0,
               help="Draw so many negatives for each event of a log that has only positives."),
        option("--neg", group="Method", type=click.Choice(["popularity", "uniform"]), default="popularity",
               help="Draw from earlier events, or from items seen earlier."),
    )  # fmt: skip


@command(
    "longer-prep",
    schema=schema,
    examples=[
        "longer-prep log.jsonl --map 'label=rating>=4' --out data",
        "longer-prep --verify data",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@_files()
@_features()
@_samples()
@groups.seed_option("Seed of user folds and of negatives.")
def main(call: Invocation, **values: Any) -> None:
    """Pack a log of who touched what and when into a dataset for longer-train.

    Rows are {"user", "item", "ts"}, with "label" 0 or 1, "request" and features where there are any; JSON lines, CSV,
    TSV, RecBole's .inter, or recbole:NAME for a data set inside an installed recbole. Histories are pointers to
    events strictly before the request. One JSON line says what was made.
    """
    from toolbox.longer.prep import Options, run

    run(Options(**values), call)
