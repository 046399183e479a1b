"""Inner products of lists of tensors: accurate over millions of terms, in range, over any dtypes."""

from __future__ import annotations

import math

import pytest
import torch

from toolbox.unlearning import products
from toolbox.unlearning.gru import cosine, dot, rectify

SHAPES = [(301, 16), (16, 16), (16,), (), (0, 16), (64, 16)]


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def product(a, b) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def test_long_products_are_better_than_single_precision():
    """Four million products in the worst order for one sum: those that cancel come last."""
    size = (1 << 22) + 12345
    a, b = torch.full((size,), 0.1), torch.full((size,), 0.3)
    b[size // 2 :] = -0.3
    b[-1] = 7.0
    lengths = math.sqrt(product([a], [a]) * product([b], [b]))
    for kind, close in ((torch.float32, 1e-7), (torch.bfloat16, 1e-13), (torch.float64, 1e-13)):
        assert dot([a.to(kind)], [b]) == pytest.approx([product([a.to(kind)], [b])], abs=close * lengths)
    assert dot([a[:0]], [b[:0]]) == [0.0]


@pytest.mark.parametrize("power", [1, 3, 5])
def test_heavy_tails_do_not_swallow_small_terms(power):
    """As in gradients: most of the squared norm is in few entries; the rest must still be added up."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1 << 22, generator=generator) ** power
    b = torch.randn(1 << 22, generator=generator) ** power - 0.05 * a
    lengths = math.sqrt(product([a], [a]) * product([b], [b]))
    assert dot([a, a], [a, b]) == pytest.approx([product([a], [a]), product([a], [b])], rel=1e-7, abs=1e-8 * lengths)


def test_products_neither_overflow_nor_vanish_in_single_precision():
    huge, tiny = torch.full((1000,), 1e30), torch.full((1000,), 1e-30)
    assert dot([huge, tiny], [huge, tiny]) == pytest.approx([1e63, 1e-57], rel=1e-5)
    forget, average = [-tiny, tiny.clone()], [2 * tiny, 0 * tiny]
    found = rectify(forget, average, reduce=list)
    assert found.cos == pytest.approx(-math.sqrt(0.5), rel=1e-6)
    assert found.coef == pytest.approx(-0.5, rel=1e-6)


@pytest.mark.parametrize("piece", [3, 1 << 17])
@pytest.mark.parametrize("kinds", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
def test_dtypes_may_differ_within_a_pair(piece, kinds, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", piece)
    a, b = ([tensor.to(kind) for tensor in tensors(seed)] for seed, kind in enumerate(kinds))
    expected = [float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)]
    assert dot(a, b) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_cosine_of_a_vector_with_itself_its_opposite_and_nothing():
    a = tensors(0)
    assert cosine(a, a, reduce=list) == pytest.approx(1.0, abs=1e-15)
    assert cosine(a, [-x for x in a], reduce=list) == pytest.approx(-1.0, abs=1e-15)
    assert cosine(a, [0 * x for x in a], reduce=list) == 0.0
    with pytest.raises(FloatingPointError):
        cosine(a, [math.nan * x for x in a], reduce=list)
