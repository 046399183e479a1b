"""Costs against loops in float64, and the assignments against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from toolbox.lwi.match import Cost, Part, Sinkhorn, assign, cut, hungarian, sinkhorn_plan
from toolbox.lwi.plan import Factor, TensorPlan
from toolbox.shell.errors import BadData


@pytest.fixture
def parts():
    """A convolution that computes the group of 4, and a linear layer (blocks of 3) that reads it."""
    torch.manual_seed(0)
    conv = Part(("g", None, None, None), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), frozenset("g"), 2)
    linear = Part((None, "g", None), torch.randn(5, 4, 3), torch.randn(5, 4, 3), frozenset())
    return [conv, linear]


def slow(parts, metric):
    """The definitions, entry by entry."""
    old = [[p.old.movedim(p.dims.index("g"), 0)[c].double() for p in parts] for c in range(4)]
    new = [[p.new.movedim(p.dims.index("g"), 0)[d].double() for p in parts] for d in range(4)]
    matrix = np.zeros((4, 4))
    affinity = np.zeros((2, 4, 4))
    for c, d in itertools.product(range(4), range(4)):
        squared = sum(float(((x - y) ** 2).sum()) for x, y in zip(old[c], new[d], strict=True))
        inner = sum(float((x * y).sum()) for x, y in zip(old[c], new[d], strict=True))
        norms = math.sqrt(sum(float((x**2).sum()) for x in old[c]) * sum(float((y**2).sum()) for y in new[d]))
        edges = sum(float((old[c][0][a] - new[d][0][a]).norm()) for a in range(2))
        edges += float((old[c][1] - new[d][1]).abs().sum())
        matrix[c, d] = {"sqeuclidean": squared, "euclidean": math.sqrt(squared), "cosine": -inner / norms,
                        "edge": edges, "gamf": 0.0}[metric]  # fmt: skip
        for side in (0, 1):
            affinity[side, c, d] = math.exp(-0.5 * float(((old[c][side] - new[d][side]) ** 4).sum()) ** 0.25)
    if metric == "gamf":
        matrix = -sum(one / one.mean() for one in affinity)
    return matrix


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "gamf", "edge"])
def test_costs_are_their_definitions(parts, metric):
    cost = Cost(metric, 4)
    for part in parts:
        cost.add(part, "g")
    np.testing.assert_allclose(cost.matrix().numpy(), slow(parts, metric), rtol=1e-5, atol=1e-5)


def test_slow_metrics_are_for_small_groups():
    with pytest.raises(BadData, match="takes no group of 5000 channels"):
        Cost("gamf", 5000)


@pytest.mark.parametrize("dissimilar", [False, True])
def test_the_assignment_is_the_best_of_all_and_its_direction_is_old_to_place(dissimilar):
    for seed in range(10):
        cost = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
        solved = assign(cost, hungarian, dissimilar=dissimilar)
        best = (max if dissimilar else min)(
            sum(float(cost[r[d], d]) for d in range(5)) for r in itertools.permutations(range(5))
        )
        assert solved.after == pytest.approx(best)
        assert solved.after == pytest.approx(sum(float(cost[solved.step[d], d]) for d in range(5)))
        assert solved.before == pytest.approx(float(cost.trace()))


def test_equal_costs_move_nothing_and_values_that_are_not_finite_are_refused():
    assert not assign(torch.ones(4, 4), hungarian).better
    assert not assign(torch.zeros(3, 3), hungarian).better
    swapped = torch.ones(4, 4) - 1e-9 * torch.eye(4).flip(0)
    assert not assign(swapped, hungarian).better
    with pytest.raises(BadData, match="not finite"):
        assign(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]), hungarian)


def test_the_entropic_plan_is_doubly_stochastic_and_sharpens_to_the_assignment():
    cost = np.random.default_rng(0).random((6, 6))
    exact = hungarian(cost)
    plan = sinkhorn_plan(cost, 0.05, 500)
    np.testing.assert_allclose(plan.sum(0), 1, atol=1e-3)
    np.testing.assert_allclose(plan.sum(1), 1, atol=1e-9)
    assert (Sinkhorn(0.05, 500)(cost) == exact).all()
    even = sinkhorn_plan(cost, 1e4, 50)
    np.testing.assert_allclose(even, 1 / 6, atol=1e-4)
    # In float64 the plain iteration on exp(-C/tau) gives the same plan.
    scaled = (cost - cost.mean()) / cost.std()
    kernel = np.exp(-scaled.T / 0.5)
    for _ in range(200):
        kernel /= kernel.sum(0, keepdims=True)
        kernel /= kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(sinkhorn_plan(cost, 0.5, 200), kernel, atol=1e-10)


def test_tensors_are_cut_at_concatenations_and_blocks():
    fixed = Factor(None, 2)
    axis = ((Factor("kv", 3), Factor("q", 2), fixed), (Factor("kv", 3),))
    tensor = TensorPlan("t", (axis, ((Factor("r", 4),),)))
    values = torch.arange(60.0).reshape(15, 4)
    one, two = cut(tensor, values, -values)
    assert (one.dims, two.dims) == (("kv", "q", None, "r"), ("kv", "r"))
    assert one.old[2, 1, 0, 3] == values[2 * 4 + 1 * 2 + 0, 3]
    assert two.new[1, 2] == -values[13, 2]
    pair = one.at("kv", 0, 2)
    assert (pair.dims, pair.old.shape) == (("q", None, "r"), (2, 2, 4))
    assert torch.equal(pair.new, -values[8:12].reshape(2, 2, 4))
