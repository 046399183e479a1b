"""ENCO against its reference implementation's numbers, and against slow loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.conftest import SHARED
from toolbox.legit.conditionals import FORMS, Conditionals, distribution_loss, grouped_nll
from toolbox.legit.method import (
    GammaAdam,
    ThetaAdam,
    edge_effects,
    edge_probabilities,
    gamma_gradient,
    theta_gradient,
    theta_step_mask,
)

WEIGHTS = ("embedding", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3")


@pytest.fixture(scope="module", params=["asia", "insurance"])
def reference(request):
    """Inputs and outputs of the published code on one network, and our networks with its weights."""
    path = SHARED / "legit" / "enco_reference.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference numbers are not here ({path})")
    from safetensors.torch import load_file

    stem = request.param + "."
    tensors = {name.removeprefix(stem): one for name, one in load_file(path).items() if name.startswith(stem)}
    count, _, most, hidden = tensors["embedding"].shape
    model = Conditionals([most] * count, hidden, mask_states=False, generator=torch.Generator())
    model.load_state_dict({name: tensors[name] for name in WEIGHTS})
    return tensors, model


def never_of(tensors, kind: str) -> torch.Tensor:
    never = torch.zeros(len(tensors["gamma"]), dtype=torch.bool)
    if kind == "partial":
        never[tensors["never_intervened"]] = True
    return never


@pytest.mark.parametrize("form", FORMS)
def test_the_likelihood_is_the_published_codes_in_all_three_forms(reference, form):
    tensors, model = reference
    found = FORMS[form](model, tensors["batch"], tensors["graphs"].float(), int(tensors["target"]))
    assert float((found - tensors["nll"]).abs().max()) <= 1e-5


@pytest.mark.parametrize("kind", ["all", "partial"])
def test_gradients_masks_and_three_optimiser_steps_are_the_published_codes(reference, kind):
    tensors, model = reference
    target, never = int(tensors["target"]), never_of(tensors, kind)
    nll = FORMS["unique"](model, tensors["batch"], tensors["graphs"].float(), target)
    effects = edge_effects(nll, tensors["graphs"].float())
    gamma, theta = tensors["gamma"].clone(), tensors["theta"].clone()
    found = {
        "grad_gamma": gamma_gradient(effects, gamma, theta, target),
        "grad_theta": theta_gradient(effects, gamma, theta, target, never),
        "theta_step_mask": theta_step_mask(target, never),
    }
    first, second = GammaAdam(gamma), ThetaAdam(theta)
    for scale in (1, 0.75, 0.5):
        first.step(scale * found["grad_gamma"])
        second.step(scale * found["grad_theta"], found["theta_step_mask"])
    found |= {"gamma_after_3": gamma, "theta_after_3": theta}
    for name, value in found.items():
        assert float((value - tensors[f"{kind}.{name}"]).abs().max()) <= 1e-5, name
    assert torch.equal(theta, -theta.t())


def small() -> tuple[Conditionals, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = [2, 3, 2, 4]
    model = Conditionals(states, 5, generator=generator)
    with torch.no_grad():
        for one in (model.bias_1, model.bias_2, model.bias_3):
            one.normal_(generator=generator)
    rows = torch.stack([torch.randint(0, size, (11,), generator=generator) for size in states], 1).to(torch.int8)
    graphs = (torch.rand(9, 4, 4, generator=generator) < 0.5).float()
    return model, rows, graphs


def loop_nll(model: Conditionals, row: list[int], graph: torch.Tensor, child: int) -> float:
    """-log p of one child in one row under one graph, in float64, number by number."""
    weight = {name: getattr(model, name).double() for name in WEIGHTS}

    def leaky(x: float) -> float:
        return x if x > 0 else 0.1 * x

    hidden = model.embedding.shape[-1]
    one = [
        leaky(
            float(weight["bias_1"][child, h])
            + sum(
                float(weight["embedding"][child, j, row[j], h])
                for j in range(len(row))
                if j != child and graph[j, child]
            )
        )
        for h in range(hidden)
    ]
    two = [
        leaky(
            float(weight["bias_2"][child, h])
            + sum(one[i] * float(weight["weight_2"][child, i, h]) for i in range(hidden))
        )
        for h in range(hidden)
    ]
    logits = [
        float(weight["bias_3"][child, c]) + sum(two[i] * float(weight["weight_3"][child, i, c]) for i in range(hidden))
        for c in range(model.states[child])
    ]
    return math.log(sum(math.exp(one) for one in logits)) - logits[row[child]]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_formula_and_states_that_are_not_there_get_nothing(form):
    model, rows, graphs = small()
    found = FORMS[form](model, rows, graphs, 2)
    for k, child in itertools.product(range(3), range(4)):
        slow = sum(loop_nll(model, row, graphs[k], child) for row in rows.tolist()) / len(rows)
        assert float(found[k, child]) == pytest.approx(0.0 if child == 2 else slow, abs=1e-5)


def test_groups_of_rows_are_averaged_apart():
    model, rows, graphs = small()
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    found = grouped_nll(model, rows, graphs, groups, 3)
    for one in range(3):
        alone = FORMS["gather"](model, rows[groups == one], graphs)
        assert torch.allclose(found[one], alone, atol=1e-6)


def test_the_loss_of_distribution_fitting_is_the_likelihood_with_a_graph_a_row():
    model, rows, graphs = small()
    masks = graphs[torch.arange(11) % 9] * (1 - torch.eye(4))
    slow = sum(loop_nll(model, row, masks[b], n) for b, row in enumerate(rows.tolist()) for n in range(4)) / len(rows)
    assert float(distribution_loss(model, rows, masks)) == pytest.approx(slow, rel=1e-5)
    kept = torch.ones(11, 4)
    kept[:5, 1] = 0
    some = distribution_loss(model, rows, masks, kept)
    parts = [
        sum(loop_nll(model, row, masks[b], n) for b, row in enumerate(rows.tolist()) if kept[b, n])
        / int(kept[:, n].sum())
        for n in range(4)
    ]
    assert float(some) == pytest.approx(sum(parts), rel=1e-5)


def test_both_gradients_are_the_formulas():
    model, rows, graphs = small()
    generator = torch.Generator().manual_seed(1)
    gamma, theta = torch.randn(4, 4, generator=generator), torch.randn(4, 4, generator=generator).triu(1)
    theta = theta - theta.t()
    never, target = torch.tensor([True, False, False, True]), 1
    nll = FORMS["gather"](model, rows, graphs, target)
    effects = edge_effects(nll, graphs)
    g, s = torch.sigmoid(gamma.double()), torch.sigmoid(theta.double())
    raw = torch.zeros(4, 4, dtype=torch.float64)
    wanted = torch.zeros(4, 4, dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        have = [float(nll[k, j]) for k in range(9) if graphs[k, i, j]]
        lack = [float(nll[k, j]) for k in range(9) if not graphs[k, i, j]]
        d = sum(have) / len(have) - sum(lack) / len(lack)
        if j != target:
            wanted[i, j] = g[i, j] * (1 - g[i, j]) * s[i, j] * (d + 0.004)
        if i == target or (never[i] and never[j]):
            raw[i, j] = s[i, j] * (1 - s[i, j]) * g[i, j] * d
    assert torch.allclose(gamma_gradient(effects, gamma, theta, target).double(), wanted, atol=1e-7)
    assert torch.allclose(theta_gradient(effects, gamma, theta, target, never).double(), raw - raw.t(), atol=1e-7)
    p = edge_probabilities(gamma, theta)
    assert bool(((p + p.t()) <= 1).all())
