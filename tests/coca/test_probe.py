"""coca-probe: the right states, disjoint parts, what readers must and must not find, files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_model
from toolbox.coca.erase import Moments, leace, projected_off
from toolbox.coca.intervention import hooked
from toolbox.coca.lofit import HeadGrid, Lofit
from toolbox.coca.loreft import Loreft, Positions
from toolbox.coca.probe import Options, class_names, wanted_layers
from toolbox.coca.reading import make_split, read_layer
from toolbox.coca.states import Asked, hidden_states, layer_name, next_token_kl, reasoned
from toolbox.shell.errors import UsageProblem

ASKED = [Asked((5, 9, 2, 40, 7), 5), Asked((1, 8, 3), 3), Asked(tuple(range(30, 37)), 7)]
SENTENCES = [
    {"id": f"s{i}", "prompt": f"{'Harm' if i % 2 else 'Help'} {'now ' * (i % 4)}{i}",
     "label": ["safe", "unsafe"][i % 2], "group": "ab"[i // 40]}
    for i in range(80)
]  # fmt: skip


# -- states -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("on", [None, "lofit", "loreft"])
def test_states_are_those_of_each_row_alone_at_its_last_token(on):
    """Against transformers' hidden states of unpadded rows; interventions are seen by what lies behind them."""
    model = tiny_model()
    module = {
        None: None,
        "lofit": Lofit(HeadGrid(2, 4, 8), count=1, places=[1]),
        "loreft": Loreft.drawn([0], 32, 2, Positions(1, 1), seed=1),
    }[on]
    if on == "lofit":
        module.v.data += 0.5
    bare = hidden_states(model, ASKED, [0, 1, 2], None)
    if on is None:
        for row, one in zip(ASKED, bare, strict=True):
            states = model(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
            wanted = torch.stack([layer[0, -1] for layer in states])
            torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(hidden_states(model, ASKED, [2], None)[:, 0], bare[:, 2], rtol=0, atol=0)
        return
    with hooked(module, model) as attached:
        together = hidden_states(model, ASKED, [0, 1, 2], attached)
        alone = torch.cat([hidden_states(model, [row], [0, 1, 2], attached) for row in ASKED])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together[:, 0], bare[:, 0], rtol=0, atol=0)
    assert float((together[:, 1:] - bare[:, 1:]).abs().amax(dim=(0, 2)).min()) > 1e-3
    longer = [Asked((*row.ids, 11, 12), len(row.ids)) for row in ASKED]
    with hooked(module, model) as attached:  # behind a reply the prompt is still the prompt
        states = hidden_states(model, longer, [1], attached)
        if on == "loreft":
            with attached.prompts([row.prompt for row in longer[:1]]):
                one = model.base_model(input_ids=torch.tensor([longer[0].ids]), output_hidden_states=True)
            assert one.last_hidden_state.shape[1] == 7
    assert states.shape == (3, 1, 32)


def test_layers_are_named_and_counted_as_transformers_has_them():
    assert [layer_name(layer, 3) for layer in range(4)] == ["embeddings", "layer 1", "layer 2", "final norm"]
    assert wanted_layers(Options(), 30) == list(range(31))
    assert wanted_layers(Options(layers="25"), 30) == [25]
    assert class_names(["harmful", "benign"]) == ["benign", "harmful"]
    with pytest.raises(UsageProblem):
        wanted_layers(Options(layers="x"), 30)


def test_the_kl_of_an_eraser_is_that_of_the_changed_logits():
    model = tiny_model()
    x = hidden_states(model, [Asked((5, i, 2), 3) for i in range(60)], [1, 2], None).double()
    z = torch.arange(60) % 2
    for place, layer in enumerate((1, 2)):
        eraser = leace(Moments(32, 2).update(x[:, place], z), shrinkage=True)
        found = next_token_kl(model, ASKED, layer, eraser, None)
        assert min(found) > 1e-6
        if layer == 2:  # behind the final norm the head is all there is
            states = hidden_states(model, ASKED, [2], None)[:, 0].double()
            head = model.lm_head.weight.double()
            p, q = (torch.log_softmax(one @ head.T, -1) for one in (states, eraser(states)))
            by_hand = (p.exp() * (p - q)).sum(-1)
            assert found == pytest.approx(by_hand.tolist(), rel=1e-4, abs=1e-7)
        nothing = projected_off([], x[:, place].mean(0))
        assert next_token_kl(model, ASKED, layer, nothing, None) == pytest.approx([0, 0, 0], abs=1e-7)


