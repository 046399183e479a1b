"""The step computed back from the optimiser is the step it made; its correction is the nearest without conflict."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from tests.thread_ranks import Ranks
from toolbox.shell.errors import UsageProblem
from toolbox.unlearning import products
from toolbox.unlearning.geometry import correct_step, step_delta, update_cosine

SHAPES = [(40, 8), (8, 8), (8,), ()]


def tensors(seed: int, dtype=torch.float64, shapes=SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def parameters(seed: int, dtype=torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors(seed, dtype, shapes)]


def take_step(optimizer, params, seed: int, missing: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """One step on random gradients; what it did to each parameter."""
    for place, (param, gradient) in enumerate(zip(params, tensors(seed, params[0].dtype), strict=True)):
        param.grad = None if place in missing else gradient
    old = [param.detach().clone() for param in params]
    optimizer.step()
    return [param.detach() - was for param, was in zip(params, old, strict=True)]


def computed(param, optimizer) -> torch.Tensor:
    """The whole step of one parameter from its pieces."""
    group = next(group for group in optimizer.param_groups if any(param is one for one in group["params"]))
    pieces = [delta for _, delta, _, _ in step_delta(param, optimizer, group, torch.zeros_like(param))]
    return torch.cat([piece.reshape(-1) for piece in pieces]).view(param.shape)


def product(a, b) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def cosine(a, b) -> float:
    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


def metric(params, optimizer) -> list[torch.Tensor]:
    """P = 1/(√v̂ + ε) from the optimiser's state, by the formula."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            corrected = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
            found.append(1 / (corrected.sqrt() + group["eps"]))
    return found


