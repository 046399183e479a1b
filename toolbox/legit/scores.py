"""What the next experiment is worth: GIT, AIT and CBED on imagined rows, and the strategies that need none.

Sources: GIT, Olko et al., "Trust Your Gradient: Gradient-based Intervention Targeting for Causal Discovery"
(arXiv 2211.13715); AIT and CBED as in the code of Tigas et al., "Interventions, Where and How?" (NeurIPS 2022). Neither
GIT's norm nor its reduction is published as code: both are options, and reconstructions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from toolbox.legit.conditionals import Conditionals, grouped_nll, log_likelihoods
from toolbox.legit.imagine import Imagined, imagine, sample_dags
from toolbox.legit.learner import Enco, keyed
from toolbox.legit.method import edge_effects, edge_probabilities, gamma_gradient, sample_graphs, theta_gradient
from toolbox.legit.network import Network, keyed_generator

NUMERIC = ("git", "ait", "cbed", "random", "round-robin", "degree", "git-privileged")
SCORED = ("git", "ait", "cbed", "degree", "git-privileged")
"""Those whose figure is a worth, which a cost can divide."""

FLOOR = math.log(1e-6)
"""CBED's smallest log-probability of one value: a zero cell must not outweigh all else."""

_MARGIN = 1e-3
"""Of the expected out-degree: a variable believed to have no child stays possible."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Sizes of the imagined experiments, and the forms of GIT and AIT."""

    imagined_graphs: int = 10
    imagined_rows: int = 32
    git_norm: str = "theta"
    git_reduce: str = "mean-norm"
    ait_strata: str = "value"


@dataclass(frozen=True)
class Situation:
    """What a strategy may look at: the learner, which variables no experiment had as its target yet, the earlier picks
    of each variable, this round's number; the network only where a privileged strategy was asked for."""

    learner: Enco
    never: Tensor
    picks: Sequence[int]
    round: int
    seed: int
    network: Network | None = None


def rate(
    strategy: str, allowed: Sequence[int], here: Situation, options: ScoreOptions
) -> tuple[dict[int, float], list[int]]:
    """The score of each allowed variable, and the allowed ones from first to last choice (ties by their order)."""
    if strategy == "random":
        draws = keyed_numbers(here, "random", len(here.picks))
        return _ordered({one: float(draws[one]) for one in allowed})
    if strategy == "round-robin":
        order = np.argsort(keyed_numbers(here, "round-robin", len(here.picks), every_round=True)).tolist()
        scores = {one: 0.0 - here.picks[one] for one in allowed}
        return scores, sorted(allowed, key=lambda one: (-scores[one], order.index(one)))
    if strategy == "degree":
        return _degree(allowed, here)
    return _ordered(dict(zip(allowed, _worth(strategy, tuple(allowed), here, options).tolist(), strict=True)))


def keyed_numbers(here: Situation, purpose: str, count: int, *, every_round: bool = False) -> np.ndarray:
    """Uniform numbers of this seed and round; with ``every_round`` the same in all rounds."""
    return keyed_generator(here.seed, f"legit {purpose}", 0 if every_round else here.round).random(count)


def _ordered(scores: Mapping[int, float]) -> tuple[dict[int, float], list[int]]:
    return dict(scores), sorted(scores, key=lambda one: (-scores[one], one))


def _degree(allowed: Sequence[int], here: Situation) -> tuple[dict[int, float], list[int]]:
    """Drawn without replacement in proportion to the expected out-degree under the belief (never the truth)."""
    p = edge_probabilities(here.learner.gamma, here.learner.theta).cpu().numpy()
    weights = p.sum(1) + _MARGIN
    gumbel = -np.log(-np.log(np.maximum(keyed_numbers(here, "degree", len(p)), 1e-300)))
    keys = np.log(weights) + gumbel
    return {one: float(weights[one]) for one in allowed}, sorted(allowed, key=lambda one: (-keys[one], one))


def _worth(strategy: str, targets: tuple[int, ...], here: Situation, options: ScoreOptions) -> Tensor:
    """The scores [T] of the strategies that imagine experiments."""
    learner = here.learner
    generator = keyed(here.seed, here.round, "score")
    p = edge_probabilities(learner.gamma, learner.theta)
    dags, orders = sample_dags(p, options.imagined_graphs, generator)
    if strategy == "git-privileged":
        assert here.network is not None
        imagined = true_experiments(here.network, dags, targets, options, here)
    else:
        imagined = imagine(learner.model, dags, orders, targets, options.imagined_rows, generator)
    if strategy == "ait":
        return ait(imagined, learner.sizes, options.ait_strata)
    if strategy == "cbed":
        return cbed(learner.model, imagined)
    return git(learner, here.never, imagined, generator, options.git_norm, options.git_reduce)


