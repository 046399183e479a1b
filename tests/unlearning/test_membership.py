"""Membership scores equal their formulas from full logits in float64; AUC is 1 where members look like members."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models.chat import Chat, Encoded
from toolbox.models.score import TokenScores, score_rows
from toolbox.models.token_loss import TokenLoss
from toolbox.stats import auc
from toolbox.training.processes import start_processes
from toolbox.unlearning.attacks import relearn
from toolbox.unlearning.membership import (
    Moments,
    auc_interval,
    labelled_text,
    loss_score,
    membership,
    membership_scores,
    min_k,
    min_k_plus_plus,
    privleak,
    vocabulary_moments,
    zlib_score,
)


def encoded(count, seed=0):
    """Rows of unequal length of which the later tokens, or all but some, are labelled."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 4 + 5 * (number % 4)
        ids = tuple(torch.randint(0, 250, (length,), generator=generator).tolist())
        labelled = (False, *(bool(x) for x in torch.rand(length - 1, generator=generator) < 0.7))
        labelled = (*labelled[:-1], True)
        found.append(Encoded(ids, labelled, (False,) * (length - 1) + (True,)))
    return found


def slow_row(model, row):
    """(log p of the labelled tokens, μ, σ) by a loop over positions and vocabulary, in float64."""
    logits = model.double()(torch.tensor([row.ids])).logits[0].tolist()
    log_p, means, deviations = [], [], []
    for position in range(1, len(row.ids)):
        if not row.labelled[position]:
            continue
        z = logits[position - 1]
        norm = max(z) + math.log(math.fsum(math.exp(one - max(z)) for one in z))
        logs = [one - norm for one in z]
        mean = math.fsum(math.exp(one) * one for one in logs)
        log_p.append(logs[row.ids[position]])
        means.append(mean)
        deviations.append(math.sqrt(math.fsum(math.exp(one) * (one - mean) ** 2 for one in logs)))
    return log_p, means, deviations


def slow_lowest(values, share):
    count = max(1, sum(1 for place in range(1, len(values) + 1) if place <= share * len(values) + 1e-9))
    return sum(sorted(values)[:count]) / count


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_all_scores_equal_slow_loops_over_full_logits(chunk):
    model = tiny_model(2)
    rows = encoded(7)
    head = TokenLoss(model, chunk)
    scores = score_rows(head, rows, pad_id=258)
    moments = vocabulary_moments(head, rows, pad_id=258, max_tokens=40)
    for number, (row, score, moment) in enumerate(zip(rows, scores, moments, strict=True)):
        log_p, means, deviations = slow_row(tiny_model(2), row)
        np.testing.assert_allclose(-score.nll, log_p, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moment.mean, means, rtol=1e-5)
        np.testing.assert_allclose(moment.std, deviations, rtol=1e-5)
        text = f"an answer, number {number}, an answer"
        found = membership_scores(score, text, moment)
        standard = [(one - mean) / std for one, mean, std in zip(log_p, means, deviations, strict=True)]
        assert found == {
            "loss": pytest.approx(sum(log_p) / len(log_p), rel=1e-5),
            "zlib": pytest.approx(sum(log_p) / len(log_p) / len(zlib.compress(text.encode())), rel=1e-5),
            "min_k": pytest.approx(slow_lowest(log_p, 0.2), rel=1e-5),
            "min_k_plus_plus": pytest.approx(slow_lowest(standard, 0.2), rel=1e-4),
        }
        assert membership_scores(score, text).keys() == {"loss", "zlib", "min_k"}


def test_moments_leave_the_model_as_it_was_and_tell_of_their_batches():
    model, done = tiny_model(2), []
    rows = encoded(6)
    vocabulary_moments(TokenLoss(model), rows, max_tokens=40, on_batch=done.append)
    assert sum(done) == 6
    assert len(done) > 1
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_moments_are_without_dropout_and_a_model_in_training_goes_on_training():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=32, n_embd=16, n_layer=1, n_head=2, embd_pdrop=0.5))
    head, rows = TokenLoss(model), encoded(3)
    model.train()
    one, other = vocabulary_moments(head, rows), vocabulary_moments(head, rows)
    assert all(np.array_equal(a.mean, b.mean) for a, b in zip(one, other, strict=True))
    assert model.training


