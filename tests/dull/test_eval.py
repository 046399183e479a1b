"""Shot groups, accuracy and detection against loops and peers; dull-eval end to end; the breaker's restoration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.test_dull import made
from toolbox.classify.backbones import backbone_config, new_backbone
from toolbox.classify.shots import shot_groups
from toolbox.dull.epoch import EpochEnd, act, doubts
from toolbox.dull.metrics import detection, judged, transition_error, warning
from toolbox.dull.options import Options
from toolbox.training.processes import start_processes


def test_shot_groups():
    groups, how = shot_groups([5, 90, 40, 30, 20, 10, 8, 7, 6, 5])
    assert groups == {"many": [1, 2, 3], "medium": [4, 5, 6, 7], "few": [0, 8, 9]}
    assert "thirds" in how
    assert shot_groups([101, 100, 20, 19], (100, 20))[0] == {"many": [0], "medium": [1, 2], "few": [3]}
    assert "above 100" in shot_groups([1] * 100)[1]
    assert shot_groups([3, 1])[0] == {"many": [], "medium": [0, 1], "few": []}


def test_accuracy_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score, recall_score

    draw = np.random.default_rng(0)
    truth, predicted = draw.integers(0, 4, 200), draw.integers(0, 4, 200)
    found = judged(predicted, truth, {"many": [0, 1], "few": [2, 3], "medium": []}, 5)
    assert found["acc"] == pytest.approx(np.mean(truth == predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert found["recall"][:4] == pytest.approx(recall_score(truth, predicted, average=None))
    assert found["recall"][4] is None
    assert found["many"] == pytest.approx(np.mean((truth == predicted)[truth < 2]))
    assert found["medium"] is None
    assert found["acc_ci"][0] < found["acc"] < found["acc_ci"][1]


def test_detection_against_loops():
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(1)
    given, clean, suggested = (draw.integers(0, 3, 120) for _ in range(3))
    given[:60] = clean[:60]
    doubt, flagged = draw.random(120) + (given != clean), draw.random(120) < 0.3
    found = detection(doubt, flagged, suggested, given, clean, {"many": [0], "few": [1, 2]})
    wrong = given != clean
    assert found["auc"] == pytest.approx(roc_auc_score(wrong, doubt))
    for n in range(3):
        mine = given == n
        assert found["auc_by_class"][n] == pytest.approx(roc_auc_score(wrong[mine], doubt[mine]))
    hits = sum(1 for f, w in zip(flagged, wrong, strict=True) if f and w)
    assert found["flag_precision"] == pytest.approx(hits / flagged.sum())
    assert found["flag_recall"] == pytest.approx(hits / wrong.sum())
    assert found["noise_before"] == pytest.approx(wrong.mean())
    after = [(s if f else g) != c for s, f, g, c in zip(suggested, flagged, given, clean, strict=True)]
    assert found["noise_after"] == pytest.approx(np.mean(after))
    few = given > 0
    assert found["by_shot"]["few"]["base_rate"] == pytest.approx(wrong[few].mean())
    assert found["by_shot"]["few"]["flag_recall"] == pytest.approx((flagged & wrong)[few].sum() / wrong[few].sum())
    none = detection(doubt, np.zeros(120, bool), suggested, clean, clean, {"many": [0]})
    assert none["auc"] is none["flag_precision"] is none["correction_accuracy"] is None


def test_a_list_that_is_no_better_than_a_draw_is_warned_of():
    base = {"noise_before": 0.3, "flagged_share": 0.1}
    assert "hardly better" in warning({**base, "flag_precision": 0.35})
    assert warning({**base, "flag_precision": 0.37}) is None
    assert warning({**base, "flagged_share": 0.02, "flag_precision": 0.0}) is None
    assert warning({**base, "flag_precision": None}) is None


def test_the_transitions_distance():
    given, clean = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert transition_error(np.array([[1, 0], [1 / 3, 2 / 3]]), given, clean) == pytest.approx(0)
    assert transition_error(np.eye(2), given, clean) == pytest.approx((0 + 2 / 3) / 2)


def known(n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posteriors of a model that knows the truth well, given labels with tail-to-head noise, and the truth."""
    draw = np.random.default_rng(2)
    clean = np.repeat([0, 1], [n, n // 2])
    given = np.where((clean == 1) & (draw.random(len(clean)) < 0.4), 0, clean)
    sure = draw.uniform(0.7, 0.95, len(clean))
    return np.where(np.eye(2, dtype=bool)[clean], sure[:, None], 1 - sure[:, None]), given, clean


def test_flags_find_what_a_good_model_knows_and_run_one_way():
    q, given, clean = known()
    counts = np.bincount(given)
    found = doubts(q, given, counts / counts.sum(), counts, "t2h")
    assert (given != clean)[found.flagged].mean() > 0.95
    assert found.flagged.sum() > 0.4 * (given != clean).sum()
    assert not found.flagged[given == 1].any(), "nothing is larger than the head, so nothing is doubted for it"
    assert (found.right[found.flagged] == 1).all()
    backwards = doubts(q[:, ::-1], 1 - given, counts[::-1] / counts.sum(), counts, "t2h")
    assert not backwards.flagged.any()
    assert doubts(q[:, ::-1], 1 - given, counts[::-1] / counts.sum(), counts, "all").flagged.any()


def test_no_more_is_acted_upon_than_the_cap_and_the_most_doubtful_first():
    q, given, _ = known()
    counts = np.bincount(given)
    found = doubts(q, given, counts / counts.sum(), counts, "t2h")
    rows, targets, right = act(found, q, given, [True, True], np.array([0.05, 0.5]), Options())
    assert len(rows) == min(int(0.05 * counts[0]), int(found.flagged.sum()))
    assert found.flagged[rows].all()
    left = found.flagged.copy()
    left[rows] = False
    assert found.clean[rows].max() <= found.clean[left].min() + 1e-12
    assert targets.sum(1) == pytest.approx(1)
    assert (targets[:, 1] > 0.5).all()
    assert (right == 1).all()
    assert not len(act(found, q, given, [False, True], np.array([0.5, 0.5]), Options())[0])
    plain = act(found, q, given, [True, True], np.array([0.05, 0.5]), Options(aml=False))[1]
    assert (plain == np.eye(2)[given[rows]]).all()


def test_the_breaker_brings_back_network_average_and_gates():
    objective = made("dull")
    weights = [p for name, p in objective.model.named_parameters() if name != "gates"]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    objective._accelerator = start_processes()
    end = EpochEnd(objective._accelerator, objective, Options(), [optimizer])
    end._keep()
    average = {name: value.clone() for name, value in objective.average.state_dict().items()}
    gates = objective.model.gates.detach().clone()
    state = end._state()
    for parameter in weights:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        objective.model.gates.fill_(0.3)
        for value in objective.average.state_dict().values():
            value.zero_()
    again = EpochEnd(objective._accelerator, objective, Options(), [optimizer])
    again.load({f"safety/{name}": value for name, value in state.items()})
    again._restore()
    for name, value in average.items():
        assert torch.equal(objective.average.state_dict()[name], value)
        assert torch.equal(objective.model.backbone.state_dict()[name], value)
    assert torch.equal(objective.model.gates, gates)
    assert not any(value.any() for one in optimizer.state.values() for value in one.values())


def test_acted_are_the_rows_of_the_epoch_that_ended_and_not_of_the_next():
    objective = made("dull")
    weights = [p for name, p in objective.model.named_parameters() if name != "gates"]
    objective._accelerator = start_processes()
    end = EpochEnd(objective._accelerator, objective, Options(gate="open"), [torch.optim.SGD(weights, lr=0.1)])
    objective.labels.acting, objective.labels.targets = np.array([1, 4]), np.eye(4)[[2, 3]]
    end(1)
    assert end.acted.tolist() == [1, 4]
    kept = end._state()
    again = EpochEnd(objective._accelerator, objective, Options(gate="open"), [torch.optim.SGD(weights, lr=0.1)])
    again.load({f"safety/{name}": value for name, value in kept.items()})
    assert again.acted.tolist() == [1, 4]
    objective.labels.acting = np.zeros(0, np.int64)
    again(2)
    assert not len(again.acted)


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    config = backbone_config("cifar-resnet8", [str(n) for n in range(10)], widths=[2, 3, 4])
    config.dull = {"method": "la", "counts": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}
    folder = tmp_path_factory.mktemp("judge") / "run"
    new_backbone(config, 0).save_pretrained(folder)
    return folder


def test_dull_eval_end_to_end(tool, judge, tmp_path):
    rows = [
        {"id": f"d{n}", "image": f"digits:{n}", "label": n % 10, "dull": {"label_clean": n % 10}} for n in range(30)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    done = tool("dull-eval", "--model", judge, "--image-size", "8", "--plot", tmp_path / "c.png", stdin=text)
    assert done.code == 0, done.err
    assert [row["id"] for row in done.rows[:-1]] == [row["id"] for row in rows]
    assert all(row["dull"]["label_clean"] == int(row["id"][1:]) % 10 for row in done.rows[:-1])
    right = sum(row["dull"]["pred"] == str(row["label"]) for row in done.rows[:-1])
    assert done.rows[-1]["acc"] == pytest.approx(right / 30)
    assert done.rows[-1]["shots"] == {"many": ["0", "1", "2"], "medium": ["3", "4", "5", "6"], "few": ["7", "8", "9"]}
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    samples = [
        {"id": f"d{n}", "label": str((n + (n < 10)) % 10),
         "dull": {"suggested": str(n % 10), "labels": [], "p_clean": 0.5, "q_given": 0.1 if n < 10 else 0.9,
                  "q_top": 0.9, "flagged": n < 12}}
        for n in range(30)
    ]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    words = ["--model", judge, "--image-size", "8", "--samples", tmp_path / "s.jsonl", "--summary-only"]
    summed = tool("dull-eval", *words, stdin=text)
    assert len(summed.rows) == 1
    found = summed.rows[0]["detection"]
    assert found["auc"] == 1
    assert found["flag_precision"] == pytest.approx(10 / 12)
    assert found["flag_recall"] == found["correction_accuracy"] == 1
    other = text.replace(b'"id": "d', b'"id": "e')
    assert "has no id of the rows at hand" in tool("dull-eval", *words, stdin=other).err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model", "cifar-resnet8"], 2, "a trained model is expected"),
        (["--model", "none/none/none"], 66, "no such file"),
        (["--plot", "x.gif"], 2, "cannot write a figure"),
        (["--shots", "a"], 2, "two numbers of images"),
        (["--samples", "none.jsonl"], 66, "No such file"),
    ],
)
def test_what_cannot_be_judged(tool, judge, words, code, says):
    done = tool("dull-eval", "digits", *([] if "--model" in words else ["--model", judge]), *words)
    assert (done.code, done.out) == (code, b""), done.err
    assert says in done.err


def test_a_label_that_the_model_has_not_is_named(tool, judge):
    text = b'{"image": "digits:1", "label": "1"}\n{"image": "digits:2", "label": "ten"}\n'
    done = tool("dull-eval", "--model", judge, "--image-size", "8", stdin=text)
    assert done.code == 65
    assert "stdin:2: $.label: 'ten' is no class" in done.err
