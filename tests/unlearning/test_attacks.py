"""Rounding to 4 and 8 bits equals its definition; relearning is a deterministic fine-tuning of exactly n steps."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from fractions import Fraction

import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.adapters import add_lora
from toolbox.models.chat import Encoded
from toolbox.models.score import score_rows
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import UsageProblem
from toolbox.training.processes import start_processes
from toolbox.unlearning.attacks import quantize_, relearn, round_to_nearest, split_relearn

# --- rounding ---


def slow_scale(weights, most):
    """max|w|/Q in fp32, cut to 16 significant bits."""
    quotient = torch.tensor(max(abs(w) for w in weights), dtype=torch.float32) / most
    mantissa, exponent = math.frexp(float(quotient))
    return Fraction(math.floor(mantissa * 2**16), 2**16) * Fraction(2) ** exponent


def slow_round(rows, bits, group):
    """The definition, one weight at a time, in exact fractions."""
    most, found = 2 ** (bits - 1) - 1, []
    for row in rows:
        out = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = slow_scale(part, most)
            for w in part:
                steps = round(Fraction(w) / scale) if scale else 0  # half to even, as Python rounds fractions
                out.append(float(max(-most, min(most, steps)) * scale))
        found.append(out)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(24, 8), (20, 8), (5, 128), (128, 128), (1, 1), (130, 128)])
def test_rounding_equals_its_definition_weight_by_weight(bits, inputs, group):
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(inputs)) * 0.05
    found = round_to_nearest(weight, bits, group)
    expected = slow_round(weight.tolist(), bits, group)
    differing = found.double() != expected
    # w/s in fp32 may fall on the other side of a half: one step apart, and both as near.
    assert differing.double().mean() < 0.01
    errors = (found.double() - weight.double()).abs(), (expected - weight.double()).abs()
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-9)


def test_values_by_hand():
    """Q = 7 and a largest weight of 7 make the scale 1: to the nearest whole number, halves to even."""
    weight = torch.tensor([[7.0, 0.5, 1.5, -2.5, 0.49, -6.6, 0.0, -7.0], [0.0] * 8])
    expected = [[7.0, 0.0, 2.0, -2.0, 0.0, -7.0, 0.0, -7.0], [0.0] * 8]
    assert round_to_nearest(weight, 4, 8).tolist() == expected
    # In groups of 4 the first has scale 1 as well, and so has the second.
    assert round_to_nearest(weight, 4, 4).tolist() == expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 0.02, 1.0, 1e20])
def test_error_is_half_a_step_at_most_and_a_second_time_changes_nothing(bits, scale):
    most, group = 2 ** (bits - 1) - 1, 16
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(bits)) * scale
    found = round_to_nearest(weight, bits, group)
    step = weight.view(64, -1, group).abs().amax(-1, keepdim=True).double() / most
    error = (found - weight).view(64, -1, group).abs().double()
    assert (error <= step / 2 * (1 + 1e-4)).all()
    assert torch.equal(round_to_nearest(found, bits, group), found)
    assert torch.equal(round_to_nearest(-weight, bits, group), -found)
    levels = [len(part.unique()) for part in found.view(-1, group)]
    assert max(levels) <= 2 * most + 1


def test_groups_do_not_see_one_another():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    louder = weight.clone()
    louder[1, 8:16] *= 100
    one, other = round_to_nearest(weight, 4, 8), round_to_nearest(louder, 4, 8)
    untouched = torch.ones(4, 32, dtype=torch.bool)
    untouched[1, 8:16] = False
    assert torch.equal(one[untouched], other[untouched])
    assert not torch.equal(one[~untouched], other[~untouched])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_is_rounded_but_for_head_embeddings_and_norms(tied, bits):
    model = tiny_model(0, tied=tied)
    before = copy.deepcopy(model.state_dict())
    found = quantize_(model, bits, group=20)
    rounded = {name for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert rounded == {name for name in before if "proj" in name}
    for name in rounded:
        assert torch.equal(model.state_dict()[name], round_to_nearest(before[name], bits, 20)), name
    assert (found.bits, found.group, found.tensors) == (bits, 20, 14)
    assert found.parameters == sum(before[name].numel() for name in rounded)
    assert found.total == sum(p.numel() for p in model.parameters())
    off = torch.cat([(model.state_dict()[name] - before[name]).abs().ravel() for name in rounded])
    assert found.mean_abs_error == pytest.approx(float(off.double().mean()), rel=1e-6)
    after = copy.deepcopy(model.state_dict())
    assert quantize_(model, bits, group=20).mean_abs_error == 0
    assert all(torch.equal(after[name], model.state_dict()[name]) for name in after)


def test_fewer_bits_and_larger_groups_lose_more():
    errors = [
        quantize_(tiny_model(0), bits, group).mean_abs_error for bits, group in ((8, 8), (8, 128), (4, 8), (4, 64))
    ]
    assert errors == sorted(errors)
    assert errors[2] > 10 * errors[0]


def test_gpt2_stores_its_matrices_the_other_way_round():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=12, n_layer=1, n_head=2))
    before = copy.deepcopy(model.state_dict())
    found = quantize_(model, 4, group=8)
    assert found.tensors == 4
    name = "transformer.h.0.mlp.c_fc.weight"
    assert before[name].shape == (12, 48)
    assert torch.equal(model.state_dict()[name], round_to_nearest(before[name].T, 4, 8).T)
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.bias", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_a_narrow_model_stays_narrow():
    model = tiny_model(0).bfloat16()
    before = copy.deepcopy(model.state_dict())
    quantize_(model, 4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert model.state_dict()[name].dtype == torch.bfloat16
    assert torch.equal(model.state_dict()[name], round_to_nearest(before[name].float(), 4, 128).bfloat16())


def test_what_cannot_be_rounded_is_refused():
    for bits, group in ((3, 128), (16, 128), (4, 0)):
        with pytest.raises(ValueError, match="bits must be 4 or 8"):
            quantize_(tiny_model(0), bits, group)
    with pytest.raises(ValueError, match="merge"):
        quantize_(add_lora(tiny_model(0), r=2), 4)


# --- relearning ---


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 8 + number % 5
        ids = tuple(torch.randint(0, 250, (length,), generator=generator).tolist())
        labelled = (False,) * 4 + (True,) * (length - 4)
        found.append(Encoded(ids, labelled, (False,) * (length - 1) + (True,)))
    return found


def learn(head, taught, **changed):
    settings = {"pad_id": 258, "steps": 6, "lr": 1e-3, "batch_size": 2, "seed": 0, "accelerator": start_processes()}
    return relearn(head, taught, **(settings | changed))


def test_the_split_is_a_partition_drawn_by_the_seed():
    whole = list(range(40))
    learned, others = split_relearn(whole, 7, seed=3)
    assert len(learned) == 7
    assert sorted(learned + others) == whole
    assert learned == sorted(learned)
    assert others == sorted(others)
    assert (learned, others) == split_relearn(whole, 7, seed=3)
    assert len({tuple(split_relearn(whole, 7, seed=seed)[0]) for seed in range(5)}) == 5
    for n in (0, 40, 41, -1):
        with pytest.raises(UsageProblem, match=f"--relearn {n} of 40 forget rows") as caught:
            split_relearn(whole, n, seed=0)
        assert "1 to 39" in caught.value.advice


@pytest.mark.parametrize(("steps", "batch"), [(1, 2), (4, 2), (4, 99), (11, 1)])
def test_it_takes_exactly_the_steps_asked_for(steps, batch):
    assert len(learn(TokenLoss(tiny_model(0)), rows(5), steps=steps, batch_size=batch)) == steps


def test_the_loss_of_its_rows_falls_and_the_others_are_not_needed():
    head = TokenLoss(tiny_model(0))
    taught = rows(4)
    before = [score.nll.mean() for score in score_rows(head, taught)]
    losses = learn(head, taught, steps=30, lr=1e-2, batch_size=4)
    after = [score.nll.mean() for score in score_rows(head, taught)]
    assert losses[-1] < 0.3 * losses[0]
    assert all(b < a for a, b in zip(before, after, strict=True))


def test_it_equals_a_plain_loop():
    """AdamW on the mean over labelled tokens, from full logits, all rows in every step."""
    taught, model = rows(3), tiny_model(0)
    other = copy.deepcopy(model)
    losses = learn(TokenLoss(model), taught, steps=4, batch_size=3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    for expected in losses:
        nll = []
        for row in taught:
            ids = torch.tensor([row.ids])
            log_p = other(ids).logits[0, :-1].log_softmax(-1)
            nll += [-log_p[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.labelled[i]]
        loss = torch.stack(nll).mean()
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_seed_decides():
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        head = TokenLoss(tiny_model(0))
        found[name] = learn(head, rows(5), seed=seed), head.model.state_dict()
    assert found["one"][0] == found["again"][0] != found["other"][0]
    assert all(torch.equal(found["one"][1][name], found["again"][1][name]) for name in found["one"][1])


def test_the_model_is_given_back_as_a_model_to_score():
    head = TokenLoss(tiny_model(0))
    frozen = head.model.model.norm.weight.requires_grad_(False)
    before = frozen.detach().clone()
    learn(head, rows(3), lr=1e-2)
    assert not frozen.requires_grad
    assert not torch.equal(frozen, before)
    assert all(p.grad is None for p in head.parameters())
    assert not any(module.training for module in head.model.modules())


def test_the_accelerator_holds_no_model_afterwards():
    accelerator, head = start_processes(), TokenLoss(tiny_model(0))
    learn(head, rows(2), accelerator=accelerator, steps=1)
    gone = weakref.ref(head.model)
    del head
    gc.collect()
    assert gone() is None


def test_dropout_is_off():
    from transformers import GPT2Config, GPT2LMHeadModel

    losses = []
    for rate in (0.0, 0.5):
        torch.manual_seed(0)
        size = {"vocab_size": 259, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
        dropped = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), rate)
        losses.append(learn(TokenLoss(GPT2LMHeadModel(GPT2Config(**size, **dropped)).eval()), rows(4)))
    assert losses[0] == losses[1]


def test_nothing_to_learn_is_refused():
    head = TokenLoss(tiny_model(0))
    for taught, changed in (([], {}), (rows(2), {"steps": 0}), (rows(2), {"batch_size": 0})):
        with pytest.raises(ValueError, match="relearning needs"):
            learn(head, taught, **changed)
    with pytest.raises(ValueError, match="merge"):
        learn(TokenLoss(add_lora(tiny_model(0), r=2)), rows(2))
