"""satimp-unlearn: what it refuses, what it warns of, what it watches."""

from __future__ import annotations

import pytest

from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Row
from toolbox.unlearning.data import check_overlap, hold_out

FORGET = [{"id": f"f{i}", "question": f"Who is Vorn {i}?", "answer": f"Vorn {i} is a lamp."} for i in range(4)]
RETAIN = [{"id": f"r{i}", "question": f"Who is Mell {i}?", "answer": f"Mell {i} is a chair."} for i in range(4)]


@pytest.fixture
def go(tool, tiny, rows, tmp_path):
    forget, retain = rows("forget.jsonl", FORGET), rows("retain.jsonl", RETAIN)

    def run(*more, keep=True):
        sets = ["--forget", forget, *(["--retain", retain] if keep else [])]
        return tool("satimp-unlearn", "--model", tiny, *sets, "--out", tmp_path / "out", "--epochs", "1", *more)

    return run


def row(id: str, text: str) -> Row:
    return Row(id, None, text, "PlainText", "f", 1)


def test_held_out_rows_are_never_trained_on():
    rows = [row(str(i), f"t{i}") for i in range(5)]
    held, rest = hold_out(rows, 2)
    assert [r.id for r in held] == ["0", "1"]
    assert [r.id for r in rest] == ["2", "3", "4"]
    with pytest.raises(UsageProblem, match="leaves none of the 5"):
        hold_out(rows, 5)


def test_overlap_is_told_by_words_not_by_ids():
    assert check_overlap([row("a", "x")], [row("a", "y")], strict=True) is None
    warning = check_overlap([row("a", "x "), row("b", "y")], [row("c", "x")], strict=False)
    assert warning is not None
    assert "1 rows" in warning
    assert "a=c" in warning
    with pytest.raises(BadData):
        check_overlap([row("a", "x")], [row("c", "x")], strict=True)


def test_the_same_rows_in_both_sets_are_a_warning_without_their_text(tool, tiny, rows, tmp_path):
    both = rows("both.jsonl", FORGET)
    words = ["--model", tiny, "--forget", both, "--retain", both, "--out", tmp_path / "o", "--epochs", "1"]
    done = tool("satimp-unlearn", *words)
    assert done.code == 0
    assert "4 rows stand in both" in done.err
    assert "f0=f0" in done.err
    assert "Vorn" not in done.err
    strict = tool("satimp-unlearn", *words, "--strict", "--overwrite")
    assert (strict.code, strict.out) == (65, b"")


@pytest.mark.parametrize(
    ("more", "keep", "code", "says"),
    [
        ((), False, 2, "--alpha above 0 needs --retain"),
        (("--retain-loss", "none"), False, 0, ""),
        (("--alpha", "0"), False, 0, ""),
        (("--holdout", "1"), False, 2, "--alpha above 0 needs --retain"),
        (("--holdout", "9"), True, 2, "--holdout 9 leaves none of the 4"),
        (("--beta1", "-1"), True, 2, "below 0"),
        (("--gamma", "nan"), True, 2, "not finite"),
        (("--lora-r", "2", "--delta", "d"), True, 2, "--delta does not apply to --lora-r"),
        (("--lora-alpha", "2"), True, 2, "need --lora-r"),
        (("--delta", "d", "--model", "some/hub-id"), True, 69, "hub"),
        (("--stop-when", "forget_es<"), True, 2, "--stop-when"),
        (("--stop-when", "forget_es<.1", "--eval-every", "0"), True, 2, "needs evaluations"),
        (("--plot", "nowhere/p.svg"), True, 73, "--plot nowhere/p.svg: no such directory"),
        (("--delta", "nowhere/d.safetensors"), True, 73, "--delta nowhere/d.safetensors"),
        (("--tracker", "tensorboard"), True, 2, "its package is missing"),
        (("--stop-when", "other_es<1"), True, 2, "`other_es` is not one of"),
        (("--watch", "forget=x"), True, 2, "the name forget is taken"),
        (("--watch", "x=nowhere.jsonl"), True, 66, "nowhere.jsonl"),
        (("--plot", "p.bmp"), True, 2, "p.bmp"),
        (("--max-length", "4"), True, 65, "no labelled token within --max-length 4"),
        (("--train-params", "nothing"), True, 2, "matches no parameter"),
        (("--train-params", "("), True, 2, "--train-params"),
        (("--tracker", "nosuchthing"), True, 2, "nosuchthing"),
        (("--forget", "-", "--retain", "-"), True, 2, "only one input can be stdin"),
    ],
)
def test_what_does_not_fit_together(go, tmp_path, more, keep, code, says):
    done = go(*more, keep=keep)
    assert done.code == code, done.err
    assert says in done.err
    assert "Traceback" not in done.err
    if code:
        assert done.out == b""
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_quantised_model_is_refused_before_it_loads(go, tool, tiny, tmp_path):
    import json
    import shutil

    shutil.copytree(tiny, tmp_path / "four-bit")
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "four-bit" / "config.json").write_text(json.dumps(config))
    done = go("--model", tmp_path / "four-bit")
    assert (done.code, done.out) == (2, b"")
    assert "quantised" in done.err


