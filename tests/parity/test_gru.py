"""GRU against whole vectors in float64, written from the formulas: average, projection, clip, scopes, several steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolbox.unlearning import products
from toolbox.unlearning.gru import RetainAverage, rectify, scope_groups

NAMES = [
    *("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    *("model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"),
]
SHAPES = [(37, 8), (8, 8), (24, 8), (8, 8), (8,), ()]
LAYERS = [0, 1, 1, 2, 2, 3]


def gradients(seed: int, pull: float) -> list[torch.Tensor]:
    """Random tensors of very unequal size, with a common direction so that conflicts come and go."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator) * 10.0 ** (-number % 3) + pull * (1 if number % 2 else -0.5)
        for number, shape in enumerate(SHAPES)
    ]


def whole(tensors: list[torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.numpy().astype(np.float64).ravel() for tensor in tensors])


def spans(groups: list[int]) -> list[np.ndarray]:
    """The places of each group's entries in the whole vector."""
    of_entry = np.repeat(groups, [int(np.prod(shape)) for shape in SHAPES])
    return [np.flatnonzero(of_entry == group) for group in sorted(set(groups))]


def project(forget: np.ndarray, retain: np.ndarray, clip: float | None) -> np.ndarray:
    product = float(forget @ retain)
    if product >= 0 or not retain.any():
        return forget
    if clip is None:
        return forget - product / float(retain @ retain) * retain
    length, direction = np.linalg.norm(forget), retain / np.linalg.norm(retain)
    return forget - length * max(float(forget @ direction) / length, clip) * direction


@pytest.fixture(params=[1 << 17, 5], ids=["whole", "small pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", request.param)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize(("kind", "close"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("momentum", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("clip", [None, -0.5, -0.02])
@pytest.mark.parametrize(("scope", "expected"), [("model", [0] * 6), ("layer", LAYERS), ("tensor", list(range(6)))])
def test_six_steps_equal_the_whole_vector_version(kind, close, momentum, clip, scope, expected):
    average, slow = RetainAverage(momentum, kind), np.zeros(whole(gradients(0, 0)).size)
    groups = scope_groups(NAMES, scope)
    conflicts = 0
    for step in range(6):
        pull = (-0.3, 0.2, -0.1)[step % 3]
        retain, forget = ([g.to(kind) for g in gradients(*which)] for which in ((step, 0.4), (100 + step, pull)))
        slow = momentum * whole(retain) + (1 - momentum) * slow
        before, after = whole(forget), whole(forget)
        changed = 0
        for span in spans(expected):
            after[span] = project(before[span], slow[span], clip)
            changed += bool((after[span] != before[span]).any())
        average.fold(retain)
        found = rectify(forget, average.tensors, reduce=list, groups=groups, cos_clip=clip)
        size = np.linalg.norm(after)
        length = np.linalg.norm(slow)
        assert np.abs(whole(average.tensors) - slow).max() <= close * np.abs(slow).max()
        assert np.abs(whole(forget) - after).max() <= close * np.abs(before).max()
        assert found.norm_forget == pytest.approx(np.linalg.norm(before), rel=close)
        assert found.norm_retain == pytest.approx(length, rel=close)
        assert found.dot == pytest.approx(before @ slow, abs=close * found.norm_forget * length)
        assert found.cos == pytest.approx(before @ slow / found.norm_forget / length, abs=close)
        assert found.norm_after == pytest.approx(size, rel=close)
        assert found.cos_after == pytest.approx(after @ slow / size / length, abs=close)
        assert found.rectified == (bool(changed) if scope == "model" else changed / len(set(expected)))
        assert sum(found.products) == pytest.approx(found.dot, rel=1e-12)
        conflicts += changed
    assert conflicts >= 3


@pytest.mark.usefixtures("piece")
def test_a_bfloat16_average_gives_the_projection_against_what_it_holds():
    """The buffer is rounded to 8 bits; the projection against the rounded one is as exact as any."""
    average, exact = RetainAverage(0.8, torch.bfloat16), RetainAverage(0.8)
    for step in range(4):
        retain, forget = gradients(step, 0.4), gradients(50 + step, -0.4)
        before = whole(forget)
        average.fold(retain)
        exact.fold(retain)
        held = whole([mean.float() for mean in average.tensors])
        assert np.linalg.norm(held - whole(exact.tensors)) <= 2**-8 * np.linalg.norm(held)
        found = rectify(forget, average.tensors, reduce=list)
        assert found.rectified is True
        assert np.abs(whole(forget) - project(before, held, None)).max() <= 1e-6 * np.abs(before).max()
        assert abs(found.cos_after) <= 1e-6


def test_bfloat16_gradients_are_projected_as_well_as_they_can_be_written():
    retain = gradients(1, 0.4)
    forget = [(noise - 0.5 * mean).bfloat16() for noise, mean in zip(gradients(51, 0.0), retain, strict=True)]
    before = whole([gradient.float() for gradient in forget])
    average = RetainAverage(1.0)
    average.fold(retain)
    found = rectify(forget, average.tensors, reduce=list)
    after = whole([gradient.float() for gradient in forget])
    expected = project(before, whole(retain), None)
    assert found.rectified is True
    assert np.linalg.norm(after - expected) <= 2**-8 * np.linalg.norm(expected)
    assert found.cos_after == pytest.approx(after @ whole(retain) / np.linalg.norm(after) / found.norm_retain, abs=1e-6)
