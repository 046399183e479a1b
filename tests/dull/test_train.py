"""dull-train: learns, tells of every sample once, never sees clean labels, goes on bitwise, refuses what cannot be."""

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
from tests.server import ROOT, environment
from toolbox.dull.data import split_holdout
from toolbox.dull.options import Options, check, shot_bounds
from toolbox.dull.table import Posteriors
from toolbox.shell.errors import UsageProblem

SHORT = ["--image-size", "8", "--aug", "crop", "--epochs", "3", "--batch-size", "32", "--warmup-epochs", "1"]


@pytest.fixture(scope="module")
def noisy(tool, tmp_path_factory) -> Path:
    """Digits with a long tail and tail-to-head noise: 300 of them or so."""
    path = tmp_path_factory.mktemp("dull") / "noisy.jsonl"
    path.write_bytes(tool("dull-noise", "digits", "--max-per-class", "80", "--imbalance", ".1", "--rate", ".2").out)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_tells_of_every_sample_once_and_keeps_the_gates_in_bounds(tool, noisy, tmp_path):
    words = [*SHORT, "--epochs", "8", "--eval", "digits#test", "--gate", "open", "--plot", tmp_path / "run.svg"]
    done = tool("dull-train", noisy, *words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "--gate open: labels are acted upon" in done.err
    epochs = [row for row in done.rows if row["event"] == "epoch"]
    assert [row["epoch"] for row in epochs] == list(range(1, 9))
    assert epochs[-1]["acc"] > 0.25
    assert epochs[-1]["acting_share"] > 0
    assert 0 < epochs[-1]["gate_density"] < epochs[0]["gate_density"]
    assert done.rows[-1]["acc"] == epochs[-1]["acc"]
    assert done.rows[-1]["acc_last10"] == pytest.approx(np.mean([row["acc"] for row in epochs]))
    rows = [json.loads(line) for line in noisy.open()]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert [row["id"] for row in samples] == [row["id"] for row in rows]
    assert [row["label"] for row in samples] == [row["label"] for row in rows]
    held = sum(row["dull"]["held_out"] for row in samples)
    assert held == done.rows[0]["holdout"] == len(rows) - done.rows[0]["rows"]
    assert any(row["dull"]["acted"] for row in samples)
    for row in samples:
        one = row["dull"]
        assert row["label"] in one["labels"]
        assert one["suggested"] in one["labels"]
        assert one["flagged"] or one["suggested"] == row["label"]
    gates = load_file(tmp_path / "run" / "dull_state.safetensors")["gates"]
    assert gates.amax(1).tolist() == [1.0] * 64
    assert gates.min() >= 0
    assert (tmp_path / "run.svg").read_bytes().startswith(b"<?xml")
    from transformers import AutoModelForImageClassification

    import toolbox.classify.backbones  # noqa: F401 - the one thing that plain transformers needs

    config = AutoModelForImageClassification.from_pretrained(tmp_path / "run").config
    assert [config.id2label[n] for n in range(10)] == list("0123456789")
    assert config.dull["counts"] == done.rows[0]["counts"]


def test_clean_labels_change_no_weight_and_no_doubt(tool, noisy, tmp_path):
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(
        json.dumps({key: value for key, value in json.loads(line).items() if key != "dull"}) + "\n"
        for line in noisy.open()
    ))  # fmt: skip
    words = [*SHORT, "--gate", "open"]
    with_them = tool("dull-train", noisy, *words, "--out", tmp_path / "a")
    without = tool("dull-train", bare, *words, "--out", tmp_path / "b")
    assert "detection" in with_them.rows[-1]
    assert "detection" not in without.rows[-1]
    for name in ("model.safetensors", "dull_state.safetensors", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_killed_and_resumed_equals_uninterrupted_bitwise(tool, noisy, tmp_path):
    words = ["dull-train", noisy, *SHORT, "--limit", "130", "--gate", "open", "--save-every", "1"]
    same = ("model.safetensors", "dull_state.safetensors", "samples.jsonl", "config.json")
    killed_and_resumed(tool, words, tmp_path, states="step-00000[6-9]", same=same)
    assert told(tmp_path / "out") == told(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(noisy, tmp_path):
    """Twenty steps and more, with labels acted upon and mixing: batch norm over both, q exchanged, gates projected."""
    losses = []
    for count in (1, 2):
        words = [*SHORT, "--gate", "open", "--lr", ".005", "--out", tmp_path / str(count), "-j", str(count)]
        done = subprocess.run([sys.executable, ROOT / "bin/dull-train", noisy, *words], env=environment(),
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert rows[0]["processes"] == count
        losses.append([row["loss"] for row in rows if row["event"] == "step"])
    assert len(losses[0]) > 20
    assert losses[1][:20] == pytest.approx(losses[0][:20], abs=1e-4)
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)  # rounding may let another label be acted upon
    one, two = (load_file(tmp_path / name / "dull_state.safetensors") for name in "12")
    assert float((one["gates"] - two["gates"]).abs().max()) < 1e-3
    assert two["gates"].amax(1).tolist() == [1.0] * 64
    assert float((one["q"].float() - two["q"].float()).abs().max()) < 1e-2


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("ce", "la")]


@pytest.mark.parametrize("method", ["elr", *SLOW])
def test_baselines_run_in_the_same_harness(tool, noisy, tmp_path, method):
    done = tool("dull-train", noisy, *SHORT, "--method", method, "--optimizer", "adamw", "--lr", "1e-2", "--eval",
                "digits#test", "--eval-every", "2", "--out", tmp_path / "run")  # fmt: skip
    assert done.code == 0, done.err
    assert ["acc" in row for row in done.rows if row["event"] == "epoch"] == [False, True, True]
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == done.rows[-1]["samples"]
    assert (tmp_path / "run" / "dull_state.safetensors").exists() == (method == "elr")
    again = tool("dull-train", noisy, "--model", tmp_path / "run", "--epochs", "1", "--out", tmp_path / "on",
                 "--limit", "120")  # fmt: skip
    assert again.code == 0, again.err
    assert ("drawn anew" in again.err) == (len(again.rows[0]["classes"]) < 10)


def test_with_all_parts_off_dull_is_logit_adjustment(tool, noisy, tmp_path):
    def go(name: str, *words: str) -> Path:
        short = ["--epochs", "1", "--limit", "150", "--gate", "shut"]
        assert tool("dull-train", noisy, *SHORT, *short, *words, "--out", tmp_path / name).code == 0
        return tmp_path / name

    parts = ["--no-ifd", "--no-ifpu", "--no-aml", "--no-h2t"]
    assert equal(go("dull", *parts), go("la", "--method", "la"))
    assert equal(go("bare", *parts, "--no-logit-adjust"), go("ce", "--method", "ce"))
    assert not equal(tmp_path / "la", tmp_path / "ce")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--clean-field", "label"], 2, "is the label field itself"),
        (["--method", "ce", "--no-aml"], 2, "--no-aml is DULL's"),
        (["--method", "ce", "--no-logit-adjust"], 2, "--method ce has none"),
        (["--shots", "20,100"], 2, "two numbers of images"),
        (["--holdout", ".9"], 2, "is above 0.5"),
        (["--model", "cifar-resnet9"], 66, "no such file or directory"),
        (["--lr", "1e20"], 75, "not finite"),
    ],
)
def test_what_cannot_be_is_refused(tool, noisy, tmp_path, words, code, says):
    done = tool("dull-train", noisy, *SHORT, *words, "--out", tmp_path / "run")
    assert done.code == code, done.err
    assert says in done.err
    assert not (tmp_path / "run").exists()
    if code == 75:
        assert "batch: " in done.err


