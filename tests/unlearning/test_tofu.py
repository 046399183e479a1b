"""TOFU's metrics: golden figures of the logs that its authors committed, and what must hold of any numbers."""

from __future__ import annotations

import functools
import math

import pytest

from toolbox.shell.streams import Streams
from toolbox.unlearning import tofu as metrics
from toolbox.unlearning.rouge import rouge_l_recall
from toolbox.unlearning.stored_logs import read_log
from toolbox.unlearning.summary import log_ratios, summarise

MODELS = ("llama2-7b", "phi")
TRAINED_ON = ("full", "retain90", "retain95", "retain99")
UTILITY = {
    # model: {trained on: (arithmetic, geometric)}, recomputed once from the committed logs by TOFU's own formulas
    "llama2-7b": {
        "full": (0.585886, 0.622677),
        "retain90": (0.575240, 0.613745),
        "retain95": (0.561296, 0.600577),
        "retain99": (0.581165, 0.620744),
    },
    "phi": {
        "full": (0.503353, 0.522074),
        "retain90": (0.513001, 0.531991),
        "retain95": (0.506979, 0.524959),
        "retain99": (0.498613, 0.518603),
    },
}
QUALITY = {"llama2-7b": (1.834066e-21, 0.396667, 6.03e-23), "phi": (2.194274e-16, 0.346667, 2.43e-17)}
"""Forget quality of full against retain90: p, D, and p with arithmetic ratios."""


@pytest.fixture(scope="module")
def stored(tofu):
    """A stored log by model and by what it was trained on."""
    folder = tofu.parent / "tofu_eval_logs"
    if not folder.is_dir():
        pytest.skip(f"TOFU's evaluation logs are not here ({folder})")

    @functools.cache
    def read(model: str, trained_on: str):
        return read_log(str(folder / f"{model}_{trained_on}_wd0.01.json.gz"), Streams(0, 1))

    return read


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("trained_on", TRAINED_ON)
def test_model_utility_of_the_committed_logs(stored, model, trained_on):
    log = stored(model, trained_on)
    arithmetic, geometric = summarise(log), summarise(log, variant="geometric")
    assert f"{arithmetic.model_utility:.6f}" == f"{UTILITY[model][trained_on][0]:.6f}"
    assert f"{arithmetic.model_utility_geometric:.6f}" == f"{UTILITY[model][trained_on][1]:.6f}"
    assert geometric.model_utility == geometric.model_utility_geometric == arithmetic.model_utility_geometric
    low, high = (arithmetic.intervals["model_utility"][bound] for bound in ("low", "high"))
    assert low < arithmetic.model_utility < high < low + 0.1


@pytest.mark.parametrize("model", MODELS)
def test_forget_quality_of_the_committed_logs(stored, model):
    full, retain = stored(model, "full"), stored(model, "retain90")
    p, d, arithmetic_p = QUALITY[model]
    score = summarise(full, retain)
    assert score.forget_quality == pytest.approx(p, rel=5e-7)
    assert score.ks.d == pytest.approx(d, abs=5e-7)
    assert (score.ks.n, score.ks.n_reference, score.ks.variant, score.ks.method) == (300, 300, "geometric", "exact")
    ratios = [log_ratios(one.sets["forget"], "arithmetic") for one in (full, retain)]
    assert metrics.forget_quality(*ratios).p == pytest.approx(arithmetic_p, rel=5e-3)


def test_the_parts_of_llama_2_trained_on_everything(stored):
    score = summarise(stored("llama2-7b", "full"))
    expected = {  # probability, ROUGE-L recall, truth ratio
        "retain": (0.9895, 0.9857, 0.4539),
        "authors": (0.4555, 0.9330, 0.5052),
        "facts": (0.4186, 0.8825, 0.4231),
        "forget": (0.9909, 0.9854, 0.5304),
    }
    for name, parts in expected.items():
        found = (score.prob[name], score.rouge_l[name], getattr(score.truth_ratio, name))
        assert [round(part, 4) for part in found] == list(parts)
    assert round(score.truth_ratio.geometric["forget"], 4) == 0.5160
    assert score.n == {"forget": 300, "retain": 300, "authors": 100, "facts": 117}


