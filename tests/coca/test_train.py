"""coca-train: the two stages equal a loop by hand, prompts are found, rows of all spellings, refusals, and resuming."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.coca.intervention import hooked, load_intervention
from toolbox.coca.lofit import HeadGrid, Lofit, top_heads
from toolbox.coca.loreft import Loreft, Positions
from toolbox.coca.train import balanced, layer_range, parse_heads
from toolbox.models.chat import Chat
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import Row

ROWS = [
    {"prompt": f"Say {'more ' * (i % 3)}{i}", "completion": f"<think>t{i}</think>\n<response>no {'x' * i}</response>",
     "label": "harmful" if i % 3 else "benign", "coca": {"decision": "NOT SHOWN"}}
    for i in range(6)
]  # fmt: skip
FILE = "intervention.safetensors"


@pytest.fixture
def train(tool, tiny, rows, tmp_path):
    data = rows("rows.jsonl", ROWS)

    def run(out, *more, data=data, model=tiny):
        return tool("coca-train", "--model", model, "--out", tmp_path / out, *more, data)

    return run


def encoded():
    """The rows as the command encodes them: ids, prompt length."""
    chat = Chat(tiny_tokenizer())
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in ROWS
    ]
    return [
        (torch.tensor(one.ids), one.labelled.index(True)) for one in (chat.encode(t, loss_on="last") for t in turns)
    ]


def cross_entropy(model, before=lambda prompt: None):
    """Σ over answer tokens / their number, row by row without padding."""
    total, count = 0.0, 0
    for ids, prompt in encoded():
        before(prompt)
        logits = model(input_ids=ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="sum")
        count += len(ids) - prompt
    return total / count


def test_both_stages_of_lofit_are_plain_gradient_steps(train, tmp_path):
    """Two steps of stage a, the heads by its scores, two of stage b: by SGD on all rows at once."""
    done = train("out", "--optimizer", "sgd", "--lr", "2", "--heads-lr", "4", "--heads", "3", "--batch-size", "6",
                 "--epochs", "2", "--l1", "0.01", "--micro-batch", "2", "--seed", "5")  # fmt: skip
    assert done.code == 0, done.err
    model = tiny_model().requires_grad_(False)
    module = Lofit(HeadGrid(2, 4, 8), count=3, scales=True, seed=5)
    losses = []
    with hooked(module, model):
        for step in range(4):
            if step == 2:
                module.start_offsets(top_heads(module.score(), 3), module.score())
            part, lr = (module.A, 4.0) if step < 2 else (module.v, 2.0)
            loss = cross_entropy(model) + (0.01 * module.A.abs().sum() if step < 2 else 0.0)
            losses.append(float(loss.detach()))
            (gradient,) = torch.autograd.grad(loss, [part])
            part.data -= lr * gradient
    steps = [event for event in done.rows if event["event"] == "step"]
    assert [event["loss"] for event in steps] == pytest.approx(losses, abs=1e-5)
    assert [event["stage"] for event in steps] == ["a", "a", "b", "b"]
    assert steps[0]["ce"] < steps[0]["loss"]
    assert losses[-1] < losses[2]
    found = load_file(tmp_path / "out" / FILE)
    for name, tensor in module.tensors().items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=2e-6)
    start = done.rows[0]
    assert start["parts"] == {"a": 2 * 4 * 8, "b": 3 * 8}
    assert start["trainable"] == sum(start["parts"].values())


def test_the_offsets_begin_with_a_fresh_optimiser_at_their_own_rate(train, tmp_path):
    """AdamW's first step moves every number by its learning rate: it counts no steps of stage a."""
    assert train("out", "--batch-size", "6", "--epochs", "1", "--heads-epochs", "3", "--heads", "3").code == 0
    first = Lofit(HeadGrid(2, 4, 8), count=3, scales=True, seed=0).v.detach()
    found = load_file(tmp_path / "out" / FILE)
    moved = torch.cat([found[name] for name in sorted(found) if name.startswith("lofit.v.")]) - first
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-2), rtol=1e-3, atol=0)


