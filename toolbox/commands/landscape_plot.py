"""landscape-plot: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, option, together


def schema() -> dict[str, Any]:
    """JSON Schemas of the paths read and the lines written."""
    from toolbox.landscape.lines import BinLine, DoneLine
    from toolbox.shell.items import PATH_SHAPES
    from toolbox.shell.records import json_schema

    return {"input": json_schema(PATH_SHAPES), "output": json_schema([BinLine, DoneLine])}


def _outputs() -> Decorator:
    return together(
        option("--limit", group="Input/Output", type=Number(1, whole=True), help="Take only the first so many paths."),
        option("--features", group="Input/Output", type=PathType(),
               help="Map and draw these scores (a features.safetensors) instead of scoring: no model is needed."),
        option("--draw", group="Input/Output", metavar="LIST", default="png",
               help="Draw figures as any of png,svg,pdf; or none."),
        option("--html", group="Input/Output", type=PathType(),
               help="Also write the figures to one HTML file with every thought as hover text (needs plotly)."),
        option("--log-text", group="Input/Output", is_flag=True, help="Keep the thoughts in paths.jsonl."),
    )  # fmt: skip


def _scoring() -> Decorator:
    return together(
        option("--answer-template", group="Method", metavar="TEXT", default="Answer is: {label}) {text}",
               help="The answer whose probability is the distance; slots {label} and {text}."),
        option("--context", group="Method", type=click.Choice(["auto", "prompt", "question"]), default="auto",
               help="What thoughts stand behind: the prompt they were sampled under, or the question with its choices; "
                    "auto: the prompt where the row has one."),
        option("--separator", group="Method", metavar="TEXT", default="\\n",
               help="Between thoughts, and before the answer (\\n, \\t and \\\\ are understood)."),
        option("--split", group="Method", metavar="HOW", default="line",
               help="How a completion is cut into thoughts: line, sentence, or regex:PATTERN."),
        option("--drop-answer-thought", group="Method", is_flag=True,
               help="Leave out the thought that states the path's answer."),
        option("--method", group="Method", type=click.Choice(["tree", "prefix", "naive"]), default="tree",
               help="How answers are scored; the numbers are the same, the cost is not."),
        option("--compat", group="Method", type=click.Choice(["reference"]),
               help="Contexts, answers, landmarks, stages and the reading of answers as in the released code."),
    )  # fmt: skip


def _map() -> Decorator:
    return together(
        option("--project", group="Method", type=click.Choice(["tsne", "pca", "opentsne"]), default="tsne",
               help="To two dimensions; opentsne (a package of its own) for more than 20,000 states."),
        option("--perplexity", group="Method", type=Number(above=1), default=10.0, help="Of t-SNE."),
        option("--landmarks", group="Method", type=click.Choice(["simplex", "paper", "reference"]), default="simplex",
               help="Where the choices lie: at L1 norm 1 like the states, at the paper's 1/k, or the released code's."),
        option("--bins", group="Method", type=Number(1, 20, whole=True), default=5, help="Stages of progress."),
        option("--density", group="Method", type=click.Choice(["kde", "hist"]), default="kde",
               help="Areas of a smooth density, or counts in cells."),
        option("--by", group="Method", metavar="LIST",
               help="A figure and lines for each value of these fields of the row or its `meta`, as in model,variant."),
        option("--per-question", group="Method", is_flag=True, help="A map for each question."),
    )  # fmt: skip


@command(
    "landscape-plot",
    schema=schema,
    examples=[
        "lot-data | jq -c 'select(.choices)' | lot-prompt --variant cot,lot2 |\n"
        "    lm-generate --n 2 --temperature 1 --max-new-tokens 48 > paths.jsonl",
        "landscape-plot --by variant --out land < paths.jsonl > metrics.jsonl",
        "landscape-plot --features land/features.safetensors --project pca --draw svg --out pca < paths.jsonl",
    ],
)
@click.argument("file", default="-", type=PathType())
@groups.record_options()
@groups.output_options("Directory for features, coordinates, metrics and figures")
@_outputs()
@_scoring()
@_map()
@groups.template_options()
@groups.model_options()
@option("--dtype", group="Model", type=click.Choice(["fp32", "bf16", "auto"]), default="fp32",
        help="auto: bf16 on a GPU, fp32 on a CPU.")  # fmt: skip
@option("--device", group="Model", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...")
@option("--batch-tokens", group="Launch", type=Number(1, whole=True), default=4096,
        help="Padded tokens fed at once; changes memory, speed and rounding only.")  # fmt: skip
@option("--seed", group="General", type=Number(0, 2**32 - 1, whole=True), default=42,
        help="Seed of t-SNE and of bootstrap draws.")  # fmt: skip
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Draw how the thoughts of reasoning paths (FILE, default: stdin) move between the answers of their questions.

    Rows are multiple-choice paths: "choices" and "thoughts" or a "completion", beside "id", "question", "answer" and
    what lm-generate adds. A model scores each answer behind each thought; states are mapped to a plane, figures go to
    --out, and stdout gets one JSON line a stage of progress: consistency, uncertainty, perplexity with intervals.
    """
    from toolbox.landscape.run import Options, run

    run(Options(**values, given=groups.given_options()), call)
