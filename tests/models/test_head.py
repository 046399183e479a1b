"""The head by chunks: every loss and gradient equals the one made of full logits."""

from __future__ import annotations

import pytest
import torch

from toolbox.models import head as module
from toolbox.models.head import Head, SoftTarget, soft_loss, token_nll

SHAPES = [(0.25, None), (2.0, 5.0), (1.0, 1.5), (1.0, None)]
TARGETS = [SoftTarget("reference"), SoftTarget("lowered", 3.0), SoftTarget("others")]


def parts(seed=0, n=9, d=4, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    double = {"dtype": torch.float64, "generator": generator}
    hidden, weight = torch.randn(n, d, **double), torch.randn(vocabulary, d, **double)
    bias = torch.randn(vocabulary, **double)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    return [one.requires_grad_() for one in (hidden, weight, bias)], labels


@pytest.mark.parametrize(("scale", "cap"), SHAPES)
def test_nll_has_the_right_gradient(scale, cap):
    inputs, labels = parts()
    assert torch.autograd.gradcheck(lambda h, w, b: token_nll(h, Head(w, b, scale, cap), labels, 4)[0], inputs)


@pytest.mark.parametrize(("scale", "cap"), SHAPES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.kind)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_soft_losses_equal_full_logits(target, scale, cap, chunk):
    inputs, labels = parts()
    (other_hidden, other_weight, other_bias), _ = parts(1)
    weights = torch.rand(len(labels), dtype=torch.float64)
    other = Head(other_weight, other_bias, scale, cap)
    loss = soft_loss(inputs[0], Head(inputs[1], inputs[2], scale, cap), labels, target, (other_hidden, other), chunk)
    found = torch.autograd.grad((loss * weights).sum(), inputs)

    def logits(hidden, weight, bias):
        z = scale * (hidden @ weight.T + bias)
        return z if cap is None else cap * torch.tanh(z / cap)

    z = logits(*inputs)
    z_ref = logits(other_hidden, other_weight, other_bias).detach()
    log_p = z.log_softmax(-1)
    expected = []
    for i, y in enumerate(labels.tolist()):
        total = z.new_zeros(())
        if target.kind == "reference":
            q = z_ref[i].softmax(-1)
            for v in range(z.shape[1]):
                total = total + q[v] * (q[v].log() - log_p[i, v])
        elif target.kind == "lowered":
            lowered = z_ref[i].clone()
            lowered[y] -= 3.0
            total = -(lowered.softmax(-1) * log_p[i]).sum()
        else:
            others = [v for v in range(z.shape[1]) if v != y]
            q = z[i, others].detach().softmax(-1)
            total = -(q * log_p[i, others]).sum()
        expected.append(total)
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for one, two in zip(found, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_kl_to_itself_is_zero_with_zero_gradient():
    (hidden, weight, bias), labels = parts()
    head = Head(weight, bias)
    loss = soft_loss(hidden, head, labels, SoftTarget("reference"), (hidden, head))
    assert loss.abs().max() < 1e-12
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(loss.sum(), (hidden, weight, bias)))


@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.kind)
def test_certain_models_give_finite_losses(target):
    hidden = torch.full((2, 3), 60.0, requires_grad=True)
    weight = torch.eye(3)[[0, 0, 1, 2]] * torch.tensor([[1.0], [-1.0], [0.5], [0.0]])
    labels = torch.tensor([0, 1])
    loss = soft_loss(hidden, Head(weight), labels, target, (hidden, Head(weight)))
    (grad,) = torch.autograd.grad(loss.sum(), hidden)
    assert loss.isfinite().all()
    assert grad.isfinite().all()


def test_a_target_without_its_reference_is_refused():
    (hidden, weight, bias), labels = parts()
    with pytest.raises(ValueError, match="reference"):
        soft_loss(hidden, Head(weight, bias), labels, SoftTarget("lowered", 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_fp32_losses(dtype):
    hidden, head = torch.randn(5, 8, dtype=dtype), Head(torch.randn(13, 8, dtype=dtype))
    assert token_nll(hidden, head, torch.arange(5))[0].dtype == torch.float32
    assert soft_loss(hidden, head, torch.arange(5), SoftTarget("others")).dtype == torch.float32


def test_no_labels_is_an_empty_loss():
    nll, hits = token_nll(torch.randn(0, 8), Head(torch.randn(13, 8)), torch.zeros(0, dtype=torch.long))
    assert nll.shape == hits.shape == (0,)


@pytest.mark.parametrize("kind", ["nll", "soft"])
def test_only_a_chunk_of_logits_ever_exists(monkeypatch, kind):
    seen = []
    original = Head.logits
    monkeypatch.setattr(module.Head, "logits", lambda self, h: seen.append(len(h)) or original(self, h))
    hidden, labels = torch.randn(100, 8, requires_grad=True), torch.zeros(100, dtype=torch.long)
    head = Head(torch.randn(50, 8))
    loss = (
        token_nll(hidden, head, labels, 16)[0]
        if kind == "nll"
        else soft_loss(hidden, head, labels, TARGETS[0], (hidden, head), 16)
    )
    loss.sum().backward()
    assert max(seen) == 16
