"""Distances between graphs against published values and an independent reference."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest

from toolbox.legit.compare import paired, pairs, summaries
from toolbox.legit.metrics import acyclic, aushd, bsf, diversity, expected_shd, judge, rates, shd, sid
from toolbox.legit.network import read_network


def dag(draw: np.random.Generator, size: int, density: float) -> np.ndarray:
    order = draw.permutation(size)
    graph = np.triu(draw.random((size, size)) < density, 1)
    return graph[np.ix_(np.argsort(order), np.argsort(order))]


def slow_sid(true: np.ndarray, guess: np.ndarray) -> int:
    """Ordered pairs for which the parents of i in ``guess`` are no valid adjustment set, by d-separation."""
    graph = nx.from_numpy_array(true, create_using=nx.DiGraph)
    wrong = 0
    for i, j in itertools.permutations(range(len(true)), 2):
        parents = set(np.flatnonzero(guess[:, i]).tolist())
        below = nx.descendants(graph, i)
        if j in parents:  # claims that i does not act on j
            wrong += j in below
            continue
        causal = {node for node in below if node == j or j in nx.descendants(graph, node)}
        forbidden = set().union(*({node} | nx.descendants(graph, node) for node in causal)) if causal else set()
        if parents & forbidden:
            wrong += 1
            continue
        cut = graph.copy()
        cut.remove_edges_from([(i, node) for node in graph.successors(i) if node in causal])
        wrong += not nx.is_d_separator(cut, {i}, {j}, parents)
    return wrong


def test_asia_without_its_weakest_edge_scores_as_published():
    true = read_network("asia").adjacency
    guess = true.copy()
    names = read_network("asia").names
    guess[names.index("asia"), names.index("tub")] = False
    found = judge(true, guess, guess)
    assert (found["shd"], found["sid"], found["bsf"], found["shd_empty"]) == (1, 1, 0.875, 8)


def test_sid_is_that_of_adjustment_by_parents():
    draw = np.random.default_rng(0)
    for _ in range(60):
        true, guess = dag(draw, 5, 0.5), dag(draw, 5, draw.choice([0.2, 0.5]))
        assert sid(true, guess) == slow_sid(true, guess)
        assert sid(true, true) == 0
    cycle = np.roll(np.eye(4, dtype=bool), 1, 1)
    with pytest.raises(ValueError, match="cyclic"):
        sid(true=dag(draw, 4, 0.5), guess=cycle)


def test_shd_counts_pairs_and_a_reversal_once():
    true = np.zeros((4, 4), dtype=bool)
    true[0, 1] = true[1, 2] = True
    guess = np.zeros_like(true)
    guess[1, 0] = guess[1, 2] = guess[2, 1] = guess[0, 3] = True  # reversed, both ways, added
    assert shd(true, guess) == 3
    assert shd(true, np.zeros_like(true)) == 2
    assert shd(true, true) == 0
    assert not acyclic(guess)


def test_bsf_is_one_for_the_truth_zero_for_the_empty_and_the_full_graph_and_half_for_reversals():
    draw = np.random.default_rng(1)
    for _ in range(20):
        true = dag(draw, 6, 0.4)
        full = ~np.eye(6, dtype=bool) & np.triu(np.ones((6, 6), dtype=bool))
        assert bsf(true, true) == 1
        if true.any() and true.sum() < 15:
            assert bsf(true, np.zeros_like(true)) == pytest.approx(0)
            assert bsf(true, np.triu(true | true.T, 1) | (full & ~np.triu(true | true.T))) <= 0.5
            assert bsf(true, true.T) == pytest.approx(0.5)


def test_rates_and_expected_shd():
    true = np.zeros((3, 3), dtype=bool)
    true[0, 1] = true[1, 2] = True
    guess = np.zeros_like(true)
    guess[1, 0] = guess[1, 2] = True
    assert rates(true, guess) == {"tpr": 0.5, "fdr": 0.5, "f1": 0.5, "skeleton_f1": 1.0}
    assert rates(np.zeros_like(true), np.zeros_like(true)) == dict.fromkeys(("tpr", "fdr", "f1", "skeleton_f1"))
    draw = np.random.default_rng(2)
    p = draw.random((3, 3)) / 2
    np.fill_diagonal(p, 0)
    total = 0.0
    for bits in itertools.product([False, True], repeat=6):
        graph = np.zeros((3, 3), dtype=bool)
        graph[~np.eye(3, dtype=bool)] = bits
        weight = np.where(graph, p, 1 - p)[~np.eye(3, dtype=bool)].prod()
        total += weight * shd(true, graph)
    assert expected_shd(true, p) == pytest.approx(total)


def test_the_area_is_weighted_by_rows_and_diversity_counts_equal_shares():
    assert aushd([8, 4, 2], [32, 32, 64]) == pytest.approx((8 * 32 + 4 * 32 + 2 * 64) / 128)
    with pytest.raises(ValueError, match="at least one round"):
        aushd([], [])
    assert diversity("abcd") == pytest.approx(4)
    assert diversity("aaaa") == pytest.approx(1)
    assert diversity("") == 0


def test_summaries_name_both_deviations_and_pairs_are_by_seed():
    runs = [
        {"event": "run", "strategy": name, "seed": seed, "shd": value, "aushd": value + 0.5}
        for name, values in (("git", (1, 2, 4)), ("round-robin", (2, 2, 2)), ("legit+git", (0, 1, 5)))
        for seed, value in enumerate(values)
    ]
    found = {(one["strategy"], one["metric"]): one for one in summaries(runs)}
    git = found["git", "shd"]
    assert git["values"] == [1, 2, 4]
    assert git["sd_population"] == pytest.approx(np.std([1, 2, 4]))
    assert git["sd_sample"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert git["ci95"][0] <= git["mean"] <= git["ci95"][1]
    assert pairs(["git", "round-robin", "legit+git"], "round-robin") == [
        ("git", "round-robin"), ("legit+git", "round-robin"), ("legit+git", "git"),
    ]  # fmt: skip
    tests = {(one["a"], one["b"], one["metric"]): one for one in paired(runs, "round-robin")}
    assert tests["legit+git", "git", "shd"]["differences"] == [-1, -1, 1]
    assert tests["git", "round-robin", "shd"]["p_floor"] == 0.25
