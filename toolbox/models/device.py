"""The device that an option names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolbox.shell.errors import Unavailable

if TYPE_CHECKING:
    import torch


def find_device(name: str, advice: str = "auto takes a GPU where there is one, else the CPU") -> torch.device:
    """``--device name``. Raises: Unavailable (69) for one that is not there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unavailable(f"--device {name}: {error}", advice) from None
    return device