# -- the step ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("piece", [7, 1 << 17])
@pytest.mark.parametrize("kind", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_step_is_the_difference_it_made(piece, kind, decay, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", piece)
    params = parameters(0)
    groups = [{"params": params[:2], "lr": 3e-3}, {"params": params[2:], "weight_decay": 0.3, "betas": (0.5, 0.9)}]
    optimizer = AdamW(groups, lr=1e-2, weight_decay=decay, eps=1e-6, **kind)
    for step in range(5):
        optimizer.param_groups[0]["lr"] *= 0.7  # a schedule
        moved = take_step(optimizer, params, 10 + step, missing=(1,) if step == 2 else ())
        for place, (param, actual) in enumerate(zip(params, moved, strict=True)):
            if step == 2 and place == 1:
                assert not actual.any()
            else:
                assert torch.allclose(computed(param, optimizer), actual, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_step_is_the_difference_it_made(decay):
    params = parameters(0)
    optimizer = SGD(params, lr=0.03, weight_decay=decay)
    for step in range(3):
        moved = take_step(optimizer, params, 10 + step)
        for param, actual in zip(params, moved, strict=True):
            assert torch.allclose(computed(param, optimizer), actual, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("fused", [False, True])
def test_in_single_precision_it_is_known_better_than_by_subtracting(fused):
    """θ_new − θ_old is off by a rounding of θ; the computed step is within that of it, and within 1e-5 of the truth."""
    params, exact = parameters(0, torch.float32), parameters(0)
    for param, truth in zip(params, exact, strict=True):
        truth.data = param.detach().double()
    optimizers = [AdamW(one, lr=1e-4, weight_decay=0.01, fused=fused) for one in (params, exact)]
    for step in range(3):
        gradients = tensors(10 + step, torch.float32)
        for param, truth, gradient in zip(params, exact, gradients, strict=True):
            param.grad, truth.grad = gradient, gradient.double()
        old = [param.detach().clone() for param in params]
        was = [truth.detach().clone() for truth in exact]
        for optimizer in optimizers:
            optimizer.step()
        for param, before, truth, true_before in zip(params, old, exact, was, strict=True):
            delta = computed(param, optimizers[0])
            assert delta.dtype == torch.float32
            assert ((param.detach() - before) - delta).abs().max() <= 2**-22 * param.abs().max()
            assert (delta.double() - (truth.detach() - true_before)).abs().max() <= 1e-5 * 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Adam(params, lr=0.1),
        lambda params: SGD(params, lr=0.1, momentum=0.9),
        lambda params: AdamW(params, lr=0.1, maximize=True),
    ],
)
def test_a_step_that_cannot_be_computed_back_is_refused(make):
    params = parameters(0)
    optimizer = make(params)
    take_step(optimizer, params, 1)
    with pytest.raises(UsageProblem, match="cannot be computed back"):
        update_cosine(params, [optimizer], tensors(2), reduce=list)


# -- its angle --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("piece", [7, 1 << 17])
@pytest.mark.parametrize("wrapped", [False, True])
def test_update_cosine_is_that_of_the_whole_difference(piece, wrapped, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", piece)
    params = parameters(0)
    optimizers = [AdamW(params[:2], lr=1e-2, weight_decay=0.1), SGD(params[2:], lr=0.1)]
    for step in range(3):
        average: list = tensors(20 + step)
        moved = []
        for optimizer, mine in ((optimizers[0], params[:2]), (optimizers[1], params[2:])):
            shapes = [param.shape for param in mine]
            for param, gradient in zip(mine, tensors(30 + step, shapes=shapes), strict=True):
                param.grad = gradient
            old = [param.detach().clone() for param in mine]
            optimizer.step()
            moved += [param.detach() - was for param, was in zip(mine, old, strict=True)]
        given = [types.SimpleNamespace(optimizer=one) for one in optimizers] if wrapped else optimizers
        found = update_cosine(params, given, average, reduce=list)
        assert found == pytest.approx(cosine(moved, average), abs=1e-9)
        without = update_cosine(params, given, [None, *average[1:]], reduce=list)
        average[0] = torch.zeros_like(average[0])
        assert without == pytest.approx(cosine(moved, average), abs=1e-9)


def test_parameters_that_were_not_moved_do_not_count():
    params, average = parameters(0), tensors(1)
    optimizer = AdamW(params, lr=1e-2)
    take_step(optimizer, params, 2)
    moved = take_step(optimizer, params, 3, missing=(0,))
    found = update_cosine(params, [optimizer], average, reduce=list)
    assert found == pytest.approx(cosine(moved[1:], average[1:]), abs=1e-9)
    for param in params:
        param.grad = None
    assert update_cosine(params, [optimizer], average, reduce=list) == 0.0


# -- its correction ---------------------------------------------------------------------------------------------------
def conflicting(dtype=torch.float64, steps: int = 3, lr: float = 1e-3):
    """Parameters before and after a step of AdamW, and an average that the step climbs."""
    params = parameters(0, dtype)
    optimizer = AdamW(params, lr=lr, weight_decay=0.05)
    for step in range(steps):
        old = [param.detach().clone() for param in params]
        moved = take_step(optimizer, params, 10 + step)
    average = [0.3 * noise + delta / lr for noise, delta in zip(tensors(40, dtype), moved, strict=True)]
    assert cosine(moved, average) > 0.1
    return params, optimizer, average, old, moved


@pytest.mark.parametrize("piece", [7, 1 << 17])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_corrected_step_is_the_formula_and_orthogonal(piece, steps, monkeypatch):
    monkeypatch.setattr(products, "_PIECE", piece)
    params, optimizer, average, old, moved = conflicting(steps=steps)
    scale = metric(params, optimizer)
    within = product([p * a for p, a in zip(scale, average, strict=True)], average)
    found = correct_step(params, [optimizer], average, reduce=list)
    assert found.corrected is True
    assert found.dot == pytest.approx(product(moved, average), rel=1e-9)
    assert found.coef == pytest.approx(product(moved, average) / within, rel=1e-9)
    assert found.cos_before == pytest.approx(cosine(moved, average), rel=1e-9)
    now = [param.detach() - was for param, was in zip(params, old, strict=True)]
    for delta, was, p, mean in zip(now, moved, scale, average, strict=True):
        assert torch.allclose(delta, was - found.coef * p * mean, rtol=1e-9, atol=1e-14)
    assert abs(cosine(now, average)) <= 1e-12
    assert abs(found.update_cos) <= 1e-12


def test_it_is_the_nearest_step_in_the_optimisers_own_metric():
    params, optimizer, average, old, moved = conflicting()
    scale = metric(params, optimizer)
    correct_step(params, [optimizer], average, reduce=list)
    now = [param.detach() - was for param, was in zip(params, old, strict=True)]

    def distance(step) -> float:
        return math.fsum(float(((a - b) ** 2 / p).sum()) for a, b, p in zip(step, moved, scale, strict=True))

    assert product(now, average) <= 1e-12 * math.sqrt(product(now, now) * product(average, average))
    least = distance(now)
    for seed in range(40):
        size = 1e-3 * 10.0 ** -(seed % 4)
        other = [delta + size * noise for delta, noise in zip(now, tensors(100 + seed), strict=True)]
        excess = max(0.0, product(other, average)) / product(average, average)
        other = [delta - excess * mean for delta, mean in zip(other, average, strict=True)]
        assert distance(other) >= least * (1 - 1e-9)
    # The projection that ignores the metric is feasible too, and strictly further.
    plain = product(moved, average) / product(average, average)
    assert distance([delta - plain * mean for delta, mean in zip(moved, average, strict=True)]) > least * 1.01


def test_a_step_without_conflict_keeps_every_bit():
    params, optimizer, average, _, moved = conflicting(torch.float32)
    before = [param.detach().clone() for param in params]
    found = correct_step(params, [optimizer], [-mean for mean in average], reduce=list)
    assert (found.corrected, found.coef) == (False, 0.0)
    assert found.update_cos == found.cos_before == pytest.approx(-cosine(moved, average), abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    found = correct_step(params, [optimizer], [0 * mean for mean in average], reduce=list)
    assert (found.corrected, found.update_cos) == (False, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_single_precision_what_is_left_is_rounding(dtype):
    params, optimizer, average, old, _ = conflicting(torch.float32)
    found = correct_step(params, [optimizer], [mean.to(dtype) for mean in average], reduce=list)
    now = [param.detach() - was for param, was in zip(params, old, strict=True)]
    assert found.corrected is True
    assert abs(found.update_cos) <= 1e-5
    assert cosine(now, [mean.to(dtype) for mean in average]) <= 1e-4


def test_another_optimiser_has_no_such_geometry():
    params = parameters(0)
    optimizer = SGD(params, lr=0.1)
    take_step(optimizer, params, 1)
    with pytest.raises(UsageProblem, match="AdamW"):
        correct_step(params, [optimizer], tensors(2), reduce=list)


def test_a_step_that_is_not_finite_is_told():
    params, optimizer, average, _, _ = conflicting()
    average[1][0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        correct_step(params, [optimizer], average, reduce=list)


# -- shards -----------------------------------------------------------------------------------------------------------
def test_shards_are_corrected_as_the_whole_is():
    params, optimizer, average, _, _ = conflicting()
    gradients = [tensors(10 + step) for step in range(3)]
    expected = correct_step(params, [optimizer], average, reduce=list)

    def part(tensor, rank):
        chunks = tensor.reshape(-1).chunk(2)
        return chunks[rank].clone() if rank < len(chunks) else tensor.reshape(-1)[:0].clone()

    def work(rank, reduce):
        mine = [nn.Parameter(part(tensor, rank)) for tensor in tensors(0)]
        own = AdamW(mine, lr=1e-3, weight_decay=0.05)
        for step in gradients:
            for param, gradient in zip(mine, step, strict=True):
                param.grad = part(gradient, rank)
            own.step()
        here = [part(mean, rank) for mean in average]
        cos = update_cosine(mine, [own], here, reduce=reduce)
        return cos, correct_step(mine, [own], here, reduce=reduce), mine

    ranks = Ranks(2)
    (cos, found, one), (_, same, two) = ranks.run(work)
    assert found == same
    assert cos == pytest.approx(expected.cos_before, rel=1e-9)
    assert (found.dot, found.coef) == pytest.approx((expected.dot, expected.coef), rel=1e-9)
    assert ranks.calls == [4, 4, 4]
    for param, a, b in zip(params, one, two, strict=True):
        assert torch.allclose(param.detach().reshape(-1), torch.cat([a.detach(), b.detach()]), rtol=1e-12)


@pytest.fixture
def mesh():
    """A mesh of one process."""
    import torch.distributed as dist

    if dist.is_initialized():
        pytest.skip("this process is in a group already")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fully_sharded_parameters_are_taken_by_their_local_parts(mesh):
    from torch.distributed.fsdp import fully_shard

    results = []
    for sharded in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        if sharded:
            fully_shard(module, mesh=mesh)
        optimizer = AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
        module(torch.ones(3, 8)).square().sum().backward()
        old = [param.detach().clone() for param in module.parameters()]
        optimizer.step()
        params = list(module.parameters())
        assert hasattr(params[0], "to_local") == sharded
        moved = [param.detach() - was for param, was in zip(params, old, strict=True)]
        moved = [delta.to_local() if sharded else delta for delta in moved]
        noise = tensors(1, torch.float32, [delta.shape for delta in moved])
        average = [delta + 0.01 * some for delta, some in zip(moved, noise, strict=True)]
        cos = update_cosine(params, [optimizer], average, reduce=list)
        found = correct_step(params, [optimizer], average, reduce=list)
        weights = [param.detach().to_local() if sharded else param.detach() for param in params]
        results.append((cos, found, weights))
    (cos, found, weights), (shard_cos, shard_found, shard_weights) = results
    assert cos > 0.1
    assert shard_cos == pytest.approx(cos, rel=1e-6)
    assert shard_found.coef == pytest.approx(found.coef, rel=1e-6)
    assert shard_found.corrected is True
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights, shard_weights, strict=True))
