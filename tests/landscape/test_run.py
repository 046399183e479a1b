"""landscape-plot on tiny models: numbers against plain passes, what is written, several processes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.landscape.runs import (
    FAST,
    FILES,
    ROWS,
    figures_of,
    jsonl,
    lines,
    same_files,
)
from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.landscape.features import read_features


@functools.cache
def plain_model() -> Any:
    return tiny_model().double()


def plain_logprobs(before: list[int], answer: list[int]) -> list[float]:
    """ln p of the answer's tokens behind ``before``: one plain forward pass over both, in float64."""
    import torch

    with torch.no_grad():
        logprobs = plain_model()(torch.tensor([before + answer])).logits[0].log_softmax(-1)
    return [float(logprobs[len(before) + place - 1, token]) for place, token in enumerate(answer)]


def test_every_score_equals_plain_passes_over_the_text(plot, tmp_path):
    turns = [{"role": "user", "content": "Which is 7?"}]
    rows = [ROWS[0], {**ROWS[0], "id": "m", "messages": turns, "completion": "So.\nAnswer: B"}]
    assert plot(rows=rows).code == 0
    features = read_features(tmp_path / "out" / "features.safetensors")
    tokenizer = tiny_tokenizer()

    def ids(text: str) -> list[int]:  # a byte a token, control tokens whole: any cut of a text is a cut of its tokens
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    question = "Which is 0?\nA) thing 0\nB) other 0\nC) none"
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich is 7?<|im_end|>\n<|im_start|>assistant\n"
    for number, (context, joint) in enumerate([(question, "\n"), (prompt, "")]):
        thoughts = rows[number]["completion"].split("\n")
        states = [context] + [context + joint + "\n".join(thoughts[: n + 1]) for n in range(len(thoughts))]
        mine = np.flatnonzero(features.path == number)
        got = np.vstack([features.start_logprob[features.question[number]], features.logprob[mine]])
        for state, row in zip(states, got, strict=True):
            for choice, found in zip(["A) thing 0", "B) other 0", "C) none"], row, strict=True):
                answer = ids(("" if state.endswith("\n") else "\n") + f"Answer is: {choice}")
                expected = plain_logprobs(ids(state), answer)
                assert found == pytest.approx(sum(expected), abs=2e-4 * len(expected))
        for before, after, row in zip(states, states[1:], mine, strict=False):
            expected = plain_logprobs(ids(before), ids(after[len(before) :]))
            assert features.thought_logprob[row] == pytest.approx(sum(expected), abs=2e-4 * len(expected))
            assert features.thought_tokens[row] == len(expected)
    assert features.scoring.options["scored_by"] == ["tree"]
    assert (features.scoring.model, features.scoring.template) == ("tiny", "Answer is: {label}) {text}")


@pytest.mark.parametrize("method", ["prefix", "naive"])
def test_every_method_gives_the_same_scores(plot, made, tmp_path, method):
    assert plot("--method", method).code == 0
    one, other = read_features(made.features), read_features(tmp_path / "out" / "features.safetensors")
    assert np.max(np.abs(one.logprob - other.logprob)) < 5e-4
    assert np.max(np.abs(one.thought_logprob - other.thought_logprob)) < 5e-4
    assert np.array_equal(one.distance.argmin(axis=1), other.distance.argmin(axis=1))
    assert other.scoring.options["scored_by"] == [method]


def test_what_is_written(plot, tmp_path):
    done = plot("--by", "variant", "--log-text", fast=False)
    assert done.code == 0, done.err
    out = tmp_path / "out"
    figures = ["landscape_k3_cot.png", "landscape_k3_lot2.png", "metrics.png"]
    assert {path.name for path in out.iterdir()} == FILES | set(figures)
    assert all((out / name).stat().st_size > 5_000 for name in figures)
    assert done.out == (out / "metrics.jsonl").read_bytes()
    *bins, last = done.rows
    assert last["figures"] == figures
    assert last == {
        "event": "done", "questions": 3, "paths": 12, "states": len(features_path(out)), "k": [3],
        "without_thoughts": 0, "single_thought": 0, "read": 12, "judged": 12, "correct": 6, "figures": figures,
    }  # fmt: skip
    assert {(row["facet"]["variant"], row["outcome"], row["bin"]) for row in bins} == {
        (facet, outcome, stage) for facet in ("cot", "lot2") for outcome in ("wrong", "correct", "all")
        for stage in (1, 2, 3, 4, 5, None)
    }  # fmt: skip
    coordinates = jsonl(out / "coords.jsonl")
    assert len(coordinates) == last["states"] + 3 + 3
    assert set(coordinates[0]) == {"path_id", "step", "progress", "x", "y", "k"}
    paths = jsonl(out / "paths.jsonl")
    assert [path["path_id"] for path in paths][:3] == ["q0/cot/0", "q0/cot/1", "q0/lot2/0"]
    assert [path["pred"] for path in paths] == [row["completion"][-1] for row in ROWS]
    assert ["\n".join(path["thoughts"]) for path in paths] == [row["completion"] for row in ROWS]
    record = json.loads((out / "run.json").read_text())
    assert (record["processes"], record["scored_before"], record["done"]) == (1, 0, last)


def test_figures_of_facets_that_a_file_cannot_be_named_after_keep_apart(plot, tmp_path):
    facets = ["a/b", "A b", "..", "", None, "x" * 300, "a:b"]
    rows = [{**row, "level": facets[number % 7]} for number, row in enumerate(ROWS)]
    assert plot("--by", "level", rows=rows).code == 0
    assert figures_of(tmp_path / "out", rows, by="level")[:-1] == [
        f"landscape_k3_{name}.png" for name in ("a-b", "A-b-2", "none", "none-2", "none-3", "x" * 60, "a-b-3")
    ]


def features_path(out: Path) -> np.ndarray:
    return read_features(out / "features.safetensors").path


def test_texts_stay_out_of_the_directory_unless_asked_for(made):
    for path in made.out.iterdir():
        assert b"Step 0" not in path.read_bytes(), path
    assert "Step 0" not in made.done.err + made.done.out.decode()


def test_two_processes_give_the_features_of_one(tool, tiny, made, tmp_path):
    rejects, out = tmp_path / "rejects", tmp_path / "out"
    long = {**ROWS[0], "path_id": "long", "completion": "word\n" * 150}
    rows = [*ROWS, long]
    words = ["--model", tiny, *FAST, "-j", "2", "--on-bad", "skip", "--out", out]
    two = tool("landscape-plot", *words, "--batch-tokens", "300", "--rejects", rejects, stdin=lines(rows))
    assert two.code == 0, two.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
    assert two.out == made.done.out
    same_files(made.out, tmp_path / "out")
    assert two.err.count("bad rows left out") == 1


@pytest.mark.slow
def test_two_processes_of_which_none_has_anything_to_score_go_home(tool, tiny, made):
    again = tool("landscape-plot", "--model", tiny, *FAST, "-j", "2", "--out", made.out, "--resume", stdin=lines(ROWS))
    assert (again.code, again.out) == (0, made.done.out), again.err
    assert again.err.count("nothing was scored") == 1


def test_the_models_own_passes_are_those_of_the_twin(tiny):
    """The independent numbers above are of the model that the command loads."""
    from safetensors.torch import load_file

    assert (load_file(tiny / "model.safetensors")["model.norm.weight"] == tiny_model().model.norm.weight).all()
