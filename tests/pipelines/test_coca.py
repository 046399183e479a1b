"""COCA's recipes as they stand, with real executables and pipes; a stand-in for the batch runner, which is no part of
this project, and the embedded model where the test is slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.loopback import Answer, Loopback, said
from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir

RECIPES = ROOT / "recipes" / "coca"

BATCH_RUNNER = '''#!/usr/bin/env python3
"""vllm run-batch -i IN -o OUT --model M: answers from the words of each request."""
import json, sys
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert sys.argv[1] == "run-batch" and words["--model"] == "M"
with open(words["-i"]) as asked, open(words["-o"], "w") as out:
    for line in asked:
        one = json.loads(line)
        last = one["body"]["messages"][-1]["content"]
        request = last.partition("Request: ")[2].partition("\\n")[0]
        unsafe = "at least one of its concepts is unsafe" in last
        text = (f"<think> The request says: {request} </think>\\n<concept> request, subject </concept>\\n"
                f"<check> {'subject' if unsafe else 'none'} </check>\\n<erase unsafe concepts> "
                + ("I refuse completely." if unsafe else "No unsafe concept: a complete and helpful answer."))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 9}}
        out.write(json.dumps({"id": "v", "custom_id": one["custom_id"], "error": None,
                              "response": {"status_code": 200, "request_id": "r", "body": body}}) + "\\n")
'''


def run(words: list, folder: Path, **more: str) -> subprocess.CompletedProcess:
    env = {**environment(), **more}
    return subprocess.run(list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_goes_out_and_comes_back(tmp_path):
    runner = tmp_path / "bin" / "vllm"
    runner.parent.mkdir()
    runner.write_text(BATCH_RUNNER)
    runner.chmod(0o755)
    demo = RECIPES / "demo.jsonl"
    path = f"{runner.parent}{os.pathsep}{environment()['PATH']}"
    done = run(["bash", RECIPES / "batch.sh", demo, "M"], tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    made, before = rows(tmp_path / "enhanced.jsonl"), rows(demo)
    assert len(made) == len(before) == 48
    for row, pair in zip(made, before, strict=True):
        assert row["completion"].endswith(f"<response> {pair['completion']} </response>")
        assert row["coca"]["decision"] == ("refuse" if pair["label"] == "harmful" else "comply")


def test_the_endpoint_recipe_and_a_judged_run(tmp_path):
    """Pairs through a served teacher into a file, then a served model judged beside what lm-generate wrote."""

    def teach(seen):
        last = seen.asked
        request = last.partition("Request: ")[2].partition("\n")[0]
        unsafe = "at least one of its concepts is unsafe" in last
        text = f"<think> It says: {request} </think>\n<concept> request, subject </concept>\n"
        text += f"<check> {'subject' if unsafe else 'none'} </check>\n<erase unsafe concepts> "
        return Answer(said(seen, text + ("I refuse." if unsafe else "No unsafe concept: a helpful answer.")))

    with Loopback(teach) as server:
        script = (
            f"cat {RECIPES}/demo.jsonl | coca-refactor --recipe {RECIPES}/endpoint.yaml --base-url {server.url} "
            "-o enhanced.jsonl --rejects rejects.jsonl"
        )
        done = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "enhanced.jsonl")) == 48
    assert (tmp_path / "rejects.jsonl").read_text() == ""
    with Loopback(lambda seen: Answer(said(seen, "I'm sorry, but I can't help with that."))) as server:
        script = (
            f"lm-generate --backend openai --base-url {server.url} --model m {RECIPES}/demo-eval.jsonl "
            "| coca-eval --run served --report table.json > served.jsonl"
        )
        done = run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "table.json").read_text())["runs"][0]
    assert {name: one["asr"]["count"] for name, one in told["attacks"].items()} == {
        "id": 0,
        "past tense": 0,
        "role play": 0,
    }
    assert told["over_refusal"]["estimate"] == 1.0  # a model that refuses everything is told so


@pytest.mark.slow
def test_the_evaluation_recipe(tmp_path):
    tiny = tiny_model_dir(tmp_path / "wide", window=8192)
    done = run(["bash", RECIPES / "eval.sh"], tmp_path, TOOLBOX_MODEL=str(tiny), TOOLBOX_MAX_NEW_TOKENS="4", ROWS="22")
    assert done.returncode == 0, done.stderr
    assert "prompt-only − base" in (tmp_path / "coca" / "table.md").read_text()
    assert (tmp_path / "coca" / "rates.svg").stat().st_size > 2000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_refactoring_recipe_with_the_embedded_model(tmp_path):
    done = run(["bash", RECIPES / "refactor.sh"], tmp_path, ROWS="4")
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "coca" / "summary.json").read_text())
    assert counts["rows"] == counts["accepted"] + counts["rejected"] == 4
    for row in rows(tmp_path / "coca" / "enhanced.jsonl"):
        assert row["coca"]["decision"] == ("refuse" if row["label"] == "harmful" else "comply")
