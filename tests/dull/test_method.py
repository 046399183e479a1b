"""Gates, labels, unlearning and mixing against slow versions in float64, and what must hold whatever the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from toolbox.classify.backbones import backbone_config, new_backbone
from toolbox.dull import labels
from toolbox.dull.gates import Gated, auto_lambda, find_head, gate_vectors, project, sparsity
from toolbox.dull.mix import draw_mixing, head_share, may_mix
from toolbox.dull.unlearn import unlearning_loss, weakened, wrong_only
from toolbox.shell.errors import BadData


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def small_net(classes: int = 4, seed: int = 0) -> torch.nn.Module:
    config = backbone_config("cifar-resnet8", [str(n) for n in range(classes)], widths=[3, 4, 6])
    return new_backbone(config, seed)


# -- gates ------------------------------------------------------------------------------------------------------------
def test_gating_the_pooled_vector_equals_masks_over_the_whole_map():
    net = small_net().eval()
    model = Gated(net, 4, trained=True)
    with torch.no_grad():
        model.gates.copy_(draw(6, 4, seed=1))
    images, targets = draw(5, 3, 16, 16, seed=2), torch.softmax(3 * draw(5, 4, seed=3), 1)
    model.requires_grad_(False)
    found = model(images, targets)
    maps = []
    hook = net.stages[-1]["blocks"][-1].register_forward_hook(lambda _, __, out: maps.append(out))
    net(images)
    hook.remove()
    for number in range(5):
        for k in range(6):
            gate = sum(float(targets[number, c]) * float(model.gates[k, c]) for c in range(4))
            maps[0][number, k] *= min(1.0, max(0.0, gate))
    masked = net.classifier(maps[0].mean((2, 3)))
    assert float((masked - found["gated"]).abs().max()) <= 1e-6
    assert torch.equal(found["logits"], net(images).logits)


def test_predictions_do_not_depend_on_the_gates():
    model = Gated(small_net().eval(), 4, trained=True)
    images = draw(3, 3, 16, 16)
    before = model(images)["logits"]
    with torch.no_grad():
        model.gates.copy_(draw(6, 4, seed=9))
    assert torch.equal(model(images)["logits"], before)


def test_projection_keeps_rows_at_one_and_values_within_zero_and_one():
    gates = 3 * draw(7, 5) - 1
    gates[2] = -0.5
    wanted = [[min(1.0, max(0.0, float(x) / max(map(float, row)))) for x in row] for row in gates]
    wanted[2] = [1.0] * 5
    project(gates)
    assert torch.allclose(gates, torch.tensor(wanted), atol=1e-6)
    assert gates.amax(1).tolist() == [1.0] * 7
    assert gates.min() >= 0
    again = gates.clone()
    project(again)
    assert torch.equal(again, gates)


def test_sparsity_ends_at_the_density_asked_for_and_does_not_know_the_number_of_steps():
    gates = draw(10, 4)
    assert float(sparsity(gates, 0.2)) == pytest.approx(float(gates.sum()) - 0.2 * 40, abs=1e-5)
    assert float(sparsity(torch.full((10, 4), 0.1), 0.2)) == 0
    assert auto_lambda(0.5, 100) * 100 == pytest.approx(auto_lambda(0.5, 1000) * 1000)
    assert float(gate_vectors(gates, 3 * torch.eye(4)).max()) == 1


def test_a_model_without_a_head_of_that_size_is_refused():
    assert find_head(small_net(4), 4).in_features == 6
    with pytest.raises(BadData, match="no linear layer with 5 outputs"):
        find_head(small_net(4), 5)


@pytest.mark.parametrize("kind", ["vit", "convnext", "swin", "resnet"])
def test_the_pooled_feature_of_any_hugging_face_classifier_is_found(kind):
    from transformers import AutoConfig, AutoModelForImageClassification

    settings = {
        "vit": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                "image_size": 16, "patch_size": 8},
        "convnext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
        "swin": {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "patch_size": 4,
                 "window_size": 2},
        "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
    }[kind]  # fmt: skip
    net = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, num_labels=3, **settings)).eval()
    model = Gated(net, 3, trained=True)
    images = draw(2, 3, 16, 16)
    logits, pooled = model.features(images)
    assert pooled.shape == (2, 8)
    assert torch.allclose(model.classify(pooled), logits, atol=1e-6)
    gated = model(images, torch.eye(3)[:2])["gated"]
    assert torch.allclose(gated, logits, atol=1e-6), "gates start at one"


# -- unlearning -------------------------------------------------------------------------------------------------------
def test_masks_hold_the_channels_of_the_wrong_class_alone():
    gates = draw(6, 4)
    given, right = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 2])
    mask = wrong_only(gates.clone().requires_grad_(), given, right)
    for i, (y, r) in enumerate(zip(given.tolist(), right.tolist(), strict=True)):
        for k in range(6):
            assert float(mask[i, k]) == pytest.approx(float(gates[k, y]) * (1 - float(gates[k, r])), abs=1e-6)
            assert float(weakened(mask, 0.5)[i, k]) == pytest.approx(1 - 0.5 * float(mask[i, k]), abs=1e-6)
    assert not mask.requires_grad
    shared = torch.ones(6, 4)
    assert not wrong_only(shared, given, right).any(), "what the right class uses too stays"


def test_unlearning_is_bounded_and_pushes_the_wrong_class_down():
    logits = torch.tensor([[50.0, 0, 0], [0, 0, 0], [-50, 0, 0]], dtype=torch.float64, requires_grad=True)
    given = torch.zeros(3, dtype=torch.int64)
    loss = unlearning_loss(logits, given)
    for value, row in zip(loss.tolist(), logits.tolist(), strict=True):
        wrong = math.exp(row[0]) / sum(map(math.exp, row))
        assert value == pytest.approx(-math.log(1 - wrong + 1e-4), abs=1e-9)
    assert loss.max() <= -math.log(1e-4) + 1e-6
    loss.sum().backward()
    assert logits.grad[1, 0] > 0


def test_gradients_of_unlearning_reach_the_backbone_and_never_the_gates():
    model = Gated(small_net().train(), 4, trained=True)
    given, right = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        model.gates.copy_(draw(6, 4, seed=4))
    mask = wrong_only(model.gates, given, right)
    out = model(draw(3, 3, 16, 16), masks={"keep": weakened(mask), "wrong": mask})
    (unlearning_loss(out["wrong"], given).sum() + F.cross_entropy(out["keep"], right)).backward()
    assert model.gates.grad is None
    assert model.head[0].weight.grad.abs().sum() > 0
    assert model.backbone.stem["convolution"].weight.grad.abs().sum() > 0


# -- labels -----------------------------------------------------------------------------------------------------------
def posteriors(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), n)


def test_sets_and_targets_against_loops():
    q, given = posteriors(40, 4), np.random.default_rng(1).integers(0, 4, 40)
    clean = np.random.default_rng(2).random(40)
    tau = labels.thresholds(q)
    for c in range(4):
        own = [max(row) for row in q.tolist() if row.index(max(row)) == c]
        assert tau[c] == pytest.approx(sum(own) / len(own))
    sets = labels.label_sets(q, given, tau)
    targets = labels.soft_targets(q, given, clean, sets)
    for i in range(40):
        members = {c for c in range(4) if q[i, c] >= tau[c]} | {int(given[i])}
        assert {c for c in range(4) if sets[i, c]} == members
        others = {c: q[i, c] for c in members - {int(given[i])}}
        wanted = [0.0] * 4
        wanted[given[i]] = clean[i] if others else 1.0
        for c, value in others.items():
            wanted[c] = (1 - clean[i]) * value / sum(others.values())
        assert targets[i] == pytest.approx(wanted)
    assert targets.sum(1) == pytest.approx(1)
    assert labels.thresholds(np.array([[0.7, 0.3, 0.0]]))[2] == np.inf
    assert labels.moving_average(q, q[::-1])[0] == pytest.approx(0.7 * q[0] + 0.3 * q[-1])


@pytest.mark.parametrize("apart", [0.5, 3.0])
def test_mixtures_are_those_of_scikit_learn(apart):
    from sklearn.mixture import GaussianMixture

    generator = np.random.default_rng(4)
    losses = np.concatenate([generator.normal(1, 0.4, 300), generator.normal(1 + apart, 0.7, 100)])
    ours = labels.fit_mixture(losses, rounds=5000, tolerance=1e-12)
    middle = np.median(losses)
    start = [[losses[losses <= middle].mean()], [losses[losses >= middle].mean()]]
    peer = GaussianMixture(
        2, tol=1e-12, max_iter=5000, reg_covar=1e-6, means_init=start, weights_init=[0.5, 0.5],
        precisions_init=np.full((2, 1, 1), 1 / losses.var()),
    ).fit(losses[:, None])  # fmt: skip
    order = peer.means_[:, 0].argsort()
    assert ours.means == pytest.approx(peer.means_[order, 0], abs=1e-4)
    assert ours.variances == pytest.approx(peer.covariances_[order, 0, 0], abs=1e-4)
    assert ours.weights == pytest.approx(peer.weights_[order], abs=1e-4)
    between = losses[(losses > ours.means[0]) & (losses < ours.means[1])]
    assert ours.clean(between) == pytest.approx(peer.predict_proba(between[:, None])[:, order[0]], abs=1e-3)
    wide = np.linspace(losses.min() - 5, losses.max() + 5, 200)
    assert (np.diff(ours.clean(wide)) <= 1e-12).all(), "a lower loss is never less believable"


def test_small_and_constant_classes_count_as_clean():
    losses = np.concatenate([np.random.default_rng(0).random(60), np.random.default_rng(1).random(10), np.ones(60)])
    given = np.repeat([0, 1, 2], [60, 10, 60])
    mixtures = labels.fit_by_class(losses, given, 3)
    assert mixtures[0] is not None
    assert mixtures[1:] == [None, None]
    clean = labels.clean_probabilities(losses, given, mixtures)
    assert (clean[60:] == 1).all()
    assert clean[:60].min() < 0.5
    q = np.full((2, 4), 0.25)
    assert labels.given_losses(q, np.array([0, 3])) == pytest.approx(math.log(4))


def test_the_transition_is_the_one_that_made_the_labels():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 6000)
    matrix = np.array([[1, 0, 0], [0.3, 0.7, 0], [0.2, 0.2, 0.6]])
    given = (generator.random(6000)[:, None] >= matrix.cumsum(1)[true]).sum(1)
    found = labels.transition(np.eye(3)[true], given)
    assert np.abs(found - matrix).max() < 0.03
    soft = posteriors(50, 3)
    few = given[:50]
    for r in range(3):
        for y in range(3):
            counts = sum(soft[i, r] for i in range(50) if few[i] == y)
            assert labels.transition(soft, few)[r, y] == pytest.approx(counts / soft[:, r].sum())
    wrong = labels.wrong_share(np.eye(3)[true], given)
    assert wrong == pytest.approx([np.mean(true[given == y] != y) for y in range(3)])
    assert labels.transition(np.eye(3)[[0, 0]], np.array([0, 1]))[2] == pytest.approx([0, 0, 1])
    prior = np.array([0.7, 0.2, 0.1])
    assert labels.with_prior(np.full((1, 3), 1 / 3), prior)[0] == pytest.approx(prior)


# -- mixing -----------------------------------------------------------------------------------------------------------
def test_every_image_is_seen_plain_every_other_epoch_and_partners_are_of_small_classes():
    rows = np.arange(4000)
    given = np.repeat([0, 1], [3600, 400])
    members = [rows[given == c] for c in (0, 1)]
    first, second = (
        draw_mixing(rows, epoch, 0.5, members, np.random.default_rng(epoch)) for epoch in (3, 4)
    )  # fmt: skip
    assert not (first.mixed & second.mixed).any()
    assert (first.mixed | second.mixed).all()
    assert (may_mix(rows, 3) != may_mix(rows, 4)).all()
    assert np.mean(given[first.partner]) == pytest.approx(0.9, abs=0.02)
    assert first.weight.mean() == pytest.approx(0.5, abs=0.02)
    third = draw_mixing(rows, 1, 0.2, members, np.random.default_rng(0))
    assert third.mixed.mean() == pytest.approx(0.2, abs=0.02)
    assert not draw_mixing(rows, 1, 0.0, members, np.random.default_rng(0)).mixed.any()


def test_remix_gives_the_tail_the_label_where_the_head_is_much_larger():
    weight = np.array([0.4, 0.4, 0.6, 0.4])
    own, partner = np.array([300.0, 299, 300, 10]), np.array([100.0, 100, 100, 100])
    assert head_share(weight, own, partner).tolist() == [0.0, 0.4, 0.6, 0.4]
