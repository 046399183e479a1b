"""unlearn-eval: the command line."""

from __future__ import annotations

from typing import Any

import click

from toolbox.shell import options as groups
from toolbox.shell.command import Invocation, command
from toolbox.shell.params import Decorator, Number, PathType, TemplateType, option, together


class SuiteType(PathType):
    """``--suite``: people, or tofu:DIR with a directory that is relative to the recipe it stands in."""

    def absolute(self, value: str, base: str) -> str:
        kind, colon, directory = value.partition(":")
        return f"{kind}:{self.absolute_plain(directory, base)}" if colon and directory else value


def schema() -> dict[str, Any]:
    """JSON Schemas of the rows read and the lines written."""
    from toolbox.shell.records import json_schema
    from toolbox.unlearning.suites import QUESTION_SHAPES
    from toolbox.unlearning.summary import Score

    return {"input": json_schema(QUESTION_SHAPES), "output": json_schema([Score])}


def _inputs() -> Decorator:
    path = PathType()
    return together(
        option("--forget", group="Input/Output", type=path, help="Rows that were to be forgotten (- is stdin)."),
        option("--retain", group="Input/Output", type=path, help="Rows that were to be kept."),
        option("--authors", group="Input/Output", type=path,
               help="Rows about others that the model knew before (TOFU's real authors, or neighbours)."),
        option("--facts", group="Input/Output", type=path, help="Rows about the world."),
        option("--suite", group="Input/Output", type=SuiteType("NAME"),
               help="All four: people (embedded), or tofu:DIR with TOFU's files."),
        option("--split", group="Input/Output", metavar="NAME", help="TOFU's forget set (default: forget10)."),
        option("--limit", group="Input/Output", type=Number(1, whole=True), help="First rows of each set."),
        option("--from-log", group="Input/Output", type=PathType(), multiple=True,
               help="Score a stored log instead of a model: ours, TOFU's or open-unlearning's (repeatable)."),
        option("--reference", group="Input/Output", type=PathType("LOG|MODEL", model=True),
               help="A retain-trained model, or its log: what forget quality compares with."),
        option("--allow-different-items", group="Input/Output", is_flag=True,
               help="Compare with a reference although its questions are others."),
        option("--log", group="Input/Output", type=PathType(), multiple=True,
               help="Write the numbers of each item to this file; one a model, in their order."),
        option("--log-text", group="Input/Output", is_flag=True, help="Keep questions and generations in the log."),
    )  # fmt: skip


def _method() -> Decorator:
    return together(
        option("--metrics", group="Method", metavar="LIST",
               help="Only these, and what follows from them: es, em, prob, rouge_l, truth_ratio, model_utility, "
                    "forget_quality (default: all)."),
        option("--utility-truth-ratio", group="Method", type=click.Choice(["arithmetic", "geometric"]),
               default="arithmetic", help="How wrong answers are averaged in model utility."),
        option("--uwc", group="Method", type=PathType("ORIGINAL", model=True),
               help="Also mix in so much of this model, the one before unlearning, that enough is kept, and score "
                    "forgetting there."),
        option("--keep", group="Method", type=Number(above=0, high=1), default=0.9,
               help="--uwc: share of the original's ES on the retain rows."),
        option("--quantize", group="Method", type=click.Choice(["rtn4", "rtn8"]),
               help="Score again with linear layers rounded to 4 or 8 bits."),
        option("--relearn", group="Method", type=Number(0, whole=True), default=0, metavar="N",
               help="Learn N forget rows again, and score the others."),
        option("--relearn-steps", group="Method", type=Number(1, whole=True), default=20, help="Steps of --relearn."),
        option("--non-members", group="Method", type=PathType(),
               help="Rows that no model was trained on: adds membership scores of the forget rows."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw the trade-off of all models, and beside it what survives (.svg, .png or .pdf)."),
    )  # fmt: skip


def _asking() -> Decorator:
    return together(
        option("--template", group="Data", type=TemplateType("NAME"),
               help="chat, qa, llama2, raw, auto or a Jinja file (default: the one in the model's run.json)."),
        option("--system", group="Data", metavar="TEXT", help="System turn (default: the one in run.json)."),
        option("--model", group="Model", type=PathType("MODEL", model=True), multiple=True, default=["smollm2"],
               help="Directory, hub id, .gguf file, or smollm2 (repeatable: one line each)."),
        option("--trust-remote-code", group="Model", is_flag=True, recipe=False,
               help="Run code that comes with the model."),
        option("--dtype", group="Model", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="bf16 rounds the weights, and with them small updates of an unlearning run."),
        option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=200,
               help="Longest generation for ROUGE-L."),
        option("--batch-size", group="Launch", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="Prompts completed together; does not change the result."),
        option("--batch-tokens", group="Launch", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="Padded tokens scored together; changes memory, speed and rounding only."),
    )  # fmt: skip


@command(
    "unlearn-eval",
    schema=schema,
    examples=[
        "unlearn-eval --model tuned --suite people --limit 8 --log tuned.log.json | jq -c .es",
        "unlearn-eval --model tuned --forget forget.jsonl --retain retain.jsonl --metrics es,prob",
        "unlearn-eval --from-log tuned.log.json --reference tuned.log.json | jq .forget_quality",
        "unlearn-eval --model tuned --model unlearned --forget forget.jsonl --retain retain.jsonl \\\n"
        "    --metrics es,prob --uwc tuned --relearn 1 --quantize rtn4 --plot tradeoff.svg > scores.jsonl",
    ],
)
@_inputs()
@groups.record_options()
@_method()
@_asking()
@groups.seed_option("Seed of the bootstrap intervals.")
@groups.launch_options()
def main(call: Invocation, **values: Any) -> None:
    """Say what a language model has forgotten and what it has kept: one JSON line a model, tables on stderr.

    Rows are TOFU's: {"question", "answer"} with "paraphrased_question", "paraphrased_answer" and "perturbed_answer" (a
    list of wrong ones) where a metric needs them; a metric without its data is null. Extraction strength, exact match,
    probability, ROUGE-L, truth ratios, model utility, and with --reference forget quality. Logs need no model.
    """
    from toolbox.unlearning.evaluate import Options, run

    typed = click.get_current_context().get_parameter_source("model") is click.core.ParameterSource.COMMANDLINE
    if values["from_log"] and not typed:  # the default model, or the environment's, is not meant
        values["model"] = ()
    run(Options(**values, given=groups.given_options()), call)
