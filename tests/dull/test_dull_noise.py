"""dull-noise: exact, in order, repeatable; what cannot be is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.conftest import SHARED


def test_the_report_is_what_the_rows_say(tool, tmp_path):
    done = tool("dull-noise", "digits", "--imbalance", ".1", "--rate", ".2", "--seed", "1", "--report", tmp_path / "r")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "r").read_bytes())
    pairs = Counter((row["dull"]["label_clean"], row["label"]) for row in done.rows)
    for i, true in enumerate(report["classes"]):
        assert [pairs[true, given] for given in report["classes"]] == report["moved"][i]
    assert all(row["dull"]["flipped"] == (row["label"] != row["dull"]["label_clean"]) for row in done.rows)
    assert report["rate"] == pytest.approx(0.2, abs=10 / report["n"])
    ids = [int(row["id"]) for row in done.rows]
    assert ids == sorted(ids)
    assert len(set(ids)) == report["n"] == sum(report["counts"])
    tail = tool("dull-noise", "digits", "--imbalance", "10", "--mode", "none", "--seed", "1").out
    words = ["--mode", "matrix", "--matrix", tmp_path / "r", "--report", tmp_path / "s"]
    again = tool("dull-noise", *words, stdin=tail)
    assert again.code == 0, again.err
    second = json.loads((tmp_path / "s").read_bytes())
    assert second["moved"] == report["moved"]
    assert second["counts"] == report["counts"]


def test_noise_upon_noise_keeps_the_first_label(tool):
    first = tool("dull-noise", "digits", "--imbalance", ".1", "--rate", ".3")
    second = tool("dull-noise", "--mode", "uniform", "--rate", ".5", stdin=first.out)
    assert [row["dull"]["label_clean"] for row in second.rows] == [row["dull"]["label_clean"] for row in first.rows]
    changed = sum(a["label"] != b["label"] for a, b in zip(first.rows, second.rows, strict=True))
    assert changed == pytest.approx(len(first.rows) / 2, abs=6)


def test_a_folder_becomes_a_manifest(tool, tmp_path):
    for label, count in (("cat", 3), ("dog", 2)):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "pets" / label / f"{number}.png").touch()
    rows = tool("dull-noise", tmp_path / "pets", "--mode", "none").rows
    assert [(row["image"], row["label"]) for row in rows] == [
        ("cat/0.png", "cat"), ("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/0.png", "dog"), ("dog/1.png", "dog"),
    ]  # fmt: skip
    assert not any(row["dull"]["flipped"] for row in rows)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--rate", ".9", "--imbalance", ".1"], 65, "the cap is"),
        (["--rate", "1.5"], 2, "is above 1"),
        (["--imbalance", "0"], 2, "not above 0"),
        (["--rate", ".1", "--rate-nonhead", ".1"], 2, "exclude one another"),
        (["--mode", "field"], 2, "--field NAME"),
        (["--field", "x"], 2, "no use with --mode t2h"),
        (["--mode", "field", "--field", "x"], 65, "digits:0: $.x: a label is expected"),
        (["--mode", "cifar-asym"], 65, "needs CIFAR-10's classes"),
        (["--mode", "matrix", "--matrix", "none.json"], 66, "no such file"),
        (["--class-order", "none.txt"], 66, "no such file"),
        (["--class-order", "confusion"], 2, "two labels a row"),
    ],
)
def test_what_cannot_be_is_refused(tool, words, code, says):
    done = tool("dull-noise", "digits", *words)
    assert (done.code, done.out) == (code, b""), done.err
    assert says in done.err


def test_odd_inputs_have_their_place_in_the_message(tool, tmp_path):
    rows = [
        {"id": str(i), "image": "digits:1", "label": "ab"[i % 2], "worse": "c" if i == 3 else "a"} for i in range(4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    done = tool("dull-noise", "--mode", "field", "--field", "worse", stdin=text)
    assert done.code == 65
    assert "stdin:4: $.worse: 'c' is the label of no row" in done.err
    (tmp_path / "order").write_text("a\nc\n")
    assert "'b' stands in one of order and data" in tool("dull-noise", "--class-order", tmp_path / "order",
                                                        stdin=text).err  # fmt: skip
    (tmp_path / "t").write_text("[[1, 1], [0, 1]]")
    assert "add up to 1" in tool("dull-noise", "--mode", "matrix", "--matrix", tmp_path / "t", stdin=text).err
    twice = tool("dull-noise", stdin=text + text[: text.index(b"\n") + 1])
    assert twice.code == 65
    assert "the id '0' stands at stdin:1 already" in twice.err


def test_the_human_set(tool):
    path = SHARED / "images" / "cifar10n_train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"CIFAR-10's human labels are not here ({path})")
    plan = tool("dull-noise", path, "--mode", "field", "--field", "label_worse", "--t2h-only", "--class-order",
                "confusion", "--imbalance", ".1", "--dry-run").rows[0]  # fmt: skip
    assert plan["n"] == 17_864
    assert plan["classes"] == ["automobile", "bird", "airplane", "dog", "horse", "deer", "truck", "ship", "cat", "frog"]
    assert plan["rate"] == pytest.approx(0.179, abs=0.005)
    assert not any(plan["moved"][i][j] for i in range(10) for j in range(i + 1, 10))
