"""What holds for SatImp's weights, granularities and samplings whatever the numbers; values are in tests/parity."""

from __future__ import annotations

import pytest
import torch

from toolbox.unlearning.satimp import (
    FRACTIONS,
    annotated_weights,
    draw_seed,
    exponents,
    forget_loss,
    group_weights,
    hard_sample,
    instance_loss,
    instance_weights,
    reduction_factors,
    row_lengths,
    row_nll,
    row_sums,
    tnpo_weights,
    token_weights,
)

LENGTHS = (5, 1, 30, 8)
ROW = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
SEEDS = [draw_seed(7, 3, number) for number in (40, 2, 11, 5)]


def losses(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(ROW), generator=generator, dtype=torch.float64) ** 4 * 20


def satimp(nll):
    return token_weights(nll, 5.0, 0.1)


def by_row(nll, row, n_rows, seeds):
    """Every function of a row's tokens, at (n,)."""
    return {
        "group": group_weights(satimp(nll), row, 10),
        "instance": instance_weights(nll, row, n_rows, "sum", satimp)[row],
        "instance, mean": instance_weights(nll, row, n_rows, "mean", satimp)[row],
        **{kind: hard_sample(nll, row, kind, fraction, 0.7, seeds) for kind, fraction in FRACTIONS.items()},
        "sequence": reduction_factors("sequence", nll, row, row_lengths(row, n_rows)),
    }


# --- rows stand alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]], [[3, 2, 1, 0]]])
def test_nothing_depends_on_how_a_window_is_cut_into_micro_batches(cut):
    nll = losses()
    whole = by_row(nll, ROW, len(LENGTHS), SEEDS)
    for part in cut:
        at = torch.cat([torch.nonzero(number == ROW).squeeze(1) for number in part])
        row = torch.repeat_interleave(torch.arange(len(part)), torch.tensor([LENGTHS[number] for number in part]))
        found = by_row(nll[at], row, len(part), [SEEDS[number] for number in part])
        for name, values in found.items():
            torch.testing.assert_close(values, whole[name][at], rtol=1e-14, atol=0, msg=name)


def test_a_micro_batch_without_rows_gives_nothing():
    empty, row = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for values in by_row(empty, row, 0, []).values():
        assert values.shape == (0,)
    assert float(instance_loss(row_sums(empty, row, 2), torch.ones(2), 4)) == 0
    assert float(forget_loss(empty, empty, 4)) == 0


def test_a_row_that_is_not_there_weighs_nothing():
    weights = instance_weights(torch.tensor([0.5, 0.1]), torch.tensor([0, 2]), 4, "sum", torch.ones_like)
    assert weights.tolist() == [1, 0, 1, 0]


# --- granularity ----------------------------------------------------------------------------------------------------


def test_groups_of_one_are_tokens_and_groups_of_all_are_rows():
    weights = satimp(losses())
    torch.testing.assert_close(group_weights(weights, ROW, 1), weights, rtol=0, atol=0)
    means = row_sums(weights, ROW, len(LENGTHS)) / row_lengths(ROW, len(LENGTHS))
    for size in (max(LENGTHS), 10**6):
        torch.testing.assert_close(group_weights(weights, ROW, size), means[ROW], rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="groups of 0"):
        group_weights(weights, ROW, 0)


