"""The map: which points it holds in which order, one fit, the same for the same seed, and the released coordinates."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys

import numpy as np
import pytest

from tests.landscape.twins import SCORING, demo_features, demo_file, path, question, random_features
from toolbox.landscape.features import PathScores, assemble
from toolbox.landscape.method import gold_first, l1_features, landmarks
from toolbox.landscape.project import (
    MANY_STATES,
    coordinate_records,
    many_states_advice,
    map_rows,
    project,
    question_groups,
)
from toolbox.shell.errors import BadData, UsageProblem


def small():
    """Two questions whose paths come in turn, gold at different places, and one path without thoughts."""
    empty = PathScores("b/1", 1, -1, {}, np.empty((0, 3)), np.empty((0, 3)), np.empty(0), np.empty(0))
    return assemble(
        [question("a", [1, 2, 3], gold=2), question("b", [4, 5, 6], gold=0)],
        [path("a/0", 0, [[1, 1, 2], [1, 2, 1]]), path("b/0", 1, [[3, 1, 1]]), path("a/1", 0, [[5, 1, 1]]), empty],
        SCORING,
    )


# --- points ---


def test_points_come_question_by_question_with_the_start_after_the_states():
    rows = map_rows(small(), [0, 1])
    assert rows.state.tolist() == [0, 1, 3, -1, 2, -1, -1, -1, -1]
    assert rows.question.tolist() == [0, 0, 0, 0, 1, 1, -1, -1, -1]
    assert rows.k == 3
    expected = [[2, 1, 1], [1, 1, 2], [1, 5, 1], [3, 1, 2], [3, 1, 1], [4, 5, 6]]
    np.testing.assert_allclose(rows.matrix[:6], l1_features(expected), rtol=1e-14)
    np.testing.assert_array_equal(rows.matrix[6:], landmarks(3))
    assert rows.gold_first


def test_questions_come_in_the_order_asked_for():
    rows = map_rows(small(), [1, 0])
    assert rows.state.tolist()[:6] == [2, -1, 0, 1, 3, -1]


def test_points_of_a_random_map_are_the_formulas():
    features = random_features(4, k=(4, 3, 4), paths=7)
    rows = map_rows(features, question_groups(features)[1])
    assert sorted(rows.state[rows.state >= 0].tolist()) == np.flatnonzero(features.state_question != 1).tolist()
    for point, state, of in zip(rows.matrix, rows.state, rows.question, strict=True):
        if of < 0:
            continue
        distances = features.distance[state] if state >= 0 else features.start_distance[of]
        expected = gold_first((distances / np.nansum(distances))[None, :4], features.gold[of : of + 1])[0]
        np.testing.assert_allclose(point, expected, rtol=1e-13)


def test_maps_are_of_one_k_or_of_one_question():
    features = random_features(0, k=(5, 2, 5))
    assert [group.tolist() for group in question_groups(features)] == [[1], [0, 2]]
    assert [group.tolist() for group in question_groups(features, per_question=True)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"got \[2, 5\]"):
        map_rows(features, [0, 1])


def test_a_question_without_states_has_no_start_on_the_map():
    features = small()
    only = dataclasses.replace(features, question=np.array([0, 0, 0, 1], dtype=np.int32))
    assert [group.tolist() for group in question_groups(only)] == [[0]]
    assert 1 not in map_rows(only, [0, 1]).question
    with pytest.raises(BadData, match="no thoughts to draw"):
        map_rows(only, [1])


def test_without_right_answers_a_map_holds_one_question_in_its_own_order():
    features = random_features(1, gold=False)
    with pytest.raises(UsageProblem, match="3 of 3 questions have no `answer`") as found:
        map_rows(features, [0, 1, 2])
    assert "--per-question" in found.value.advice
    rows = map_rows(features, [1])
    assert not rows.gold_first
    np.testing.assert_allclose(
        rows.matrix[: -1 - rows.k], l1_features(features.distance[features.state_question == 1]), rtol=1e-14
    )


# --- projection ---


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_the_same_seed_gives_the_same_map(method):
    rows = map_rows(random_features(5, k=(4, 4), paths=2), [0, 1])
    first, second = project(rows, method, seed=3), project(rows, method, seed=3)
    assert first.xy.shape == (len(rows.matrix), 2)
    assert first.xy.dtype == np.float64
    assert np.isfinite(first.xy).all()
    np.testing.assert_array_equal(first.xy, second.xy)


def test_the_maps_threads_are_one_only_while_it_is_made():
    from threadpoolctl import threadpool_info, threadpool_limits

    with threadpool_limits(2):
        before = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()]
        project(map_rows(small(), [0, 1]))
        after = {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}
        assert all(after[name] == count for name, count in before)


def test_few_points_lower_the_perplexity_and_it_is_said():
    landscape = project(map_rows(small(), [0, 1]), "tsne")
    assert landscape.perplexity == pytest.approx(8 / 3)
    assert landscape.note == "9 points are few for t-SNE: perplexity 2.67 instead of 10"
    assert project(map_rows(small(), [0, 1]), "tsne", perplexity=2).note is None
    assert project(map_rows(small(), [0, 1]), "pca").note is None


def test_the_smallest_map_there_is():
    features = assemble([question("a", [2, 3])], [path("a/0", 0, [[4, 1]])], SCORING)
    for method in ("tsne", "pca"):
        landscape = project(map_rows(features, [0]), method)
        assert landscape.xy.shape == (4, 2)
        assert np.isfinite(landscape.xy).all()


def test_equal_states_are_no_fault():
    features = assemble([question("a", [2, 2, 2])], [path("a/0", 0, [[2, 2, 2]] * 9)], SCORING)
    for method in ("tsne", "pca"):
        assert np.isfinite(project(map_rows(features, [0]), method).xy).all()


def test_a_pca_keeps_the_distances_that_two_dimensions_can_hold():
    """Three choices lie in a plane: nothing is lost; five do not."""
    rows = map_rows(random_features(2, k=(3, 3)), [0, 1])
    landscape = project(rows, "pca")
    apart = np.linalg.norm(rows.matrix[:, None] - rows.matrix[None], axis=2)
    np.testing.assert_allclose(
        np.linalg.norm(landscape.xy[:, None] - landscape.xy[None], axis=2), apart, rtol=1e-9, atol=1e-12
    )
    assert landscape.explained == pytest.approx(1)
    assert project(map_rows(random_features(2, k=(5, 5)), [0, 1]), "pca").explained < 0.95


def test_opentsne_that_is_not_installed_is_a_usage_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(UsageProblem, match="openTSNE is not installed") as found:
        project(map_rows(small(), [0, 1]), "opentsne")
    assert "pip install openTSNE" in found.value.advice


def test_opentsne_makes_a_map_too():
    pytest.importorskip("openTSNE", reason="openTSNE is an extra")
    rows = map_rows(random_features(5), [0, 1, 2])
    first, second = project(rows, "opentsne"), project(rows, "opentsne")
    assert first.xy.shape == (len(rows.matrix), 2)
    np.testing.assert_array_equal(first.xy, second.xy)


def test_a_faster_projection_is_named_where_there_are_many_states():
    rows = map_rows(small(), [0, 1])
    many = dataclasses.replace(rows, matrix=np.broadcast_to(rows.matrix[:1], (MANY_STATES + 1, 3)))
    assert many_states_advice([rows], "tsne") is None
    assert "--project opentsne" in many_states_advice([rows, many], "tsne")
    assert many_states_advice([many], "pca") is None


def test_coordinates_are_told_a_point_a_line():
    features = small()
    landscape = project(map_rows(features, [0, 1]), "pca")
    records = list(coordinate_records(landscape, features))
    assert len(records) == 9
    assert records[1] == {
        **{"path_id": "a/0", "step": 2, "progress": 1.0},
        **{"x": landscape.xy[1, 0], "y": landscape.xy[1, 1], "k": 3},
    }
    assert {key: records[5][key] for key in ("id", "step")} == {"id": "b", "step": 0}
    assert [record.get("landmark") for record in records[6:]] == [0, 1, 2]


# --- the released demo ---


def test_the_demos_points_and_coordinates_are_the_released_codes():
    features = demo_features()
    rows = map_rows(features, question_groups(features)[0], "reference")
    with np.load(demo_file("fixture_features.npz")) as stored:
        np.testing.assert_allclose(rows.matrix[:-5], stored["features"], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(rows.matrix[-5:], stored["landmarks"])
        expected = stored["tsne"]
    landscape = project(rows)
    assert landscape.xy.shape == expected.shape == (671, 2)
    assert np.isfinite(landscape.xy).all()
    assert landscape.note is None
    if importlib.metadata.version("scikit-learn") == "1.9.1":
        np.testing.assert_allclose(landscape.xy, expected, rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(project(rows).xy, landscape.xy)
