"""Relabelled twins of every architecture: the same function, found again exactly, and what must hold in any mode."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.lwi.nets import NETS, save_net
from toolbox.lwi.align import divert, group_lines, match, prepare
from toolbox.lwi.checkpoint import Fused, Model, Relabelled, open_checkpoint, pair_labels
from toolbox.lwi.choices import Options
from toolbox.lwi.groups import identity, random_relabelling
from toolbox.lwi.inputs import find_spec
from toolbox.lwi.verify import Runner, check_spec, difference

WITHOUT_SPEC = Options(models=("x",))


class Changed(Model):
    """A model whose floating tensors are changed one by one."""

    def __init__(self, model, change):
        self.model, self.change, self.name, self.labels = model, change, model.name, model.labels

    def names(self):
        return self.model.names()

    def shape(self, key):
        return self.model.shape(key)

    def read(self, key):
        values = self.model.read(key)
        return self.change(key, values) if values.is_floating_point() else values


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Open the nets once: ``nets("llama")`` gives checkpoint, spec and plan."""
    known = {}

    def get(name):
        if name not in known:
            checkpoint = open_checkpoint(str(save_net(name, tmp_path_factory.mktemp("nets") / name)))
            known[name] = (checkpoint, *find_spec(checkpoint, WITHOUT_SPEC))
        return known[name]

    return get


def align(plan, old, new, **options):
    job = prepare(plan, old, new, pair_labels(old, new, plan), Options(models=("x",), **options), "cpu")
    match(job, 1, lambda: None)
    divert(job)
    return job


@pytest.mark.parametrize("name", NETS)
def test_a_relabelled_twin_has_the_same_function_and_is_found_again_exactly(nets, name):
    checkpoint, spec, plan = nets(name)
    run = Runner(checkpoint, plan, seed=5)
    before = run(checkpoint)
    twin = Relabelled(checkpoint, plan, random_relabelling(plan, 11))
    assert difference(before, run(twin)) < 1e-4
    moved = [key for key in checkpoint.names() if not torch.equal(twin.read(key), checkpoint.read(key))]
    assert len(moved) > 0.7 * sum(bool(tensor.groups) for tensor in plan.tensors.values())
    job = align(plan, twin, checkpoint, deep="0", groups=".")
    back = Relabelled(twin, plan, job.state.perms)
    rows = pair_labels(twin, checkpoint, plan)
    fused = Fused(back, checkpoint, plan, rows, 0.5)
    for key in checkpoint.names():
        assert torch.equal(back.read(key), checkpoint.read(key)), key
        assert (fused.read(key) - checkpoint.read(key)).abs().max() <= 1e-6
    assert check_spec(spec, checkpoint, plan, 3, 1e12).worst < 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_a_shrunk_copy_stands_for_a_large_model(nets, name):
    checkpoint, spec, plan = nets(name)
    verdict = check_spec(spec, checkpoint, plan, 3, limit=0)
    assert verdict.how == "shrunk"
    assert 0 < verdict.worst < 1e-4


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine", "gamf", "edge"])
def test_any_metric_and_the_entropic_solver_find_a_twin_again(nets, metric):
    checkpoint, _, plan = nets("cifar-resnet")
    twin = Relabelled(checkpoint, plan, random_relabelling(plan, 2))
    solver = "sinkhorn" if metric == "sqeuclidean" else "lsa"
    job = align(plan, twin, checkpoint, deep="0", metric=metric, solver=solver)
    back = Relabelled(twin, plan, job.state.perms)
    assert all(torch.equal(back.read(key), checkpoint.read(key)) for key in checkpoint.names())


@pytest.mark.parametrize("name", ["llama", "cifar-resnet"])
def test_rows_are_found_again_under_a_tenth_of_noise(nets, name):
    checkpoint, _, plan = nets(name)
    generator = torch.Generator().manual_seed(0)

    def noisy(key, values):
        noise = torch.randn(values.shape, generator=generator)
        return values + 0.1 * noise * values.norm() / noise.norm()

    noise = {key: noisy(key, checkpoint.read(key)) for key in checkpoint.names() if plan.tensors[key].groups}
    shuffle = random_relabelling(plan, 4)
    twin = Relabelled(Changed(checkpoint, lambda key, values: noise.get(key, values)), plan, shuffle)
    job = align(plan, twin, checkpoint, deep="0", groups=".")
    from toolbox.lwi.descent import recovered

    shares = recovered(plan, shuffle, job.state.perms)
    found = [share for name, share in shares.items() if name.endswith(("ff", "inner", "stream", "stem"))]
    assert min(found) >= 0.99


MODES = {
    "coordinate": {},
    "greedy": {"matching": "greedy"},
    "identity": {"matching": "identity"},
    "deep": {"deep": "2"},
    "regex": {"deep": "stream|ff"},
    "cosine": {"metric": "cosine"},
    "sinkhorn": {"solver": "sinkhorn"},
    "some": {"groups": "inner|ff|qin"},
    "children": {"groups": "vo|stem"},
}