def test_stages_apart_choose_and_take_the_same_heads(train, tmp_path):
    """Heads chosen by one run are trained by the next, all of them or fewer."""
    first = train("heads", "--stage", "a", "--epochs", "1", "--heads", "4")
    assert first.code == 0, first.err
    assert first.rows[0]["parts"] == {"a": 64}
    scores = load_file(tmp_path / "heads" / FILE)
    assert not any(name.startswith("lofit.v") for name in scores)
    places = top_heads(scores["lofit.scores"], 4)
    for more, count in (([], 4), (["--heads", "2"], 2), (["--heads", "25%"], 2)):
        done = train("b", "--heads-from", tmp_path / "heads", "--epochs", "1", "--overwrite", *more)
        assert done.code == 0, done.err
        assert done.rows[0]["parts"] == {"b": 8 * count}
        found = load_intervention(tmp_path / "b").module.places
        assert found == (places if count == 4 else top_heads(scores["lofit.scores"], 2))
    named = train("c", "--heads", "0.1,1.3", "--epochs", "1", "--merge", tmp_path / "merged")
    assert named.code == 0, named.err
    assert load_intervention(tmp_path / "c").module.places == [1, 7]
    from transformers import AutoModelForCausalLM

    ids, _ = encoded()[3]
    model, merged = tiny_model(), AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with load_intervention(tmp_path / "c").attach(model), torch.no_grad():
        wanted = model(input_ids=ids[None]).logits
    torch.testing.assert_close(merged(input_ids=ids[None]).logits, wanted, rtol=0, atol=1e-5)
    assert (tmp_path / "merged" / "run.json").is_file()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_loreft_is_trained_and_watched_at_the_prompts_alone(train, tmp_path, rows):
    """The first loss is that of the drawn module by hand, the watched probability that of the trained one attached."""
    watch = rows("watch.jsonl", ROWS[:1])
    words = ["--method", "loreft", "--rank", "3", "--layers", "0-1", "--positions", "f3+l2", "--optimizer", "sgd",
             "--epochs", "2", "--batch-size", "6", "--watch", f"w={watch}"]  # fmt: skip
    done = train("out", *words, "--lr", "0.5")
    assert done.code == 0, done.err
    model = tiny_model().requires_grad_(False)
    module = Loreft.drawn([0, 1], 32, 3, Positions(3, 2), seed=0)

    def at(attached):
        return lambda prompt: setattr(attached, "_lengths", torch.tensor([prompt]))

    with hooked(module, model) as attached:
        losses = []
        for _ in range(2):
            loss = cross_entropy(model, at(attached))
            losses.append(float(loss.detach()))
            parts = list(module.parameters())
            for part, gradient in zip(parts, torch.autograd.grad(loss, parts), strict=True):
                part.data -= 0.5 * gradient
    steps = [event for event in done.rows if event["event"] == "step"]
    assert [event["loss"] for event in steps] == pytest.approx(losses, abs=1e-5)
    assert done.rows[0]["parts"] == {"loreft": 2 * (2 * 3 * 32 + 3)}
    loaded = load_intervention(tmp_path / "out")
    for name, tensor in module.tensors().items():
        torch.testing.assert_close(loaded.module.tensors()[name], tensor, rtol=0, atol=1e-5)
    ids, prompt = encoded()[0]
    with loaded.attach(model) as attached, attached.prompts([prompt]), torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1], ids[prompt:])
    assert done.rows[-1]["after"]["w"]["prob"] == pytest.approx(float(torch.exp(-nll)), rel=1e-4)
    again = train("again", *words, "--lr", "0.5", "--grad-checkpointing", "--micro-batch", "1")
    one, two = (load_file(tmp_path / name / FILE) for name in ("out", "again"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-6, again.err


def test_all_spellings_of_an_answer_are_the_same_rows(train, rows, tmp_path):
    asked, answered = "Add\n1 and 2", "3"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    shared = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    spellings = [
        {"prompt": asked, "completion": answered}, {"question": asked, "answer": answered}, {"messages": turns},
        {"instruction": "Add", "input": "1 and 2", "output": answered}, {"conversations": shared},
    ]  # fmt: skip
    plans = []
    for number, one in enumerate(spellings):
        data = rows(f"{number}.jsonl", [{**one, "text": "ignored", "coca": {"think": "not shown"}}])
        done = train("x", "--dry-run", data=data)
        assert done.code == 0, done.err
        plans.append({name: done.rows[0][name] for name in ("tokens", "labelled", "parts", "steps")})
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["labelled"]["train"] == 2  # "3" and the end of the turn
    earlier = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, *turns]}
    done = train("x", "--dry-run", data=rows("earlier.jsonl", [earlier]))
    assert done.rows[0]["labelled"]["train"] == 2  # earlier answers are context


