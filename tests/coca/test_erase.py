"""Linear erasers: equal to the package concept-erasure, to the theorem, and to themselves over batches and ranks."""

from __future__ import annotations

import pytest
import torch

from toolbox.coca.erase import (
    Moments,
    condition_number,
    distortion,
    inlp,
    leace,
    mean_difference,
    projected_off,
    shrunk,
)


def sample(n: int = 240, d: int = 24, k: int = 2, seed: int = 0, spread: float = 30.0):
    """Correlated rows with a condition number of some 1e3, far from the origin, and class numbers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0, -1.5, d, dtype=torch.float64)
    z = torch.arange(n) % k
    shift = torch.randn(k, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * scale @ mixing + shift[z] + spread
    return x, z


def moments_of(x, z, k=None):
    return Moments(x.shape[1], int(z.max()) + 1 if k is None else k).update(x, z)


def packaged(x, z, k, *, method="leace", shrinkage=True):
    from concept_erasure import LeaceFitter

    one_hot = torch.nn.functional.one_hot(z, k)
    fitter = LeaceFitter(x.shape[1], k, method, constrain_cov_trace=False, shrinkage=shrinkage, dtype=torch.float64)
    return fitter.update(x, one_hot).eraser


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_leace_is_that_of_the_package(k, shrinkage):
    pytest.importorskip("concept_erasure", reason="concept-erasure is a test dependency")
    x, z = sample(k=k)
    ours = leace(moments_of(x, z), shrinkage=shrinkage)
    theirs = packaged(x, z, k, shrinkage=shrinkage)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-9)
    assert ours.rank == k - 1


def test_fewer_rows_than_dimensions_go_through_pseudo_inverses_as_in_the_package():
    pytest.importorskip("concept_erasure", reason="concept-erasure is a test dependency")
    x, z = sample(n=20, d=24)
    ours = leace(moments_of(x, z), shrinkage=False)
    torch.testing.assert_close(ours(x), packaged(x, z, 2, shrinkage=False)(x), rtol=0, atol=1e-9)
    assert condition_number(moments_of(x, z).covariance(False)) == float("inf")


def test_the_mean_difference_is_the_packages_orthogonal_eraser_and_a_projection():
    pytest.importorskip("concept_erasure", reason="concept-erasure is a test dependency")
    x, z = sample()
    ours = mean_difference(moments_of(x, z))
    torch.testing.assert_close(ours(x), packaged(x, z, 2, method="orth")(x), rtol=0, atol=1e-9)
    gap = x[z == 1].mean(0) - x[z == 0].mean(0)
    unit = gap / gap.norm()
    by_hand = x - ((x - x.mean(0)) @ unit)[:, None] * unit
    torch.testing.assert_close(ours(x), by_hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(ours(x)), ours(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("shrinkage", [True, False])
def test_the_class_means_coincide_after_erasure_and_the_mean_stays(k, shrinkage):
    """Theorem 3.1 of the paper: then, and only then, no linear reader beats a constant on this sample."""
    x, z = sample(k=k, seed=3)
    eraser = leace(moments_of(x, z), shrinkage=shrinkage)
    means = torch.stack([eraser(x)[z == c].mean(0) for c in range(k)])
    assert float((means - means[0]).abs().max()) <= 1e-9
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0), rtol=0, atol=1e-9)


def test_leace_moves_rows_less_than_any_other_eraser_tried():
    x, z = sample(seed=5)
    moments = moments_of(x, z)
    least = distortion(leace(moments, shrinkage=False), x)
    assert 0 < least < distortion(mean_difference(moments), x) <= 1
    deviation = (x - x.mean(0)).square().sum()
    assert least == pytest.approx(float((leace(moments, shrinkage=False)(x) - x).square().sum() / deviation))


def test_batches_and_merged_parts_give_what_one_batch_gives():
    x, z = sample(n=1000, k=3)
    whole = leace(moments_of(x, z))
    batched = Moments(x.shape[1], 3)
    for start in range(0, len(x), 37):
        batched.update(x[start : start + 37], z[start : start + 37])
    ranks = [moments_of(x[rank::2], z[rank::2], 3) for rank in range(2)]
    merged = Moments(x.shape[1], 3).merge(ranks[0]).merge(ranks[1])
    for other in (batched, merged, Moments(x.shape[1], 3).merge(merged).update(x[:0], z[:0])):
        torch.testing.assert_close(leace(other)(x), whole(x), rtol=0, atol=1e-10)
        assert other.n == len(x)
    torch.testing.assert_close(merged.covariance(False), torch.cov(x.T), rtol=1e-12, atol=1e-12)


def test_low_precision_rows_are_summed_in_float64():
    x, z = sample(n=4000, spread=1000.0)
    low = x.float()
    eraser = leace(moments_of(low, z))
    erased = eraser(low.double())
    assert float((erased[z == 0].mean(0) - erased[z == 1].mean(0)).abs().max()) <= 1e-9
    assert eraser(low).dtype == torch.float32


def test_a_concept_that_is_not_there_leaves_the_rows_alone():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both, z = torch.cat([x, x]), torch.arange(128) // 64  # the same rows in either class
    eraser = leace(moments_of(both, z))
    assert eraser.rank == 0
    torch.testing.assert_close(eraser(both), both, rtol=0, atol=0)


def test_shrinkage_keeps_the_trace_and_pulls_towards_the_identity():
    x, z = sample(n=30)
    plain = moments_of(x, z).covariance(False) * 29 / 30
    found = shrunk(plain, 30)
    assert float(found.trace()) == pytest.approx(float(plain.trace()))
    assert condition_number(found) < condition_number(plain)


def test_inlp_counts_the_directions_a_reader_needs():
    """Two independent directions carry the class; the third round finds nothing."""
    generator = torch.Generator().manual_seed(1)
    z = torch.arange(400) % 2
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    x[:, 0] += 6.0 * z
    x[:, 3] -= 3.0 * z

    def reader(rows):
        gap = rows[z == 1].mean(0) - rows[z == 0].mean(0)
        found = torch.zeros(6, dtype=torch.float64)
        best = int(gap.abs().argmax())
        found[best] = gap[best]
        middle = (rows[z == 1].mean(0) + rows[z == 0].mean(0))[best] / 2
        guess = ((rows[:, best] - middle) * gap[best] > 0).long()
        return found, float((guess == z).double().mean()) if gap.abs().max() > 0.5 else 0.5

    eraser, rank = inlp(x, x.mean(0), reader)
    assert rank == eraser.rank == 2
    assert float((eraser(x)[:, [0, 3]] - x.mean(0)[[0, 3]]).abs().max()) <= 1e-9
    eraser, rank = inlp(x, x.mean(0), reader, rounds=1)
    assert (eraser.rank, rank) == (1, None)


def test_projecting_off_dependent_directions_is_projecting_off_their_span():
    x, _ = sample(d=6)
    one, two = torch.eye(6, dtype=torch.float64)[:2]
    eraser = projected_off([one, one + two], x.mean(0))
    assert float((eraser(x)[:, :2] - x.mean(0)[:2]).abs().max()) <= 1e-12
    torch.testing.assert_close(eraser(x)[:, 2:], x[:, 2:], rtol=0, atol=1e-12)
