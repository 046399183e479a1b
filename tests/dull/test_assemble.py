"""What a run is put together from and what it says before it starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.parity.test_dull import made
from toolbox.dull.assemble import make_optimizers
from toolbox.dull.options import Options
from toolbox.dull.telling import announce, done_event


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_nothing_but_their_own_gradient_moves_the_gates(optimizer):
    """No decay, no momentum, no clipping: only the rate, which keeps its ratio to the schedule's."""
    model = made("dull").model
    weights, optimizers = make_optimizers(model, Options(optimizer=optimizer, lr=0.1, weight_decay=0.5), 1.0)
    assert not any(one is model.gates for one in weights)
    assert len(optimizers) == 2
    assert not any(one is model.gates for group in optimizers[0].param_groups for one in group["params"])
    (group,) = optimizers[1].param_groups
    assert [one is model.gates for one in group["params"]] == [True]
    assert group["scale"] == pytest.approx(10)
    before = model.gates.detach().clone()
    for _ in range(2):
        model.gates.grad = torch.zeros_like(model.gates)
        optimizers[1].step()
    assert torch.equal(model.gates, before)
    model.gates.grad = torch.ones_like(model.gates)
    for _ in range(2):
        optimizers[1].step()
    assert torch.allclose(model.gates, before - 2.0, atol=1e-6), "a second step is as long as the first"
    assert len(make_optimizers(made("la").model, Options(method="la"), 1.0)[1]) == 1


def test_what_may_surprise_is_said_before_the_run():
    said: list[str] = []
    call = SimpleNamespace(reporter=SimpleNamespace(note=said.append, warn=said.append))
    start = {"rows": 9, "holdout": 0, "counts": [8, 1], "classes": ["a", "b"], "parameters": 1, "steps": 2}
    announce(call, Options(), start)
    assert "9 images (0 held out) in 2 classes of 8 to 1" in said[0]
    assert said[1:] == ["fewer than two training images of b: treated as clean",
                        "without a hold-out there is no evidence: the gate stays shut"]  # fmt: skip
    said.clear()
    announce(call, Options(gate="open"), start | {"counts": [8, 2], "holdout": 1})
    assert said[1:] == ["--gate open: labels are acted upon whether or not the data bear it out"]
    said.clear()
    announce(call, Options(method="la"), start | {"counts": [8, 2]})
    assert len(said) == 1


def test_the_last_line_is_that_of_the_last_epoch_with_the_mean_of_ten():
    events = [{"event": "epoch", "acc": n / 100, "gate_open": ["a"] * (n == 12), "seconds": 1.0} for n in range(1, 13)]
    done = done_event(Options(out="x"), events, {}, steps=5, stopped="epochs", tripped=False, samples=3)
    assert done["acc"] == 0.12
    assert done["acc_last10"] == pytest.approx(sum(range(3, 13)) / 1000)
    assert done["gate_open"] == ["a"]
    assert "detection" not in done
    assert done["seconds"] == 12