def test_a_token_that_is_ruled_out_adds_nothing():
    """A logit of −∞, as some models have it for padding of the vocabulary."""
    model, rows = tiny_model(2, tied=False), encoded(3)
    small = tiny_model(2, tied=False)
    model.lm_head = torch.nn.Linear(32, 259)
    with torch.no_grad():
        model.lm_head.weight.copy_(small.lm_head.weight)
        model.lm_head.bias.zero_()[250:] = -torch.inf
        small.lm_head.weight = torch.nn.Parameter(small.lm_head.weight[:250].clone())
    found, expected = (vocabulary_moments(TokenLoss(one), rows) for one in (model, small))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-5)
        np.testing.assert_allclose(one.std, other.std, rtol=1e-5)


def test_moments_of_a_model_with_adapters_are_those_of_the_whole():
    from toolbox.models.adapters import add_lora
    from toolbox.unlearning.calibrate import merged

    adapted, rows = add_lora(tiny_model(2), r=2, seed=1), encoded(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    found = vocabulary_moments(TokenLoss(adapted), rows)
    whole = vocabulary_moments(TokenLoss(merged(adapted)), rows)
    bare = vocabulary_moments(TokenLoss(tiny_model(2)), rows)
    for one, same, other in zip(found, whole, bare, strict=True):
        np.testing.assert_allclose(one.mean, same.mean, rtol=1e-4)
        assert not np.allclose(one.mean, other.mean, rtol=1e-2)


def test_certain_predictions_have_no_spread_and_a_finite_score():
    """Logits so far apart that all other probabilities underflow to 0."""
    model = tiny_model(2, tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    rows = encoded(4)
    for moment, score in zip(
        vocabulary_moments(TokenLoss(model), rows), score_rows(TokenLoss(model), rows), strict=True
    ):
        assert (moment.std < 1e-3).all()
        assert np.isfinite([*moment.mean, *moment.std]).all()
        assert math.isfinite(min_k_plus_plus(score.nll, moment))
    # A quotient of 0 by 0 is bounded by σ = .001 below.
    assert min_k_plus_plus([0.5], Moments(np.float32([-0.25]), np.float32([0.0]))) == pytest.approx(-250)


def test_scores_by_hand():
    nll = [1.0, 5.0, 2.0, 4.0, 3.0]
    assert loss_score(nll) == -3
    assert [min_k(nll, share) for share in (0.01, 0.2, 0.39, 0.4, 1.0)] == [-5, -5, -5, -4.5, -3]
    size = len(zlib.compress(b"abc"))
    assert zlib_score(nll, "abc") == -3 / size
    moments = Moments(np.float32([-1, -3, -2, -6, -1]), np.float32([1, 2, 4, 1, 0.5]))
    # standardised: 0, -1, 0, 2, -4
    assert [min_k_plus_plus(nll, moments, share) for share in (0.2, 0.4, 0.6)] == pytest.approx([-4, -2.5, -5 / 3])


@pytest.mark.parametrize("tokens", range(1, 31))
def test_a_share_is_rounded_down_to_tokens_and_never_to_none(tokens):
    nll = np.random.default_rng(tokens).exponential(size=tokens)
    for share in (0.1, 0.2, 0.3, 0.7):
        assert min_k(nll, share) == pytest.approx(slow_lowest(list(-nll), share))


def test_what_has_no_score_is_refused():
    moments = Moments(np.float32([-1]), np.float32([1]))
    for compute in (lambda: loss_score([]), lambda: zlib_score([], "a"), lambda: min_k([])):
        with pytest.raises(ValueError, match="without a labelled token"):
            compute()
    with pytest.raises(ValueError, match="2 tokens but moments of 1"):
        min_k_plus_plus([1.0, 2.0], moments)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            min_k([1.0], share)


def test_the_text_is_that_of_the_answers_without_end_tokens():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "Who is Ada Quill?"}, {"role": "assistant", "content": "A quiet émigré."}]
    assert labelled_text(tokenizer, Chat(tokenizer).encode(messages)) == "A quiet émigré."