def test_rouge_l_recall_of_all_stored_generations_is_the_stored_one(stored):
    log = stored("llama2-7b", "retain90")
    items = [item for items in log.sets.values() for item in items]
    assert len(items) == 817
    assert all(rouge_l_recall(item.text.answer, item.text.generation) == item.rouge_l for item in items)


def test_the_questions_of_stored_logs_are_those_of_the_data(stored, tofu):
    """TOFU's two prompt forms are undone, so that its logs can be compared with ours."""
    from types import SimpleNamespace

    from toolbox.unlearning.suites import read_questions, suite_files

    call = SimpleNamespace(streams=Streams(0, 1))
    sets, _ = read_questions(call, suite_files(f"tofu:{tofu}"), limit=300)
    for model in MODELS:
        log = stored(model, "full")
        for name, questions in sets.items():
            assert [item.question for item in log.sets[name]] == [question.hash for question in questions]


# -- what holds of any numbers ----------------------------------------------------------------------------------------
def test_both_truth_ratios_agree_on_one_wrong_answer_and_order_as_their_means():
    for variant in metrics.VARIANTS:
        assert metrics.log_truth_ratio(1.0, [3.0], variant) == pytest.approx(-2.0)
    losses = [0.5, 2.0, 4.0]
    arithmetic, geometric = (metrics.log_truth_ratio(1.0, losses, variant) for variant in ("arithmetic", "geometric"))
    assert math.exp(arithmetic) == pytest.approx(sum(math.exp(-loss) for loss in losses) / 3 / math.exp(-1.0))
    assert math.exp(geometric) == pytest.approx(math.exp(-sum(losses) / 3) / math.exp(-1.0))
    assert arithmetic > geometric  # the inequality of the means
    with pytest.raises(ValueError, match="no truth ratio"):
        metrics.log_truth_ratio(1.0, losses, "harmonic")


@pytest.mark.parametrize("loss", [0.0, 1.0, 800.0, 1e5])
def test_a_model_beyond_the_range_of_a_float_still_has_finite_metrics(loss):
    """exp(-1e5) is 0 and exp(1e5) overflows; none of it may become NaN, inf or an error."""
    for wrong in (0.0, 1.0, 800.0, 1e5):
        assert 0 <= metrics.chosen_probability(loss, [wrong, wrong]) <= 1
        for variant in metrics.VARIANTS:
            ratio = metrics.log_truth_ratio(loss, [wrong, wrong], variant)
            assert 0 <= metrics.balance(ratio) <= 1
            assert 0 <= metrics.preference(ratio) <= 1
    assert metrics.chosen_probability(loss, [loss, loss, loss]) == pytest.approx(1 / 4)


def test_sums_of_the_truth_ratio():
    half = math.log(0.5)
    assert metrics.balance(half) == metrics.balance(-half) == pytest.approx(0.5)
    assert metrics.preference(half) == pytest.approx(0.5)
    assert metrics.preference(-half) == metrics.preference(0.0) == 0.0
    assert metrics.balance(0.0) == 1.0


def test_model_utility_is_the_harmonic_mean_and_0_with_a_part_of_0():
    assert metrics.model_utility([0.5] * 9) == pytest.approx(0.5)
    assert metrics.model_utility([0.25, 1.0]) == pytest.approx(0.4)
    assert metrics.model_utility([0.9] * 8 + [0.0]) == 0.0


def test_forget_quality_sees_the_order_alone():
    ours, theirs = [0.1, 0.4, -2.0, 3.0, 0.2], [0.3, 0.5, 1.0, 2.0, -1.0]
    test = metrics.forget_quality(ours, theirs)
    powers = metrics.forget_quality([math.exp(x) for x in ours], [math.exp(x) for x in theirs])
    assert (test.d, test.p) == (powers.d, powers.p)
    assert metrics.forget_quality(ours, ours).p == 1.0


def test_rouge_l_recall_counts_the_words_of_the_answer_in_order():
    assert rouge_l_recall("the cat sat down", "yes: the cat finally sat") == 3 / 4
    assert rouge_l_recall("runs", "running") == 1.0  # stems
    assert rouge_l_recall("a b", "b a") == 1 / 2
    assert rouge_l_recall("cat", "") == 0.0