def test_long_rows_are_left_out_and_counted_never_cut(train):
    lengths = sorted(len(ids) for ids, _ in encoded())
    done = train("x", "--dry-run", "--max-length", str(lengths[3]))
    assert "2 rows longer than --max-length" in done.err
    assert done.rows[0]["rows"] == {"train": 4}
    assert done.rows[0]["tokens"]["train"] == sum(lengths[:4])
    nothing = train("x", "--max-length", "5")
    assert nothing.code == 65
    assert "no row to learn from" in nothing.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--heads", "0"], 65, "nothing would be trained"),
        (["--heads", "0.9,2.0"], 65, "no such head"),
        (["--method", "loreft", "--layers", "1-2"], 65, "no such layers"),
        (["--method", "loreft", "--rank", "33"], 65, "between 1 and the model's width"),
        (["--method", "loreft", "--positions", "x"], 2, "no position"),
        (["--method", "loreft", "--heads", "3"], 2, "means nothing to --method loreft"),
        (["--method", "lora", "--l1", "0.1"], 2, "means nothing to --method lora"),
        (["--method", "loreft", "--merge", "m"], 2, "means nothing"),
        (["--stage", "b"], 2, "needs heads"),
        (["--stage", "a", "--heads", "1.1"], 2, "they are given"),
        (["--heads-from", "nowhere"], 66, "no such file"),
        (["--heads", "1.x"], 2, "expected LAYER.HEAD"),
        (["--balance", "1:0:1"], 2, "expected H:B"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_begins(train, tmp_path, words, code, says):
    done = train("out", *words)
    assert (done.code, done.out) == (code, b""), done.err
    assert says in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def row(number, label):
    return Row(str(number), ({"role": "user", "content": "x"},), None, "", "f", number, label=label)


def test_rows_are_balanced_by_a_seeded_sample_in_their_order():
    rows = tuple(
        row(i, label) for i, label in enumerate(["unsafe", "safe", 1, 0, "harmful", True, "benign", "Harmful"])
    )
    kept = balanced(rows, "1:1", 0)
    assert [one.label in ("safe", 0, "benign") and one.label is not True for one in kept].count(True) == 3
    assert len(kept) == 6
    assert [one.line for one in kept] == sorted(one.line for one in kept)
    assert kept == balanced(rows, "1:1", 0)
    assert len(balanced(rows, "1:3", 0)) == 4
    assert all(one.label in (0, "safe", "benign") for one in balanced(rows, "0:1", 0))
    for wrong in (None, "maybe", 2):
        with pytest.raises(BadData) as problem:
            balanced((*rows, row(9, wrong)), "1:1", 0)
        assert problem.value.field == "$.label"
    for ratio in ("1", "0:0", "a:b"):
        with pytest.raises(UsageProblem):
            balanced(rows, ratio, 0)


def test_layers_and_heads_as_they_are_written():
    assert layer_range(None, 32) == list(range(10, 19))
    assert layer_range(None, 30) == list(range(9, 18))
    assert layer_range("3", 4) == [3]
    assert parse_heads("3.1,12.0") == [(3, 1), (12, 0)]


def test_killed_in_both_stages_and_resumed_it_ends_with_the_same_bytes(tool, tiny, rows, tmp_path):
    words = ["--model", tiny, "--epochs", "2", "--heads-epochs", "2", "--batch-size", "3", "--heads", "3",
             "--save-every", "1", rows("rows.jsonl", ROWS)]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert tool("coca-train", *words, "--out", whole).code == 0
    for behind in (2, 5):  # four steps of stage a, four of stage b
        with open(os.devnull, "r+b") as null:
            running = tool.start("coca-train", *words, "--out", out, "--resume", fds=(null.fileno(),) * 3)
        deadline = time.monotonic() + 60
        states = (tmp_path / "out.partial").glob
        while not out.exists() and not any(int(one.name[5:]) >= behind for one in states("step-??????")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        if not out.exists():
            os.kill(running.pid, signal.SIGKILL)
        running.wait()
    last = tool("coca-train", *words, "--out", out, "--resume")
    assert last.code == 0, last.err
    assert (out / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert events(out) == events(whole)


def events(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "settings", "model")} for line in lines]


def test_another_base_is_refused_by_its_sizes_and_by_its_weights(train, tmp_path):
    assert train("out", "--heads", "2", "--epochs", "1", "--heads-epochs", "1").code == 0
    loaded = load_intervention(tmp_path / "out")
    loaded.check_base(tiny_model().config, loaded.about["base"]["weights_sha256"])
    with pytest.raises(BadData, match="its weights differ"):
        loaded.check_base(tiny_model().config, "0" * 64)
    with pytest.raises(BadData, match="its layers or sizes differ"), loaded.attach(tiny_model(width=64)):
        pass
    header = (tmp_path / "out" / FILE).read_bytes()
    assert str(tmp_path).encode() not in header
    assert loaded.about["template"] == "chat"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [["--heads", "3", "--heads-epochs", "1", "--lr", "0.5"], ["--method", "lora", "--lr", "0.05"]]
)
def test_two_processes_train_what_one_does(train, tmp_path, method):
    """By SGD; both stages of LoFiT, whose idle parameters must not stop the engine."""
    words = [*method, "--optimizer", "sgd", "--epochs", "2", "--batch-size", "4"]
    one, two = train("one", *words), train("two", *words, "-j", "2")
    assert two.code == 0, two.err
    assert two.rows[0]["processes"] == 2
    steps = [[event["loss"] for event in run.rows if event["event"] == "step"] for run in (one, two)]
    assert steps[0] == pytest.approx(steps[1], abs=1e-6, rel=1e-6)
    name = FILE if "lora" not in method else "adapter_model.safetensors"
    a, b = (load_file(tmp_path / out / name) for out in ("one", "two"))
    assert max(float((a[key].float() - b[key].float()).abs().max()) for key in a) <= 1e-6
