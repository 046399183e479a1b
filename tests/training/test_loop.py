"""The loop: schedules, several optimisers, parameters outside the clip norm, rows that are not tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from toolbox.shell.errors import TryAgain
from toolbox.training.loop import Loop, LoopSettings, learning_rate
from toolbox.training.objective import Objective, Pass
from toolbox.training.processes import start_processes
from toolbox.training.windows import Plan, Stream


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule):
    rates = [learning_rate(step, 20, 1.0, 0.2, schedule) for step in range(1, 21)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == 1.0
    assert rates == [learning_rate(step, 20, 1.0, 4, schedule) for step in range(1, 21)]
    if schedule == "constant":
        assert set(rates[4:]) == {1.0}
    else:
        assert all(a > b > 0 for a, b in pairwise(rates[4:]))
    if schedule == "linear":
        assert rates[12] == pytest.approx(0.5)
    if schedule == "cosine":
        assert rates[12] == pytest.approx(0.5)
        assert rates[-1] < 0.01


@dataclass
class Vectors:
    """A batch that is not token rows."""

    x: torch.Tensor
    y: torch.Tensor

    def to(self, device):
        return Vectors(self.x.to(device), self.y.to(device))


class Regression(Objective):
    """Squared error of rows with weights of their own as units; a second pass pulls the weights to zero."""

    passes = (Pass("fit", "fit"), Pass("shrink", "shrink"))

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(12, 3, generator=generator)
        self.y = torch.randn(12, 1, generator=generator)
        self.seen = []

    def length(self, stream, row):
        return 1 + row

    def units(self, one, row):
        return 0.5 + row

    def batch(self, one, rows):
        return Vectors(self.x[list(rows)], self.y[list(rows)])

    def start(self, ground):
        self.ground = ground

    def loss(self, model, one, batch, divisor):
        out = model(batch.x)
        total = ((out - batch.y) ** 2).sum() if one.name == "fit" else 0.1 * (out**2).sum()
        return total / divisor, {one.name: total.detach()}

    def after_pass(self, one, sums):
        self.seen.append((one.name, [p.grad.clone() for p in self.ground.parameters.values()]))

    def report(self, sums, divisors):
        return {"loss": sums["fit"] / divisors["fit"] + sums["shrink"] / divisors["shrink"]}


def build(micro_batch="auto", max_grad_norm=0.0, clip_bias=True, lr=0.1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [torch.optim.SGD(weights, lr=lr), torch.optim.SGD([{"params": biases, "scale": 0.5}], lr=lr)]
    objective = Regression()
    plan = Plan(Stream("fit", 12, 5), [Stream("shrink", 12, 4)], 2, seed=0)
    loop = Loop(
        start_processes(), model, objective, optimizers, plan,
        LoopSettings(lr=lr, micro_batch=micro_batch, max_grad_norm=max_grad_norm, save_every=0),
        clipped=None if clip_bias else weights,
    )  # fmt: skip
    return loop, model, objective


def test_steps_equal_a_plain_loop_over_whole_windows():
    loop, model, objective = build()
    plain = copy.deepcopy(model)
    events = list(loop.run())
    for step in range(1, loop.plan.steps + 1):
        window = loop.plan.window(step)
        plain.zero_grad()
        for stream in ("fit", "shrink"):
            rows = list(window.rows[stream])
            out = plain(objective.x[rows])
            loss = ((out - objective.y[rows]) ** 2).sum() if stream == "fit" else 0.1 * (out**2).sum()
            (loss / sum(0.5 + row for row in rows)).backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.1 * (0.5 if parameter.ndim == 1 else 1.0) * parameter.grad
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
    assert [event["step"] for event in events] == list(range(1, 7))


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_do_not_show(micro_batch):
    (one, model, a), (two, other, b) = build(), build(micro_batch)
    first, second = list(one.run()), list(two.run())
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
    assert [e["loss"] for e in first] == pytest.approx([e["loss"] for e in second], rel=1e-6)
    assert len(a.seen) == len(b.seen) == 12  # the hook runs once a pass, not once a micro-batch


def test_hooks_see_gradients_add_up_over_passes():
    loop, _, objective = build()
    next(iter(loop.run()))
    (first, fit), (second, both) = objective.seen[:2]
    assert (first, second) == ("fit", "shrink")
    assert any(not torch.equal(x, y) for x, y in zip(fit, both, strict=True))


def test_the_clip_norm_covers_the_clipped_parameters_only():
    free, model_a, _ = build()
    clipped, model_b, _ = build(max_grad_norm=1e-3, clip_bias=False)
    start = {name: p.clone() for name, p in model_a.named_parameters()}
    next(iter(free.run()))
    event = next(iter(clipped.run()))
    moved = {name: (p - start[name]).norm() for name, p in model_b.named_parameters()}
    whole = torch.stack([moved[n] for n in moved if n.endswith("weight")]).norm()
    assert float(whole) == pytest.approx(0.1 * 1e-3, rel=1e-3)
    for name in (n for n in moved if n.endswith("bias")):
        torch.testing.assert_close(dict(model_a.named_parameters())[name], dict(model_b.named_parameters())[name])
    assert event["grad_norm"] > 1e-3


def test_a_loss_that_is_not_finite_stops_before_the_step():
    loop, model, objective = build()
    objective.y[3] = float("nan")
    with pytest.raises(TryAgain, match="not finite"):
        list(loop.run())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_model_that_has_diverged_is_never_handed_out():
    loop, model, _ = build()
    events = loop.run()
    for event in events:
        if event["step"] == loop.plan.steps:
            with torch.no_grad():
                next(model.parameters())[0, 0] = float("inf")  # as the last update may leave it
            break
    with pytest.raises(TryAgain, match="a parameter is not finite"):
        list(events)


def test_an_evaluation_that_is_not_finite_stops_the_run():
    loop, _, _ = build()

    def evaluate():
        raise FloatingPointError("the prob of a watched row is not finite")

    loop.evaluate = evaluate
    with pytest.raises(TryAgain, match="behind step 0: the prob of a watched row"):
        list(loop.run())


def test_the_rate_of_a_step_is_set_before_its_passes():
    """An optimiser that runs inside backward needs it then."""
    loop, _, objective = build(lr=0.1)
    loop.settings = replace(loop.settings, schedule="linear")
    seen = []
    objective.before_window = lambda window: seen.append([o.param_groups[0]["lr"] for o in loop.optimizers])
    rates = [event["lr"] for event in loop.run()]
    assert len(set(rates)) == loop.plan.steps
    assert seen == [[pytest.approx(rate), pytest.approx(rate / 2)] for rate in rates]


def test_the_model_need_not_be_evaluated_before_the_first_step():
    for start in (True, False):
        loop, _, _ = build()
        loop.settings = replace(loop.settings, evaluate_start=start, eval_every=4)
        loop.evaluate = lambda: {"set": {"n": 1, "loss": 1.0}}
        found = [event["step"] for event in loop.run() if event["event"] == "eval"]
        assert found == ([0, 4, 6] if start else [4, 6])


def test_how_much_a_pass_may_hold_is_a_setting():
    counts = {}
    for most in (13, 10_000):
        loop, _, objective = build()
        loop.settings = replace(loop.settings, auto_length=most)
        calls = []
        whole = objective.batch
        objective.batch = lambda one, rows, calls=calls, whole=whole: calls.append(len(rows)) or whole(one, rows)
        next(iter(loop.run()))
        counts[most] = len(calls)
    assert counts[10_000] == 2  # one a pass
    assert counts[13] > 4


def test_ranks_that_hold_different_things_save_each_its_own(tmp_path):
    loop, _, objective = build()
    objective.state = lambda: {"mine": torch.ones(2)}
    again = Loop(
        loop.accelerator, loop.model, objective, loop.optimizers, loop.plan, loop.settings, state_dir=tmp_path,
        each_rank=True,
    )  # fmt: skip
    events = again.run()
    next(events)
    again.save()
    found = []
    objective.load_state = found.append
    again.resume(tmp_path / "step-000001")
    assert torch.equal(found[0]["mine"], torch.ones(2))
    assert [path.name for path in (tmp_path / "step-000001").glob("rank-*")] == ["rank-0000.safetensors"]


@pytest.mark.parametrize("steps", [10, 97])
def test_one_cycle_is_that_of_torch_and_steps_fall_where_they_should(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    peer = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, cycle_momentum=False)
    for step in range(1, steps + 1):
        assert learning_rate(step, steps, 0.1, 0.0, "onecycle") == pytest.approx(peer.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < steps:
            peer.step()
    rates = [learning_rate(step, steps, 1.0, 0.0, "step", (0.4, 0.6)) for step in range(1, steps + 1)]
    assert rates.count(1.0) == round(0.4 * steps)
    assert sum(abs(rate - 0.01) < 1e-9 for rate in rates) == steps - round(0.6 * steps)
