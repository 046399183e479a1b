"""The loss of a task against slow float64 loops; frozen rows of the head; FACIL's schedule."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lwi.pictures import SIZE, drawn
from toolbox.classify.augment import normalise
from toolbox.classify.backbones import backbone_config, new_backbone
from toolbox.lwi.objective import PAD, Patience, SplitHead, TaskObjective, distillation, find_head
from toolbox.training.windows import Plan, Stream, Window


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [value / sum(powers) for value in powers]


def slow_distillation(new, old, temperature):
    p, q = ([softmax([v / temperature for v in row]) for row in rows.tolist()] for rows in (old, new))
    return [-sum(a * math.log(b) for a, b in zip(one, two, strict=True)) for one, two in zip(p, q, strict=True)]


def test_distillation_is_the_cross_entropy_of_softened_outputs_and_has_the_gradient_of_the_kl():
    torch.manual_seed(0)
    new, old = (3 * torch.randn(5, 7, dtype=torch.float64) for _ in "ab")
    new.requires_grad_()
    found = distillation(new, old, 2.0)
    assert found.tolist() == pytest.approx(slow_distillation(new.detach(), old, 2.0), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), new)
    kl = F.kl_div((new / 2).log_softmax(1), (old / 2).softmax(1), reduction="sum")
    assert torch.allclose(gradient, torch.autograd.grad(kl, new)[0], rtol=1e-10)
    same = distillation(old, old, 2.0)
    assert (same <= distillation(old + torch.randn_like(old), old, 2.0) + 1e-12).all()


@pytest.fixture
def task():
    """A model of two learned classes about to learn two more, its teacher, and images."""
    model = new_backbone(backbone_config("cifar-resnet8", ["a", "b"], SIZE, widths=[4, 5, 6]), 0)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_submodule("classifier", SplitHead(model.classifier, 2, 2, 5))
    images, labels = drawn(12)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return SimpleNamespace(model=model, teacher=teacher, pixels=pixels, targets=torch.tensor(labels) % 2)


def objective(task, **changes):
    settings = {"learned": 2, "teacher": task.teacher, "kd": 1.5, "temperature": 2.0, "augment": False, "seed": 3}
    found = TaskObjective(task.pixels, task.targets, normalise, **{**settings, **changes})
    found._autocast = lambda: torch.autocast("cpu", enabled=False)
    return found


def test_the_loss_equals_a_hand_written_loop(task):
    task.model.eval()
    one = objective(task)
    rows = [0, 3, 4, 7, 10]
    loss, sums = one.loss(task.model, one.passes[0], one.batch(one.passes[0], rows), 5.0)
    logits = task.model(normalise(task.pixels[rows])).logits.double()
    old = task.teacher(normalise(task.pixels[rows])).logits.double()
    ce = kd = right = 0.0
    for row, number in enumerate(rows):
        p = softmax(logits[row, 2:].tolist())
        ce -= math.log(p[int(task.targets[number])])
        right += int(np.argmax(p)) == int(task.targets[number])
        kd += slow_distillation(logits[row : row + 1, :2].detach(), old[row : row + 1], 2.0)[0]
    assert float(loss.detach()) == pytest.approx((ce + 1.5 * kd) / 5, rel=1e-5)
    told = one.report({name: float(value) for name, value in sums.items()}, {"train": 5.0})
    assert told["ce"] == pytest.approx(ce / 5, rel=1e-5)
    assert told["kd"] == pytest.approx(kd / 5, rel=1e-5)
    assert told["loss"] == pytest.approx(told["ce"] + 1.5 * told["kd"])
    assert told["right"] == right / 5


def test_before_any_step_the_student_says_of_old_classes_what_the_teacher_says(task):
    images = normalise(task.pixels)
    assert torch.equal(task.model.eval()(images).logits[:, :2], task.teacher(images).logits)


@pytest.mark.parametrize("kd", [0.0, 4.0])
def test_old_rows_of_the_head_are_bitwise_kept_whatever_the_optimiser_does(task, kd):
    one = objective(task, kd=kd, teacher=task.teacher if kd else None)
    before = copy.deepcopy(task.model.state_dict())
    trained = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
    task.model.train()
    for _ in range(3):
        optimizer.zero_grad()
        one.loss(task.model, one.passes[0], one.batch(one.passes[0], range(12)), 12.0)[0].backward()
        optimizer.step()
    after = task.model.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"classifier.old.weight", "classifier.old.bias"}
    merged = task.model.classifier.merged()
    hidden = torch.randn(3, 6)
    assert torch.allclose(merged(hidden), task.model.classifier(hidden), atol=1e-7)
    assert torch.equal(merged.weight[:2], before["classifier.old.weight"])


def test_the_head_is_the_last_linear_layer_of_its_size():
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), nn.Linear(3, 2))
    assert find_head(net, 3) == "1.1"
    with pytest.raises(KeyError):
        find_head(net, 7)


def test_augmentation_belongs_to_the_window_and_not_to_who_computes_it(task):
    one, other = (objective(task, augment=True) for _ in "ab")
    plan = Plan(Stream("train", 12, 6), (), 2, 0)
    window = plan.window(2)
    rows = window.rows["train"]
    for each in (one, other):
        each.before_window(window)
    whole = one.batch(one.passes[0], rows).images()
    halves = [other.batch(one.passes[0], part).images() for part in (rows[:2], rows[2:])]
    assert torch.equal(whole, torch.cat(halves))
    one.before_window(Window(9, 1, False, window.rows))
    assert not torch.equal(whole, one.batch(one.passes[0], rows).images())
    places = np.stack(list(one._places.values()))
    assert places[:, :2].min() >= 0
    assert places[:, :2].max() <= 2 * PAD


def test_patience_lowers_the_rate_goes_back_to_the_best_and_stops():
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    patience = Patience(net, 0.1, factor=3, patience=2, least=0.02)
    patience.attach(optimizer)
    scales, stopped = [], []
    for value, loss in enumerate([5.0, 4.0, 4.5, 4.0, 3.0, 3.1, 3.2, 3.3]):
        with torch.no_grad():
            net.weight.fill_(value)
        stopped.append(patience.met({"val_loss": loss}, {}))
        scales.append(optimizer.param_groups[0]["scale"])
        if value == 3:  # two epochs without a lower loss: back to the second, at a third of the rate
            assert net.weight.tolist() == [[1.0, 1.0]]
            memory = patience.state()
    assert scales == pytest.approx([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert stopped == [False] * 6 + [True] * 2  # .1/9 is below .02
    patience.restore()
    assert net.weight.tolist() == [[4.0, 4.0]]
    again = Patience(net, 0.1, factor=3, patience=2, least=0.02)
    again.attach(optimizer)
    again.load_state(memory)
    assert (again.best, again.left, optimizer.param_groups[0]["scale"]) == (4.0, 2, pytest.approx(1 / 3))
    again.restore()
    assert net.weight.tolist() == [[1.0, 1.0]]
