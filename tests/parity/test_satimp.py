"""SatImp's loss and gradients against a slow loop in float64, written from the formula."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from tests.tiny import tiny_model
from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss, collate
from toolbox.unlearning.satimp import (
    annotated_weights,
    exponents,
    forget_loss,
    group_weights,
    hard_sample,
    instance_loss,
    instance_weights,
    reduction_factors,
    row_lengths,
    row_nll,
    row_quantile,
    row_sums,
    tnpo_weights,
    token_weights,
)

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


# --- the family: each part against loops in plain floats, written from its definition -------------------------------

LENGTHS = [7, 1, 12, 0, 3, 25, 2]  # row 3 is in no micro-batch here


def family(seed: int) -> tuple[list[list[float]], torch.Tensor, torch.Tensor]:
    """(l by row, l (n,), row (n,)); a third of the tokens near certain, some hopeless, some equal."""
    source = random.Random(seed)
    rows = []
    for length in LENGTHS:
        kinds = (source.uniform(0, 0.02), source.uniform(0, 2), source.uniform(2, 30), 0.5)
        rows.append([source.choice(kinds) for _ in range(length)])
    row = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    return rows, torch.tensor([x for row in rows for x in row], dtype=torch.float64), torch.tensor(row)


def slow_weight(name: str, x: float, reference: float, key: float, row_weight: float, beta1: float, beta2: float):
    p, q = math.exp(-x), math.exp(-reference)
    match name:
        case "satimp":
            return p**beta1 * (1 - p) ** beta2
        case "simsat":
            return p**beta1
        case "simimp":
            return (1 - p) ** beta2
        case "ga":
            return 1.0
        case "wga":
            return p
        case "tnpo":
            return 2 * p**4 / (p**4 + q**4 + 1e-5)
        case "wtnpo":
            return 2 * p**5.5 / (p**4 + q**4 + 1e-5)
        case "annotated":
            return key * row_weight
    raise KeyError(name)


def fast_weight(name, nll, reference, key, row, row_weight, beta1, beta2):
    match name:
        case "tnpo":
            return tnpo_weights(nll, reference)
        case "wtnpo":
            return tnpo_weights(nll, reference, a=1.5)
        case "annotated":
            return annotated_weights(key, row, row_weight)
    return token_weights(nll, *exponents(name, beta1, beta2))


def close(found, expected) -> None:
    found, expected = torch.as_tensor(found), torch.tensor(expected, dtype=torch.float64)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


NAMES = ["satimp", "simsat", "simimp", "ga", "wga", "tnpo", "wtnpo", "annotated"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 0.1), (5.0, 1.0), (0.7, 3.0)])
def test_every_weighting_equals_its_formula(name, beta1, beta2):
    _, nll, row = family(1)
    _, reference, _ = family(2)
    key = torch.tensor([float(i % 3 == 0) for i in range(len(nll))], dtype=torch.float64)
    row_weight = torch.tensor([1.0, 0.5, 2.0, 9.0, 1.0, 0.25, 3.0], dtype=torch.float64)
    inputs = zip(nll.tolist(), reference.tolist(), key.tolist(), row.tolist(), strict=True)
    expected = [slow_weight(name, x, r, k, row_weight[b].item(), beta1, beta2) for x, r, k, b in inputs]
    close(fast_weight(name, nll.requires_grad_(), reference, key, row, row_weight, beta1, beta2), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 25, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_means_over_chunks_of_each_rows_sorted_weights(size, seed):
    rows, nll, row = family(seed)
    expected = []
    for values in rows:
        weights = [slow_weight("satimp", x, 0, 0, 0, 5.0, 0.1) for x in values]
        order = sorted(range(len(values)), key=lambda i: -weights[i])
        grouped = [0.0] * len(values)
        for start in range(0, len(values), size):
            chunk = order[start : start + size]
            for i in chunk:
                grouped[i] = sum(weights[j] for j in chunk) / len(chunk)
        expected += grouped
    close(group_weights(token_weights(nll.requires_grad_(), 5.0, 0.1), row, size), expected)


@pytest.mark.parametrize("prob", ["sum", "mean"])
@pytest.mark.parametrize("name", ["satimp", "simsat", "simimp", "ga", "wga", "tnpo"])
def test_instances_weigh_by_the_probability_of_the_whole_row(name, prob):
    rows, nll, row = family(3)
    before, reference, _ = family(4)
    n_rows, present = len(rows), [b for b, values in enumerate(rows) if values]

    def rowwise(values: list[float]) -> float:
        return sum(values) / (len(values) if prob == "mean" else 1) if values else 0.0

    weights = [
        slow_weight(name, rowwise(values), rowwise(was), 0, 0, 2.0, 0.3) if values else 0.0
        for values, was in zip(rows, before, strict=True)
    ]
    expected = -sum(weights[b] * sum(rows[b]) for b in present) / len(present)
    nll.requires_grad_()
    of_reference = row_nll(reference, row, n_rows, prob)
    found = instance_weights(
        nll, row, n_rows, prob, lambda x: fast_weight(name, x, of_reference, None, None, None, 2.0, 0.3)
    )
    close(found, weights)
    loss = instance_loss(row_sums(nll, row, n_rows), found, len(present))
    assert float(loss) == pytest.approx(expected, rel=1e-10)
    loss.backward()
    close(nll.grad, [-weights[b] / len(present) for b in row.tolist()])

    of_window = sum(weights) / len(present)
    together = instance_loss(row_sums(nll, row, n_rows), found.sum() / len(present), len(present))
    assert float(together) == pytest.approx(-of_window * sum(map(sum, rows)) / len(present), rel=1e-10)


def slow_quantile(values: list[float], q: Fraction) -> float:
    """Linear interpolation at place q (T - 1), in exact fractions."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + float(place - low) * (ordered[high] - ordered[low])


