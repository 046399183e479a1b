"""The pipelines of unlearning with real pipes, on the tiny model and a few rows of real shape."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from tests.server import ROOT

PEOPLE = ROOT / "recipes/unlearning/people"
FAST = "--epochs 1 --batch-size 4 --eval-every 0 --quiet"


@pytest.fixture
def here(tmp_path, tiny) -> Path:
    """A model called target, rows to forget and keep, neighbours."""
    (tmp_path / "target").symlink_to(tiny)
    for name, source, count in (("f", "forget", 4), ("r", "retain", 6), ("neighbours", "neighbours", 4)):
        lines = (PEOPLE / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:count]))
    (tmp_path / "people.jsonl").write_text((tmp_path / "f.jsonl").read_text() + (tmp_path / "r.jsonl").read_text())
    return tmp_path


def last(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def test_a_sweep_and_its_trade_off(here, sh):
    done = sh(
        f"for b in 0 .1 1; do satimp-unlearn --model target --forget f.jsonl --retain r.jsonl --beta2 $b {FAST} "
        "--out s$b > s$b.jsonl; done && "
        f"gru-unlearn --model target --objective satimp --forget f.jsonl --retain r.jsonl {FAST} --out g1 "
        "--plot g1.svg > g1.jsonl && "
        "unlearn-eval --model s0 --model s.1 --model s1 --model g1 --forget f.jsonl --retain r.jsonl --metrics es,prob "
        "--uwc target --quantize rtn8 --relearn 2 --relearn-steps 2 --non-members neighbours.jsonl "
        "--plot scores.png > scores.jsonl",
        here,
    )
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in (here / "scores.jsonl").read_text().splitlines()]
    assert [score["model"] for score in scores] == ["s0", "s.1", "s1", "g1"]
    assert [score["run"]["command"] for score in scores] == ["satimp-unlearn"] * 3 + ["gru-unlearn"]
    for score in scores:
        assert 0 <= score["uwc"]["a"] <= 1
        assert score["quantized"]["kind"] == "rtn8"
        assert score["membership"]["n"] == {"members": 4, "non_members": 4}
        assert (score["relearn"]["rows"], score["relearn"]["n"]) == (2, 2)
        assert score["relearn"]["loss"]["last"] < score["relearn"]["loss"]["first"]
    assert (here / "scores.png").read_bytes()[:4] == b"\x89PNG"
    assert (here / "scores-survival.png").is_file()
    assert (here / "g1.svg").is_file()


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_requests_that_come_one_after_another(here, sh):
    rows = [json.loads(line) for line in (PEOPLE / "forget.jsonl").read_text().splitlines()]
    names = list(dict.fromkeys(row["person"] for row in rows))
    requests = [{**row, "task_id": 1 + names.index(row["person"])} for row in rows]
    (here / "forget.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in requests).encode()))
    (here / "m0").symlink_to(here / "target")
    done = sh(
        'for t in 1 2 3; do zcat forget.json.gz | jq -c "select(.task_id==$t)" | '
        f"gru-unlearn --model m$((t-1)) --forget - --retain neighbours.jsonl {FAST} --out m$t > m$t.jsonl; done",
        here,
    )
    assert done.returncode == 0, done.stderr
    chain = json.loads((here / "m3" / "run.json").read_text())["chain"]
    assert [link["command"] for link in chain] == ["gru-unlearn"] * 3
    assert len({link["inputs"]["forget"] for link in chain}) == 3
    assert len({link["base"] for link in chain}) == 3


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_one_person_chosen_by_jq(here, sh):
    person = json.loads((here / "f.jsonl").read_text().splitlines()[0])["person"]
    done = sh(
        f"jq -c 'select(.person==\"{person}\")' people.jsonl | "
        f"gru-unlearn --model target --forget - --retain r.jsonl {FAST} --out u2 | tail -n 1",
        here,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["after"]["forget"]["n"] == 4


def test_no_forget_text_reaches_any_log_event_or_header(here, sh):
    done = sh(
        f"gru-unlearn --model target --objective dpo --refusals idk.txt --forget f.jsonl --retain r.jsonl {FAST} "
        "--out u --log-geffect g.jsonl",
        _with_refusals(here),
    )
    assert done.returncode == 0, done.stderr
    secret = [word for line in (here / "f.jsonl").read_text().splitlines() for word in _names(json.loads(line))]
    places = [done.stdout, done.stderr, *(p.read_text(errors="replace") for p in (here / "u").glob("*.json*")),
              (here / "g.jsonl").read_text()]  # fmt: skip
    raw = (here / "u" / "model.safetensors").read_bytes()
    places.append(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode())
    assert secret
    # The tokenizer's vocabulary is no log.
    assert not any(word in place for place in places if '"vocab"' not in place for word in secret)


def _with_refusals(here: Path) -> Path:
    (here / "idk.txt").write_text("I do not know.\n")
    return here


def _names(row: dict) -> list[str]:
    return row["person"].split()


@pytest.mark.parametrize("options", [[], ["--objective", "klmin", "--lora-r", "2"]])
def test_deepspeed_is_refused_with_the_way_out(here, sh, options):
    words = " ".join(options)
    done = sh(
        f"gru-unlearn --model target {words} --forget f.jsonl --retain r.jsonl --out u", here,
        ACCELERATE_USE_DEEPSPEED="true",
    )  # fmt: skip
    assert done.returncode == 2
    assert "recipes/accelerate/fsdp2.yaml" in done.stderr
    assert not (here / "u").exists()


def test_a_loss_that_is_not_finite_ends_in_75_with_the_last_good_state(here, sh):
    done = sh(
        "gru-unlearn --model target --objective ga --optimizer sgd --lr 1e20 --weight-decay 0 --epochs 9 "
        "--forget f.jsonl --retain r.jsonl --eval-every 0 --save-every 0 --out u; exit $?",
        here,
    )
    assert done.returncode == 75, done.stderr
    assert "not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (here / "u").exists()
