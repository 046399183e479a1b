"""The pipelines across methods as their scripts stand, on tiny models; one that is killed half-way ends the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir

pytestmark = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
RECIPES = ROOT / "recipes/pipelines"
RANKER = {"TRAIN": "--max-len 16 --dim 8 --merge 4 --queries 2 --batch-requests 16 --epochs 2 --lr 1e-2 --save-every 3"}
LEARNER = ("--n-obs 60 --obs-iters 20 --model-iters 4 --graph-iters 6 --hidden 8 --num-graphs 20 --imagined-graphs 3 "
           "--imagined-rows 8")  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """The tiny model with room for the long prompts of real recipes."""
    return tiny_model_dir(tmp_path_factory.mktemp("wide") / "wide", window=8192)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pipeline(sh, name: str, folder: Path, **settings: str) -> Path:
    """Run one of the scripts into ``folder/out``."""
    done = sh(f"bash {RECIPES}/{name}.sh out", folder, **settings)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.slow
def test_two_wordings_are_judged_and_drawn_from_the_same_paths(sh, wide, tmp_path):
    settings = {"MODEL": str(wide), "N": "2", "TOKENS": "12", "TOOLBOX_PROJECT": "pca"}
    out = pipeline(sh, "wording", tmp_path, **settings)
    paths, scores = rows(out / "paths.jsonl"), rows(out / "scores.jsonl")
    assert len(paths) == 12 * 2 * 2
    assert {row["variant"]: row["rows"] for row in scores if row["kind"] == "variant"} == {"cot": 24, "lot2": 24}
    assert [row["variant"] for row in scores if row["kind"] == "comparison"] == ["lot2"]
    drawn = rows(out / "metrics.jsonl")
    assert drawn[-1]["paths"] == len(paths)
    assert {row["facet"]["variant"] for row in drawn[:-1]} == {"cot", "lot2"}
    assert {path.name for path in (out / "landscape").glob("*.png")} == {
        "landscape_k4_cot.png", "landscape_k4_lot2.png", "metrics.png"
    }  # fmt: skip
    before = (out / "metrics.jsonl").read_bytes()
    assert (pipeline(sh, "wording", tmp_path, **settings) / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_sweep_of_unlearning_is_judged_and_its_answers_are_drawn_before_and_after(sh, tiny, tmp_path):
    out = pipeline(sh, "unlearn", tmp_path, MODEL=str(tiny), ROWS="4", LRS="1e-4 1e-3", N="2", TOOLBOX_EPOCHS="1",
                   TOOLBOX_PROJECT="pca")  # fmt: skip
    scores = rows(out / "scores.jsonl")
    assert [Path(row["model"]).name for row in scores] == ["before", "lr-1e-4", "lr-1e-3"]
    assert [row["run"]["method"] for row in scores] == [None, "satimp", "satimp"]
    assert (out / "tradeoff.svg").stat().st_size > 2000
    paths = rows(out / "paths.jsonl")
    assert [row["choices"][0] for row in paths[:2]] == ["Pellowick Sound"] * 2
    assert all(row["pred"] is None or row["pred"] in row["completion"] for row in paths)
    facets = {tuple(row["facet"].values()) for row in rows(out / "metrics.jsonl")[:-1]}
    assert facets == {(state, kind) for state in ("before", "lr-1e-3") for kind in ("forget", "retain")}


@pytest.mark.slow
def test_two_fine_tunes_are_fused_and_asked_about_both(sh, tiny, tmp_path):
    out = pipeline(sh, "fuse", tmp_path, MODEL=str(tiny), ROWS="4", TOOLBOX_LR="1e-2")
    scores = {Path(row["model"]).name: row["prob"] for row in rows(out / "scores.jsonl")}
    assert list(scores) == [tiny.name, "one", "two", "matched", "average"]
    assert scores["one"]["forget"] > scores["two"]["forget"]
    assert scores["two"]["retain"] > scores["one"]["retain"]
    assert rows(out / "matched.groups.jsonl")[-1]["verified"] == "full"


def test_a_run_of_a_ranker_that_is_stopped_goes_on_and_ends_the_same(sh, shims, tmp_path):
    log = tmp_path / "log.jsonl"
    made = subprocess.run([sys.executable, RECIPES / "log.py", "8", "24"], capture_output=True, check=True).stdout
    log.write_bytes(made)
    settings = {**RANKER, "DATA": str(log), "PREP": "--side cat"}
    (tmp_path / "whole").mkdir()
    whole = pipeline(sh, "ranker", tmp_path / "whole", **settings)
    env = {**environment(), "PATH": f"{shims}:{environment()['PATH']}", **settings}
    running = subprocess.Popen(
        ["bash", RECIPES / "ranker.sh", "out"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    _stop_when(running, lambda: any((tmp_path / "out").glob("model.partial/step-*")), signal.SIGTERM)
    assert not (tmp_path / "out/model").exists()
    out = pipeline(sh, "ranker", tmp_path, **settings)
    assert len(rows(out / "scored.jsonl")) == rows(out / "data.json")[-1]["requests"]["test"]
    for name in ("scored.jsonl", "figures.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in (out / "scored.jsonl", out / "figures.json")}
    pipeline(sh, "ranker", tmp_path, **settings)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def _stop_when(running: subprocess.Popen, reached, number: int) -> None:
    """Signal the whole session once ``reached``; that moment has to come before the end."""
    deadline = time.monotonic() + 120
    while not reached():
        assert running.poll() is None, running.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(running.pid, number)
    running.communicate()
    assert running.returncode != 0


@pytest.mark.slow
def test_a_ranker_killed_at_each_step_ends_the_same(tmp_path):
    """SIGKILL of real processes: in the data, in training, in scoring."""
    log = tmp_path / "log.jsonl"
    made = subprocess.run([sys.executable, RECIPES / "log.py", "8", "24"], capture_output=True, check=True).stdout
    log.write_bytes(made)
    env = {**environment(), **RANKER, "DATA": str(log), "PREP": "--side cat"}
    start = {"env": env, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    script = ["bash", RECIPES / "ranker.sh", "out"]
    subprocess.run(script, cwd=tmp_path / "whole", check=True, **start)
    out = tmp_path / "killed/out"
    moments = (
        lambda: (out / "data.json").exists(),
        lambda: any(out.glob("model.partial/step-*")),
        lambda: (out / "scored.jsonl.part").exists(),
    )
    for moment in moments:
        running = subprocess.Popen(script, cwd=tmp_path / "killed", start_new_session=True, **start)
        _stop_when(running, moment, signal.SIGKILL)
    subprocess.run(script, cwd=tmp_path / "killed", check=True, **start)
    for name in ("scored.jsonl", "figures.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole/out" / name).read_bytes()


@pytest.mark.slow
def test_tasks_with_noisy_labels_are_learned_one_after_another_fused_and_judged(sh, tmp_path):
    out = pipeline(sh, "tasks", tmp_path, EPOCHS="2", SIZE="8", TASKS="3,0,1 8,2 9,7")
    states = [json.loads((out / f"fused.{task}/config.json").read_bytes()) for task in range(3)]
    tasks = [["0", "1", "3"], ["2", "8"], ["7", "9"]]
    assert [state["lwi_tasks"] for state in states] == [tasks[:1], tasks[:2], tasks]
    assert list(states[-1]["id2label"].values()) == [label for task in tasks for label in task]
    listed = {row["id"]: row["dull"]["flagged"] for row in rows(out / "new.1/samples.jsonl")}
    assert not any(listed.get(row["id"], False) for row in rows(out / "memory.jsonl") if row["label"] in tasks[1])
    found = {row["name"]: row for row in rows(out / "eval.jsonl") if row["event"] != "cell"}
    assert list(found) == ["not fused", "fused"]
    assert all(len(row["avg_taw"]) == 3 for row in found.values())


@pytest.mark.slow
def test_designs_on_answers_of_lm_generate_are_the_same_twice_and_as_if_asked_live(sh, wide, tmp_path):
    settings = {"MODEL": str(wide), "SEEDS": "1", "ROUNDS": "7", "VOTES": "2", "TOKENS": "4", "LOOP": LEARNER}
    out = pipeline(sh, "replay", tmp_path, **settings)
    assert (out / "first.jsonl").read_bytes() == (out / "second.jsonl").read_bytes()
    answers = rows(out / "answers.jsonl")
    assert [row["id"] for row in answers] == ["legit-0-warmup"] * 2 + ["legit-0-bootstrap"] * 2
    live = sh(
        f"legit-loop --network asia --strategies legit+git,git --baseline git --seeds 1 --rounds 7 --backend local "
        f"--model {wide} --n-warmup 3 --self-consistency 2 --redraws 0 --max-new-tokens 4 --log live.jsonl {LEARNER} "
        "> live.events.jsonl",
        tmp_path,
    )
    assert live.returncode == 0, live.stderr
    assert [row["completion"] for row in rows(tmp_path / "live.jsonl")] == [row["completion"] for row in answers]
    assert (tmp_path / "live.events.jsonl").read_bytes() == (out / "first.jsonl").read_bytes()


@pytest.mark.slow
def test_adapters_from_plain_and_reasoned_pairs_are_judged_and_read(sh, wide, tmp_path):
    pairs = rows(ROOT / "recipes/coca/demo.jsonl")[:6]
    text = "<think> It asks. </think>\n<concept> request </concept>\n<check> {0} </check>\n<erase unsafe concepts> {1} "
    text += "</erase unsafe concepts>\n<response> {2} </response>"
    words = {"harmful": ("request", "I refuse."), "benign": ("none", "Help.")}
    told = [{**row, "completion": text.format(*words[row["label"]], row["completion"])} for row in pairs]
    (tmp_path / "enhanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    out = pipeline(
        sh, "safety", tmp_path, MODEL=str(wide), ROWS="6", EPOCHS="1", ENHANCED=str(tmp_path / "enhanced.jsonl"),
        TOOLBOX_MAX_LENGTH="4096", TOOLBOX_MAX_NEW_TOKENS="4", TOOLBOX_SPLIT_SEEDS="1",
    )  # fmt: skip
    assert {row["run"] for row in rows(out / "verdicts.jsonl")} == {"vanilla", "coca"}
    probes = rows(out / "probes.jsonl")
    assert [row["state"] for row in probes] == ["before", "vanilla", "coca"]
    assert all(set(row["linear"]) == {"none", "leace"} and 0 <= row["linear"]["none"] <= 1 for row in probes)


def test_every_script_has_a_make_target_and_a_row_in_the_docs():
    names = {path.stem for path in RECIPES.glob("*.sh")}
    assert len(names) == 7
    makefile, page = (ROOT / "Makefile").read_text(), (ROOT / "docs/pipelines.md").read_text()
    for name in names:
        assert f"\tbash recipes/pipelines/{name}.sh" in makefile.replace("$(RUN) bash", "bash")
        assert f"| `pipe-{name}` |" in page
