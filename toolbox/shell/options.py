"""The option groups that commands share, as decorators."""

from __future__ import annotations

import re
from typing import Any

import click

from toolbox.shell.params import Decorator, Number, PathType, TemplateType, option, together


def seed_option(help: str = "Seed of everything random.") -> Decorator:
    return option("--seed", group="General", type=Number(0, 2**63 - 1, whole=True), default=0, help=help)


def record_options() -> Decorator:
    """How records are read: --map, --on-bad, --rejects."""
    return together(
        option("--map", "map_fields", group="Input/Output", multiple=True, metavar="NEW=OLD",
               help="Rename fields, as in question=text,answer=labels."),
        option("--on-bad", group="Input/Output", type=click.Choice(["fail", "skip"]), default="fail",
               help="What to do with a bad record."),
        option("--rejects", group="Input/Output", type=PathType(), help="Write skipped records to this file."),
    )  # fmt: skip


def output_options(what: str) -> Decorator:
    """The output directory of a trainer."""
    return together(
        option("--out", group="Input/Output", type=PathType("DIR"), required=True, help=f"{what} (made by this run)."),
        option("--overwrite", group="Input/Output", is_flag=True, recipe=False, help="Replace an existing output."),
        option("--resume", group="Input/Output", is_flag=True, recipe=False,
               help="Continue an interrupted run from its last saved state."),
    )  # fmt: skip


def model_options() -> Decorator:
    """Which model."""
    return together(
        option("--model", "-m", group="Model", type=PathType("MODEL", model=True), default="smollm2",
               help="Directory, hub id, .gguf file, or smollm2 (embedded, no download)."),
        option("--trust-remote-code", group="Model", is_flag=True, recipe=False,
               help="Run code that comes with the model."),
    )  # fmt: skip


def template_options() -> Decorator:
    """How conversations become tokens."""
    return together(
        option("--template", group="Data", type=TemplateType("NAME"), default="auto",
               help="auto (the model's chat template, else qa), chat, qa, llama2, raw, or a Jinja file."),
        option("--system", group="Data", metavar="TEXT", help="System turn, instead of the template's own."),
    )  # fmt: skip


def row_options() -> Decorator:
    """How training rows are cut and labelled."""
    return together(
        template_options(),
        option("--max-length", group="Data", type=Number(2, whole=True), default=512,
               help="Cut rows at so many tokens."),
        option("--loss-on", group="Data", type=click.Choice(["assistant", "last", "all"]), default="assistant",
               help="Which turns of a conversation are labelled."),
    )  # fmt: skip


def training_options(
    *,
    epochs: float | str = 5,
    batch_size: int = 16,
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    lr_help: str,
    epochs_help: str = "Passes over the rows.",
    whole_model: bool = True,
    schedule: str = "constant",
    max_grad_norm: float = 0.0,
) -> Decorator:
    """The one loop's settings; the arguments are this command's defaults.

    ``epochs`` may be the word auto; without ``whole_model`` there is no choice of the model's parameters.
    """
    whole = Number(1, whole=True)
    passes = Number(above=0, words=[epochs] if isinstance(epochs, str) else [])
    chosen = option("--train-params", group="Training", metavar="REGEX",
                    help="Train only parameters whose name matches.")  # fmt: skip
    return together(
        option("--lr", group="Training", type=Number(above=0, high=1e30, words=["auto"]), default="auto",
               help=lr_help),
        option("--epochs", group="Training", type=passes, default=epochs, help=epochs_help),
        option("--batch-size", group="Training", type=whole, default=batch_size,
               help="Rows of one step, over all processes."),
        option("--micro-batch", group="Training", type=Number(1, whole=True, words=["auto"]), default="auto",
               help="Rows of one backward pass of one process; changes memory and speed, not the result."),
        option("--weight-decay", group="Training", type=Number(0), default=weight_decay, help="On matrices only."),
        option("--warmup", group="Training", type=Number(0), default=warmup,
               help="Linear warm-up: steps, or a share of them below 1."),
        option("--schedule", group="Training", type=click.Choice(["constant", "linear", "cosine"]), default=schedule,
               help="Learning rate after the warm-up."),
        option("--max-grad-norm", group="Training", type=Number(0), default=max_grad_norm,
               help="Clip the gradient norm (0: off)."),
        option("--precision", group="Training", type=click.Choice(["fp32", "bf16"]), default="fp32",
               help="bf16 is autocast over fp32 weights."),
        option("--optimizer", group="Training", type=click.Choice(["adamw", "sgd"]), default="adamw",
               help="Optimiser; adamw has betas .9 and .999, sgd no momentum."),
        option("--grad-checkpointing", group="Training", is_flag=True, help="Less memory, one more forward pass."),
        *([chosen] if whole_model else []),
        option("--loss-chunk", group="Training", type=whole, default=1024,
               help="Labelled positions whose logits exist at once."),
        seed_option("Seed of order and initialisation."),
    )  # fmt: skip


