"""Batch norm over two processes is batch norm over their batches together: outputs, gradients, running statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn

from toolbox.classify import sync
from toolbox.classify.backbones import backbone_config, new_backbone


def test_one_process_alone_is_plain_batch_norm():
    net = new_backbone(backbone_config("cifar-resnet8", ["a", "b"], widths=[2, 3, 4]), 0)
    shared = sync.share_batch_norm(copy.deepcopy(net), torch.device("cpu"))
    assert sum(type(one) is sync.SharedBatchNorm2d for one in shared.modules()) == 9
    assert shared.state_dict().keys() == net.state_dict().keys()
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(net.train()(images).logits, shared.train()(images).logits)


def test_with_a_process_group_the_statistics_are_those_of_the_whole_batch(monkeypatch):
    """Two ranks in one process: the sum over processes of this half and the other, gradients through both."""
    import torch.distributed.nn.functional as collectives

    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3).train()
    with torch.no_grad():
        plain.weight.copy_(torch.rand(3) + 0.5)
        plain.bias.copy_(torch.rand(3))
    holder = nn.Sequential(copy.deepcopy(plain))
    shared = sync.share_batch_norm(holder, torch.device("cpu"))[0]
    whole = torch.randn(6, 3, 4, 5, requires_grad=True)
    halves = whole.detach().clone().requires_grad_()
    other: list[torch.Tensor] = []

    def sums(values: torch.Tensor) -> torch.Tensor:
        wide = other[0].double()
        count = torch.tensor([wide.numel() / 3], dtype=torch.float64)
        return values + torch.cat([wide.sum((0, 2, 3)), (wide * wide).sum((0, 2, 3)), count])

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(collectives, "all_reduce", sums)
    start = copy.deepcopy(shared.state_dict())
    outputs = []
    for mine, theirs in ((slice(0, 2), slice(2, 6)), (slice(2, 6), slice(0, 2))):
        shared.load_state_dict(start)
        other[:] = [halves[theirs]]
        outputs.append(shared(halves[mine]))
    target = torch.randn(6, 3, 4, 5)
    (plain(whole) * target).sum().backward()
    (torch.cat(outputs) * target).sum().backward()
    assert torch.allclose(torch.cat(outputs), plain(whole).detach(), atol=1e-5)
    assert torch.allclose(halves.grad, whole.grad, atol=1e-5)
    assert torch.allclose(shared.weight.grad, plain.weight.grad, atol=1e-4)
    again = nn.BatchNorm2d(3).train()
    again(whole.detach())
    assert torch.allclose(shared.running_mean, again.running_mean, atol=1e-6)
    assert torch.allclose(shared.running_var, again.running_var, atol=1e-6)
