"""Logs: ours comes back as it was, other people's are read by their published schemas, damage is named by its place."""

from __future__ import annotations

import gzip
import json
import math

import msgspec
import pytest

from toolbox.shell.errors import BadData
from toolbox.shell.streams import Streams
from toolbox.unlearning.logs import Item, Log, Text, check_same_questions, keep_metrics, question_hash, write_log
from toolbox.unlearning.stored_logs import read_log
from toolbox.unlearning.summary import summarise


def item(number: int, **numbers) -> Item:
    return Item(index=str(number), question=question_hash(f"q{number}"), **numbers)


def whole_log() -> Log:
    """Every number there is, different for every item."""

    def numbers(k: int) -> dict:
        x = k / 7
        text = Text(prompt=f"Who is Zorblax {k}?", answer="A secret.", generation="Nobody.")
        return {
            "loss": x, "paraphrase_loss": 1 / (k + 3), "perturbed_losses": (x + 0.1, 2 * x + 0.3), "es": x / 4,
            "es_paraphrased": x / 5, "em": x / 3, "rouge_l": x / 2, "text": text,
        }  # fmt: skip

    sets = {name: tuple(item(k, **numbers(k + n)) for k in range(5)) for n, name in enumerate(("forget", "retain"))}
    sets |= {name: tuple(item(k, **numbers(k + 1)) for k in range(3)) for name in ("authors", "facts")}
    return Log(
        model="m", sets=sets, template="chat", system=None, max_new_tokens=9, run={"command": "lm-tune"},
        digests={"forget": "ab"},
    )  # fmt: skip


def read(path) -> Log:
    return read_log(str(path), Streams(0, 1))


def write_json(path, data):
    path.write_text(json.dumps(data))
    return path


# -- ours -------------------------------------------------------------------------------------------------------------
def test_a_log_comes_back_as_it_was_and_holds_no_text_unless_asked(tmp_path):
    log, path = whole_log(), tmp_path / "a.json"
    write_log(log, str(path))
    back = read(path)
    assert summarise(back) == summarise(log)
    assert "Zorblax" not in path.read_text()
    assert "secret" not in path.read_text()
    write_log(log, str(path), text=True)
    assert read(path) == log
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(path.with_suffix(".gz")) == log


def test_a_log_is_one_json_object_with_its_version_and_equal_runs_give_equal_bytes(tmp_path):
    for name in "ab":
        write_log(whole_log(), str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    data = json.loads((tmp_path / "a").read_text())
    assert (data["format"], data["version"]) == ("unlearn-eval", 1)
    assert set(data["sets"]["forget"][0]) == {
        "index", "question", "loss", "paraphrase_loss", "perturbed_losses", "es", "es_paraphrased", "em", "rouge_l"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d["sets"]["forget"][1].update(es="x"), r"\$\.sets\[\.\.\.\]\[1\]\.es"),
        (lambda d: d["sets"]["forget"][1].update(loss=math.nan), r"\$\.sets\.forget\[1\]\.loss: nan"),
        (lambda d: d["sets"]["facts"][0].update(perturbed_losses=[1, math.inf]), r"\$\.sets\.facts\[0\]\.perturbed"),
        (lambda d: d["sets"].update(test=[]), "no set is called test"),
        (lambda d: d.pop("model"), "model"),
        (lambda d: d.update(sets=3), r"\$\.sets"),
    ],
)
def test_a_damaged_log_of_ours_is_named_by_its_place(tmp_path, change, says):
    path = tmp_path / "a.json"
    write_log(whole_log(), str(path))
    data = json.loads(path.read_text())
    change(data)
    with pytest.raises(BadData, match=says) as caught:
        read(write_json(path, data))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"{oops", "a.json:1: not valid JSON"),
        (b"[1]", "expected an object, got list"),
        (b"{}", "not a log that is known"),
        (b'{"model_utility": 0.5}', "not a log that is known"),  # a summary
        (b"\xff\xfe{", "not"),
        (b"\x1f\x8b\x08\x00garbage", "damaged gzip"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"", "not valid JSON"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, raw, says):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(BadData, match=says):
        read(path)


