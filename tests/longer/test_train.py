"""longer-train: learns, resumes bitwise, gives with two processes what one gives; wrong calls are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.killed import killed_and_resumed, told
from tests.longer.logs import TINY, events, prepared, shared_folder
from tests.server import ROOT, environment
from toolbox.longer.data import Dataset, RequestPlan, Shape
from toolbox.longer.files import load_model
from toolbox.longer.objective import EarlyStop
from toolbox.longer.options import Options, check, query_count
from toolbox.shell.errors import UsageProblem

SIZES = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]
DATA = shared_folder() / "data"


def difference(one: Path, two: Path) -> float:
    a, b = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


OTHERS = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("transformer", "hstu", "sumpool", "base")]


@pytest.mark.parametrize("arch", ["longer", "din", *OTHERS])
def test_every_architecture_learns_and_can_be_scored(tool, tmp_path, arch):
    done = tool(
        "longer-train", DATA, "--out", tmp_path / "run", "--arch", arch, *SIZES, "--epochs", "15", "--lr", "2e-2",
        "--batch-requests", "16", "--globals", "cls,uid",
    )  # fmt: skip
    assert done.code == 0, done.err
    steps = [row["loss"] for row in done.rows if row["event"] == "step"]
    assert np.mean(steps[-4:]) < np.mean(steps[:4]) - 0.02
    last = done.rows[-1]
    assert last["valid"]["n"] > 0
    assert 0 <= last["test"]["auc"] <= 1
    scored = tool("longer-score", "--model", tmp_path / "run", "--data", DATA, "--split", "test", "--check")
    judged = tool("longer-eval", stdin=scored.out).rows[0]
    assert judged["auc"] == pytest.approx(last["test"]["auc"], abs=1e-6)
    assert judged["logloss"] == pytest.approx(last["test"]["logloss"], abs=1e-6)
    assert judged["gauc"] == pytest.approx(last["test"]["gauc"], abs=1e-6)


def test_pieces_micro_batches_and_recomputing_do_not_show(tool, tmp_path):
    """Two epochs by SGD: how a step is cut changes rounding only. Of large requests, which are cut, nothing is lost."""
    log = tmp_path / "log"
    log.write_text("".join(json.dumps(row) + "\n" for row in events()))
    data = prepared(tmp_path / "data", log, request_window=6, split="user:3")
    words = [data, *SIZES, "--optimizer", "sgd", "--batch-requests", "4", "--epochs", "2"]

    def go(name, *more):
        done = tool("longer-train", *words, "--out", tmp_path / name, *more)
        assert done.code == 0, done.err
        return done.rows

    first = go("one")
    for name, more in (("two", ["--micro-batch", "1"]), ("three", ["--recompute", "blocks"])):
        again = go(name, *more)
        assert difference(tmp_path / "one", tmp_path / name) <= 1e-6
        one, two = ([row["loss"] for row in rows if row["event"] == "step"] for rows in (first, again))
        assert two == pytest.approx(one, abs=1e-6)
    shape = Shape(16, 4, 4)
    whole, cut = Dataset(data).split("train", Shape(16, 4, 64)), Dataset(data).split("train", shape)
    assert cut.candidates.max() == 4
    assert cut.candidates.sum() == whole.candidates.sum()
    assert len(cut) == 2 * len(whole)


def test_killed_and_resumed_equals_uninterrupted_bitwise(tool, tmp_path):
    words = ["longer-train", DATA, *SIZES, "--epochs", "12", "--batch-requests", "16", "--save-every", "1",
             "--eval-every", "3", "--early-stop", "auc", "--patience", "30", "--dropout", ".1"]  # fmt: skip
    killed_and_resumed(tool, words, tmp_path, states="step-00000[4-9]", same=("model.safetensors", "config.json"))
    assert told(tmp_path / "out") == told(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_two_processes_give_what_one_gives(tool, tmp_path, optimizer):
    """Sparse gradients of one process, dense ones through DDP: equal tables and losses on the same global batches."""
    found = []
    words = [DATA, *SIZES, "--optimizer", optimizer, "--max-steps", "50", "--epochs", "50", "--batch-requests", "6"]
    for count in (1, 2):
        out = tmp_path / str(count)
        if count == 1:
            rows = tool("longer-train", *words, "--out", out).rows
        else:
            two = [sys.executable, ROOT / "bin/longer-train", *words, "--out", out, "-j", "2"]
            done = subprocess.run(two, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert rows[0]["processes"] == count
        found.append([row["loss"] for row in rows if row["event"] == "step"])
        assert len(found[-1]) == 50
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "12")
    tables = [name for name in a if name.startswith("tables.")]
    assert max(float((a[name] - b[name]).abs().max()) for name in tables) <= 1e-5


def test_batches_hold_like_lengths_and_every_piece_once_an_epoch():
    requests = Dataset(DATA).split("train", Shape(16, 4, 64))
    plan = RequestPlan(requests, 7, 2, seed=3)
    for epoch in range(2):
        rows = [plan.window(1 + epoch * plan.per_epoch + n) for n in range(plan.per_epoch)]
        assert sorted(row for window in rows for row in window.rows["train"]) == list(range(len(requests)))
        assert [window.ends_epoch for window in rows] == [False] * (plan.per_epoch - 1) + [True]
    assert plan.window(1) == RequestPlan(requests, 7, 2, seed=3).window(1)
    assert plan.window(1) != RequestPlan(requests, 7, 2, seed=4).window(1)
    budget = RequestPlan(requests, 7, 9, seed=3, max_labels=60)
    labels = [sum(requests.candidates[list(budget.window(n).rows["train"])]) for n in range(1, budget.steps + 1)]
    assert sum(labels) >= 60 > sum(labels[:-1])
    times = [requests.ts[list(RequestPlan(requests, 7, 1, 0, order="time").window(n).rows["train"])] for n in (1, 2)]
    assert times[0].max() <= times[1].min()


def test_an_early_stop_hands_out_the_best_model():
    model = torch.nn.Linear(1, 1)
    early = EarlyStop("logloss", 2, model)
    for step, (value, stop) in enumerate([(0.6, False), (0.5, False), (0.55, False), (0.7, True)]):
        with torch.no_grad():
            model.weight.fill_(float(step))
        again = EarlyStop("logloss", 2, model)
        if step:
            again.load_state(early.state())
        early = again
        assert early.met({"valid_logloss": value, "step": step}, {}) == stop
    early.restore()
    assert float(model.weight) == 1.0


def test_a_model_may_begin_from_one_with_a_shorter_history(tool, tmp_path):
    words = ["longer-train", DATA, *SIZES, "--max-steps", "1", "--batch-requests", "8"]
    assert tool(*words, "--out", tmp_path / "short").code == 0
    more = ["--max-len", "32", "--init-from", tmp_path / "short", "--lr", "1e-30", "--emb-lr", "1e-30"]
    done = tool(*words, *more, "--out", tmp_path / "long")
    assert done.code == 0, done.err
    short, long = load_model(tmp_path / "short"), load_model(tmp_path / "long")
    assert torch.equal(long.events.position[:16], short.events.position)  # they count from the newest event
    assert len(long.events.position) == 32
    assert torch.equal(long.head.first.weight, short.head.first.weight)
    other = tool(*words, "--dim", "4", "--out", tmp_path / "other", "--init-from", tmp_path / "short")
    assert other.code == 65


def test_a_dry_run_tells_costs_and_when_merging_saves(tool, tmp_path):
    done = tool("longer-train", DATA, "--out", tmp_path / "o", "--max-len", "2048", "--merge", "4", "--dry-run")
    plan = done.rows[0]
    assert plan["layer_flops"] == {"plain": 587202560, "merged": 335544320.0, "change": -0.4286}
    assert (plan["merging_saves_above_events"], plan["merge_of_fewest_flops"]) == (768, 3.27)
    parts = plan["parameters"]["blocks_by_formula"]
    assert parts == {"inner": 12 * 32**2 + 13 * 32, "cross and self": 2 * (12 * 128**2 + 13 * 128)}
    assert not (tmp_path / "o.partial").exists()
    short = tool(
        "longer-train", DATA, "--out", tmp_path / "o", *SIZES, "--queries", "900", "--max-len", "15", "--dry-run"
    )
    assert "rounded up to 16" in short.err
    assert "clamped to 4" in short.err
    assert "saves nothing below 192" in short.err


REFUSED = [
    (["--heads", "3"], "does not divide the width"),
    (["--attention", "flex"], "needs a CUDA device"),
    (["--precision", "fp16"], "needs a CUDA device"),
    (["--embedding", "torchrec", "--precision", "fp16"], "its optimiser runs before scaling is undone"),
    (["--embedding", "torchrec", "--micro-batch", "2"], "its optimiser runs at every backward"),
    (["--torchrec-kernel", "fused_uvm"], "needs --embedding torchrec"),
    (["--queries", "some"], "a number of merged tokens"),
    (["--queries", "0"], "a number of merged tokens"),
    (["--globals", "cls,target"], "--globals target: not known"),
    (["--globals", "none", "--readout", "target+cls"], "without CLS tokens"),
    (["--arch", "din", "--readout", "target+cls"], "has no CLS tokens"),
    (["--arch", "din", "--query-strategy", "uniform"], "is LONGER's"),
]


@pytest.mark.parametrize(("more", "says"), REFUSED)
def test_what_does_not_fit_together_is_2(tool, tmp_path, more, says):
    done = tool("longer-train", DATA, "--out", tmp_path / "o", *SIZES, *more)
    assert (done.code, done.out) == (2, b"")
    assert says in done.err
    assert not (tmp_path / "o.partial").exists()


def test_torchrec_and_engines_that_cannot_be_are_refused(tmp_path, monkeypatch):
    asked = Options(data="d", out="o", embedding="torchrec")
    monkeypatch.setattr("toolbox.longer.options.find_spec", lambda name: None)
    with pytest.raises(UsageProblem, match="torchrec and fbgemm_gpu not installed"):
        check(asked)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageProblem, match="FSDP is of no use here"):
        check(Options(data="d", out="o"))


def test_data_that_is_missing_or_another_has_its_code(tool, tmp_path):
    assert tool("longer-train", tmp_path, "--out", tmp_path / "o", *SIZES).code == 66
    log = tmp_path / "log"
    log.write_text("".join(json.dumps({**row, "item": row["item"] + "x"}) + "\n" for row in events()))
    other = prepared(tmp_path / "other", log)
    words = [*SIZES, "--max-steps", "1", "--out", tmp_path / "o"]
    assert tool("longer-train", DATA, *words).code == 0
    again = tool("longer-train", other, *words, "--resume")
    assert (again.code, again.out) == (65, b"")
    assert "of another schema" in again.err


def test_queries_may_be_a_share():
    assert [query_count(text, 64, 4) for text in ("40%", "100%", "100", "3")] == [7, 16, 16, 3]
