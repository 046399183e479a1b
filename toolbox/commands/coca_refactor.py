"""coca-refactor: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read; rows leave in the same shape."""
    from toolbox.coca.pairs import SHAPES
    from toolbox.shell.records import json_schema

    return {"input": json_schema(SHAPES), "output": json_schema(SHAPES)}


def check(values: dict[str, Any]) -> None:
    """What does not fit together among the options."""
    from toolbox.coca import refactor

    values = {name: value for name, value in values.items() if name != "print_template"}
    refactor.check(refactor.Options(**values, given=groups.given_options()))


def _rows() -> Decorator:
    return together(
        groups.record_options(),
        option("--limit", group="Input/Output", type=Number(0, whole=True), help="Read only the first so many rows."),
        option("-o", "--out", group="Input/Output", type=PathType(), default="-",
               help="Write rows to this file, which appears when it is whole (- is stdout)."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--summary", group="Input/Output", type=PathType(), help="Write the counts to this JSON file."),
        option("--log-text", group="Input/Output", is_flag=True, recipe=False,
               help="Put what the teacher wrote into --rejects too."),
        option("--responses", group="Input/Output", type=PathType(), help="Another name for --replay."),
        option("--emit-requests", group="Input/Output", is_flag=True,
               help="Write the questions as a batch file and ask nobody."),
        option("--no-meta", "meta", group="Input/Output", is_flag=True, flag_value=False, default=True,
               show_default=False, help="Leave out what was found, under `coca`."),
        option("--keep-vanilla-text", group="Input/Output", is_flag=True, help="Keep the answer as it was, too."),
        option("--label", group="Data", type=click.Choice(["harmful", "benign"]),
               help="The label of rows that have none."),
        option("--turns", group="Data", type=click.Choice(["last", "all"]), default="last",
               help="Which answers of a conversation."),
        option("--reprocess", group="Data", is_flag=True, help="Annotate answers that have the five tags already."),
    )  # fmt: skip


def _teaching() -> Decorator:
    return together(
        option("--template", group="Method", type=PathType("FILE.yaml"), default="coca-v1",
               help="What the teacher is told: coca-v1, or a file of the same keys."),
        option("--print-template", group="Method", is_flag=True, recipe=False, help="Print coca-v1 and stop."),
        option("--few-shot", group="Method", type=Number(0, whole=True), default=2, help="Examples shown."),
        option("--decode", group="Method", type=click.Choice(["auto", "forced", "free", "json"]), default="auto",
               help="Tag by tag (a model here), at once, or as JSON (an endpoint); auto: forced here, else free."),
        option("--response-source", group="Method", type=click.Choice(["splice", "teacher"]), default="splice",
               help="splice: the answer as given; teacher: it is typed again and compared."),
        option("--label-hint/--no-label-hint", group="Method", default=True,
               help="Tell the teacher the label, where there is one."),
        option("--unsafe-vanilla", group="Method", type=click.Choice(["reject", "refuse"]), default="reject",
               help="Labelled harmful, and the answer complies: reject it, or put a fixed refusal in its place."),
        option("--tag-style", group="Method", type=click.Choice(["spaced", "underscored"]), default="spaced",
               help="How the fourth tag is spelt."),
        option("--tag-prefix", group="Method", metavar="TEXT", default="",
               help="Before every tag's name, for students that have a <think> of their own."),
        option("--ablate", group="Method", metavar="KIND",
               help="fix-concept[=TEXT], fix-think[=TEXT], drop:TAG, order:A,B,..., or length-matched."),
        option("--temperature", group="Generation", type=Number(0), default=0.0, help="0 is greedy."),
        option("--max-tokens", group="Generation", type=Number(1, whole=True), default=256,
               help="Longest annotation in tokens."),
    )  # fmt: skip


def _verifying() -> Decorator:
    return together(
        option("--verify", group="Method", type=click.Choice(["strict", "lenient", "off"]), default="strict",
               help="All rules, those that do harm when broken, or only those that nothing switches off."),
        option("--verify-only", group="Method", is_flag=True, help="Judge records that are there; ask nobody."),
        option("--fix", group="Method", is_flag=True,
               help="With --verify-only: mend blanks and a missing last end tag."),
        option("--max-attempts", group="Method", type=Number(1, whole=True), default=3,
               help="Tries a row, each told what the last one broke."),
        option("--on-reject", group="Method", type=click.Choice(["drop", "keep-vanilla", "fail"]), default="drop",
               help="What becomes of a row that no try gets through."),
        option("--min-accept", group="Method", type=Number(0, 1), default=0.0,
               help="Fail in the end if a smaller share of rows was accepted."),
        option("--tokenizer", group="Method", type=PathType("MODEL", model=True),
               help="The student, to tell the length of rows."),
        option("--max-length", group="Method", type=Number(1, whole=True), help="Reject rows of more tokens."),
        option("--think-lang", group="Method", metavar="CODE",
               help="Language of the reasoning (default: the request's), as in en; told by its script."),
    )  # fmt: skip


@command(
    "coca-refactor",
    schema=schema,
    before_workers=check,
    examples=[
        "head -4 safety.jsonl | coca-refactor --label harmful --rejects rejects.jsonl > enhanced.jsonl",
        "coca-refactor --verify-only enhanced.jsonl | jq -r '.coca.decision'",
        "coca-refactor --backend openai --model teacher --emit-requests < safety.jsonl > requests.jsonl",
        "coca-refactor --print-template > mine.yaml && coca-refactor --template mine.yaml --dry-run safety.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@_rows()
@_teaching()
@_verifying()
@groups.model_options()
@groups.backend_options()
@groups.endpoint_options()
@groups.inference_options("Questions", window=64)
@groups.launch_options()
@groups.seed_option("Seed of sampling; each try moves on by one.")
def main(call: Invocation, **values: Any) -> None:
    """Make safety data that reasons about concepts before it answers (COCA) of the pairs in FILE (default: stdin).

    A pair is a request and a safe answer: "prompt" and "completion", "messages", "instruction" and "output", or
    "conversations", with a "label" (harmful, benign) if known. A teacher names the concepts, says which are unsafe,
    decides; the answer itself is copied. Rows leave in the same shape and order, each checked by fourteen rules.
    """
    if values.pop("print_template"):
        from toolbox.coca.template import template_text

        with call.streams.open_stdout() as out:
            out.write(template_text().encode())
        return
    from toolbox.coca.refactor import Options, run

    run(Options(**values, given=groups.given_options()), call)