# -- metrics ----------------------------------------------------------------------------------------------------------
def test_what_was_not_measured_is_null_and_never_0():
    empty = Log(model="m", sets={"forget": (item(1), item(2))})
    score = summarise(empty, empty)
    assert score.n == {"forget": 2, "retain": None, "authors": None, "facts": None}
    for means in (score.es, score.em, score.prob, score.rouge_l, score.truth_ratio.geometric):
        assert set(means.values()) == {None}
    assert (score.model_utility, score.model_utility_geometric, score.forget_quality, score.ks) == (None,) * 4
    assert json.loads(msgspec.json.encode(score))["forget_quality"] is None


@pytest.mark.parametrize("missing", ["loss", "rouge_l", "paraphrase_loss"])
def test_a_utility_of_eight_parts_is_null(missing):
    log = whole_log()
    assert summarise(log).model_utility > 0
    facts = tuple(msgspec.structs.replace(one, **{missing: None}) for one in log.sets["facts"])
    log = msgspec.structs.replace(log, sets={**log.sets, "facts": facts})
    assert summarise(log).model_utility is None


def test_means_are_over_the_items_that_have_the_number_and_say_how_many():
    items = (item(1, es=0.5, em=1.0), item(2, es=1.0))
    score = summarise(Log(model="m", sets={"forget": items}))
    assert (score.es["forget"], score.em["forget"]) == (0.75, 1.0)
    assert score.intervals["es"]["forget"]["n"] == 2
    assert score.intervals["em"]["forget"] == {"low": None, "high": None, "n": 1}  # one row has no interval


def test_metrics_keep_what_they_are_made_of_and_nothing_else():
    log = whole_log()
    full = summarise(log)
    score = summarise(keep_metrics(log, ("es",)))
    assert score.es == full.es
    assert set(score.prob.values()) == set(score.em.values()) == {None}
    ratios = summarise(keep_metrics(log, ("truth_ratio",)), keep_metrics(log, ("truth_ratio",)))
    assert ratios.truth_ratio == full.truth_ratio
    assert ratios.forget_quality == 1.0
    chosen = summarise(keep_metrics(log, ("prob",)))
    assert chosen.prob == full.prob  # that of authors and facts needs the wrong answers
    assert summarise(keep_metrics(log, ("prob", "rouge_l", "truth_ratio"))).model_utility == full.model_utility


def test_intervals_depend_on_the_seed_alone():
    log = whole_log()
    one, again, other = (summarise(log, seed=seed).intervals for seed in (1, 1, 2))
    assert one == again != other
    assert one["es"]["forget"]["low"] <= summarise(log).es["forget"] <= one["es"]["forget"]["high"]


# -- the same questions -----------------------------------------------------------------------------------------------
def forget_log(items) -> Log:
    return Log(model="m", sets={"forget": tuple(items)})


def test_the_same_questions_in_another_order_are_the_same():
    check_same_questions(forget_log([item(1), item(2)]), forget_log([item(2), item(1)]))


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ([item(1)], "2 against 1"),
        ([item(1), item(3)], "1 of 2 differ"),
        ([item(1), item(1)], "1 of 2 differ"),  # a repeated question counts twice
    ],
)
def test_other_questions_are_refused(theirs, says):
    with pytest.raises(BadData, match=says) as caught:
        check_same_questions(forget_log([item(1), item(2)]), forget_log(theirs))
    assert "--allow-different-items" in caught.value.advice


