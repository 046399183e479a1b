"""The option groups that the commands of experimental design share (legit-target, legit-fit, legit-loop)."""

from __future__ import annotations

import click

from toolbox.shell import options as groups
from toolbox.shell.params import Decorator, Number, PathType, option, together


def variable_options() -> Decorator:
    """What the variables are, and how numbers become states."""
    return together(
        option("--variables", group="Input/Output", type=PathType(),
               help="Names, descriptions, states, costs: one JSON object a variable."),
        option("--network", group="Input/Output", metavar="NAME",
               help="A packaged network (asia, child, insurance, alarm, sachs, ...) or a BIF file."),
        option("--bins", group="Data", type=Number(2, 64, whole=True),
               help="Cut numbers into so many states, by the observed rows."),
        option("--binning", group="Data", type=click.Choice(["quantile", "equal"]), default="quantile",
               help="Bins of equal counts or of equal width."),
    )  # fmt: skip


def learner_options(*, obs_iters: bool = True) -> Decorator:
    """ENCO's settings."""
    first = [
        option("--obs-iters", group="Method", type=Number(0, whole=True), default=1000,
               help="Steps of distribution fitting before the first experiment.")
    ] if obs_iters else []  # fmt: skip
    return together(
        *first,
        option("--model-iters", group="Method", type=Number(0, whole=True), default=100 if obs_iters else 1000,
               help="Steps of distribution fitting " + ("a round." if obs_iters else "an epoch.")),
        option("--graph-iters", group="Method", type=Number(0, whole=True), default=100,
               help="Steps of graph fitting " + ("a round." if obs_iters else "an epoch.")),
        option("--hidden", group="Method", type=Number(1, 4096, whole=True), default=64,
               help="Width of the conditional networks."),
        option("--num-graphs", group="Method", type=Number(2, whole=True), default=100,
               help="Graphs sampled a gradient."),
        option("--batch", group="Method", type=Number(1, whole=True), default=128, help="Rows a step."),
        option("--lambda-sparse", group="Method", type=Number(0), default=0.004, help="Weight of sparsity."),
        option("--fit-rows", group="Method", type=click.Choice(["obs", "all"]), default="obs",
               help="all: fit distributions on rows of interventions too, but for their targets."),
        option("--no-mask-states", group="Method", is_flag=True,
               help="Let networks give weight to states that a variable does not have."),
    )  # fmt: skip


def score_options() -> Decorator:
    """The imagined experiments of GIT, AIT and CBED."""
    return together(
        option("--imagined-graphs", group="Method", type=Number(2, whole=True), default=10,
               help="Graphs drawn from the belief to imagine experiments in."),
        option("--imagined-rows", group="Method", type=Number(1, whole=True), default=32,
               help="Rows imagined a graph and target."),
        option("--git-norm", group="Method", type=click.Choice(["theta", "both"]), default="theta",
               help="GIT's gradient: theta's row of the target, or all of gamma and theta."),
        option("--git-reduce", group="Method", type=click.Choice(["mean-norm", "norm-mean"]), default="mean-norm",
               help="The mean of the norms over graphs, or the norm of the mean."),
        option("--ait-strata", group="Method", type=click.Choice(["value", "none"]), default="value",
               help="AIT within strata of equal values, or as published."),
    )  # fmt: skip


def stage_options() -> Decorator:
    """The language model's rounds."""
    return together(
        option("--plan", group="Method", type=PathType(), help="A list of names instead of a language model's."),
        option("--n-warmup", group="Method", type=Number(0, whole=True), default=3,
               help="Rounds of the first list: likely root causes."),
        option("--n-bootstrap", group="Method", type=Number(0, whole=True), default=2,
               help="Rounds of the second list: influential, not tried yet."),
        option("--resample", group="Method", type=click.Choice(["all", "agreed", "none"]), default="all",
               help="Which of them are done once more; agreed: those that a second vote names again."),
        option("--ask", group="Method", type=Number(1, whole=True), default=5, help="Names asked for an answer."),
        option("--self-consistency", group="Method", type=Number(1, 1000, whole=True), default=5,
               help="Answers that vote."),
        option("--redraws", group="Method", type=Number(0, 100, whole=True), default=2,
               help="Fresh answers for one that names no variable."),
        option("--show-edges", group="Method", is_flag=True, help="Show believed edges in the second question."),
        option("--allow-repeat", group="Method", is_flag=True, help="The second list may name tried variables."),
        option("--anonymise", group="Method", is_flag=True,
               help="Neutral labels and no descriptions: a control without knowledge."),
        option("--prompt-warmup", group="Method", type=PathType(), help="A template for the first question."),
        option("--prompt-bootstrap", group="Method", type=PathType(), help="A template for the second."),
        option("--on-llm-error", group="Method", type=click.Choice(["auto", "numeric", "fail"]), default="auto",
               help="auto: an unreachable endpoint fails, answers without names fall back on the score."),
    )  # fmt: skip


def budget_options() -> Decorator:
    """How much may be done, and to what."""
    return together(
        option("--rounds", group="Method", type=Number(1, whole=True), default=33, help="Experiments in all."),
        option("-n", "--n", "n", group="Method", type=Number(1, whole=True), default=32,
               help="Rows an experiment."),
        option("--allow", group="Method", metavar="A,B", help="Only these may be targets."),
        option("--forbid", group="Method", metavar="A,B", help="These may not be targets."),
        option("--per-cost", group="Method", is_flag=True, help="Divide scores by the variables' `cost`."),
    )  # fmt: skip


def threads_option() -> Decorator:
    """For commands that are always one process."""
    return option("--threads", group="Launch", type=Number(1, whole=True), help="CPU threads (default: one a core).")


def asking_options() -> Decorator:
    """The language model that plans."""
    return together(
        option("--backend", group="Generation", type=click.Choice(["none", "local", "openai", "replay"]),
               default="none", help="No language model, one here, an OpenAI-compatible endpoint, stored responses."),
        option("--log", group="Input/Output", type=PathType(), help="Append each response to this file as it comes."),
        option("--replay", group="Input/Output", type=PathType(), help="Stored responses, for --backend replay."),
        groups.endpoint_options(),
        option("--temperature", group="Generation", type=Number(0), default=1.0,
               help="Of the answers; votes of one greedy answer would all be the same."),
        option("--max-new-tokens", group="Generation", type=Number(1, whole=True), default=1024,
               help="Longest answer in tokens."),
        option("--system", group="Generation", metavar="TEXT", help="System turn."),
        groups.model_options(),
        option("--device", group="Launch", default="cpu", metavar="DEVICE", help="Of the learner: cpu, cuda, ..."),
    )  # fmt: skip