# -- splits and readers -----------------------------------------------------------------------------------------------
def test_parts_are_disjoint_whole_seeded_and_in_proportion():
    labels = np.arange(200) % 4 == 0
    split = make_split(labels.astype(np.int64), seed=3)
    parts = [split.eraser, split.probe, split.score]
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert [len(part) for part in parts] == [120, 40, 40]
    assert [int(labels[part].sum()) for part in parts] == [30, 10, 10]
    again, other = (make_split(labels.astype(np.int64), seed=seed) for seed in (3, 4))
    assert np.array_equal(again.probe, split.probe)
    assert not np.array_equal(other.probe, split.probe)
    shared = make_split(labels.astype(np.int64), seed=3, parts=2)
    assert (shared.kind, len(shared.score)) == ("in-sample", 40)
    assert np.array_equal(shared.eraser, shared.probe)
    groups = np.arange(200) < 100, np.arange(200) >= 100
    moved = make_split(labels.astype(np.int64), seed=3, groups=groups)
    assert moved.kind == "transfer"
    assert moved.eraser.max() < 100 <= min(moved.probe.min(), moved.score.min())
    assert not set(moved.probe) & set(moved.score)


def rings(n=600, d=6, seed=0):
    """The class shifts the rows along one axis and sets their distance from the middle in a plane: LEACE takes the
    first, and a non-linear reader still has the second."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    x = draw.normal(size=(n, d))
    x[:, 0] += 3 * labels
    angle = draw.uniform(0, 2 * np.pi, n)
    x[:, 1:3] = (1 + 2 * labels + 0.1 * draw.normal(size=n))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return torch.from_numpy(x).float(), labels


def test_linear_erasure_hides_the_class_from_linear_readers_only():
    x, labels = rings()
    splits = [make_split(labels, seed) for seed in range(2)]
    found = read_layer(x, labels, splits, ["none", "leace", "dim", "inlp"], classes=2, shrinkage=False)
    assert found["none"]["linear_acc"] > 0.9
    for name in ("leace", "dim", "inlp"):
        assert found[name]["linear_acc"] < 0.68, name
        assert found[name]["rbf_acc"] > 0.95, name
        assert found[name]["gap"] == pytest.approx(found[name]["rbf_acc"] - found[name]["linear_acc"], abs=1e-5)
        assert found[name]["rank"] >= 1
    assert found["none"]["distortion"] == 0 < found["leace"]["distortion"] < 1
    assert found["leace"]["linear_auc"] < 0.65 < 0.95 < found["leace"]["rbf_auc"]


def test_an_eraser_and_a_reader_on_the_same_rows_read_exactly_chance():
    x, labels = rings(seed=4)
    splits = [make_split(labels, seed, parts=2) for seed in range(2)]
    found = read_layer(x, labels, splits, ["leace"], classes=2, shrinkage=False)
    assert (found["leace"]["linear_acc"], found["leace"]["linear_acc_sd"]) == (0.5, 0.0)


def test_a_reader_carried_to_other_rows_is_judged_there():
    """Two groups whose classes lie along different axes: what is erased in one stays in the other."""
    draw = np.random.default_rng(0)
    labels, second = np.arange(400) % 2, np.arange(400) >= 200
    x = draw.normal(size=(400, 6))
    x[~second, 0] += 5 * labels[~second]
    x[second, 1] += 5 * labels[second]
    splits = [make_split(labels, seed, groups=(~second, second)) for seed in range(2)]
    found = read_layer(
        torch.from_numpy(x), labels, splits, ["none", "leace"], classes=2, shrinkage=True, on_fit=~second
    )
    assert found["leace"]["linear_acc"] > 0.95  # the group's own reader has its own axis
    assert found["none"]["carried_acc"] < 0.75
    assert found["none"]["linear_acc"] > 0.95


def test_more_than_two_classes_have_accuracies_and_no_curve():
    draw = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = torch.from_numpy(draw.normal(size=(300, 5)) + 4 * np.eye(5)[labels])
    found = read_layer(x, labels, [make_split(labels, 0)], ["none", "leace", "dim"], classes=3, shrinkage=True)
    assert found["none"]["linear_acc"] > 0.9
    assert found["leace"]["rank"] == found["dim"]["rank"] == 2
    assert found["leace"]["linear_acc"] < 0.6
    assert found["none"]["linear_auc"] is None


# -- the command ------------------------------------------------------------------------------------------------------
@pytest.fixture
def probe(tool, tiny, rows, tmp_path):
    data = rows("rows.jsonl", SENTENCES)

    def run(*more, data=data, model=tiny):
        return tool("coca-probe", "--model", model, "--split-seeds", "1", *more, data)

    return run


def test_states_are_saved_taken_again_and_known_by_what_they_are_of(probe, rows, tmp_path):
    states, out = tmp_path / "states.safetensors", tmp_path / "erasers.safetensors"
    first = probe(
        "--states", states, "--out", out, "--eraser", "leace", "--eraser", "dim", "--plot", tmp_path / "p.svg"
    )
    assert first.code == 0, first.err
    assert (tmp_path / "p.svg").read_bytes().startswith(b"<?xml")
    table = first.rows
    assert [(row["layer"], row["name"], row["eraser"]) for row in table] == [
        (layer, name, eraser)
        for layer, name in enumerate(("embeddings", "layer 1", "final norm"))
        for eraser in ("leace", "dim")
    ]
    assert {row["status"] for row in table[:2]} == {"constant"}
    assert {row["split"] for row in table[2:]} == {"disjoint"}
    assert table[2]["n"] == {"eraser": 48, "probe": 16, "score": 16}
    saved = load_file(states)
    assert saved["acts"].shape == (80, 3, 32)
    assert saved["labels"].tolist() == [0, 1] * 40
    erasers = load_file(out)
    assert set(erasers) == {
        f"{layer}.{name}.{part}" for layer in (1, 2) for name in ("leace", "dim")
        for part in ("proj_left", "proj_right", "mean")
    }  # fmt: skip
    x, z = saved["acts"][:, 1].double(), saved["labels"]
    erased = x - (x - erasers["1.leace.mean"]) @ erasers["1.leace.proj_right"].T @ erasers["1.leace.proj_left"].T
    assert float((erased[z == 0].mean(0) - erased[z == 1].mean(0)).abs().max()) <= 1e-9

    again = probe("--states", states, "--eraser", "leace", "--eraser", "dim")
    assert again.out == first.out
    layer = probe("--states", states, "--layers", "1", "--eraser", "leace", "--eraser", "dim")
    assert layer.rows == table[2:4]
    for more, says in (
        (["--position", "after:check"], "another position"),
        (["--dtype", "bf16"], "another model"),
        (["--system", "Be kind."], "another template"),
    ):
        other = probe("--states", states, *more)
        assert (other.code, other.out) == (65, b""), other.err
        assert says in other.err
    fewer = probe("--states", states, data=rows("fewer.jsonl", SENTENCES[:60]))
    assert "other rows" in fewer.err
    assert probe("--out", out).code == 73
    kept = out.read_bytes()
    refused = probe("--intervention", out)
    assert refused.code == 2
    assert "measuring instruments" in refused.err
    assert out.read_bytes() == kept


@pytest.mark.parametrize(
    ("data", "words", "code", "says"),
    [
        (SENTENCES[::2], [], 65, "one class alone"),
        (SENTENCES[:39], [], 65, "only 19 rows are harmful"),
        (SENTENCES, ["--layers", "0"], 65, "one and the same vector"),
        (SENTENCES, ["--layers", "1-3"], 65, "no such layers"),
        (SENTENCES, ["--fit-groups", "a", "--test-groups", "c"], 65, "--test-groups c: no rows are benign"),
        (SENTENCES, ["--fit-groups", "a"], 2, "belong together"),
        (SENTENCES, ["--fit-groups", "a", "--test-groups", "a"], 2, "fitted and tested on"),
        (SENTENCES, ["--position", "after:"], 2, "which tag"),
        (SENTENCES, ["--position", "first"], 2, "last, or after:TAG"),
        (SENTENCES, ["--out", "x.safetensors", "--eraser", "none"], 2, "none is fitted"),
        ([{"prompt": "x"}], [], 65, "missing required field `label`"),
        ([{"prompt": "x", "label": 0.5}], [], 65, "$.label"),
        ([{"prompt": "x", "label": " "}], [], 65, "an empty label"),
        (SENTENCES, ["--plot", "x.gif"], 2, ".svg"),
    ],
)
def test_what_cannot_be_probed_is_refused(probe, rows, data, words, code, says):
    done = probe(*words, data=rows("given.jsonl", data))
    assert (done.code, done.out) == (code, b""), done.err
    assert says in done.err
    assert "Traceback" not in done.err


def test_transfer_in_sample_and_kl_are_labelled(probe, rows):
    more = ["--layers", "1", "--fit-groups", "a", "--test-groups", "b", "--kl", rows("k.jsonl", SENTENCES[:2])]
    (none, erased) = probe(*more).rows
    assert none["split"] == erased["split"] == "transfer"
    assert none["kl"] == pytest.approx(0, abs=1e-6)
    assert erased["kl"] > 0
    assert erased["kl_n"] == 2
    assert 0 <= erased["carried_acc"] <= 1
    (row,) = probe("--layers", "1", "--splits", "2", "--eraser", "leace", "--shrinkage", "none").rows
    assert row["split"] == "in-sample"
    assert row["n"] == {"eraser": 64, "probe": 64, "score": 16}


@pytest.fixture(scope="module")
def tagger(tool, tiny, tmp_path_factory) -> Path:
    """A model that has learned to reason: whatever it is asked, it writes one check."""
    folder = tmp_path_factory.mktemp("tagger")
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "completion": "<check>a</check> ok"}) + "\n" for row in SENTENCES)
    )
    words = ["--model", tiny, "--lr", "1e-2", "--epochs", "8", "--batch-size", "16", "--stop-when", "loss<.005"]
    done = tool("lm-tune", *words, "--out", folder / "model", data)
    assert done.code == 0, done.err
    assert done.rows[-2]["loss"] < 0.1
    return folder / "model"


def test_states_behind_a_tag_are_those_of_what_the_model_writes(probe, tagger, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolbox.models.chat import Chat

    states = tmp_path / "s.safetensors"
    done = probe("--position", "after:check", "--max-new-tokens", "24", "--states", states, model=tagger)
    assert done.code == 0, done.err
    saved = load_file(states)
    assert len(saved["rows"]) > 70
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tagger), AutoTokenizer.from_pretrained(tagger)
    row = int(saved["rows"][5])
    chat = Chat(tokenizer)
    prompt = chat.prompt([{"role": "user", "content": SENTENCES[row]["prompt"]}])
    ids = prompt + tokenizer("<check>a</check>", add_special_tokens=False)["input_ids"]
    hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(saved["acts"][5, 1], hidden[1][0, -1], rtol=0, atol=1e-4)
    found = reasoned(model, tokenizer, chat.end_ids, [tuple(prompt)], "response", 24)
    assert found == [None]  # it ends its turn, or runs out, before such a tag
    never = probe("--position", "after:response", "--max-new-tokens", "12", model=tagger)
    assert never.code == 65
    assert "came to </response>" in never.err