def test_images_that_cannot_be_had_and_labels_that_are_not_known(tool, tmp_path):
    rows = [{"id": str(n), "image": f"digits:{n}", "label": "ab"[n % 2]} for n in range(12)]
    rows[3]["image"] = rows[7]["image"] = "gone.png"
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    words = ["--image-size", "8", "--epochs", "1", "--holdout", "0"]
    failed = tool("dull-train", *words, "--out", tmp_path / "a", stdin=text)
    assert failed.code == 65
    assert "2 of 12 images: gone.png is missing" in failed.err
    kept = tool(
        "dull-train", *words, "--on-bad", "skip", "--rejects", tmp_path / "r", "--out", tmp_path / "b", stdin=text
    )
    assert kept.code == 0, kept.err
    assert "2 bad rows left out" in kept.err
    assert len((tmp_path / "r").read_text().splitlines()) == 2
    assert len((tmp_path / "b" / "samples.jsonl").read_text().splitlines()) == 10
    (tmp_path / "test.jsonl").write_text('{"image": "digits:1", "label": "a"}\n{"image": "digits:1", "label": "z"}\n')
    unknown = tool("dull-train", *words, "--eval", tmp_path / "test.jsonl", "--out", tmp_path / "c", stdin=text)
    assert unknown.code == 65
    assert "test.jsonl:2: $.label: 'z' is no class" in unknown.err
    one = text.replace(b'"label": "b"', b'"label": "a"')
    assert "has one class only" in tool("dull-train", *words, "--out", tmp_path / "d", stdin=one).err


def test_the_hold_out_is_stratified_and_spares_small_classes():
    given = np.repeat([0, 1, 2], [200, 20, 19])
    train, held = split_holdout(given, 0.05, 3)
    assert np.bincount(given[held], minlength=3).tolist() == [10, 1, 0]
    assert sorted([*train, *held]) == list(range(239))
    assert (split_holdout(given, 0.05, 3)[1] == held).all()
    assert (split_holdout(given, 0.05, 4)[1] != held).any()
    assert not len(split_holdout(given, 0.0, 3)[1])


def test_a_table_of_many_classes_keeps_the_largest_entries():
    generator = np.random.default_rng(0)
    table = Posteriors(5, 300)
    assert table.values.nbytes == 5 * 16 * 2
    assert table.get(slice(None)) == pytest.approx(1 / 300, rel=1e-3)
    sharp = generator.dirichlet(np.full(300, 0.01), 3)
    rows = np.array([0, 2, 4])
    for _ in range(20):
        table.update(rows, sharp, 0.7)
    found = table.get(rows)
    assert found.sum(1) == pytest.approx(1)
    assert np.abs(found - sharp).max() < 0.02
    again = Posteriors(5, 300)
    again.load(table.state())
    assert (again.get(slice(None)) == table.get(slice(None))).all()
    other = Posteriors(5, 300)
    other._take(b"".join([rows.tobytes(), table.values[rows].tobytes(), table.last[rows].tobytes(),
                          table.places[rows].tobytes()]))  # fmt: skip
    assert (other.get(slice(None)) == table.get(slice(None))).all()


def test_options():
    assert shot_bounds("100,20") == (100, 20)
    assert [Options(epochs=n).warm for n in (4, 12, 100, 300)] == [3, 4, 30, 30]
    with pytest.raises(UsageProblem):
        check(Options(shots="x"))
    with pytest.raises(UsageProblem, match="--gate open is DULL's"):
        check(Options(method="la", gate="open"))
    with pytest.raises(UsageProblem, match="--h2t-always is DULL's"):
        check(Options(method="ce", h2t_always=True))
    with pytest.raises(UsageProblem, match="exclude one another"):
        check(Options(h2t=False, h2t_always=True))
