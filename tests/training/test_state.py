"""Saved states: what comes back is what was there, in the order in memory that an optimiser counts on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolbox.training.state import TrainingTensors


def steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        (parameter * torch.arange(15.0).reshape(5, 3)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_parameter_in_column_order_goes_on_where_it_stopped(fused):
    """Fused AdamW reads a moment in the order of its parameter; those of orthogonal maps are in column order."""

    def made() -> tuple[nn.Parameter, torch.optim.Optimizer, TrainingTensors]:
        parameter = nn.Parameter(torch.arange(15.0).reshape(3, 5).sin().T)
        assert not parameter.is_contiguous()
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
        return parameter, optimizer, TrainingTensors({"p": parameter}, [optimizer])

    whole, optimizer, _ = made()
    steps(whole, optimizer, 4)
    first, optimizer, tensors = made()
    steps(first, optimizer, 2)
    saved = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.collect({}).items()}
    again, optimizer, tensors = made()
    tensors.restore(saved)
    steps(again, optimizer, 2)
    assert torch.equal(again, whole)
