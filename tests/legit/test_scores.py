"""Whom the scores ask for: the pair that is not oriented, and what the other strategies promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.legit.test_method import table_of
from toolbox.legit.imagine import Imagined
from toolbox.legit.learner import Enco, LearnerOptions, keyed
from toolbox.legit.scores import NUMERIC, ScoreOptions, Situation, ait, cbed, git, rate

SIZES = (2, 2, 2, 2)


def two_pairs(seed: int) -> tuple[Situation, set[int]]:
    """A learner that knows which way a -> b goes and not which way c - d does; the places of c and d."""
    draw = np.random.default_rng(seed)
    a, b, c, d = draw.permutation(4).tolist()
    states = np.zeros((3000, 4), dtype=np.int8)
    for cause, effect in ((a, b), (c, d)):
        states[:, cause] = draw.random(3000) < draw.uniform(0.3, 0.7)
        low, high = draw.uniform(0.05, 0.25), draw.uniform(0.75, 0.95)
        states[:, effect] = draw.random(3000) < np.where(states[:, cause] == 1, high, low)
    learner = Enco(SIZES, LearnerOptions(hidden=16, num_graphs=100, batch=128), seed)
    learner.gamma.fill_(-6)
    for i, j in ((a, b), (b, a), (c, d), (d, c)):
        learner.gamma[i, j] = 6
    learner.theta[a, b], learner.theta[b, a] = 6, -6
    learner.fit_distribution(table_of(states, np.full(3000, -1), SIZES), 250, keyed(seed, 0, "test"))
    return Situation(learner, torch.ones(4, dtype=torch.bool), [0] * 4, 1, seed), {c, d}


def test_git_ait_and_cbed_ask_for_the_pair_that_is_not_oriented():
    first = {"git": 0, "ait": 0, "cbed": 0}
    for seed in range(20):
        here, open_pair = two_pairs(seed)
        for strategy in first:
            first[strategy] += rate(strategy, range(4), here, ScoreOptions())[1][0] in open_pair
    assert all(count >= 18 for count in first.values()), first


def small() -> Situation:
    learner = Enco((2, 3, 2), LearnerOptions(hidden=4, num_graphs=12), 1)
    draw = torch.Generator().manual_seed(0)
    learner.gamma.copy_(torch.randn(3, 3, generator=draw))
    theta = torch.randn(3, 3, generator=draw)
    learner.theta.copy_(theta - theta.t())
    return Situation(learner, torch.tensor([True, True, False]), [2, 0, 1], 4, 7)


@pytest.mark.parametrize("strategy", [name for name in NUMERIC if name != "git-privileged"])
def test_every_strategy_orders_the_allowed_targets_the_same_way_each_time(strategy):
    scores, order = rate(strategy, [0, 2], small(), ScoreOptions(imagined_graphs=3, imagined_rows=4))
    assert (scores, order) == rate(strategy, [0, 2], small(), ScoreOptions(imagined_graphs=3, imagined_rows=4))
    assert sorted(order) == sorted(scores) == [0, 2]


def test_round_robin_takes_whoever_was_asked_least_and_degree_follows_the_belief():
    here = small()
    assert rate("round-robin", [0, 1, 2], here, ScoreOptions())[1] == [1, 2, 0]
    scores, _ = rate("degree", [0, 1, 2], here, ScoreOptions())
    p = torch.sigmoid(here.learner.gamma) * torch.sigmoid(here.learner.theta)
    assert scores[1] == pytest.approx(float(p[1, 0] + p[1, 2]) + 1e-3)
    firsts = [rate("degree", [0, 1, 2], Situation(here.learner, here.never, [0] * 3, n, 0), ScoreOptions())[1][0]
              for n in range(2000)]  # fmt: skip
    wanted = np.array([scores[n] for n in range(3)]) / sum(scores.values())
    assert np.bincount(firsts, minlength=3) / 2000 == pytest.approx(wanted, abs=0.05)


def imagined(draw: torch.Generator) -> Imagined:
    rows = torch.stack([torch.randint(0, size, (3, 2, 5), generator=draw) for size in (2, 3, 2)], -1)
    graphs = torch.triu((torch.rand(3, 3, 3, generator=draw) < 0.5).float(), 1)
    return Imagined(rows, graphs, (0, 2))


def test_ait_is_between_over_within_and_strata_split_by_the_value_that_was_set():
    found = imagined(torch.Generator().manual_seed(3))
    for place, target in enumerate(found.targets):
        for strata in ("none", "value"):
            between = within = 0.0
            for value in range(3) if strata == "value" else [None]:
                means, members = [], []
                for graph in range(3):
                    here = []
                    for row in found.rows[graph, place].tolist():
                        if value is not None and row[target] != value:
                            continue
                        here.append([float(n != target and row[n] == c) for n in range(3) for c in range(3)])
                    members.append(np.array(here).reshape(-1, 9))
                    if here:
                        means.append(members[-1].mean(0))
                common = np.mean(means, 0) if means else np.zeros(9)
                for own in members:
                    if len(own):
                        between += len(own) * ((own.mean(0) - common) ** 2).sum()
                        within += ((own - own.mean(0)) ** 2).sum()
            score = float(ait(found, (2, 3, 2), strata)[place])
            assert score == pytest.approx(between / max(within, 1e-9))


def test_cbed_is_the_mean_log_ratio_to_the_mixture():
    here, found = small(), imagined(torch.Generator().manual_seed(4))
    model = here.learner.model
    scores = cbed(model, found)
    for place, target in enumerate(found.targets):
        total = []
        for graph in range(3):
            for row in found.rows[graph, place]:
                logs = []
                for other in found.graphs:
                    own = 0.0
                    for child in range(3):
                        if child != target:
                            parts = model.contributions(child, row[None]).detach() * other[:, child, None, None]
                            own -= min(
                                float(model.nll(child, parts.sum(0)[None], row[child][None]).detach()), 13.815511
                            )
                    logs.append(own)
                total.append(logs[graph] - (np.logaddexp.reduce(logs) - np.log(3)))
        assert float(scores[place]) == pytest.approx(np.mean(total), abs=1e-5)


def test_git_is_the_norm_of_encos_gradient_on_the_imagined_rows():
    from toolbox.legit.conditionals import gather_nll
    from toolbox.legit.method import edge_effects, edge_probabilities, gamma_gradient, sample_graphs, theta_gradient

    here, found = small(), imagined(torch.Generator().manual_seed(5))
    learner = here.learner
    graphs = sample_graphs(edge_probabilities(learner.gamma, learner.theta), 12, keyed(0, 0, "git"))
    for norm in ("theta", "both"):
        for reduce in ("mean-norm", "norm-mean"):
            scores = git(learner, here.never, found, keyed(0, 0, "git"), norm, reduce)
            for place, target in enumerate(found.targets):
                slopes = []
                for rows in found.rows[:, place]:
                    effects = edge_effects(gather_nll(learner.model, rows, graphs, target), graphs)
                    of_theta = theta_gradient(effects, learner.gamma, learner.theta, target, here.never)
                    of_gamma = gamma_gradient(effects, learner.gamma, learner.theta, target)
                    slopes.append(
                        of_theta[target] if norm == "theta" else torch.cat([of_theta.flatten(), of_gamma.flatten()])
                    )
                wanted = torch.stack(slopes)
                value = wanted.norm(dim=1).mean() if reduce == "mean-norm" else wanted.mean(0).norm()
                assert float(scores[place]) == pytest.approx(float(value), rel=1e-4, abs=1e-7)