def true_experiments(
    network: Network, dags: Tensor, targets: tuple[int, ...], options: ScoreOptions, here: Situation
) -> Imagined:
    """Rows of the true system in the place of imagined ones: what GIT would choose if it knew; a ceiling."""
    count = options.imagined_graphs * options.imagined_rows
    blocks = []
    for target in targets:
        noise = keyed_generator(here.seed, f"legit privileged {network.names[target]}", here.round).random(
            (count, len(network.names))
        )
        blocks.append(torch.from_numpy(network.sample(noise, target)).long().view(len(dags), options.imagined_rows, -1))
    return Imagined(torch.stack(blocks, 1), dags, targets)


# -- GIT --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def git(learner: Enco, never: Tensor, imagined: Imagined, generator: torch.Generator, norm: str, reduce: str) -> Tensor:
    """score(k) = mean over graphs G of || gradient on the rows imagined in G under do(k) ||: [T].

    The gradient is ENCO's; one set of K sampled graphs serves all. ``norm`` theta: row k of theta's gradient; both:
    all of gamma's and theta's. ``reduce`` norm-mean: the norm of the mean gradient instead.
    """
    gamma, theta = learner.gamma, learner.theta
    graphs = sample_graphs(edge_probabilities(gamma, theta), learner.options.num_graphs, generator)
    flat, groups = imagined.flat.to(learner.device), imagined.groups().to(learner.device)
    count, targets = imagined.rows.shape[:2]
    nll = grouped_nll(learner.model, flat, graphs, groups, count * len(imagined.targets))
    nll = nll.view(count, targets, *nll.shape[1:])
    scores = []
    for place, target in enumerate(imagined.targets):
        losses = nll[:, place].clone()
        losses[..., target] = 0  # the variable that was set says nothing about its causes
        effects = edge_effects(losses, graphs)
        slope = theta_gradient(effects, gamma, theta, target, never)
        if norm == "theta":
            gradient = slope[:, target, :]
        else:
            of_gamma = gamma_gradient(effects, gamma, theta, target, learner.options.lambda_sparse)
            gradient = torch.cat([slope.flatten(1), of_gamma.flatten(1)], 1)
        scores.append(gradient.norm(dim=1).mean() if reduce == "mean-norm" else gradient.mean(0).norm())
    return torch.stack(scores)


# -- AIT and CBED -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def ait(imagined: Imagined, sizes: Sequence[int], strata: str = "value") -> Tensor:
    """Active intervention targeting: variance between graphs over variance within them, of one-hot rows: [T].

    score = sum_G B ||mu_G - mu||^2 / max(sum (X - mu_G)^2, 1e-9), the target's own columns left out. With values set
    at random the mean over rows hides the effect, so both sums run over strata of equal value (``strata`` value); none
    is the formula as published.
    """
    scores = []
    most = max(sizes)
    for place, target in enumerate(imagined.targets):
        rows = imagined.rows[:, place]
        one_hot = F.one_hot(rows.long(), most).double()
        one_hot[:, :, target] = 0
        one_hot = one_hot.flatten(2)  # [M, B, N C]
        values = rows[..., target] if strata == "value" else torch.zeros_like(rows[..., 0])
        between, within = 0.0, 0.0
        for value in range(sizes[target] if strata == "value" else 1):
            here = (values == value).double()[..., None]
            count = here.sum(1)  # [M, 1]
            own = (one_hot * here).sum(1) / count.clamp(min=1)
            there = (count > 0).double()
            common = (own * there).sum(0) / there.sum().clamp(min=1)
            between += float((count * (own - common).square() * there).sum())
            within += float(((one_hot - own[:, None]).square() * here).sum())
        scores.append(between / max(within, 1e-9))
    return torch.tensor(scores, dtype=torch.float64)


@torch.no_grad()
def cbed(model: Conditionals, imagined: Imagined) -> Tensor:
    """Causal Bayesian experimental design: mean of log p(x|G) - logmeanexp over G' of log p(x|G'): [T].

    An estimate of the information that rows give about which graph it is; log p runs over all variables but the target.
    """
    flat = imagined.flat.to(model.embedding.device)
    count, targets, rows, _ = imagined.rows.shape
    skip = torch.tensor(imagined.targets, device=flat.device).repeat_interleave(rows).repeat(count)
    found = log_likelihoods(model, flat, imagined.graphs, skip, FLOOR).double().view(count, count, targets, rows)
    own = found[torch.arange(count), torch.arange(count)]  # [M, T, B]: under the graph that they were drawn in
    return (own - (torch.logsumexp(found, 0) - math.log(count))).mean((0, 2))