def test_watched_sets_are_forget_retain_and_named_ones(go, rows):
    done = go("--watch", f"old={rows('old.jsonl', RETAIN[:1])}", "--holdout", "2", "--eval-rows", "3")
    assert done.code == 0, done.err
    sets = next(event for event in done.rows if event["event"] == "eval")["sets"]
    assert {name: values["n"] for name, values in sets.items()} == {"forget": 3, "retain": 2, "old": 1}
    assert sets["old"]["es_interval"] == [None, None]


def test_without_retain_loss_the_rows_are_only_watched(go):
    done = go("--retain-loss", "none")
    steps = [event for event in done.rows if event["event"] == "step"]
    assert all("loss_retain" not in step for step in steps)
    assert "retain" in done.rows[-1]["after"]


def test_one_part_of_the_model_can_be_trained_alone(go, tiny, tmp_path):
    from safetensors.torch import load_file

    done = go("--train-params", r"layers\.1\..*mlp", "--lr", "0.01")
    assert done.code == 0, done.err
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not bool((before[name] == after[name]).all())}
    assert changed == {name for name in before if "layers.1.mlp" in name}
    assert done.rows[0]["trainable"] < done.rows[0]["parameters"]


def test_a_plain_dry_run_shows_a_kept_row_and_never_a_forgotten_one(go):
    done = go("--dry-run")
    assert done.code == 0, done.err
    assert "⟦Mell 0 is a chair.<|im_end|>⟧" in done.err
    assert "Vorn" not in done.err
    assert done.rows[0]["rows"] == {"forget": 4, "retain": 4}


def test_a_resume_of_somebody_elses_finished_output_is_refused(go, tool, tiny, rows, tmp_path):
    words = ["--model", tiny, "--out", tmp_path / "out", "--epochs", "1", rows("retain.jsonl", RETAIN)]
    assert tool("lm-tune", *words).code == 0
    assert tool("lm-tune", *words, "--resume").code == 0
    for done in (go("--resume"), tool("lm-tune", *words, "--resume", "--seed", "4")):
        assert (done.code, done.out) == (2, b"")
        assert "--resume with another" in done.err


def test_the_delta_of_a_model_replaced_in_place_is_that_of_the_old_one(go, tiny, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(tiny, tmp_path / "out")
    (tmp_path / "out" / "run.json").write_text("{}")
    delta = tmp_path / "d.safetensors"
    done = go("--model", tmp_path / "out", "--overwrite", "--delta", delta, "--lr", "1e-2")
    assert done.code == 0, done.err
    assert any(bool(value.any()) for value in load_file(delta).values())


def test_cut_rows_are_counted(go):
    done = go("--max-length", "70")
    assert done.code == 0, done.err
    assert "rows cut at --max-length 70" in done.err


def test_ascent_raises_the_loss_of_the_forget_rows(go):
    done = go("--weighting", "ga", "--retain-loss", "none", "--epochs", "6", "--lr", "1e-2")
    before, after = done.rows[-1]["before"], done.rows[-1]["after"]
    assert after["forget"]["prob"] < before["forget"]["prob"] / 2
