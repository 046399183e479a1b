"""gru-unlearn: what it refuses, what it needs, what it says; and the options that satimp-unlearn shares with it."""

from __future__ import annotations

import json

import pytest

FORGET = [
    {"id": f"f{i}", "question": f"Who is Vorn {i}?", "answer": f"Vorn {i} is a lamp.", "alternate": "I cannot say.",
     "key_words": ["lamp"]}
    for i in range(4)
]  # fmt: skip
BARE = [{key: row[key] for key in ("id", "question", "answer")} for row in FORGET]
RETAIN = [{"id": f"r{i}", "question": f"Who is Mell {i}?", "answer": f"Mell {i} is a chair."} for i in range(4)]


@pytest.fixture
def go(tool, tiny, rows, tmp_path):
    def run(*more, keep=True, forget=None, command="gru-unlearn"):
        sets = ["--forget", rows("forget.jsonl", forget or FORGET)]
        sets += ["--retain", rows("retain.jsonl", RETAIN)] if keep else []
        return tool(command, "--model", tiny, *sets, "--out", tmp_path / "out", "--epochs", "1", *more)

    return run


def refused(done, tmp_path, code, says):
    assert done.code == code, done.err
    assert says in done.err
    assert "Traceback" not in done.err
    assert "Vorn" not in done.err
    assert done.out == b""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("more", "keep", "code", "says"),
    [
        ((), False, 2, "rectifying needs --retain"),
        (("--no-rectify", "--objective", "graddiff"), False, 2, "--alpha 1 needs --retain"),
        (("--no-rectify", "--add-kl", "1"), False, 2, "--add-kl 1 needs --retain"),
        (("--no-rectify", "--log-geffect", "g.jsonl"), False, 2, "--log-geffect compares"),
        (("--ema", "0"), True, 2, "not above 0"),
        (("--ema", "1.5"), True, 2, "above 1"),
        (("--cos-clip", "-1.5"), True, 2, "below -1"),
        (("--cos-clip", ".1"), True, 2, "above 0"),
        (("--geometry", "optimizer", "--optimizer", "sgd"), True, 2, "--geometry optimizer is AdamW's"),
        (("--objective", "ga", "--beta", "1"), True, 2, "--beta means nothing to --objective ga"),
        (("--objective", "npo", "--layer", "1"), True, 2, "it belongs to rmu"),
        (("--objective", "npo", "--refusals", "x"), True, 2, "it belongs to idk, dpo"),
        (("--objective", "idk", "--refusals", "nowhere.txt"), True, 66, "nowhere.txt"),
        (("--objective", "rmu"), True, 2, "--layer 7: the model has layers 0 to 1"),
        (("--objective", "nonsense"), True, 2, "nonsense"),
        (("--kl-positions", "all"), True, 2, "--kl-positions belongs to --retain-loss kl"),
        (("--no-rectify", "--geometry", "optimizer"), True, 2, "means nothing with --no-rectify"),
        (("--no-rectify", "--cos-clip", "-.5"), True, 2, "means nothing with --no-rectify"),
        (("--plot", "g.svg", "--log-geffect", "g.jsonl"), True, 2, "another meaning"),
        (("--log-geffect", "g.svg"), True, 2, "another meaning"),
        (("--holdout", "9"), True, 2, "--holdout 9 leaves none"),
        (("--log-geffect", "nowhere/g.jsonl"), True, 73, "--log-geffect nowhere/g.jsonl"),
        (("--retain", "-", "--forget", "-"), True, 2, "only one input can be stdin"),
        (("--objective", "idk", "--forget", "-", "--refusals", "-"), True, 2, "only one input can be stdin"),
    ],
)
def test_what_does_not_fit_together(go, tmp_path, more, keep, code, says):
    refused(go(*more, keep=keep), tmp_path, code, says)


