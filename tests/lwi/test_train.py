"""lwi-train as a command: heads grow and old rows stay, killed runs go on, what is wrong is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.contract.commands import lines
from tests.killed import killed_and_resumed
from tests.lwi.pictures import CLASSES, picture_rows

ROWS = picture_rows(24)
SMALL = ["--image-size", "8", "--batch-size", "5", "--lr", "0.05"]


def first(tool, folder, *more):
    return tool("lwi-train", "--model", "cifar-resnet8", *SMALL, "--tasks", "2", "--task", "0", "--epochs", "1",
                "-o", folder / "m0", *more, stdin=lines(ROWS))  # fmt: skip


def test_a_second_task_adds_rows_and_keeps_the_old_ones_bitwise(tool, tmp_path):
    assert first(tool, tmp_path).code == 0
    (tmp_path / "val.jsonl").write_bytes(lines(picture_rows(8, seed=1)))
    done = tool("lwi-train", "--init", tmp_path / "m0", *SMALL, "--task-field", "group", "--epochs", "2",
                "--weight-decay", ".1", "--val", tmp_path / "val.jsonl", "--plot", tmp_path / "run.svg",
                "-o", tmp_path / "n1", stdin=lines(ROWS))  # fmt: skip
    assert done.code == 0, done.err
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("m0", "n1"))
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(new[name][:2], old[name])
        assert len(new[name]) == 4
    assert not torch.equal(new["stem.convolution.weight"], old["stem.convolution.weight"])
    config = json.loads((tmp_path / "n1/config.json").read_bytes())
    assert config["lwi_tasks"] == [["ant", "bee"], ["cat", "dog"]]
    assert [config["id2label"][str(i)] for i in range(4)] == list(CLASSES)
    epochs = [row for row in done.rows if row["event"] == "epoch"]
    steps = [row for row in done.rows if row["event"] == "step"]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert (done.rows[0]["images"], done.rows[0]["val"], done.rows[0]["learned"]) == (12, 4, 2)
    for name in ("loss", "ce", "kd", "right"):  # 5, 5 and 2 images
        mean = sum(row[name] * row["n"] for row in steps[3:]) / 12
        assert epochs[1][name] == pytest.approx(mean)
    assert (tmp_path / "run.svg").read_text().lstrip().startswith("<?xml")

    from transformers import AutoModelForImageClassification

    import toolbox.classify.backbones  # noqa: F401

    model, info = AutoModelForImageClassification.from_pretrained(tmp_path / "n1", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 4


def test_killed_and_resumed_equals_uninterrupted_bitwise(tool, tmp_path):
    assert first(tool, tmp_path).code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(ROWS))
    words = ["lwi-train", rows, "--init", tmp_path / "m0", *SMALL, "--tasks", "2", "--epochs", "8", "--save-every", "1",
             "--schedule", "patience", "--val", rows]  # fmt: skip
    killed_and_resumed(tool, words, tmp_path, states="step-00000[4-9]", same=("model.safetensors", "config.json"))


@pytest.mark.slow
def test_two_processes_train_as_one_does(tool, tmp_path, record_property):
    assert first(tool, tmp_path).code == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(ROWS))
    found = []
    for count in (1, 2):
        done = tool("lwi-train", rows, "--init", tmp_path / "m0", "--image-size", "8", "--batch-size", "6", "--lr",
                    ".01", "--tasks", "2", "--epochs", "10", "-j", count, "-o", tmp_path / f"j{count}")  # fmt: skip
        assert done.code == 0, done.err
        assert done.rows[0]["processes"] == count
        found.append([row["loss"] for row in done.rows if row["event"] == "step"])
    record_property("losses apart", max(abs(one - two) for one, two in zip(*found, strict=True)))
    assert len(found[0]) == 20
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_what_does_not_fit_is_refused_with_its_code(tool, tmp_path):
    assert first(tool, tmp_path).code == 0
    bad_image = [*ROWS, {**ROWS[0], "id": "torn", "image": "data:image/png;base64,AAAA"}]
    table = [
        (["--init", "m0", "--tasks", "2", "--task", "0"], ROWS, 65, "has learned 'ant', 'bee' already, as its task 0"),
        (["--tasks", "5"], ROWS, 65, "4 classes cannot make 5 tasks"),
        (["--tasks", "3", "--task", "1"], ROWS, 65, "one class only"),
        (["--tasks", "2", "--task", "2"], ROWS, 2, "--task 2: there are 2 tasks"),
        ([], ROWS, 2, "how are classes split"),
        (["--tasks", "2", "--init", "m0", "--model", "cifar-resnet8"], ROWS, 2, "--init"),
        (["--tasks", "2", "--schedule", "patience"], ROWS, 2, "--val"),
        (["--tasks", "2", "--init", "none"], ROWS, 66, "--init none"),
        (["--tasks", "2", "--model", "cifar-resnet9"], ROWS, 66, "--model cifar-resnet9"),
        (["--task-field", "x"], ROWS, 65, "class 'ant' is in task"),
        (["--task-field", "nothing"], ROWS, 65, "no task in its field"),
        (["--tasks", "2"], bad_image, 65, "1 of 13 images: data:image"),
        (["--tasks", "2"], [*ROWS, ROWS[0]], 65, "stands at stdin:1 already"),
        (["--tasks", "1"], ROWS[::4], 65, "one class only"),
    ]
    for words, rows, code, says in table:
        done = tool("lwi-train", *words, "--image-size", "8", "-o", tmp_path / "out", stdin=lines(rows), cwd=tmp_path)
        assert (done.code, done.out) == (code, b""), (words, done.err)
        assert says in done.err, (words, done.err)
        assert len(done.err.splitlines()) <= 2
        assert not (tmp_path / "out").exists()
    skipped = tool("lwi-train", "--tasks", "2", "--task", "0", "--model", "cifar-resnet8", "--on-bad", "skip",
                   "--rejects", tmp_path / "rejects", *SMALL, "--epochs", "1", "-o", tmp_path / "out",
                   stdin=lines(bad_image))  # fmt: skip
    assert skipped.code == 0, skipped.err
    assert "1 bad rows left out" in skipped.err
    assert json.loads((tmp_path / "rejects").read_bytes())["id"] == "torn"


def test_a_loss_that_is_not_finite_ends_with_75(tool, tmp_path):
    assert first(tool, tmp_path, "--overwrite").code == 0
    done = tool("lwi-train", "--init", tmp_path / "m0", "--image-size", "8", "--batch-size", "4", "--tasks", "2",
                "--epochs", "9", "--lr", "1e20", "-o", tmp_path / "out", stdin=lines(ROWS))  # fmt: skip
    assert done.code == 75, done.err
    assert "not finite" in done.err
    assert not (tmp_path / "out").exists()
