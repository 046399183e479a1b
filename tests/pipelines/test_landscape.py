"""The scripts of recipes/landscape as they are, on the tiny model; a second run finds everything done."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.contract.commands import ITEMS, SOLVED, lines
from tests.server import ROOT, environment

pytestmark = pytest.mark.slow


def run(script: str, *words: object, tiny: Path) -> str:
    env = {**environment(), "TOOLBOX_MODEL": str(tiny), "TOOLBOX_SHUFFLES": "1"}
    path = f"{env['PATH']}:{ROOT / 'bin'}"
    done = subprocess.run(
        ["bash", ROOT / "recipes" / "landscape" / script, *map(str, words)], env={**env, "PATH": path},
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_paths_are_drawn_and_a_verifier_is_judged_on_the_same_scores(tiny, tmp_path):
    paths, out = tmp_path / "paths.jsonl", tmp_path / "out"
    paths.write_bytes(lines(SOLVED))
    run("demo.sh", paths, out, tiny=tiny)
    figures = [out / "land/landscape_k3.png", out / "land/metrics.png", out / "pca/landscape_k3.png"]
    assert all(figure.stat().st_size > 10_000 for figure in figures)
    first = (out / "metrics.jsonl").read_bytes()
    assert "is finished; nothing was scored" in run("demo.sh", paths, out, tiny=tiny)
    assert (out / "metrics.jsonl").read_bytes() == first
    said = run("verify.sh", paths, out, tiny=tiny)
    assert "is finished; nothing was scored" in said
    assert "AUC within a question" in (out / "verifier.md").read_text()
    (line,) = [json.loads(line) for line in (out / "votes.jsonl").read_text().splitlines()]
    assert set(line["votes"]) == {"plurality", "weighted"}


def test_questions_become_a_map_of_each_wording(tiny, tmp_path):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out"
    questions.write_bytes(lines(ITEMS))
    run("aqua.sh", questions, out, 3, 2, 12, tiny, tiny=tiny)
    assert len((out / "paths.jsonl").read_text().splitlines()) == 3 * 2 * 2
    assert {path.name for path in (out / "lot").glob("*.png")} == {
        "landscape_k3_cot.png", "landscape_k3_lot2.png", "metrics.png"
    }  # fmt: skip
    assert "is finished; nothing was scored" in run("aqua.sh", questions, out, 3, 2, 12, tiny, tiny=tiny)
