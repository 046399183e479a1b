"""Tables of metrics: what is counted where, intervals over questions, and the released demo's figures."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.landscape.twins import SCORING, demo_features, demo_file, path, question, random_features
from toolbox.landscape.features import Features, PathScores, assemble
from toolbox.landscape.metrics import (
    PATH_METRICS,
    STATE_METRICS,
    Cell,
    facet_masks,
    facet_name,
    panel_counts,
    path_metrics,
    path_records,
    stages,
    state_metrics,
    tables,
)
from toolbox.shell.errors import UsageProblem
from toolbox.stats import bootstrap_mean


def cell(cells: list[Cell], outcome: str, stage: int | None = None, **facet: str) -> Cell:
    return next(c for c in cells if (c.outcome, c.bin, dict(c.facet)) == (outcome, stage, facet))


def small() -> Features:
    """One right path of three states, one wrong path of one, one without thoughts, all of one question."""
    empty = PathScores("a/2", 0, 1, {}, np.empty((0, 2)), np.empty((0, 2)), np.empty(0), np.empty(0))
    return assemble(
        [question("a", [2, 2], gold=0)],
        [path("a/0", 0, [[4, 1], [1, 4], [1, 3]], pred=0), path("a/1", 0, [[3, 1]], pred=1), empty],
        SCORING,
    )


# --- states and paths ---


def test_the_last_state_is_left_out_and_one_thought_has_no_consistency():
    found = state_metrics(small())
    np.testing.assert_array_equal(found["consistency"], [0, 1, np.nan, np.nan])
    np.testing.assert_array_equal(found["consistency_incl_last"], [0, 1, 1, np.nan])
    np.testing.assert_allclose(found["gold_share"], [0.8, 0.2, 0.25, 0.75], rtol=1e-14)
    np.testing.assert_allclose(found["thought_perplexity"], 2, rtol=1e-14)


def test_a_paths_metrics_are_those_of_its_states():
    found = path_metrics(small())
    assert tuple(found) == PATH_METRICS
    np.testing.assert_array_equal(found["consistency"], [0.5, np.nan, np.nan])
    np.testing.assert_allclose(found["consistency_incl_last"], [2 / 3, np.nan, np.nan])
    np.testing.assert_allclose(found["path_perplexity"], [2, 2, np.nan], rtol=1e-14)
    np.testing.assert_array_equal(found["correct"], [1, 0, 0])
    last = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    np.testing.assert_allclose(found["uncertainty_last"], [last, last, np.nan], rtol=1e-13)


def test_a_path_is_told_as_json_with_null_for_what_is_undefined():
    first, second, third = path_records(small())
    assert {key: first[key] for key in ("path_id", "id", "n", "pred", "gold", "correct", "consistency")} == {
        **{"path_id": "a/0", "id": "a", "n": 3, "pred": 0, "gold": 0, "correct": True, "consistency": 0.5}
    }
    assert second["consistency"] is None
    assert (third["n"], third["correct"], third["uncertainty"], third["path_perplexity"]) == (0, False, None, None)
    json.dumps([first, second, third], allow_nan=False)
    unknown = path_records(random_features(0, gold=False))[0]
    assert (unknown["gold"], unknown["correct"], unknown["gold_share"]) == (None, None, None)


# --- facets and stages ---


def test_facets_come_in_order_of_appearance():
    features = random_features(0)
    assert facet_masks(features) == [({}, pytest.approx(np.ones(18, dtype=bool)))]
    (first, mask), (second, other) = facet_masks(features, ["variant", "dataset"])
    assert first == {"variant": "cot", "dataset": "made"}
    assert facet_name(second) == "lot2, made"
    assert mask.tolist() == [True, False] * 9
    assert not (mask & other).any()


def test_a_facet_that_no_path_has_is_refused_with_those_there_are():
    for name in ("model", "colour"):
        with pytest.raises(UsageProblem, match=f"--by {name}: no path has one") as found:
            facet_masks(random_features(0), [name])
        assert found.value.advice == "there are: variant, dataset"


def test_stages_of_other_paths_are_none():
    features = random_features(1)
    mask = facet_masks(features, ["variant"])[0][1]
    found = stages(features, mask)
    assert ((found > 0) == mask[features.path]).all()
    np.testing.assert_array_equal(found[found > 0], stages(features, np.ones_like(mask))[found > 0])


def test_released_stages_are_cut_apart_for_wrong_and_correct_and_drop_single_thoughts():
    features = random_features(2, k=(4,) * 20, paths=8, longest=12)
    every = np.ones(len(features.path_ids), dtype=bool)
    found = stages(features, every, compat=True)
    assert ((found == 0) == (features.n_steps[features.path] == 1)).all()
    for outcome in (0, 1):
        alone = stages(features, features.correct == outcome, compat=True)
        mine = features.correct[features.path] == outcome
        np.testing.assert_array_equal(found[mine], alone[mine])
        sizes = np.bincount(alone[mine & (alone > 0)])[1:]
        assert sizes.max() < 1.35 * sizes.min()  # stages of equal counts: that is what percentiles make
        assert np.ptp(panel_counts(features, every)[outcome]) > np.ptp(sizes)


# --- tables ---


def test_a_table_has_every_facet_outcome_and_stage():
    cells = tables(random_features(0), by=["variant"], bins=3, draws=20)
    keys = [(c.facet["variant"], c.outcome, c.bin) for c in cells]
    assert keys == [
        (variant, outcome, stage)
        for variant in ("cot", "lot2")
        for outcome in ("wrong", "correct", "all")
        for stage in (1, 2, 3, None)
    ]
    for c in cells:
        names = STATE_METRICS if c.bin else PATH_METRICS
        assert set(c.metrics) == set(names) - (set() if c.outcome == "all" else {"correct"})
        assert c.progress == ((c.bin - 1) / 3, c.bin / 3) if c.bin else c.progress is None


def test_counts_add_up():
    features = random_features(6, k=(4,) * 5, paths=8, shortest=0)
    cells = tables(features, draws=20)
    for outcome, mask in (("wrong", features.correct == 0), ("correct", features.correct == 1), ("all", True)):
        total = cell(cells, outcome)
        staged = [cell(cells, outcome, stage) for stage in range(1, 6)]
        assert total.paths == np.sum(mask & np.ones(40, bool))
        assert total.states == sum(c.states for c in staged) == np.sum(features.n_steps[mask & np.ones(40, bool)])
        assert total.questions == 5
    assert cell(cells, "all").metrics["correct"].estimate == np.mean(features.correct)


def test_intervals_are_those_of_the_cluster_bootstrap_where_every_question_has_a_value():
    features = random_features(9, k=(4,) * 8, paths=8, longest=12, shortest=5)
    states, paths = state_metrics(features), path_metrics(features)
    stage = stages(features, np.ones(64, dtype=bool))
    cells = tables(features, draws=400, seed=5, level=0.9)
    outcome = features.correct[features.path]
    compared = 0
    for c in cells:
        if c.bin:
            values, of, wanted = states, features.state_question, stage == c.bin
            own = outcome
        else:
            values, of, wanted = paths, features.question, np.ones(64, dtype=bool)
            own = features.correct
        if c.outcome != "all":
            wanted = wanted & (own == ("wrong", "correct").index(c.outcome))
        for name, found in c.metrics.items():
            rows = wanted & ~np.isnan(values[name])
            if len(set(of[rows].tolist())) < 8:
                continue
            expected = bootstrap_mean(values[name][rows], clusters=of[rows], draws=400, seed=5, level=0.9)
            assert found.n == expected.n
            assert (found.estimate, found.low, found.high) == pytest.approx(
                (expected.estimate, expected.low, expected.high), rel=1e-12
            )
            compared += 1
    assert compared > 100


def test_one_question_determines_no_interval():
    cells = tables(small(), draws=50)
    found = cell(cells, "correct").metrics["uncertainty"]
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert cell(cells, "correct").as_record()["metrics"]["uncertainty"]["low"] is None
    # Two questions, of which one has right paths: the same.
    both = assemble(
        [question("a", [2, 2], gold=0), question("b", [2, 2], gold=0)],
        [path("a/0", 0, [[1, 2]] * 2, pred=0), path("b/0", 1, [[1, 2]] * 2, pred=1), path("b/1", 1, [[1, 3]], pred=1)],
        SCORING,
    )
    cells = tables(both, draws=50)
    assert math.isnan(cell(cells, "correct").metrics["uncertainty"].low)
    assert not math.isnan(cell(cells, "all").metrics["uncertainty"].low)


def test_what_has_no_value_is_null():
    cells = tables(small(), draws=20)
    assert cell(cells, "wrong").metrics["consistency"] is None
    assert (cell(cells, "wrong").paths, cell(cells, "wrong").states) == (2, 1)
    assert cell(cells, "wrong", 1).states == 0
    assert set(cell(cells, "wrong", 1).metrics.values()) == {None}
    json.dumps([c.as_record() for c in cells], allow_nan=False)


def test_without_right_answers_there_is_one_outcome():
    cells = tables(random_features(0, gold=False), draws=20)
    assert {c.outcome for c in cells} == {"all"}
    assert cells[-1].metrics["correct"] is None
    assert cells[0].metrics["gold_share"] is None
    assert cells[0].metrics["uncertainty"] is not None


def test_one_outcome_only_leaves_the_other_empty():
    cells = tables(random_features(0, outcomes=("correct",)), draws=20)
    assert cell(cells, "wrong").paths == 0
    assert set(cell(cells, "wrong").metrics.values()) == {None}


def test_different_k_are_never_mixed():
    features = random_features(0, k=(4, 2, 4))
    cells = tables(features, draws=20)
    assert [c.k for c in cells] == [2] * 18 + [4] * 18
    mean = np.mean(path_metrics(features)["uncertainty"][6:12])
    assert cell(cells[:18], "all").metrics["uncertainty"].estimate == pytest.approx(mean, rel=1e-12)


def test_the_same_seed_gives_the_same_table_and_facets_do_not_disturb_one_another():
    features = random_features(0, k=(4,) * 6)
    assert tables(features, draws=200) == tables(features, draws=200)
    assert tables(features, draws=200) != tables(features, draws=200, seed=1)
    relabelled = dataclasses.replace(
        features, facets={"variant": tuple("ab"[value == "lot2"] for value in features.facets["variant"])}
    )
    before, after = tables(features, by=["variant"], draws=200), tables(relabelled, by=["variant"], draws=200)
    assert [c.metrics for c in before] == [c.metrics for c in after]


def test_released_stages_are_not_called_progress():
    cells = tables(random_features(2), compat=True, draws=20)
    assert {c.progress for c in cells} == {None}
    assert cell(cells, "all", 2).as_record()["progress"] is None


# --- the released demo ---


def test_the_demos_fifty_paths_have_the_released_metrics():
    features = demo_features()
    found = path_metrics(features)
    stored = json.loads(demo_file("fixture_chain_metrics.json").read_text())
    assert [row["path_id"] for row in stored] == list(features.path_ids)
    assert [row["n_states"] for row in stored] == features.n_steps.tolist()
    for name in (
        *("consistency", "consistency_incl_last", "uncertainty", "uncertainty_last"),
        *("uncertainty_likelihood", "path_perplexity"),
    ):
        np.testing.assert_allclose(found[name], [row[name] for row in stored], rtol=0, atol=1e-9, err_msg=name)
    assert [row["reference_correct"] for row in stored] == (features.correct == 1).tolist()


def test_the_demos_panels_hold_the_released_counts():
    features = demo_features()
    every = np.ones(50, dtype=bool)
    assert panel_counts(features, every).tolist() == [[60, 72, 68, 72, 80], [52, 60, 64, 60, 73]]
    assert panel_counts(features, every, compat=True).tolist() == [[71, 75, 66, 69, 71], [66, 58, 61, 67, 57]]


MEANS = {
    ("wrong", "uncertainty"): (1.598, 1.598, 1.597, 1.593, 1.574),
    ("correct", "uncertainty"): (1.592, 1.592, 1.576, 1.572, 1.521),
    ("wrong", "consistency"): (0.467, 0.597, 0.515, 0.472, 0.655),
    ("correct", "consistency"): (0.346, 0.433, 0.438, 0.350, 0.622),
    ("wrong", "gold_share"): (0.178, 0.180, 0.180, 0.181, 0.188),
    ("correct", "gold_share"): (0.172, 0.179, 0.164, 0.161, 0.126),
}
TOTALS = {
    ("correct", "consistency"): 0.5219,
    ("wrong", "consistency"): 0.6041,
    ("all", "consistency"): 0.5581,
    ("correct", "uncertainty"): 1.5606,
    ("wrong", "uncertainty"): 1.5921,
    ("all", "uncertainty"): 1.5744,
    ("correct", "uncertainty_likelihood"): 1.5347,
    ("wrong", "uncertainty_likelihood"): 1.5865,
    ("all", "uncertainty_likelihood"): 1.5575,
}


def test_the_demos_tables_hold_the_published_means():
    cells = tables(demo_features(), by=["dataset"])
    for (outcome, name), expected in MEANS.items():
        found = [cell(cells, outcome, stage, dataset="aqua").metrics[name].estimate for stage in range(1, 6)]
        assert found == pytest.approx(expected, abs=5.1e-4), (outcome, name)
    for (outcome, name), expected in TOTALS.items():
        found = cell(cells, outcome, dataset="aqua").metrics[name]
        assert found.estimate == pytest.approx(expected, abs=5.1e-5), (outcome, name)
        assert found.low < found.estimate < found.high
    total = {outcome: cell(cells, outcome, dataset="aqua").metrics for outcome in ("wrong", "correct", "all")}
    assert total["all"]["consistency_incl_last"].estimate == pytest.approx(0.593, abs=5.1e-4)
    assert total["correct"]["path_perplexity"].estimate == pytest.approx(2.21, abs=5.1e-3)
    assert total["wrong"]["path_perplexity"].estimate == pytest.approx(2.16, abs=5.1e-3)
    assert total["all"]["correct"].estimate == pytest.approx(0.56)