def test_without_hashes_indices_are_compared_and_against_ours_only_the_number():
    bare = [Item(index=str(k)) for k in range(2)]
    check_same_questions(forget_log(bare), forget_log(bare))
    check_same_questions(forget_log(bare), forget_log([item(5), item(6)]))
    with pytest.raises(BadData, match="1 of 2 differ"):
        check_same_questions(forget_log(bare), forget_log([bare[0], Item(index="7")]))
    with pytest.raises(BadData, match="2 against 1"):
        check_same_questions(forget_log(bare), forget_log([item(5)]))


# -- open-unlearning --------------------------------------------------------------------------------------------------
def by_index(**values) -> dict:
    return {"agg_value": 0.0, "value_by_index": {str(k): {name: v[k] for name, v in values.items()} for k in (1, 0)}}


def open_unlearning() -> dict:
    """A file in open-unlearning's published schema, two items a set; numbers are losses that are easy to check."""
    data = {
        "forget_Q_A_Prob": by_index(prob=[0.5, 0.25], avg_loss=[math.log(2), math.log(4)]),
        "forget_Q_A_PARA_Prob": by_index(prob=[0, 0], avg_loss=[1.0, 2.0]),
        "forget_Q_A_PERT_Prob": by_index(prob=[[0] * 2] * 2, avg_loss=[[1.0, 3.0], [2.0, 2.0]]),
        "forget_Q_A_ROUGE": by_index(
            rouge1_recall=[0.9, 0.9], rougeL_recall=[0.25, 0.75], input=["q", "q"], generation=["g", "g"]
        ),
        "forget_truth_ratio": by_index(score=[9.0, 9.0]),
        "extraction_strength": by_index(score=[0.5, 0.25]),
        "exact_memorization": by_index(score=[1.0, 0.5]),
        "model_utility": {"agg_value": 0.5},
        "privleak": {"agg_value": -20.0},
        "forget_Q_A_gibberish": by_index(score=[0.1, 0.2]),
    }
    for prefix in ("retain", "ra", "wf"):
        data[f"{prefix}_Q_A_Prob"] = by_index(prob=[0, 0], avg_loss=[math.log(2), math.log(2)])
        data[f"{prefix}_Q_A_PERT_Prob"] = by_index(prob=[[0] * 2] * 2, avg_loss=[[math.log(4)] * 2, [math.log(4)] * 2])
        data[f"{prefix}_Q_A_ROUGE"] = by_index(rougeL_recall=[0.5, 0.5])
    data["retain_Q_A_PARA_Prob"] = by_index(prob=[0, 0], avg_loss=[math.log(2)] * 2)
    return data


def test_an_open_unlearning_log_is_read_by_its_schema(tmp_path):
    score = summarise(read(write_json(tmp_path / "TOFU_EVAL.json", open_unlearning())))
    assert score.n == dict.fromkeys(("forget", "retain", "authors", "facts"), 2)
    assert score.prob["forget"] == pytest.approx((0.5 + 0.25) / 2)
    assert score.prob["retain"] == pytest.approx(0.5)
    assert score.prob["authors"] == score.prob["facts"] == pytest.approx(0.5 / (0.5 + 0.25 + 0.25))
    assert score.rouge_l["forget"] == 0.5
    assert score.es == {
        "forget": 0.375, "forget_paraphrased": None, "retain": None, "retain_paraphrased": None, "authors": None,
        "facts": None,
    }  # fmt: skip
    assert score.em["forget"] == 0.75
    # from the losses, not from the stored score: R = exp(1 - 2) and exp(2 - 2)
    assert score.truth_ratio.geometric["forget"] == pytest.approx((math.exp(-1) + 1) / 2)
    assert score.truth_ratio.authors == pytest.approx(1 - 0.25 / 0.5)  # the answer stands for the paraphrase
    assert score.model_utility == pytest.approx(0.5)


def test_stored_truth_ratios_serve_where_the_losses_are_gone(tmp_path):
    data = {"forget_truth_ratio": by_index(score=[0.5, 2.0])}
    log = read(write_json(tmp_path / "a.json", data))
    score = summarise(log, log)
    assert score.truth_ratio.geometric["forget"] == pytest.approx(0.5)
    assert score.truth_ratio.forget is None  # the arithmetic one cannot be had
    assert score.forget_quality == 1.0


