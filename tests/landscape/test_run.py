"""landscape-plot on tiny models: numbers against plain passes, files, refusals, resuming, several processes."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.server import ROOT, Client, Result, environment
from tests.tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from toolbox.commands.landscape_plot import main as command
from toolbox.landscape import html
from toolbox.landscape.data import Paths
from toolbox.landscape.features import read_features, write_features
from toolbox.landscape.html import make_figure, needs_plotly, page, write_html
from toolbox.landscape.output import make_result
from toolbox.landscape.run import Options, check
from toolbox.landscape.scoring import round_sizes
from toolbox.landscape.settings import unescaped
from toolbox.landscape.wording import Wording
from toolbox.models.chain_plan import Batch
from toolbox.shell.command import Invocation
from toolbox.shell.errors import IoFailure, ToolboxError, TryAgain, UsageProblem, from_os_error
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.progress import Reporter
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

FAST = ("--draw", "none", "--project", "pca")
FILES = {"features.safetensors", "coords.jsonl", "paths.jsonl", "metrics.jsonl", "run.json"}


def make_rows(questions: int = 3, samples: int = 4, longest: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Paths of questions with three choices; every other one is right."""
    draw, rows = random.Random(seed), []
    for q in range(questions):
        gold = "ABC"[q % 3]
        for s in range(samples):
            thoughts = [f"Step {i} is {draw.randint(0, 99)}." for i in range(draw.randint(1, longest - 1))]
            said = gold if s % 2 else "ABC"[(q + 1) % 3]
            rows.append({
                "id": f"q{q}", "question": f"Which is {q}?", "choices": [f"thing {q}", f"other {q}", "none"],
                "answer": gold, "variant": ("cot", "lot2")[s // 2 % 2],
                "completion": "\n".join([*thoughts, f"Answer: {said}"]),
            })  # fmt: skip
    return rows


ROWS = make_rows()


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_process(words: list[object], stdin: str) -> Result:
    """Run the command with these words in this process, where torch is imported once for all tests."""
    parsed = command.make_context("landscape-plot", [str(word) for word in words])
    values = {name: value for name, value in parsed.params.items() if name not in ("debug", "print_recipe", "quiet")}
    dry_run = values.pop("dry_run")
    assert values.pop("num_processes") is None
    assert values.pop("accelerate") is None
    said, code = io.StringIO(), 0
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink, parsed, redirect_stderr(said):
        source.write(stdin.encode())
        source.seek(0)
        streams = Streams(source.fileno(), sink.fileno())
        call = Invocation("landscape-plot", streams, Reporter("landscape-plot"), dict(parsed.params), dry_run)
        try:
            command.callback(call, **values)
        except ToolboxError as error:
            code = error.exit_code
            said.write(f"landscape-plot: {error.what}\n  {error.advice}\n")
        except FileNotFoundError as error:
            code = from_os_error(error).exit_code
        sink.seek(0)
        return Result(code, sink.read(), said.getvalue())


@pytest.fixture
def plot(tiny: Path, tmp_path: Path):
    """Run landscape-plot on the tiny model into ``tmp_path / out``, quickly unless told otherwise."""

    def run(*more: object, rows: Any = ROWS, out: str = "out", model: Path | None = tiny, fast: bool = True) -> Result:
        words = [] if model is None else ["--model", model]
        stdin = rows if isinstance(rows, str) else lines(rows)
        return in_process([*words, *(FAST if fast else ()), "--out", tmp_path / out, *more], stdin)

    return run


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One scored directory for many tests; its lines."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = in_process(["--model", tiny, *FAST, "--out", out], lines(ROWS))
    assert done.code == 0, done.err
    return SimpleNamespace(out=out, features=out / "features.safetensors", done=done)


# --- numbers ----------------------------------------------------------------------------------------------------------


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


def figures_of(out: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    """The names of the figures that would be drawn of the features in ``out``."""
    features = read_features(out / "features.safetensors")
    result = make_result(Options(out="x", project="pca", **options), features, read(rows), lambda note: None)
    return result.done["figures"]


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


# --- stored features --------------------------------------------------------------------------------------------------


def test_stored_features_give_the_same_lines_and_the_same_file_without_a_model(plot, made, tmp_path):
    again = plot("--features", made.features, model=None)
    assert again.code == 0, again.err
    assert again.out == made.done.out
    assert (tmp_path / "out" / "features.safetensors").read_bytes() == made.features.read_bytes()
    assert (tmp_path / "out" / "coords.jsonl").read_bytes() == (made.out / "coords.jsonl").read_bytes()
    backwards = plot("--features", made.features, model=None, rows=named(ROWS[::-1]), out="b")
    assert backwards.out == again.out


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the path ids that they have in ``ROWS``."""
    names = [path.id for path in read(ROWS).paths]
    return [{**row, "path_id": names[ROWS.index(row)]} for row in rows]


def read(rows: list[dict[str, Any]], wording: Wording | None = None) -> Paths:
    paths = Paths(Wording() if wording is None else wording)
    for record in RecordReader(PATH_SHAPES)(io.BufferedReader(io.BytesIO(lines(rows).encode())), "x"):
        paths.add(record)
    return paths


def test_features_that_do_not_tell_their_paths_are_taken_by_ids_and_counts(plot, made, tmp_path):
    features = read_features(made.features)
    options = {name: value for name, value in features.scoring.options.items() if name != "paths"}
    file = tmp_path / "features.safetensors"
    write_features(file, replace(features, scoring=replace(features.scoring, options=options)))
    done = plot("--features", file, model=None)
    assert (done.code, done.out) == (0, made.done.out), done.err


def test_what_is_known_beside_scores_comes_from_the_rows(plot, made, tmp_path):
    rows = [{**row, "pred": row["answer"], "level": index % 2} for index, row in enumerate(ROWS)]
    done = plot("--features", made.features, "--by", "level", model=None, rows=rows)
    assert done.code == 0, done.err
    assert done.rows[-1]["correct"] == 12
    assert {row["facet"]["level"] for row in done.rows[:-1]} == {"0", "1"}
    before, after = read_features(made.features), read_features(tmp_path / "out" / "features.safetensors")
    assert np.array_equal(before.distance, after.distance)
    assert after.facets["level"] == ("0", "1") * 6
    assert after.scoring == before.scoring


def test_stored_features_and_finished_directories_import_no_torch(made, tiny, tmp_path):
    code = (
        "import sys\nfrom toolbox.commands.landscape_plot import main\n"
        "try: main()\nexcept SystemExit as leave: print(leave.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    for words in (
        ["--features", made.features, *FAST, "--out", tmp_path / "o"],
        ["--model", tiny, *FAST, "--out", made.out, "--resume"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, env=environment(), input=lines(ROWS).encode(),
            capture_output=True,
        )  # fmt: skip
        assert done.stderr.decode().splitlines()[-1] == "0 False", done.stderr.decode()
        assert done.stdout == made.done.out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--split", "sentence"], "was scored with split 'line', asked for is 'sentence'"),
        (["--answer-template", "{text}"], "was scored with template 'Answer is: {label}) {text}', asked for is"),
        (["--separator", " "], "was scored with separator"),
        (["--context", "prompt"], "was scored with context 'auto', asked for is 'prompt'"),
        (["--method", "naive"], "was scored with method 'tree', asked for is 'naive'"),
        (["--dtype", "bf16"], "was scored with dtype 'fp32', asked for is 'bf16'"),
        (["--drop-answer-thought"], "was scored with drop_answer_thought False, asked for is True"),
        (["--compat", "reference"], "was scored with compat 'none', asked for is 'reference'"),
        (["--template", "qa"], "was scored with chat_template 'chat', asked for is 'qa'"),
        (["--system", "Be kind."], "was scored with system None"),
    ],
)
def test_features_made_otherwise_than_asked_for_are_65(plot, made, tmp_path, more, says):
    done = plot("--features", made.features, *more, model=None)
    assert (done.code, done.out) == (65, b"")
    assert says in done.err.splitlines()[0]
    assert str(made.features) in done.err
    assert not (tmp_path / "out").exists()


def test_features_of_other_paths_or_another_model_are_65(plot, made, tmp_path):
    def problem(rows: list[dict[str, Any]], *more: object, model: Path | None = None) -> str:
        done = plot("--features", made.features, *more, model=model, rows=rows)
        assert (done.code, done.out) == (65, b""), done.err
        return done.err.splitlines()[0]

    assert "has a path that did not come in: 'q2/lot2/1' (1 in all)" in problem(ROWS[:-1])
    assert "has no path 'q2/cot/2' (1 in all)" in problem([*ROWS, ROWS[-3]])
    changed = [{**row, "completion": row["completion"].replace("Step", "Stop")} for row in ROWS]
    assert "was made from other thoughts or choices" in problem(changed)
    assert "thoughts there and" in problem([{**ROWS[0], "completion": "one"}, *ROWS[1:]])
    assert "was made from other thoughts" in problem([{**row, "choices": [*row["choices"][1::-1], "none"]}
                                                     for row in ROWS])  # fmt: skip
    other = tiny_model_dir(tmp_path / "other", seed=1)
    assert "was scored with other weights, of the model tiny, than" in problem(ROWS, model=other)
    extra = plot("--features", made.features, "--on-bad", "skip", model=None, rows=[*ROWS, ROWS[-3]])
    assert (extra.code, extra.out) == (0, made.done.out)
    assert "1 bad rows left out" in extra.err
    missing = plot("--features", tmp_path / "none", model=None, out="missing")
    assert missing.code == 66
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(made.features.read_bytes()[:-1])
    assert plot("--features", broken, model=None, out="broken").code == 65


def test_what_was_scored_as_the_released_code_is_drawn_so_only_if_asked(plot, tmp_path):
    rows = make_rows(2, 4)
    for row in rows:
        row["choices"] += ["four", "five"]  # the released code has landmarks for five
    scored = plot("--compat", "reference", rows=rows)
    assert scored.code == 0, scored.err
    assert [row["progress"] for row in scored.rows if row["event"] == "bin"] == [None] * 18
    file = tmp_path / "out" / "features.safetensors"
    scoring = read_features(file).scoring
    assert (scoring.template, scoring.separator, scoring.options["compat"]) == ("Answer is: {label}", " ", "reference")
    plain = plot("--features", file, rows=rows, model=None, out="plain")
    assert plain.code == 0, plain.err
    assert plain.rows[0]["progress"] == [0.0, 0.2]
    assert jsonl(tmp_path / "plain" / "paths.jsonl")[0]["pred_source"] == "last_letter"
    assert plot("--features", file, "--compat", "reference", rows=rows, model=None, out="c").out == scored.out


# --- bad input --------------------------------------------------------------------------------------------------------


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


# --- output directories, resuming -------------------------------------------------------------------------------------


def test_an_existing_output_is_73_and_survives_until_it_is_overwritten(plot, tmp_path):
    assert plot().code == 0
    before = (tmp_path / "out" / "features.safetensors").read_bytes()
    for rows in (ROWS, make_rows(seed=1)):
        again = plot(rows=rows)
        assert (again.code, again.out) == (73, b"")
        assert "--overwrite" in again.err
    assert (tmp_path / "out" / "features.safetensors").read_bytes() == before
    assert plot("--overwrite", rows=make_rows(seed=1)).code == 0
    assert (tmp_path / "out" / "features.safetensors").read_bytes() != before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("kept")
    assert plot("--overwrite", out="theirs").code == 73
    assert (tmp_path / "theirs" / "file").read_text() == "kept"


def test_a_finished_directory_is_told_again_and_scores_nothing(plot, tmp_path):
    first = plot()
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = plot("--resume", "--batch-tokens", "64")
    assert (again.code, again.out) == (0, first.out)
    assert "is finished; nothing was scored" in again.err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    for more, rows, says in (
        (["--separator", " "], ROWS, "with another --separator: was \\n, now  "),
        (["--bins", "4"], ROWS, "with another --bins: was 5, now 4"),
        ([], ROWS[1:], "with another data (paths)"),
        ([], [{**row, "pred": "A"} for row in ROWS], "with another data (paths)"),
    ):
        other = plot("--resume", *more, rows=rows)
        assert (other.code, other.out) == (2, b"")
        assert says in other.err


def test_a_dry_run_counts_tokens_by_method_and_writes_nothing(plot, tmp_path):
    done = plot("--dry-run")
    assert done.code == 0, done.err
    (plan,) = done.rows
    tokens = plan["tokens"]
    assert tokens["tree"] < tokens["prefix"] < tokens["naive"]
    assert plan["states"] + 12 == plan["asked"] / 3
    assert plan["flops"] == {method: 2 * plan["parameters"] * count for method, count in tokens.items()}
    assert plan["memory_bytes"] > 4 * plan["parameters"]
    assert (plan["respelt"], plan["window"], plan["k"]) == (0, 512, {"3": 3})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("budget", "sizes"), [(1, [1, 1, 1, 1]), (40, [2, 2]), (31, [2, 2]), (30, [1, 2, 1]),
                                               (1000, [4])])  # fmt: skip
def test_rounds_hold_as_many_batches_as_reach_the_budget(budget, sizes):
    batches = [Batch((n, n + 10), "tree", 0, tokens) for n, tokens in enumerate([30, 5, 10, 25, 30])]
    assert round_sizes(batches, {1, 11, 2}, budget) == sizes
    assert round_sizes(batches, set(range(20)), budget) == []


MANY = make_rows(12, 5, longest=9, seed=3)


def same_files(one: Path, two: Path) -> None:
    for name in FILES - {"run.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


class Killable:
    """landscape-plot on ``MANY``, started in the background."""

    def __init__(self, tool: Client, tiny: Path, folder: Path) -> None:
        self.tool, self.folder = tool, folder
        self.words = ["--model", tiny, *FAST, "--out", folder / "out", folder / "many.jsonl"]
        (folder / "many.jsonl").write_text(lines(MANY))
        self.journal = folder / "out.partial" / "step-scores"

    def start(self, *more: object) -> Any:
        with open(os.devnull, "r+b") as null, (self.folder / "stderr").open("ab") as err:
            return self.tool.start("landscape-plot", *self.words, *more,
                                   fds=(null.fileno(), null.fileno(), err.fileno()))  # fmt: skip

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def wait_for(self, size: int, running: Any) -> None:
        deadline = time.monotonic() + 60
        while self.size() < size and alive(running.pid):
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.0005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_killed_while_scoring_again_and_again_and_resumed_it_ends_with_the_same_bytes(tool, tiny, tmp_path):
    job, draw, killed = Killable(tool, tiny, tmp_path), random.Random(0), 0
    whole = tool("landscape-plot", "--model", tiny, *FAST, "--out", tmp_path / "whole", tmp_path / "many.jsonl")
    assert whole.code == 0, whole.err
    for _ in range(2):
        running = job.start(*(["--resume"] if killed else []))
        job.wait_for(job.size() + draw.randint(200, 6000), running)
        os.kill(running.pid, signal.SIGKILL)
        killed += running.wait() == 137
        assert not (tmp_path / "out").exists()
    assert killed == 2
    assert job.size() > 1000
    plain = tool("landscape-plot", *job.words)
    assert plain.code == 73
    assert "--resume" in plain.err
    with job.journal.open("ab") as handle:
        handle.write(b"\x99\x00\x00\x00torn")
    other = tool("landscape-plot", *job.words, "--resume", "--separator", " ")
    assert (other.code, other.out) == (2, b"")
    assert "with another --separator" in other.err
    last = tool("landscape-plot", *job.words, "--resume")
    assert (last.code, last.out) == (0, whole.out), last.err
    assert re.search(r"goes on: [1-9]\d* of 60 paths were scored before", last.err)
    same_files(tmp_path / "whole", tmp_path / "out")
    before = json.loads((tmp_path / "out" / "run.json").read_text())["scored_before"]
    assert f"({60 - before} paths scored, {before} were scored before)" in last.err
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_by_one_end_with_the_same_bytes(tool, tiny, tmp_path):
    job = Killable(tool, tiny, tmp_path)
    small = ("--batch-tokens", "300")  # short rounds; what is fed at once decides the last bits
    whole = tool("landscape-plot", "--model", tiny, *FAST, *small, "--out", tmp_path / "whole", tmp_path / "many.jsonl")
    assert whole.code == 0, whole.err
    running = job.start("-j", "2", *small)
    job.wait_for(2000, running)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == 137
    last = tool("landscape-plot", *job.words, *small, "--resume")
    assert (last.code, last.out) == (0, whole.out), last.err
    before = int(re.search(r"goes on: ([1-9]\d*) of 60 paths were scored before", last.err)[1])
    assert before < 60
    same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_a_bad_row_ends_two_processes_with_its_own_code_and_one_message(tool, tiny, tmp_path):
    rows = [*ROWS, {**ROWS[0], "path_id": "x", "answer": "Z"}]
    done = tool("landscape-plot", "--model", tiny, *FAST, "-j", "2", "--out", tmp_path / "out", stdin=lines(rows))
    assert (done.code, done.out) == (65, b""), done.err
    assert done.err.count("is not among the labels") == 1
    assert not (tmp_path / "out").exists()


def test_asked_to_stop_it_keeps_what_is_scored_and_says_75(tool, tiny, tmp_path):
    job = Killable(tool, tiny, tmp_path)
    running = job.start()
    job.wait_for(1000, running)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 75
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"interrupted; [1-9]\d* of 60 paths are scored", said)
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    assert tool("landscape-plot", *job.words, "--resume").code == 0


def test_scores_outlive_a_full_disk_and_need_no_model_then(plot, made, tmp_path, monkeypatch):
    from toolbox.landscape import output, scoring

    def full(directory: Path, result: Any) -> None:
        (directory / "coords.jsonl").write_text("half")
        raise IoFailure("No space left on device", "free some space")

    with monkeypatch.context() as patched:
        patched.setattr(output, "write_directory", full)
        assert plot().code == 74
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(scoring, "score_paths", None)  # to be called would be an error
    again = plot("--resume")
    assert (again.code, again.out) == (0, made.done.out), again.err
    assert "(0 paths scored, 12 were scored before)" in again.err
    same_files(made.out, tmp_path / "out")


def test_memory_that_runs_out_is_75_and_keeps_what_is_scored(plot, made, tmp_path, monkeypatch):
    from toolbox.models import chain_passes

    run, calls = chain_passes.Passes.run, []

    def short(self: Any, batch: Any, chains: Any) -> Any:
        calls.append(batch)
        if len(calls) == 6:
            raise TryAgain("out of memory while scoring", "try a smaller --batch-tokens")
        return run(self, batch, chains)

    with monkeypatch.context() as patched:
        patched.setattr(chain_passes.Passes, "run", short)
        done = plot()
    assert (done.code, done.out) == (75, b"")
    assert "try a smaller --batch-tokens; --resume goes on" in done.err
    again = plot("--resume", "--batch-tokens", "512")
    assert (again.code, again.out) == (0, made.done.out)
    assert "goes on: 5 of 12 paths were scored before" in again.err
    same_files(made.out, tmp_path / "out")


# --- several processes ------------------------------------------------------------------------------------------------


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


# --- HTML -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(made):
    """What the pictures are made of, with texts that try to break out of a page."""
    rows = [{**row} for row in ROWS]
    features = read_features(made.features)
    paths = read(rows)
    evil = "</script><script>alert(1)</script><b>bold & \x1b]8;;http://x\x07link</b> \u2028"
    for number, path in enumerate(paths.paths):
        paths.paths[number] = _with_thought(path, evil)
    return make_result(Options(out="x", project="pca", by="variant"), features, paths, lambda note: None)


def _with_thought(path: Any, text: str) -> Any:
    return replace(path, thoughts=(text, *path.thoughts[1:]))


def test_a_page_shows_every_state_once_with_its_thought(result, monkeypatch):
    monkeypatch.setattr(html, "FEW_STATES", 3)
    figures = [make_figure(one, result) for one in result.figures]
    shown = [trace for figure in figures for trace in figure["data"] if trace["type"] == "scatter"]
    states = [text for trace in shown for text in trace["text"] if ", thought " in text]
    assert len(states) == len(result.features.path)
    assert len(set(states)) == len(states)
    assert sum("thought 1 of" in text for text in states) == 12
    assert sum(trace["type"] == "contour" for figure in figures for trace in figure["data"]) > 3
    for figure in figures:
        panels = {trace["xaxis"] for trace in figure["data"]}
        assert len(panels) == 10
        assert {f"xaxis{name[1:]}" for name in panels} <= set(figure["layout"])
        for trace in figure["data"]:
            assert trace["type"] in ("scatter", "contour")
            if trace["type"] == "contour":
                heights = np.array(trace["z"])
                assert 0 <= heights.min() < 1 < trace["contours"]["end"] < heights.max() <= 6


def test_the_page_loads_nothing_and_no_text_gets_out_of_its_place(result):
    text = page(result, "/* plotly.js */")
    assert text.count("<script>") == 1 + len(result.figures)
    assert text.count("</script>") == 1 + len(result.figures)
    assert "alert(1)" in text
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" not in text  # within the script the ampersand is written as an escape, too
    assert "\\u0026lt;b\\u0026gt;bold" in text
    assert "http://x" not in text
    assert "\x1b" not in text
    assert not re.search(r"(?:src|href)\s*=|@import|url\(", text)
    assert "default-src 'none'" in text.split("<body>")[0]


def test_the_file_is_written_whole_with_the_script_of_the_package(result, tmp_path, monkeypatch):
    package, offline = ModuleType("plotly"), ModuleType("plotly.offline")
    offline.get_plotlyjs = lambda: "/* all of plotly.js */"
    monkeypatch.setitem(sys.modules, "plotly", package)
    monkeypatch.setitem(sys.modules, "plotly.offline", offline)
    write_html(tmp_path / "map.html", result)
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
    text = (tmp_path / "map.html").read_text()
    assert text == page(result, "/* all of plotly.js */")
    write_html(tmp_path / "again.html", result)
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "map.html").read_bytes()


def test_plotly_takes_the_figures(result, plot, made, tmp_path):
    objects = pytest.importorskip("plotly.graph_objects", reason="plotly is an extra")
    needs_plotly()
    for one in result.figures:
        figure = make_figure(one, result)
        assert len(objects.Figure(figure).data) == len(figure["data"])
    done = plot("--features", made.features, "--html", tmp_path / "out" / "map.html", model=None)
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "map.html").read_text()
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000


def test_the_models_own_passes_are_those_of_the_twin(tiny):
    """The independent numbers above are of the model that the command loads."""
    from safetensors.torch import load_file

    assert (load_file(tiny / "model.safetensors")["model.norm.weight"] == tiny_model().model.norm.weight).all()
