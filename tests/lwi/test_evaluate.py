"""lwi-eval: the matrix equals a hand-written loop over images; series, statistics, predictions; what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.contract.commands import lines
from tests.lwi.pictures import CLASSES, drawn, picture_rows
from tests.lwi.states import TASKS, write_states

ROWS = picture_rows(26, seed=4)


def outputs(directory):
    """Logits of every picture, one image at a time, by plain transformers."""
    from transformers import AutoModelForImageClassification

    import toolbox.classify.backbones  # noqa: F401

    model = AutoModelForImageClassification.from_pretrained(directory).eval()
    stored = json.loads((directory / "preprocessor_config.json").read_bytes())
    mean, std = (torch.tensor(stored[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    images, labels = drawn(26, seed=4)
    with torch.no_grad():
        found = [
            model(((torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std)[None]).logits[0].tolist()
            for image in images
        ]
    return found, [CLASSES[label] for label in labels]


def by_hand(directory, known):
    """A[t, u] of one state: TAw and TAg by loops."""
    table = []
    logits, truths = outputs(directory)
    seen = [label for task in TASKS[:known] for label in task]
    for task in TASKS[:known]:
        right = {"taw": 0, "tag": 0}
        count = 0
        for row, truth in zip(logits, truths, strict=True):
            if truth not in task:
                continue
            count += 1
            scores = dict(zip(seen, row, strict=True))
            right["taw"] += max(task, key=lambda label: scores[label]) == truth
            right["tag"] += max(seen, key=lambda label: scores[label]) == truth
        table.append((right["taw"] / count, right["tag"] / count, count))
    return table


def test_the_matrix_equals_a_hand_written_loop(tool, tmp_path):
    write_states(tmp_path, "m0", "m1")
    write_states(tmp_path, "b0", "b1", seed=9)
    pairs = ["--name", "LwI", "--baseline", f"other={tmp_path / 'b0'},{tmp_path / 'b1'}"]
    done = tool("lwi-eval", "-", tmp_path / "m0", tmp_path / "m1", *pairs, "--plot", tmp_path / "t.svg",
                "--predictions", tmp_path / "p.jsonl", "--stats", tmp_path / "s.safetensors",
                stdin=lines(ROWS))  # fmt: skip
    assert done.code == 0, done.err
    told = {(row["name"], row["t"], row["u"]): row for row in done.rows if row["event"] == "cell"}
    assert len(told) == 6
    averages = {}
    for name, states in (("LwI", ("m0", "m1")), ("other", ("b0", "b1"))):
        for t, state in enumerate(states):
            hand = by_hand(tmp_path / state, t + 1)
            averages[name, t] = [sum(cell[kind] for cell in hand) / len(hand) for kind in (0, 1)]
            for u, (taw, tag, count) in enumerate(hand):
                cell = told[name, t, u]
                assert (cell["taw"], cell["tag"], cell["n"]) == (pytest.approx(taw), pytest.approx(tag), count)
                assert cell["ci"][0] <= taw <= cell["ci"][1]
        lost = told[name, 0, 0]["taw"] - told[name, 1, 0]["taw"]
        assert told[name, 1, 0]["forgetting"] == pytest.approx(lost)
        assert told[name, 1, 1]["forgetting"] is None
        last = next(row for row in done.rows if row["event"] != "cell" and row.get("name") == name)
        assert last["avg_taw"] == pytest.approx([averages[name, 0][0], averages[name, 1][0]])
        assert last["avg_tag"] == pytest.approx([averages[name, 0][1], averages[name, 1][1]])
        assert last["forgetting"] == [None, pytest.approx(lost)]
        assert last["avg_taw_ci"][0] <= last["avg_taw"][1] <= last["avg_taw_ci"][1]
    baseline = next(row for row in done.rows if row["event"] == "baseline")
    assert baseline["difference"]["avg_taw"] == pytest.approx(averages["LwI", 1][0] - averages["other", 1][0])
    assert done.rows[-1]["event"] == "done"
    assert "LwI" in (tmp_path / "t.svg").read_text()
    check_predictions(tmp_path)
    check_stats(tmp_path, [row for row in done.rows if row["event"] == "overlap"])


def check_predictions(folder):
    rows = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    logits, truths = outputs(folder / "m1")
    for row, before, values, truth in zip(rows, ROWS, logits, truths, strict=True):
        assert {name: row[name] for name in before} == before
        best = int(np.argmax(values))
        assert row["lwi"]["pred"] == CLASSES[best]
        assert row["lwi"]["correct"] == (CLASSES[best] == truth)
        assert row["lwi"]["prob"] == pytest.approx(math.exp(values[best]) / sum(map(math.exp, values)), rel=1e-4)
        assert truth in TASKS[row["lwi"]["task"]]


def read_by_head(model, pixels):
    """What the last layer is given."""
    given = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(pixels)
    hook.remove()
    return given[0]


def check_stats(folder, overlaps):
    """The stream that the head reads, by a hook of our own; and the printed overlap."""
    from transformers import AutoModelForImageClassification

    found = load_file(folder / "s.safetensors")
    groups = {key.split("/")[1] for key in found}
    assert {row["group"] for row in overlaps} == groups
    assert len(groups) == 6
    model = AutoModelForImageClassification.from_pretrained(folder / "m1").eval()
    images, labels = drawn(26, seed=4)
    from toolbox.classify.augment import normalise

    for task in (0, 1):
        index = [place for place, label in enumerate(labels) if label // 2 == task]
        pixels = normalise(torch.from_numpy(images[index]).permute(0, 3, 1, 2))
        hidden = read_by_head(model, pixels)
        (group,) = (
            name
            for name in groups
            if len(found[f"task{task}/{name}/mean_abs"]) == hidden.shape[1]
            and torch.allclose(found[f"task{task}/{name}/mean_abs"], hidden.abs().mean(0), rtol=1e-4)
        )
        assert torch.allclose(found[f"task{task}/{group}/firing"], (hidden > 0).float().mean(0), atol=1e-6)
        gram = hidden.T @ hidden / len(index)
        assert torch.allclose(found[f"task{task}/{group}/gram"], gram, rtol=1e-3, atol=1e-5)
    one, two = (found[f"task{task}/{group}/mean_abs"] for task in (0, 1))
    told = next(row["overlap"] for row in overlaps if row["group"] == group)
    assert told == pytest.approx(float(torch.minimum(one, two).sum() / torch.maximum(one, two).sum()), rel=1e-4)


@pytest.mark.slow
def test_two_processes_print_what_one_prints(tool, tmp_path):
    write_states(tmp_path, "m0", "m1")
    words = ["lwi-eval", "-", tmp_path / "m0", tmp_path / "m1", "--baseline", f"again={tmp_path / 'm0'}"]
    one, two = (tool(*words, "-j", count, stdin=lines(ROWS)) for count in (1, 2))
    assert two.code == 0, two.err
    assert two.out == one.out


def test_what_does_not_fit_is_refused_with_its_code(tool, tmp_path):
    write_states(tmp_path, "m0", "m1")
    write_states(tmp_path, "x0", "x1", tasks=(TASKS[1], TASKS[0]))
    table = [
        (["m1", "m0"], ROWS, 65, "states out of order"),
        (["m0", "x1"], ROWS, 65, "has learned other tasks"),
        (["m0", "none"], ROWS, 66, "model none"),
        (["m0", "m1", "--baseline", "m0"], ROWS, 2, "expected NAME=DIR,DIR"),
        (["m0", "m1", "--baseline", "model=m0"], ROWS, 2, "same name"),
        (["m0", "m1"], [row for row in ROWS if row["group"] == 0], 65, "no image of task 1 (cat, dog)"),
        (["m0", "m1", "--plot", "x.txt"], ROWS, 2, "x.txt"),
        (["m0", "m1", "--stats", "no/such/s"], ROWS, 2, "--stats"),
    ]
    for words, rows, code, says in table:
        done = tool("lwi-eval", "-", *words, stdin=lines(rows), cwd=tmp_path)
        assert (done.code, done.out) == (code, b""), (words, done.err)
        assert says in done.err, (words, done.err)
    alone = tool("lwi-eval", "-", "m0", stdin=lines(ROWS), cwd=tmp_path)
    assert alone.code == 0
    assert "images of classes that no state has learned" in alone.err
    assert alone.rows[-1]["forgetting"] == [None]