def unlearning_options() -> Decorator:
    """What is to be forgotten and kept."""
    return together(
        option("--forget", group="Input/Output", type=PathType(), required=True, help="Rows to forget (- is stdin)."),
        option("--retain", group="Input/Output", type=PathType(), help="Rows to keep (- is stdin)."),
        option("--strict", group="Input/Output", is_flag=True, help="Rows in both sets are an error, not a warning."),
        option("--delta", group="Input/Output", type=PathType(),
               help="Write the change of the weights to this safetensors file too."),
        option("--retain-batch", group="Data", type=Number(0, whole=True), default=0,
               help="Retain rows of one step (0: as many as forget rows)."),
        option("--holdout", group="Data", type=Number(0, whole=True), default=0,
               help="Keep the first so many retain rows for evaluation only."),
    )  # fmt: skip


def kl_positions_option() -> Decorator:
    """Where a KL retain loss is taken."""
    return option("--kl-positions", group="Method", type=click.Choice(["labelled", "all"]), default="labelled",
                  help="all: sum the KL over prompt and padding too, as TOFU's code does.")  # fmt: skip


def adapter_options() -> Decorator:
    """LoRA instead of full weights."""
    return together(
        option("--lora-r", group="Adapters", type=Number(0, whole=True), default=0,
               help="Rank; above 0 the output is a PEFT adapter."),
        option("--lora-alpha", group="Adapters", type=Number(above=0), help="Scale (default: twice the rank)."),
        option("--lora-targets", group="Adapters", multiple=True, metavar="NAME",
               help="Modules to adapt (default: every linear layer but the head)."),
    )  # fmt: skip


def watching_options(sets: str, eval_every: str) -> Decorator:
    """Evaluation during the run, stopping, saving, tracking."""
    return together(
        option("--eval-every", group="Watching", type=Number(0, whole=True, words=["epoch"]), default=eval_every,
               help="Evaluate each epoch, every N steps, or (0) only at start and end."),
        option("--eval-rows", group="Watching", type=Number(1, whole=True), default=32, help="First rows of each set."),
        option("--watch", group="Watching", type=PathType("NAME=FILE", named=True), multiple=True,
               help=f"Evaluate another set{sets}."),
        option("--stop-when", group="Watching", metavar="EXPR",
               help="Stop after an evaluation or step where this holds, as in 'loss<.02'."),
        option("--save-every", group="Watching", type=Number(0, whole=True, words=["auto"]), default="auto",
               help="Save state every N steps; auto: about once a minute; 0: never."),
        option("--plot", group="Watching", type=PathType(), multiple=True,
               help="Draw the evaluations (.svg, .png or .pdf; repeatable)."),
        option("--tracker", group="Watching", multiple=True, metavar="NAME",
               help="Also send events to an accelerate tracker (tensorboard, wandb, ...)."),
    )  # fmt: skip


