"""landscape-plot's input: rows that are odd or bad, options that do not fit, what is missing."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

from tests.landscape.runs import (
    ROWS,
    figures_of,
    jsonl,
)
from tests.tiny import tiny_model_dir, tiny_tokenizer
from toolbox.landscape.features import read_features
from toolbox.landscape.run import Options, check
from toolbox.landscape.settings import unescaped
from toolbox.landscape.wording import Wording
from toolbox.shell.errors import UsageProblem


def test_paths_without_thoughts_count_but_are_not_on_the_map(plot, tmp_path):
    done = plot(rows=[*ROWS, {**ROWS[0], "completion": ""}, {**ROWS[0], "id": "only", "completion": " \n"}])
    assert done.code == 0, done.err
    assert "2 of 14 paths have no thoughts" in done.err
    assert (done.rows[-1]["paths"], done.rows[-1]["without_thoughts"], done.rows[-1]["judged"]) == (14, 2, 14)
    last = jsonl(tmp_path / "out" / "paths.jsonl")[-1]
    assert (last["path_id"], last["n"], last["uncertainty"], last["path_perplexity"]) == ("only/cot/0", 0, None, None)
    points = jsonl(tmp_path / "out" / "coords.jsonl")
    assert all(point.get("path_id") not in ("q0/cot/2", "only/cot/0") and point.get("id") != "only" for point in points)
    none = plot(rows=[{**ROWS[0], "completion": ""}], out="none")
    assert none.code == 65
    assert "none of 1 paths has a thought" in none.err


def test_a_single_thought_is_on_the_map_and_has_no_consistency(plot, tmp_path):
    done = plot(rows=[{**row, "completion": "Answer: A"} for row in ROWS])
    assert done.code == 0, done.err
    assert "12 of 12 paths have a single thought: --split sentence cuts them further" in done.err
    assert done.rows[-1]["single_thought"] == 12
    paths = jsonl(tmp_path / "out" / "paths.jsonl")
    assert {(path["n"], path["consistency"]) for path in paths} == {(1, None)}
    assert sum("path_id" in point for point in jsonl(tmp_path / "out" / "coords.jsonl")) == 12


def test_without_right_answers_a_question_has_one_row_and_no_split(plot, tmp_path):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in ROWS]
    several = plot(rows=rows)
    assert (several.code, several.out) == (2, b"")
    assert "3 of 3 questions have no `answer`" in several.err
    assert "--per-question" in several.err
    assert not (tmp_path / "out").exists()
    done = plot("--per-question", rows=rows)
    assert done.code == 0, done.err
    assert {row["outcome"] for row in done.rows[:-1]} == {"all"}
    assert (done.rows[-1]["judged"], done.rows[-1]["correct"]) == (0, 0)
    figures = figures_of(tmp_path / "out", rows, per_question=True, draw="svg,png", by="variant")
    assert figures[:3] == ["landscape_k3_q0_cot.svg", "landscape_k3_q0_cot.png", "landscape_k3_q0_lot2.svg"]
    assert len(figures) == 2 * (3 * 2 + 1)
    landmarks = [point["id"] for point in jsonl(tmp_path / "out" / "coords.jsonl") if "landmark" in point]
    assert landmarks == [f"q{number}" for number in range(3) for _ in range(3)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["one"]}, "stdin:3: $.choices: 1 choice, at least two are needed"),
        ({"choices": None}, "stdin:3: $.choices: no `choices`"),
        ({"answer": "Z"}, "stdin:3: $.answer: the answer 'Z' is not among the labels A, B, C"),
        ({"choices": ["a", "b", "c"]}, "stdin:3: $.choices: other choices than earlier rows of the id q0"),
        ({"path_id": "q0/cot/0"}, "stdin:3: $.path_id: the path q0/cot/0 stands on line 1 already"),
    ],
)
def test_bad_rows_are_65_with_their_line_and_can_be_left_out(plot, tmp_path, change, says):
    bad = {name: value for name, value in {**ROWS[2], **change}.items() if value is not None}
    rows = [*ROWS[:2], bad, *ROWS[2:]]
    done = plot(rows=rows)
    assert (done.code, done.out) == (65, b"")
    assert done.err.startswith(f"landscape-plot: {says}")
    assert not (tmp_path / "out").exists()
    rejects = tmp_path / "rejects.jsonl"
    left = plot("--on-bad", "skip", "--rejects", rejects, rows=rows)
    assert left.code == 0, left.err
    assert jsonl(rejects) == [bad]
    assert left.rows[-1]["paths"] == 12


def test_several_numbers_of_choices_are_several_maps(plot, tmp_path):
    more = [{**row, "id": f"r{row['id']}", "choices": [*row["choices"], "a fourth"]} for row in ROWS[:8]]
    done = plot(rows=[*ROWS, *more])
    assert done.code == 0, done.err
    assert done.rows[-1]["k"] == [3, 4]
    figures = figures_of(tmp_path / "out", [*ROWS, *more])
    assert figures == ["landscape_k3.png", "landscape_k4.png", "metrics_k3.png", "metrics_k4.png"]
    assert {point["k"] for point in jsonl(tmp_path / "out" / "coords.jsonl")} == {3, 4}
    assert "12 paths with 3 choices, 8 paths with 4 choices" in done.err
    distance = read_features(tmp_path / "out" / "features.safetensors").distance
    assert np.isnan(distance[:, 3]).any()
    assert not np.isnan(distance[:, :3]).any()


def test_a_state_longer_than_the_window_is_65_by_name_or_left_out_and_never_cut(plot, made, tmp_path):
    long = {**ROWS[0], "path_id": "long", "completion": "word\n" * 150}
    rows = [ROWS[0], long, *ROWS[1:]]
    done = plot(rows=rows)
    assert (done.code, done.out) == (65, b"")
    assert "stdin:2: path long: it has 791 tokens, too many for the model's window of 512" in done.err
    assert "--on-bad skip" in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    rejects = tmp_path / "rejects.jsonl"
    left = plot("--on-bad", "skip", "--rejects", rejects, rows=rows)
    assert left.code == 0, left.err
    assert jsonl(rejects) == [long]
    assert "1 bad rows left out" in left.err
    assert left.out == made.done.out


def test_scores_that_are_not_finite_are_1_with_path_state_and_dtype(plot, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model_dir(tmp_path / "damaged")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][tiny_tokenizer()("~")["input_ids"][0]] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    rows = [*ROWS[:3], {**ROWS[3], "completion": "Fine.\nNot ~ fine.\nAnswer: A"}]
    done = plot(model=model, rows=rows)
    assert (done.code, done.out) == (1, b""), done.err
    # The head is tied to the embedding: one NaN logit makes every probability NaN.
    assert re.search(r"path q0/cot/0, state 0: the model's log-probabilities in float32 are not finite", done.err)
    assert not (tmp_path / "out").exists()


def test_nothing_to_read_is_65(plot):
    for nothing in ("", "\n\n", "[]"):
        done = plot(rows=nothing)
        assert (done.code, done.out) == (65, b"")
        assert "stdin: is empty: no paths" in done.err
    assert "2 bad rows skipped" in plot("--on-bad", "skip", rows='{"x": 1}\n{"x": 2}\n').err


def test_extras_that_are_not_installed_are_2_with_the_line_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for more, says, advice in (
        ({"project": "opentsne"}, "openTSNE is not installed", "pip install openTSNE"),
        ({"html": "x.html"}, "plotly, which is not installed", "pip install plotly"),
    ):
        with pytest.raises(UsageProblem, match=says) as problem:
            check(Options(out="x", **more))
        assert advice in problem.value.advice
        assert problem.value.exit_code == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"answer_template": "Answer"}, "no slot"),
        ({"by": "a,,a"}, "a is there twice"),
        ({"by": ","}, "--by names nothing"),
        ({"draw": "png,gif"}, "--draw gif: not known"),
        ({"split": "regex:("}, "--split"),
        ({"features": "-"}, "stdin has the paths"),
        ({"rejects": "-"}, "stdout has the lines"),
        ({"compat": "reference", "given": frozenset({"context"})}, "--compat reference settles --context itself"),
        ({"features": "f", "given": frozenset({"num_processes"})}, "-j has no use with --features"),
        ({"features": "f", "given": frozenset({"batch_tokens"})}, "--batch-tokens has no use with --features"),
    ],
)
def test_what_does_not_fit_together_is_found_first(more, says):
    with pytest.raises(UsageProblem, match=re.escape(says)):
        check(Options(out="x", **more))


def test_landmarks_that_are_not_defined_and_facets_that_are_not_there_are_found_before_scoring(plot, tmp_path):
    for more, says in (
        (["--landmarks", "reference"], "no landmarks for questions of 3 choices"),
        (["--by", "level"], "--by level: no row has such a field"),
    ):
        done = plot(*more)
        assert (done.code, done.out) == (2, b"")
        assert says in done.err
        assert not (tmp_path / "out.partial").exists()


def test_escapes_of_the_command_line():
    assert unescaped("\\n") == "\n"
    assert unescaped("a\\tb\\\\n") == "a\tb\\n"
    assert unescaped("\\frac\n") == "\\frac\n"
    assert Options(out="x").wording == Wording()