@pytest.mark.parametrize(
    ("metric", "index", "value", "says"),
    [
        ("forget_Q_A_Prob", "0", {"avg_loss": math.nan}, r"\$\.forget_Q_A_Prob\.value_by_index\.0\.avg_loss: nan"),
        ("forget_Q_A_Prob", "0", {"avg_loss": "x"}, "expected a number, got str"),
        ("forget_Q_A_Prob", "0", {"avg_loss": True}, "expected a number, got bool"),
        ("forget_Q_A_Prob", "0", {"avg_loss": [1.0]}, "expected a number, got a list"),
        ("forget_Q_A_PERT_Prob", "0", {"avg_loss": []}, "an empty list"),
        ("forget_Q_A_Prob", "0", 3, "expected an object, got int"),
    ],
)
def test_a_damaged_open_unlearning_log_is_named_by_its_place(tmp_path, metric, index, value, says):
    data = open_unlearning()
    data[metric]["value_by_index"][index] = value
    with pytest.raises(BadData, match=says):
        read(write_json(tmp_path / "a.json", data))


def test_items_without_a_value_are_left_out_of_the_mean(tmp_path):
    data = open_unlearning()
    data["forget_Q_A_Prob"]["value_by_index"]["0"] = {"prob": None, "avg_loss": None}
    data["forget_Q_A_PERT_Prob"]["value_by_index"]["1"] = {"avg_loss": [None, 2.0]}
    score = summarise(read(write_json(tmp_path / "a.json", data)))
    assert score.prob["forget"] == pytest.approx(0.25)
    assert score.intervals["prob"]["forget"]["n"] == score.intervals["truth_ratio"]["forget"]["n"] == 1


# -- TOFU -------------------------------------------------------------------------------------------------------------
def tofu_log(prompts=("[INST] Who? [/INST]", "Question: What?\n", "Who knows")) -> dict:
    losses = {str(k): 1.0 + k for k in range(3)}
    texts = {str(k): [prompt, "Somebody.", "Nobody."] for k, prompt in enumerate(prompts)}
    return {"eval_log_forget.json": {"avg_gt_loss": losses, "generated_text": texts}}


def test_questions_are_taken_out_of_tofus_prompts(tmp_path):
    items = read(write_json(tmp_path / "a.json", tofu_log())).sets["forget"]
    assert [one.question for one in items] == [question_hash("Who?"), question_hash("What?"), None]
    assert [one.loss for one in items] == [1.0, 2.0, 3.0]
    assert items[0].text == Text(prompt="[INST] Who? [/INST]", generation="Somebody.", answer="Nobody.")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda part: part["avg_gt_loss"].update({"1": None}) or part.update(avg_gt_loss=3), "expected an object"),
        (lambda part: part["generated_text"].update({"1": ["a"]}), "expected three strings"),
        (lambda part: part["avg_gt_loss"].update({"1": math.inf}), r"forget\.json\.avg_gt_loss\.1: inf"),
    ],
)
def test_a_damaged_tofu_log_is_named_by_its_place(tmp_path, change, says):
    data = tofu_log()
    change(data["eval_log_forget.json"])
    with pytest.raises(BadData, match=says):
        read(write_json(tmp_path / "a.json", data))


def test_a_stored_log_can_be_written_as_ours(tmp_path):
    log = read(write_json(tmp_path / "a.json", open_unlearning()))
    write_log(log, str(tmp_path / "b.json"))
    assert summarise(read(tmp_path / "b.json")) == summarise(log)
    log = read(write_json(tmp_path / "c.json", tofu_log(("Who\ud800?", "What?", "Why?"))))
    write_log(log, str(tmp_path / "d.json"), text=True)
    assert read(tmp_path / "d.json").sets == log.sets
