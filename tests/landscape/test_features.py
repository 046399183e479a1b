"""The features file: what goes in comes out, and nothing that does not fit together is read."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.landscape.twins import SCORING, demo_features, path, question, random_features
from toolbox.landscape.features import (
    Features,
    PathScores,
    Scoring,
    assemble,
    check,
    read_features,
    write_features,
)
from toolbox.shell.errors import BadData

ARRAYS = {
    "distance": ("float64", "MK"),
    "logprob": ("float64", "MK"),
    "n_tokens": ("int16", "MK"),
    "start_distance": ("float64", "QK"),
    "start_logprob": ("float64", "QK"),
    "thought_logprob": ("float64", "M"),
    "thought_tokens": ("int32", "M"),
    "path": ("int32", "M"),
    "step": ("int32", "M"),
    "question": ("int32", "P"),
    "n_steps": ("int32", "P"),
    "pred": ("int8", "P"),
    "correct": ("int8", "P"),
    "k": ("int8", "Q"),
    "gold": ("int8", "Q"),
}


def mixed() -> Features:
    """Questions of 2, 5 and 3 choices, one path without thoughts."""
    return random_features(3, k=(2, 5, 3), paths=5, shortest=0)


def equal(a: Features, b: Features) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("path_ids", "question_ids", "facets", "scoring"):
        assert getattr(a, name) == getattr(b, name)


# --- in and out ---


def test_a_file_gives_back_every_bit(tmp_path: Path):
    features = mixed()
    assert 0 in features.n_steps
    write_features(tmp_path / "f.safetensors", features, {"toolbox": "{}"})
    equal(read_features(tmp_path / "f.safetensors"), features)


def test_types_shapes_and_names_are_the_formats(tmp_path: Path):
    from safetensors import safe_open

    features = mixed()
    write_features(tmp_path / "f.safetensors", features)
    sizes = {"M": int(features.n_steps.sum()), "K": 5, "P": 15, "Q": 3}
    with safe_open(tmp_path / "f.safetensors", framework="np") as stored:
        assert set(stored.keys()) == {*ARRAYS, "names"}
        for name, (kind, letters) in ARRAYS.items():
            array = stored.get_tensor(name)
            assert array.dtype == kind
            assert array.shape == tuple(sizes[letter] for letter in letters)
            np.testing.assert_array_equal(array, getattr(features, name))
        names = json.loads(stored.get_tensor("names").tobytes())
        told = json.loads(stored.metadata()["landscape"])
    assert names["paths"][:2] == ["q0/0", "q0/1"]
    assert names["questions"] == ["q0", "q1", "q2"]
    assert names["facets"]["variant"][:3] == ["cot", "lot2", "cot"]
    assert told["scoring"] == dataclasses.asdict(SCORING)


def test_equal_features_give_equal_bytes(tmp_path: Path):
    for name in "ab":
        write_features(tmp_path / name, mixed(), {"toolbox": "{}", "format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_templates_and_separators_are_kept_to_the_letter(tmp_path: Path):
    scoring = dataclasses.replace(SCORING, template="/{label}", separator="/", model="ü/模型")
    features = dataclasses.replace(mixed(), scoring=scoring)
    write_features(tmp_path / "f.safetensors", features)
    assert read_features(tmp_path / "f.safetensors").scoring == scoring


def test_paths_without_any_thought_are_kept(tmp_path: Path):
    empty = PathScores("p", 0, 1, {}, np.empty((0, 3)), np.empty((0, 3)), np.empty(0), np.empty(0))
    features = assemble([question("q", [2, 3, 4])], [empty], SCORING)
    write_features(tmp_path / "f.safetensors", features)
    found = read_features(tmp_path / "f.safetensors")
    assert found.distance.shape == (0, 3)
    assert found.n_steps.tolist() == [0]
    assert found.correct.tolist() == [0]


def test_reading_needs_no_torch(tmp_path: Path):
    write_features(tmp_path / "f.safetensors", mixed())
    script = (
        "import sys\nfrom toolbox.landscape.features import read_features\n"
        "read_features(sys.argv[1])\nassert 'torch' not in sys.modules and 'sklearn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "f.safetensors")], check=True)


def test_the_demo_survives_the_file(tmp_path: Path):
    features = demo_features()
    write_features(tmp_path / "f.safetensors", features)
    equal(read_features(tmp_path / "f.safetensors"), features)
    assert features.distance.shape == (661, 5)
    assert int((features.correct == 1).sum()) == 28


# --- assembling ---


def test_distances_padding_and_outcomes_follow_from_the_scores():
    features = assemble(
        [question("a", [4, 2], gold=1), question("b", [3, 3, 3], gold=-1)],
        [
            path("a/0", 0, [[1, 2], [3, 4]], pred=1, variant="cot"),
            path("b/0", 1, [[5, 6, 7]], pred=0, model="m"),
            path("a/1", 0, [[8, 9]]),
        ],
        SCORING,
    )
    np.testing.assert_allclose(
        features.distance, [[1, 2, np.nan], [3, 4, np.nan], [5, 6, 7], [8, 9, np.nan]], rtol=1e-14
    )
    assert features.n_tokens.tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert features.path.tolist() == [0, 0, 1, 2]
    assert features.step.tolist() == [1, 2, 1, 1]
    assert features.last.tolist() == [1, 1, 2, 3]
    assert features.state_question.tolist() == [0, 0, 1, 0]
    assert features.correct.tolist() == [1, -1, 0]
    assert features.facets == {"variant": ("cot", None, None), "model": (None, "m", None)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob": np.array([[-1.0, -np.inf]])}, r"path 'p', state 1: distance is missing, not finite"),
        ({"logprob": np.array([[-1.0, np.nan]])}, r"path 'p', state 1"),
        ({"logprob": np.array([[-1.0]]), "n_tokens": np.array([[1]])}, r"path 'p', state 1"),
        ({"n_tokens": np.array([[1, 0]])}, r"path 'p', state 1"),
        ({"n_tokens": np.array([[1, 40_000]])}, r"n_tokens holds 40000, more than the 32767"),
        ({"thought_logprob": np.array([np.nan])}, r"path 'p', state 1: thought_logprob"),
        ({"pred": 2}, "pred is not among the choices"),
        ({"question": 1}, "a question that is not there"),
    ],
)
def test_scores_that_do_not_fit_are_refused_naming_path_and_state(change, message):
    good = path("p", 0, [[2, 3]])
    with pytest.raises(BadData, match=message):
        assemble([question("q", [2, 3])], [dataclasses.replace(good, **change)], SCORING)


def test_no_paths_and_equal_ids_are_refused():
    with pytest.raises(BadData, match="no paths"):
        assemble([question("q", [2, 3])], [], SCORING)
    with pytest.raises(BadData, match="path id 'p' occurs twice"):
        assemble([question("q", [2, 3])], [path("p", 0, [[2, 3]])] * 2, SCORING)
    with pytest.raises(BadData, match="128 choices, more than 127"):
        assemble([question("q", [2.0] * 128)], [path("p", 0, [[2.0] * 128])], SCORING)


# --- what does not fit together ---


def with_entry(name: str, place: object, value: float):
    def change(features: Features) -> Features:
        array = np.array(getattr(features, name))
        array[place] = value
        return dataclasses.replace(features, **{name: array})

    return change


def moved_state(features: Features) -> Features:
    path = features.path.copy()
    path[[0, -1]] = path[[-1, 0]]
    return dataclasses.replace(features, path=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_entry("distance", (0, 0), 99.0), "does not follow from logprob"),
        (with_entry("distance", (0, 0), np.inf), "path 'q0/0', state 1: distance"),
        (with_entry("distance", (0, 0), -2.0), "path 'q0/0', state 1: distance"),
        (with_entry("distance", (0, 4), 1.0), "path 'q0/0', state 1: distance"),
        (with_entry("distance", (0, 4), np.inf), "path 'q0/0', state 1: distance"),
        (with_entry("logprob", (0, 0), np.nan), "logprob is missing"),
        (with_entry("n_tokens", (0, 4), 1), "n_tokens"),
        (with_entry("n_tokens", (0, 0), -1), "n_tokens"),
        (with_entry("start_distance", (1, 0), np.nan), "question 'q1', start: start_distance"),
        (with_entry("start_logprob", (1, 0), np.nan), "question 'q1', start: start_logprob"),
        (with_entry("thought_logprob", 0, np.inf), "thought_logprob"),
        (with_entry("thought_tokens", 0, -1), "thought_tokens"),
        (with_entry("step", 0, 2), "step: "),
        (with_entry("n_steps", 0, 2**31 - 1), "n_steps add up"),
        (with_entry("n_steps", 0, -1), "n_steps add up"),
        (moved_state, "path: the states are not in the order"),
        (with_entry("question", 0, 3), "question: "),
        (with_entry("question", 0, -1), "question: "),
        (with_entry("k", 0, 1), "k: needs"),
        (with_entry("k", 1, 4), "k: needs"),
        (with_entry("gold", 0, 2), "gold is not among"),
        (with_entry("pred", 0, 5), "pred is not among"),
        (with_entry("correct", 0, -1), "correct: does not follow"),
        (lambda f: dataclasses.replace(f, pred=f.pred[:-1]), "pred has shape"),
        (lambda f: dataclasses.replace(f, k=f.k[None]), "k has 2 dimensions"),
        (lambda f: dataclasses.replace(f, path_ids=("same",) * 15), "path id 'same' occurs twice"),
        (lambda f: dataclasses.replace(f, question_ids=("a", "b", "a")), "question id 'a' occurs twice"),
        (lambda f: dataclasses.replace(f, path_ids=f.path_ids[1:]), "has shape"),
        (lambda f: dataclasses.replace(f, facets={"model": ("m",)}), "facet 'model' has 1 values for 15 paths"),
    ],
)
def test_what_does_not_fit_together_is_not_read(change, message, tmp_path: Path):
    features = random_features(3, k=(2, 5, 3), paths=5)
    check(features)
    write_features(tmp_path / "f.safetensors", change(features))
    with pytest.raises(BadData, match=f"f.safetensors: .*{message}"):
        read_features(tmp_path / "f.safetensors")


def test_damaged_files_and_files_of_another_kind_are_not_read(tmp_path: Path):
    import pickle

    good = tmp_path / "f.safetensors"
    write_features(good, mixed())
    whole = good.read_bytes()
    other = tmp_path / "other.safetensors"
    for content, message in (
        (whole[:-5], "truncated"),
        (whole + b"\0", "after its last tensor"),
        (whole[:200], "header"),
        (b"", "holds only 0 bytes"),
        (pickle.dumps({"a": 1}), "not in safetensors format"),
        (whole.replace(b"landscape", b"landscope", 1), "not a features file"),
        (whole.replace(b'\\"version\\":1', b'\\"version\\":2', 1), "version 2"),
        (whole.replace(b'\\"split\\":\\"line\\"', b'\\"split\\":\\"l\xffne\\"', 1), "not valid JSON"),
        (whole.replace(b'\\"version\\":1', b'\\"version\\":x', 1), "cannot be read"),
        (whole.replace(b'"n_steps"', b'"n_stops"', 1), "array 'n_steps' of type I32 is missing"),
        (whole.replace(b'"k":{"dtype":"I8"', b'"k":{"dtype":"U8"', 1), "array 'k' of type I8 is of type U8"),
        (whole.replace(b'"paths":[', b'"paths":{', 1), "names: cannot be read"),
    ):
        assert content != whole
        other.write_bytes(content)
        with pytest.raises(BadData, match=message):
            read_features(other)


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_features(tmp_path / "none.safetensors")


def test_scoring_names_every_field_of_the_header():
    assert {field.name for field in dataclasses.fields(Scoring)} == {
        *("model", "model_digest", "tokenizer_digest", "dtype", "template", "context"),
        *("separator", "split", "method", "versions", "options"),
    }