def launch_options() -> Decorator:
    """How many processes, where, how many threads."""
    return together(
        option("-j", "--num-processes", group="Launch", type=Number(1, whole=True), recipe=False,
               help="Processes (GPUs, or CPU workers) on this machine."),
        option("--accelerate", group="Launch", type=PathType(), recipe=False,
               help="Launch by this accelerate configuration."),
        option("--threads", group="Launch", type=Number(1, whole=True),
               help="CPU threads a process (default: an equal share of the cores)."),
    )  # fmt: skip


class _VariableName(click.ParamType):
    """The name of an environment variable. Not repeated in messages: a key in its place is a common slip."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(value)):
            self.fail("the name of an environment variable is expected, never a key", param)
        return str(value)


def backend_options() -> Decorator:
    """What completes prompts, the log of its responses, and stored ones."""
    return together(
        option("--backend", group="Generation", type=click.Choice(["local", "openai", "replay"]), default="local",
               help="A model here, an OpenAI-compatible endpoint, or stored responses."),
        option("--log", group="Input/Output", type=PathType(), help="Append each response to this file as it comes."),
        option("--resume", group="Input/Output", is_flag=True, recipe=False,
               help="Take what is in --log already and complete the rest."),
        option("--replay", group="Input/Output", type=PathType(), help="Stored responses, for --backend replay."),
    )  # fmt: skip


def inference_options(what: str, window: int) -> Decorator:
    """How a local model answers: precision, device, how many of ``what`` at a time, how many rows are held."""
    return together(
        option("--dtype", group="Model", type=click.Choice(["auto", "fp32", "bf16"]), default="auto",
               help="auto: bf16 on a GPU, fp32 on a CPU."),
        option("--device", group="Model", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ..."),
        option("--batch-size", group="Launch", type=Number(1, whole=True, words=["auto"]), default="auto",
               help=f"{what} decoded together; does not change the result."),
        option("--window", group="Launch", type=Number(1, whole=True), default=window,
               help="Rows read before the first one leaves."),
    )  # fmt: skip


def endpoint_options() -> Decorator:
    """An OpenAI-compatible endpoint."""
    return together(
        option("--base-url", group="Generation", metavar="URL",
               help="Address of the endpoint, as in http://localhost:8000/v1."),
        option("--api-key-env", group="Generation", type=_VariableName(), default="OPENAI_API_KEY",
               help="Environment variable that holds the endpoint's key."),
        option("--concurrency", group="Generation", type=Number(1, 1024, whole=True), default=8,
               help="Requests under way at a time; does not change the result."),
        option("--rpm", group="Generation", type=Number(above=0), help="At most so many requests a minute to it."),
        option("--timeout", group="Generation", type=Number(above=0), default=600.0,
               help="Seconds that one attempt may take."),
        option("--retries", group="Generation", type=Number(0, whole=True), default=6,
               help="Further attempts after 429, 5xx and broken connections."),
    )  # fmt: skip


def given_options() -> frozenset[str]:
    """Names of the options of the command being run that were typed, or set by a recipe to other than their default.

    What the environment says is not meant for one command alone.
    """
    context = click.get_current_context()
    typed, recipe = click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP

    def given(one: click.Parameter) -> bool:
        source, value = context.get_parameter_source(str(one.name)), context.params.get(str(one.name))
        unset = value is None or value is False or value == () or value == one.default
        return source is typed or (source is recipe and not unset)

    return frozenset(str(one.name) for one in context.command.params if given(one))


def generation_options() -> Decorator:
    """Decoding."""
    return together(
        option("--n", group="Generation", type=Number(1, whole=True), default=1, help="Completions a prompt."),
        option("--temperature", group="Generation", type=Number(0), default=0.0, help="0 is greedy."),
        option("--top-p", group="Generation", type=Number(above=0, high=1), default=1.0,
               help="Sample from the smallest set of tokens with this probability."),
        option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=512,
               help="Longest completion in tokens."),
        option("--stop", group="Generation", multiple=True, metavar="STR", help="End a completion before this string."),
        option("--logprobs", group="Generation", is_flag=True, help="Add the log-probability of each token."),
        seed_option("Seed of sampling."),
    )  # fmt: skip
