"""Graph projection, imagined graphs, and a learner that goes on from what it saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolbox.legit.data import Bins, Table, Variable
from toolbox.legit.imagine import imagine, sample_dags
from toolbox.legit.learner import Enco, LearnerOptions, WeightsAdam, keyed
from toolbox.legit.method import edge_probabilities, is_acyclic, learned_graph, project_to_dag
from toolbox.legit.metrics import acyclic


def table_of(states: np.ndarray, targets: np.ndarray, sizes: tuple[int, ...]) -> Table:
    names = tuple(Variable(f"v{n}", tuple(map(str, range(size)))) for n, size in enumerate(sizes))
    none = [(None, None)] * len(states)
    return Table(names, Bins(), states.astype(np.int8), targets.astype(np.int16), none, list(range(len(states))))


@pytest.fixture
def rows() -> Table:
    draw = np.random.default_rng(0)
    states = np.stack([draw.integers(0, size, 60) for size in (2, 3, 2)], 1)
    return table_of(states, np.repeat([-1, 0, 2], [40, 10, 10]), (2, 3, 2))


SMALL = LearnerOptions(hidden=4, num_graphs=9, batch=16, obs_iters=5, model_iters=4, graph_iters=6)


def test_the_projection_drops_the_least_believed_edge_of_a_cycle_and_nothing_else():
    graph = torch.zeros(4, 4, dtype=torch.bool)
    p = torch.zeros(4, 4)
    for i, j, belief in [(0, 1, 0.9), (1, 2, 0.6), (2, 0, 0.7), (0, 3, 0.1)]:
        graph[i, j], p[i, j] = True, belief
    dag, dropped = project_to_dag(graph, p)
    assert dropped == [(1, 2)]
    assert is_acyclic(dag)
    assert not is_acyclic(graph)
    assert bool(dag[0, 3])
    p[1, 2] = p[2, 0] = 0.9  # ties: the first by row, then column
    assert project_to_dag(graph, p)[1] == [(0, 1)]


def test_random_graphs_become_acyclic_and_acyclic_ones_stay():
    draw = np.random.default_rng(1)
    for _ in range(30):
        graph = draw.random((6, 6)) < 0.4
        np.fill_diagonal(graph, False)
        dag, dropped = project_to_dag(torch.from_numpy(graph), torch.from_numpy(draw.random((6, 6))))
        assert acyclic(dag.numpy())
        assert int(dag.sum()) == int(graph.sum()) - len(dropped)
        assert bool(dropped) != acyclic(graph)
        assert project_to_dag(dag, torch.rand(6, 6))[1] == []


def test_drawn_dags_keep_each_pairs_edge_probability():
    draw = torch.Generator().manual_seed(0)
    gamma, theta = 2 * torch.randn(2, 2, generator=draw), torch.tensor([[0.0, 0.8], [-0.8, 0.0]])
    p = edge_probabilities(gamma, theta)
    dags, orders = sample_dags(p, 20_000, draw)
    assert torch.allclose(dags.mean(0), p, atol=4 * 0.5 / 20_000**0.5)
    assert bool((dags * dags.transpose(1, 2) == 0).all())
    first = (orders[:, 0] == 0).double().mean()
    assert float(first) == pytest.approx(float((1 - p[1, 0]) / (2 - p[0, 1] - p[1, 0])), abs=0.015)
    certain = torch.tensor([[0.0, 0.5], [0.5, 0.0]])  # an edge for sure, either way
    assert bool(sample_dags(certain, 200, draw)[0].any(2).any(1).all())


def test_imagined_rows_follow_the_network_and_the_target_is_uniform(rows):
    learner = Enco(rows.sizes, SMALL, 0)
    graphs = torch.zeros(1, 3, 3)
    graphs[0, 1, 0] = 1  # v1 -> v0
    found = imagine(learner.model, graphs, torch.tensor([[1, 2, 0]]), (1, 2), 6000, keyed(0, 0, "test"))
    assert found.rows.shape == (1, 2, 6000, 3)
    assert torch.bincount(found.rows[0, 0, :, 1], minlength=3).float().div(6000).sub(1 / 3).abs().max() < 0.03
    for value in range(3):
        here = found.rows[0, 0][found.rows[0, 0, :, 1] == value]
        logits = learner.model.logits(0, learner.model.embedding[0, 1, value][None])
        wanted = float(logits.detach().softmax(-1)[0, 1])
        assert float(here[:, 0].double().mean()) == pytest.approx(wanted, abs=0.04)


def test_the_optimiser_is_adam_in_float64():
    parameter = torch.nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.9]]))
    adam = WeightsAdam([parameter], 5e-3)
    value = parameter.detach().double()
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    draw = torch.Generator().manual_seed(0)
    for step in range(1, 6):
        gradient = torch.randn(2, 2, generator=draw)
        adam.step([gradient])
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        value = value - 5e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(parameter.double(), value, atol=1e-6)


@pytest.mark.parametrize("fit_rows", ["obs", "all"])
def test_a_learner_that_was_saved_goes_on_as_if_it_had_not_been(rows, fit_rows):
    options = LearnerOptions(**{**SMALL.__dict__, "fit_rows": fit_rows})
    whole, first, second = (Enco(rows.sizes, options, 3) for _ in range(3))
    whole.fit_first(rows)
    whole.fit_round(rows.head(50), 1)
    first.fit_first(rows)
    first.fit_round(rows.head(50), 1)
    second.restore(first.tensors())
    for one in (whole, second):
        one.fit_round(rows, 2)
    assert torch.equal(whole.gamma, second.gamma)
    assert torch.equal(whole.theta, -whole.theta.t())
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors().values(), second.tensors().values(), strict=True))
    assert not torch.equal(whole.theta, first.theta)
    assert torch.equal(learned_graph(whole.gamma, whole.theta), torch.from_numpy(whole.belief().raw))


def test_theta_of_pairs_without_an_intervention_moves_by_the_smaller_step_only(rows):
    learner = Enco(rows.sizes, SMALL, 0)
    learner.fit_first(rows)
    learner.fit_graph(rows.head(50), 3, keyed(0, 0, "test"))  # only v0 was a target: v1 and v2 never
    assert float(learner.theta[0].abs().max()) > float(learner.theta[1, 2].abs()) > 0
    assert learner.never(rows.head(50)).tolist() == [False, True, True]
    before = learner.theta[1].clone()
    learner.fit_graph(table_of(rows.states[50:], rows.targets[50:], rows.sizes), 3, keyed(0, 1, "test"))
    assert float((learner.theta[1, 0] - before[0]).abs()) > 0  # v0, v1: now it is these two that were never tried