@pytest.mark.parametrize("name", ["cifar-resnet", "qwen2"])
def test_aligned_old_keeps_its_function_in_every_mode_and_costs_are_in_order(nets, name, tmp_path):
    """Two nets that have nothing in common: alignment is only relabelling, whatever it optimises."""
    checkpoint, _, plan = nets(name)
    other = open_checkpoint(str(save_net(name, tmp_path / "other", seed=9, scale=20.0)))
    run = Runner(other, plan, seed=1)
    before = run(other)
    for mode, options in MODES.items():
        if mode == "sinkhorn" and name != "cifar-resnet":
            continue
        job = align(plan, other, checkpoint, **{"no_diversion": "deep" not in options, **options})
        after = run(Relabelled(other, plan, job.state.perms))
        assert difference(before, after) < 1e-4, mode
        lines = {line.group: line for line in group_lines(job, "lsa", None)}
        for line in lines.values():
            if line.mode == "similar" and mode not in ("greedy", "sinkhorn"):
                assert line.cost <= line.cost_identity * (1 + 1e-6 * (line.cost > 0)) + 1e-6, (mode, line)
            if line.mode == "dissimilar":
                assert line.cost >= line.cost_identity - 1e-6, (mode, line)
        assert {line.mode for line in lines.values()} <= {"similar", "dissimilar", "identity"}
        if mode in ("coordinate", "greedy", "cosine"):
            assert any(line.moved > 0 and line.mode == "similar" for line in lines.values())
        expected = {"deep": 2, "regex": 2}.get(mode, 0)
        assert sum(line.mode == "dissimilar" for line in lines.values()) == expected
        if mode == "identity":
            assert all(line.moved == 0 and line.mode == "identity" for line in lines.values())


def test_dissimilar_is_scipys_optimum_on_the_negated_cost_and_moves_no_other_group(nets, tmp_path):
    from scipy.optimize import linear_sum_assignment

    checkpoint, _, plan = nets("cifar-resnet")
    other = open_checkpoint(str(save_net("cifar-resnet", tmp_path / "other", seed=9, scale=20.0)))
    deep = plan.deepest[-1]
    assert deep == "stages.2.stream"
    held = align(plan, other, checkpoint, groups="^(?!stages.2.stream$)", no_diversion=True)
    assert any((perm != torch.arange(len(perm))).any() for perm in held.state.perms.values())
    job = align(plan, other, checkpoint, deep="1")
    for name in plan.groups:
        if name != deep:
            assert torch.equal(job.state.perms[name], held.state.perms[name])
    aligned = Relabelled(other, plan, held.state.perms)
    cost = torch.zeros(12, 12, dtype=torch.float64)
    for key in plan.compared[deep]:
        place = next(n for n, axis in enumerate(plan.tensors[key].axes) if axis[0][0].group == deep)
        one, two = (model.read(key).double().movedim(place, 0).reshape(12, -1) for model in (aligned, checkpoint))
        cost += torch.cdist(one, two).square()
    rows, columns = linear_sum_assignment(-cost.T.numpy())
    assert job.state.perms[deep].tolist() == columns.tolist()
    assert job.state.found[deep].cost == pytest.approx(float(cost.T[rows, columns].sum()), rel=1e-5)
    assert job.state.found[deep].cost_identity == pytest.approx(float(cost.trace()), rel=1e-5)


def test_the_squared_cost_falls_in_every_step(nets, tmp_path, monkeypatch):
    from toolbox.lwi import descent

    checkpoint, _, plan = nets("gpt2")
    other = open_checkpoint(str(save_net("gpt2", tmp_path / "other", seed=9, scale=2.0)))
    seen = []
    improve = descent.Descent.improve

    def watched(self, name):
        moved = improve(self, name)
        inner = sum(
            float((old.double() * new).sum())
            for key, tensor in plan.tensors.items()
            for old, new in [self.pairs(key)]
            for old in [Relabelled(other, plan, self.state.perms).read(key)]
        )
        seen.append((moved, inner))
        return moved

    monkeypatch.setattr(descent.Descent, "improve", watched)
    job = align(plan, other, checkpoint, groups=".", no_diversion=True)
    assert sum(moved for moved, _ in seen) > 3
    for (_, one), (moved, two) in itertools.pairwise(seen):
        assert two > one if moved else two == one
    assert job.state.sweeps > 1
    assert not torch.equal(job.state.perms["residual"], identity(plan)["residual"])


@pytest.mark.parametrize("name", ["cifar-resnet", "preact-resnet"])
def test_statistics_of_other_images_decide_nothing_and_move_with_their_channels(nets, name):
    """What batch norm measured on another task's images is large and foreign; the weights alone are matched."""
    checkpoint, _, plan = nets(name)
    generator = torch.Generator().manual_seed(3)
    measured = {
        key: 30 * torch.rand(checkpoint.shape(key), generator=generator)
        for key in checkpoint.names()
        if key.endswith(("running_mean", "running_var"))
    }
    tuned = Changed(checkpoint, lambda key, values: measured.get(key, 1.01 * values))
    job = align(plan, checkpoint, tuned, deep="0")
    assert all(line.moved == 0 and line.mode == "similar" for line in group_lines(job, "lsa", None))
    twin = Relabelled(checkpoint, plan, random_relabelling(plan, 11))
    job = align(plan, twin, tuned, deep="0")
    back = Relabelled(twin, plan, job.state.perms)
    assert all(torch.equal(back.read(key), checkpoint.read(key)) for key in checkpoint.names())
    assert all(line.cos_after == pytest.approx(1) for line in group_lines(job, "lsa", None))
    apart = Changed(checkpoint, lambda key, values: 1.01 * values)
    one, two = (align(plan, checkpoint, new, deep="1").state.perms for new in (tuned, apart))
    assert all(torch.equal(one[group], two[group]) for group in plan.groups)
    assert (one[plan.deepest[-1]] != identity(plan)[plan.deepest[-1]]).any()
