"""SatImp's loss and gradients against a slow loop in float64, written from the formula."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss, collate
from toolbox.unlearning.satimp import exponents, forget_loss, token_weights

PAIRS = [(5.0, 0.1), (5.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 2.0)]


def ragged(seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, prompt in ((9, 3), (14, 6), (4, 1), (11, 10)):
        ids = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
        labelled = [position >= prompt for position in range(length)]
        if length > 10:
            labelled[prompt + 1 if prompt + 1 < length else prompt] = length == 11  # a hole in the mask
        labelled[0] = False
        rows.append(Encoded(ids, tuple(labelled), tuple([False] * (length - 1) + [True])))
    return rows


def slow_loss(model, rows: list[Encoded], beta1: float, beta2: float) -> torch.Tensor:
    """-(1/N) sum_i w_i l_i, one row and one token at a time; the weights as plain floats."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        log_probs = torch.log_softmax(model(input_ids=torch.tensor([row.ids])).logits[0], dim=-1)
        for position in range(1, len(row.ids)):
            if row.labelled[position]:
                nll = -log_probs[position - 1, row.ids[position]]
                p = math.exp(-nll.item())
                weight = (p**beta1 if beta1 else 1.0) * ((1 - p) ** beta2 if beta2 else 1.0)
                total = total - weight * nll
                count += 1
    return total / count


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("beta1", "beta2"), PAIRS)
@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_every_gradient_equal_the_slow_loop(beta1, beta2, chunk, seed):
    model = tiny_model(seed).double()
    rows = ragged(seed)
    slow = slow_loss(model, rows, beta1, beta2)
    slow.backward()
    expected = gradients(model)

    batch = collate(rows, pad_id=0)
    nll, _ = TokenLoss(model, chunk)(batch.ids, batch.where, batch.labels)
    fast = forget_loss(nll, token_weights(nll, beta1, beta2), len(nll))
    fast.backward()
    found = gradients(model)

    assert float(fast) == pytest.approx(float(slow), rel=1e-10)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= 1e-10 * scale, name


def test_the_family_holds_gradient_ascent_and_wga():
    nll = torch.rand(50, dtype=torch.float64) * 6
    p = torch.exp(-nll)
    assert torch.equal(token_weights(nll, *exponents("ga", 5, 0.1)), torch.ones_like(nll))
    torch.testing.assert_close(token_weights(nll, *exponents("wga", 5, 0.1)), p, rtol=1e-14, atol=0)
    torch.testing.assert_close(token_weights(nll, *exponents("simsat", 5, 0.1)), p**5, rtol=1e-13, atol=0)
    torch.testing.assert_close(token_weights(nll, *exponents("simimp", 5, 0.1)), (1 - p) ** 0.1, rtol=1e-12, atol=0)
    assert exponents("satimp", 5, 0.1) == (5, 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta1", "beta2"), PAIRS)
def test_weights_and_loss_are_finite_at_both_ends(beta1, beta2, dtype):
    nll = torch.tensor([0.0, -1e-7, 1e-12, 1e-3, 1.0, 50.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    weights = token_weights(nll, beta1, beta2)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert not weights.requires_grad
    loss = forget_loss(nll, weights, 8)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(nll.grad).all()


@pytest.mark.parametrize(("beta1", "beta2", "p", "weight"), [(5, 1, 0.833, 0.067), (5, 0.1, 0.980, 0.61)])
def test_the_weight_peaks_where_the_paper_says(beta1, beta2, p, weight):
    grid = torch.linspace(1e-4, 1 - 1e-6, 200_001, dtype=torch.float64)
    weights = token_weights(-torch.log(grid), beta1, beta2)
    best = int(weights.argmax())
    assert float(grid[best]) == pytest.approx(p, abs=6e-4)
    assert float(weights[best]) == pytest.approx(weight, abs=6e-3)
    assert float(grid[best]) == pytest.approx(beta1 / (beta1 + beta2), abs=1e-4)


def test_the_divisor_is_the_token_count_and_not_the_sum_of_weights():
    nll = torch.tensor([1.0, 2.0])
    weights = torch.tensor([0.5, 0.25])
    assert float(forget_loss(nll, weights, 2)) == -0.5