@pytest.mark.parametrize("size", [1, 2, 4, 10, 29])
def test_groups_keep_the_sum_of_every_row_and_the_order_of_its_tokens(size):
    weights = satimp(losses(1))
    grouped = group_weights(weights, ROW, size)
    torch.testing.assert_close(row_sums(grouped, ROW, 4), row_sums(weights, ROW, 4), rtol=1e-14, atol=0)
    for number in range(len(LENGTHS)):
        mine = number == ROW
        in_order = grouped[mine][weights[mine].argsort()]
        assert (in_order[1:] >= in_order[:-1]).all()
        assert len(in_order.unique()) <= -(-LENGTHS[number] // size)


def test_equal_weights_are_grouped_in_the_order_of_their_tokens():
    weights = torch.tensor([0.5, 1.0, 0.5, 0.5])
    assert group_weights(weights, torch.zeros(4, dtype=torch.int64), 2).tolist() == [0.75, 0.75, 0.5, 0.5]


def test_instances_of_single_tokens_are_tokens():
    nll, row = losses(2), torch.arange(len(ROW))
    for prob in ("sum", "mean"):
        assert torch.equal(instance_weights(nll, row, len(row), prob, satimp), satimp(nll))
    assert torch.equal(row_nll(nll, row, len(row)), nll)


def test_a_long_row_has_no_weight_as_a_product_and_one_as_a_mean():
    nll, row = torch.full((200,), 0.1), torch.zeros(200, dtype=torch.int64)
    assert float(instance_weights(nll, row, 1, "sum", satimp)) < 1e-40
    assert float(instance_weights(nll, row, 1, "mean", satimp)) == pytest.approx(float(satimp(torch.tensor(0.1))))


# --- weighting ------------------------------------------------------------------------------------------------------


def test_token_wise_npo_starts_near_one_and_stays_below_two():
    nll = losses(3)
    p4 = torch.exp(-4 * nll)
    torch.testing.assert_close(tnpo_weights(nll, nll), 2 * p4 / (2 * p4 + 1e-5), rtol=1e-13, atol=0)
    grid = torch.linspace(0, 30, 40, dtype=torch.float64)
    weights = tnpo_weights(grid[:, None], grid[None, :])
    assert ((weights >= 0) & (weights < 2)).all()
    assert (weights.diff(dim=0) <= 0).all()  # the less likely a token has become, the less it weighs
    assert (weights.diff(dim=1) >= 0).all()
    weighted = tnpo_weights(grid[:, None], grid[None, :], a=1.5)
    torch.testing.assert_close(weighted, weights * torch.exp(-1.5 * grid)[:, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("a", [0.0, 1.5])
def test_token_wise_npo_is_finite_where_powers_underflow(dtype, a):
    ends = torch.tensor([-1e-7, 0.0, 1e-12, 1.0, 22.0, 26.0, 200.0, 1e4, float("inf")], dtype=dtype)
    weights = tnpo_weights(ends[:, None], ends[None, :], a=a)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((weights >= 0) & (weights <= 2)).all()


def test_an_annotation_is_multiplied_by_the_weight_of_its_row():
    key = torch.tensor([1.0, 0.0, 1.0, 1.0])
    found = annotated_weights(key, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 2.5]))
    assert found.tolist() == [1.0, 0.0, 2.5, 2.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_everything_is_finite_and_wide_at_both_ends(dtype):
    ends = [0.0, -1e-7, 1e-12, 1e-3, 1.0, 50.0, 200.0, 1e4]
    nll = torch.tensor(ends * 2, dtype=dtype, requires_grad=True)
    row = torch.tensor([0] * len(ends) + [2] * len(ends))
    weights = token_weights(nll, 5.0, 0.1)
    factors = reduction_factors("sequence", nll, row, row_lengths(row, 3))
    for sample in [hard_sample(nll, row, kind, 0.3, 0.7, [1, 2, 3]) for kind in FRACTIONS]:
        for values in (group_weights(weights, row, 3), annotated_weights(weights, row, torch.ones(3).to(weights))):
            nll.grad = None
            loss = forget_loss(nll, values * sample * factors, 2)
            loss.backward()
            assert loss.isfinite()
            assert nll.grad.isfinite().all()
            assert values.dtype == sample.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for prob in ("sum", "mean"):
        assert instance_weights(nll, row, 3, prob, satimp).isfinite().all()


def test_weights_carry_no_gradient():
    """dL/dl_i is −w_i/N exactly: nothing comes through the weight, the group, the sample or the row's probability."""
    nll = losses(4).requires_grad_()
    weights = group_weights(satimp(nll), ROW, 10) * hard_sample(nll, ROW, "topk", 0.4)
    forget_loss(nll, weights, 44).backward()
    torch.testing.assert_close(nll.grad, -weights / 44, rtol=1e-14, atol=0)
    nll.grad = None
    weights = instance_weights(nll, ROW, 4, "mean", satimp)
    instance_loss(row_sums(nll, ROW, 4), weights, 4).backward()
    torch.testing.assert_close(nll.grad, (-weights / 4)[ROW], rtol=1e-14, atol=0)
    live = row_nll(nll, ROW, 4).exp()
    nll.grad = None
    instance_loss(row_sums(nll, ROW, 4).detach() + 0 * nll.sum(), live, 4).backward()
    assert not nll.grad.any()  # weights handed in with a gradient lose it


def test_gradient_ascent_is_the_mean_over_tokens():
    nll = losses(5)
    assert float(forget_loss(nll, token_weights(nll, *exponents("ga", 5, 0.1)), len(nll))) == -float(nll.sum()) / 44


# --- sampling -------------------------------------------------------------------------------------------------------


def test_top_and_bottom_share_no_token_and_leave_at_most_the_quantile_itself():
    nll = losses(6)
    for fraction in (0.0, 0.15, 0.5, 1.0):
        top = hard_sample(nll, ROW, "topk", fraction)
        bottom = hard_sample(nll, ROW, "bottomk", fraction)
        both = row_sums(top + bottom, ROW, 4)
        assert (top * bottom == 0).all()
        assert all(length - 1 <= kept <= length for length, kept in zip(LENGTHS, both.tolist(), strict=True))
    assert hard_sample(nll, ROW, "topk", 0.15)[5] == hard_sample(nll, ROW, "bottomk", 0.5)[5] == 0  # one token alone


def test_no_token_is_kept_or_left_for_a_rounding_error():
    # (1 - .9) 10 is not 1 in floating point, nor .29 · 100 29.
    nll, row = torch.arange(11, dtype=torch.float64), torch.zeros(11, dtype=torch.int64)
    assert hard_sample(nll, row, "topk", 0.9).tolist() == [0, 0] + [1] * 9
    assert hard_sample(nll, row, "bottomk", 0.9).tolist() == [1] + [0] * 10
    assert hard_sample(torch.zeros(100), torch.zeros(100, dtype=torch.int64), "random", 0.29, 1.0, [0]).sum() == 29


@pytest.mark.parametrize(("fraction", "soft_p"), [(0.5, 1.0), (0.3, 0.7), (0.0, 0.7), (1.0, 0.2)])
def test_a_random_share_of_each_row_has_the_weight_s_and_the_rest_its_complement(fraction, soft_p):
    found = hard_sample(losses(), ROW, "random", fraction, soft_p, SEEDS)
    for number, length in enumerate(LENGTHS):
        count = int(fraction * length + 1e-9)
        expected = [soft_p] * count + [1 - soft_p] * (length - count)
        assert sorted(found[number == ROW].tolist()) == pytest.approx(sorted(expected), abs=1e-15)


def test_draws_differ_by_seed_step_and_row_and_by_nothing_else():
    nll, row = torch.zeros(60), torch.zeros(60, dtype=torch.int64)

    def draw(*key):
        return tuple(hard_sample(nll, row, "random", 0.5, 1.0, [draw_seed(*key)]).tolist())

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(*key) for key in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1, 3), (2**62, 1, 2), (0, 0, 0)]}) == 6
    torch.manual_seed(5)
    first = torch.rand(1)
    torch.manual_seed(5)
    draw(3, 4, 5)
    assert torch.rand(1) == first  # the global state is left alone


def test_every_token_is_drawn_as_often_as_the_share_says():
    nll, row = torch.zeros(10), torch.zeros(10, dtype=torch.int64)
    draws = [hard_sample(nll, row, "random", 0.3, 1.0, [draw_seed(0, step, 0)]) for step in range(2000)]
    often = torch.stack(draws).mean(0)
    assert (often - 0.3).abs().max() < 0.05  # five standard deviations


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match="'middlek' is not one of topk, bottomk, random"):
        hard_sample(losses(), ROW, "middlek", 0.5)