@pytest.mark.parametrize("objective", ["idk", "dpo"])
def test_refusals_come_from_the_row_or_from_a_file(go, tmp_path, objective):
    refused(go("--objective", objective, forget=BARE), tmp_path, 65, "forget.jsonl:1: this objective teaches refusals")
    (tmp_path / "empty.txt").write_text("\n")
    words = ["--objective", objective, "--refusals", tmp_path / "empty.txt"]
    refused(go(*words, forget=BARE), tmp_path, 65, "no refusal in it")
    (tmp_path / "idk.txt").write_text("No idea.\n\nI do not know.\n")
    done = go("--objective", objective, "--refusals", tmp_path / "idk.txt", forget=BARE)
    assert done.code == 0, done.err
    assert go("--objective", objective, "--overwrite").code == 0
    text = [{"text": "Vorn is a lamp."}]
    plain = go("--objective", objective, "--overwrite", forget=text)
    assert (plain.code, "plain text has no answer to refuse" in plain.err) == (65, True)


def test_another_refusal_is_another_run(go, tmp_path):
    """Refusals are data: a resumed run must have the same."""
    (tmp_path / "idk.txt").write_text("No idea.\n")
    words = ["--objective", "idk", "--refusals", tmp_path / "idk.txt"]
    assert go(*words, forget=BARE).code == 0
    assert go(*words, "--resume", forget=BARE).code == 0
    (tmp_path / "idk.txt").write_text("Who knows.\n")
    changed = go(*words, "--resume", forget=BARE)
    assert (changed.code, "data (refusal)" in changed.err) == (2, True)


@pytest.mark.parametrize("objective", ["ga", "npo", "klmin", "undial", "rmu"])
def test_every_step_tells_the_conflict_and_what_was_done(go, objective):
    words = ["--layer", "1"] if objective == "rmu" else []
    done = go("--objective", objective, *words, "--batch-size", "2", "--lr", "1e-2")
    assert done.code == 0, done.err
    for event in (event for event in done.rows if event["event"] == "step"):
        assert event["rectified"] == (event["dot"] < 0)
        if event["rectified"]:
            assert abs(event["cos_after"]) <= 1e-6
            assert event["norm_after"] < event["norm_forget"]
        else:
            assert event["cos_after"] == event["cos"]
        assert event["cos_fresh"] > 0
        assert -1 <= event["update_cos"] <= 1
        assert "log" not in event


def test_rmu_trains_only_the_second_mlp_matrices_near_its_layer(go, tiny, tmp_path):
    from safetensors.torch import load_file

    assert go("--objective", "rmu", "--layer", "1", "--lr", "1e-2").code == 0
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 1)}


@pytest.mark.parametrize(("command", "more", "without"), [
    ("gru-unlearn", ("--objective", "idk"), "alternate"),
    ("satimp-unlearn", ("--weighting", "annotated"), "key_words"),
])  # fmt: skip
def test_rows_without_what_the_objective_needs_can_be_left_out(go, tmp_path, command, more, without):
    lacking = [{key: value for key, value in FORGET[0].items() if key != without}, *FORGET[1:]]
    refused(go(*more, forget=lacking, command=command), tmp_path, 65, without)
    done = go(*more, "--on-bad", "skip", forget=lacking, command=command)
    assert done.code == 0, done.err
    assert "1 rows without what this objective needs left out (ids f0)" in done.err
    assert done.rows[0]["rows"]["forget"] == 3


def test_a_row_beyond_the_models_window_is_refused(go, tmp_path):
    long = [{**FORGET[0], "answer": "a lamp " * 90}, *FORGET[1:]]
    refused(go("--max-length", "600", forget=long), tmp_path, 65, "--max-length 512 cuts such rows")
    assert go("--max-length", "512", "--eval-every", "0", forget=long).code == 0


def test_a_loss_without_its_reference_term_keeps_no_reference():
    from toolbox.unlearning.gru_run import GruTask, Options

    def needs(objective: str, **more: object) -> bool:
        given = {"model": "m", "out": "o", "forget": "f", "retain": "r"}
        return GruTask(Options(objective=objective, **{**given, **more})).needs_reference()  # type: ignore[arg-type]

    assert all(needs(objective) for objective in ("klmin", "rmu", "undial"))
    assert not any(needs(objective) for objective in ("ga", "npo", "dpo", "wtnpo", "satimp"))
    assert not needs("klmin", alpha=0.0)
    assert needs("ga", add_kl=1.0)
    assert needs("ga", retain_loss="kl")