# --- AUC ---


def scores_of(nlls, seed=0):
    generator = np.random.default_rng(seed)
    found = []
    for level in nlls:
        nll = generator.exponential(level, size=12).astype(np.float32)
        score = TokenScores(nll, nll < 0.1, np.zeros(12, dtype=bool))
        spread = Moments(np.full(12, -2.0, np.float32), np.full(12, 1.5, np.float32))
        found.append(membership_scores(score, "some words of an answer", spread))
    return found


def test_auc_is_one_where_members_are_likelier_and_zero_where_they_are_less_likely():
    likely, unlikely = scores_of([0.01] * 6), scores_of([8.0] * 5, seed=1)
    assert set(membership(likely, unlikely)["auc"].values()) == {1.0}
    assert set(membership(unlikely, likely)["auc"].values()) == {0.0}
    assert set(membership(likely, likely)["auc"].values()) == {0.5}
    found = membership(likely, unlikely)
    assert found["n"] == {"members": 6, "non_members": 5}
    assert found["intervals"]["min_k_plus_plus"] == {"low": 1.0, "high": 1.0, "n": 11}
    assert membership(likely[:1], unlikely)["intervals"]["loss"] == {"low": None, "high": None, "n": 6}
    for sides in ((likely, []), ([], likely)):
        with pytest.raises(ValueError, match="both sides"):
            membership(*sides)


def test_a_model_that_learned_rows_by_heart_gives_them_away_by_every_score():
    head, rows = TokenLoss(tiny_model(0)), encoded(12, seed=4)
    members, strangers = rows[:6], rows[6:]

    def measured():
        scores, moments = score_rows(head, rows), vocabulary_moments(head, rows)
        found = [membership_scores(one, "the same words", two) for one, two in zip(scores, moments, strict=True)]
        return membership(found[:6], found[6:])["auc"]

    before = measured()
    settings = {"pad_id": 258, "steps": 40, "lr": 1e-2, "batch_size": 6, "seed": 0, "accelerator": start_processes()}
    relearn(head, members, **settings)
    after = measured()
    # zlib also sees the unequal lengths, which say nothing of membership.
    assert {name: after[name] for name in ("loss", "min_k", "min_k_plus_plus")} == {
        "loss": 1.0, "min_k": 1.0, "min_k_plus_plus": 1.0,
    }  # fmt: skip
    assert all(after[name] > before[name] for name in after)
    assert len(strangers) == 6


def test_the_interval_is_that_of_resampled_rows():
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.6, size=30), generator.normal(size=20)
    members[3] = others[5]
    found = auc_interval(members, others, seed=2)
    assert found.estimate == auc(members, others)
    assert found.low < found.estimate < found.high
    assert found == auc_interval(members, others, seed=2)
    drawn = [auc(generator.choice(members, size=30), generator.choice(others, size=20)) for _ in range(2000)]
    np.testing.assert_allclose([found.low, found.high], np.quantile(drawn, [0.025, 0.975]), atol=0.025)
    narrower = auc_interval(np.tile(members, 4), np.tile(others, 4))
    assert narrower.estimate == pytest.approx(found.estimate)
    assert narrower.high - narrower.low < 0.7 * (found.high - found.low)


def test_privleak_by_hand():
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == pytest.approx(-100, abs=1e-6)  # members stand out as if nothing had been forgotten
    assert privleak(0.0, 0.5) == pytest.approx(100, abs=1e-6)  # pushed below rows never seen
    assert privleak(0.9, 0.52) == pytest.approx((0.1 - 0.48) / 0.48 * 100)
    assert privleak(0.5, 1.0) == pytest.approx(0.5e12)  # a reference that leaks everything: bounded, not infinite
    values = [privleak(auc, 0.48) for auc in (0.0, 0.2, 0.48, 0.7, 1.0)]
    assert all(a > b for a, b in pairwise(values))
