"""landscape-plot from stored features: the same lines, no model, and only for the paths they were made of."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.landscape.runs import (
    FAST,
    ROWS,
    jsonl,
    lines,
    make_rows,
    named,
)
from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir
from toolbox.landscape.features import read_features, write_features


def test_stored_features_give_the_same_lines_and_the_same_file_without_a_model(plot, made, tmp_path):
    again = plot("--features", made.features, model=None)
    assert again.code == 0, again.err
    assert again.out == made.done.out
    assert (tmp_path / "out" / "features.safetensors").read_bytes() == made.features.read_bytes()
    assert (tmp_path / "out" / "coords.jsonl").read_bytes() == (made.out / "coords.jsonl").read_bytes()
    backwards = plot("--features", made.features, model=None, rows=named(ROWS[::-1]), out="b")
    assert backwards.out == again.out


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