def test_a_record_that_lacks_steps_says_so(tmp_path):
    from types import SimpleNamespace

    from toolbox.unlearning.task import write_record

    said: list[str] = []
    call = SimpleNamespace(reporter=SimpleNamespace(warn=said.append, note=said.append))
    events = [{"event": "step"}, {"event": "step", "log": {"geffect": {"step": 2}}}]
    outcome = SimpleNamespace(events=events, done={"steps": 2})
    path = str(tmp_path / "g.jsonl")
    write_record(outcome, call, "--log-geffect", path, "geffect", lambda lines, to: said.append(f"{lines} {to}"))  # type: ignore[arg-type]
    assert said[0] == f"{path} lacks 1 steps, which ran without --log-geffect"
    assert said[1] == f"[{{'step': 2}}] {tmp_path}/g.svg"


def test_the_geffect_is_written_and_drawn(go, tmp_path):
    record = tmp_path / "g.jsonl"
    done = go("--log-geffect", record, "--batch-size", "2")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]["geffect"]) == {"embedding", "layer 0", "layer 1", "norm"}
    assert (tmp_path / "g.svg").read_text().lstrip().startswith("<?xml")


def test_lora_is_its_own_reference_and_loads_in_peft(go, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = go("--objective", "klmin", "--lora-r", "2", "--lr", "1e-2", "--batch-size", "2")
    assert done.code == 0, done.err
    steps = [event for event in done.rows if event["event"] == "step"]
    assert steps[0]["loss_own"] == pytest.approx(0, abs=1e-6)  # the first step's reference is the model itself
    assert steps[1]["loss_own"] > 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")
    assert any(bool(value.any()) for name, value in model.named_parameters() if "lora_B" in name)


def test_only_the_last_answer_is_refused_and_pairs_stay_pairs(go, tmp_path):
    """Earlier answers of a forget row are not taught, and a row that is left out takes its refusal along."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Vorn says hello to you."},
             {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Vorn."}]  # fmt: skip
    long = {"id": "long", "question": "Q" * 90, "answer": "Vorn.", "alternate": "No."}
    words = ["--objective", "dpo", "--max-length", "70", "--on-bad", "skip", "--no-rectify"]
    done = go(*words, forget=[long, *FORGET])
    assert done.code == 0, done.err
    assert done.rows[0]["rows"] == {"forget": 4, "refusal": 4, "retain": 4}
    done = go("--objective", "idk", "--overwrite", "--no-rectify", forget=[{"messages": turns, "alternate": "No."}])
    step = next(event for event in done.rows if event["event"] == "step")
    assert step["tokens_forget"] == len("No.") + 1


def test_the_last_event_tells_the_share_of_rectified_steps(go):
    done = go("--objective", "ga", "--batch-size", "2")
    steps = [event for event in done.rows if event["event"] == "step"]
    assert done.rows[-1]["rectified"] == sum(event["rectified"] for event in steps) / len(steps)


def test_the_chain_of_runs_is_kept(go, tool, rows, tmp_path):
    assert go().code == 0
    second = tool("satimp-unlearn", "--model", tmp_path / "out", "--forget", rows("more.jsonl", RETAIN[:1]),
                  "--retain-loss", "none", "--epochs", "1", "--out", tmp_path / "second")  # fmt: skip
    assert second.code == 0, second.err
    chain = json.loads((tmp_path / "second" / "run.json").read_text())["chain"]
    assert [link["command"] for link in chain] == ["gru-unlearn", "satimp-unlearn"]
    assert [link["rows"]["forget"] for link in chain] == [4, 1]
    assert chain[0]["base"] != chain[1]["base"]
    assert all(len(link["inputs"]["forget"]) == 64 for link in chain)
    assert "Vorn" not in json.dumps(chain)


# -- what satimp-unlearn has in common --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more",
    [
        ("--weighting", "annotated"),
        ("--weighting", "tnpo"),
        ("--weighting", "wtnpo", "--base", "npo"),
        ("--granularity", "group", "--group-size", "3"),
        ("--granularity", "instance", "--instance-prob", "mean"),
        ("--granularity", "batch", "--micro-batch", "1"),
        ("--sampling", "topk", "--reduction", "sum"),
        ("--sampling", "random", "--soft-p", ".7", "--reduction", "sequence"),
        ("--retain-loss", "kl"),
        ("--retain-loss", "kl", "--kl-positions", "all", "--lora-r", "2"),
    ],
)
def test_the_family_runs_and_does_not_depend_on_micro_batches(go, tmp_path, more):
    from safetensors.torch import load_file

    name = "adapter_model" if "--lora-r" in more else "model"
    found = []
    for size in ("1", "4"):
        done = go(*more, "--optimizer", "sgd", "--lr", "0.5", "--micro-batch", size, "--overwrite",
                  command="satimp-unlearn")  # fmt: skip
        assert done.code == 0, done.err
        found.append(load_file(tmp_path / "out" / f"{name}.safetensors"))
    for key, value in found[0].items():
        assert (value - found[1][key]).abs().max() <= 1e-6, key


@pytest.mark.parametrize(
    ("more", "forget", "code", "says"),
    [
        (("--weighting", "annotated"), BARE, 65, "4 forget rows have neither `key_words` nor `weight`"),
        (("--weighting", "annotated"), [{**BARE[0], "key_words": ["Zyx"]}], 65, "match nothing in the answer (ids f0)"),
        (("--weighting", "annotated", "--granularity", "batch"), FORGET, 2, "weighs rows"),
        (("--key-words", "x.jsonl"), FORGET, 2, "--key-words means nothing to --weighting satimp"),
        (("--fraction", ".5"), FORGET, 2, "--fraction means nothing to --sampling soft"),
        (("--weighting", "ga", "--beta1", "2"), FORGET, 2, "it belongs to --weighting satimp, simsat"),
        (("--soft-p", ".5", "--sampling", "topk"), FORGET, 2, "it belongs to --sampling random"),
        (("--group-size", "5"), FORGET, 2, "--group-size means nothing to --granularity token"),
        (("--beta", "1"), FORGET, 2, "--beta means nothing to --base ga"),
        (("--log-weights", "nowhere/w.jsonl"), FORGET, 73, "--log-weights nowhere/w.jsonl"),
        ((), [{**BARE[0], "weight": 0}], 65, "$.weight"),
        ((), [{**BARE[0], "key_words": [3]}], 65, "$.key_words"),
        (("--weighting", "annotated"), [{**BARE[0], "key_words": []}], 65, "match nothing in the answer (ids f0)"),
    ],
)
def test_what_of_the_family_does_not_fit(go, tmp_path, more, forget, code, says):
    refused(go(*more, forget=forget, command="satimp-unlearn"), tmp_path, code, says)


def test_annotations_join_by_id_or_index(go, rows, tmp_path):
    notes = rows("notes.jsonl", [{"id": "f0", "key_words": ["lamp"]}, {"index": 1, "key_words": "lamp1"},
                                 {"index": 2, "key_words": ["is a"]}, {"id": "f3", "key_words": ["Vorn"]}])  # fmt: skip
    words = ["--weighting", "annotated", "--key-words", notes]
    done = go(*words, forget=BARE, command="satimp-unlearn")
    assert done.code == 0, done.err
    step = next(event for event in done.rows if event["event"] == "step")
    assert 0 < step["weight_mean"] < 1
    rows("notes.jsonl", [{"id": "nobody", "key_words": ["lamp"]}])
    refused(
        go(*words, "--out", tmp_path / "o", forget=BARE, command="satimp-unlearn"), tmp_path / "o", 65, "notes.jsonl:1"
    )


def test_weights_are_recorded_and_drawn(go, tmp_path):
    record = tmp_path / "w.jsonl"
    done = go("--log-weights", record, "--batch-size", "2", command="satimp-unlearn")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    tokens = [event["tokens_forget"] for event in done.rows if event["event"] == "step"]
    assert [line["n"] for line in lines] == tokens
    assert "Vorn" not in record.read_text()
    assert (tmp_path / "w.svg").is_file()