@pytest.mark.parametrize("kind", ["topk", "bottomk"])
@pytest.mark.parametrize("fraction", ["0", "0.05", "0.15", "0.3", "0.5", "0.9", "1"])
@pytest.mark.parametrize("seed", range(3))
def test_hard_samples_lie_beyond_the_quantile_of_their_own_row(kind, fraction, seed):
    rows, nll, row = family(seed)
    expected = []
    for values in rows:
        threshold = slow_quantile(values, 1 - Fraction(fraction)) if values else 0.0
        expected += [float(x > threshold if kind == "topk" else x < threshold) for x in values]
    close(hard_sample(nll.requires_grad_(), row, kind, float(fraction)), expected)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.37, 0.5, 0.85, 1.0])
def test_the_quantile_of_a_row_is_torchs(q):
    rows, nll, row = family(5)
    expected = [
        float(torch.tensor(values, dtype=torch.float64).quantile(q)) for values in rows for _ in range(len(values))
    ]
    close(row_quantile(nll, row, q), expected)


@pytest.mark.parametrize("reduction", ["token", "sequence", "sum"])
def test_reductions_divide_by_tokens_by_rows_or_not_at_all(reduction):
    rows, nll, row = family(6)
    weights = token_weights(nll, 5.0, 0.1)
    losses = [sum(slow_weight("satimp", x, 0, 0, 0, 5.0, 0.1) * x for x in values) for values in rows]
    match reduction:
        case "token":
            divisor, expected = len(nll), -sum(losses) / len(nll)
        case "sequence":
            of_rows = [loss / len(values) for loss, values in zip(losses, rows, strict=True) if values]
            divisor, expected = len(of_rows), -sum(of_rows) / len(of_rows)
        case _:
            divisor, expected = 1, -sum(losses)
    factors = reduction_factors(reduction, nll, row, row_lengths(row, len(rows)))
    assert float(forget_loss(nll, weights * factors, divisor)) == pytest.approx(expected, rel=1e-10)
