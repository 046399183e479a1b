"""This process among the others of one call."""

from __future__ import annotations

from typing import Any

import torch

from toolbox.lwi.choices import Options
from toolbox.shell.errors import UsageProblem


class Ranks:
    """This process among the others; alone, nothing is started."""

    def __init__(self, start: bool) -> None:
        self.rank, self.count = 0, 1
        self._accelerator: Any = None
        self.device: str | None = None
        if start:
            from toolbox.training.processes import start_processes

            self._accelerator = start_processes()
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = str(self._accelerator.device)

    def from_first(self, payload: bytes | None) -> bytes:
        """What the first process has, on all."""
        if self.count == 1:
            assert payload is not None
            return payload
        from toolbox.training.processes import broadcast_bytes

        return broadcast_bytes(self._accelerator, payload)

    def from_all(self, payload: bytes) -> list[bytes]:
        """What every process has, on all, by rank."""
        if self.count == 1:
            return [payload]
        from toolbox.training.processes import gather_bytes

        return gather_bytes(self._accelerator, payload)


def device_of(options: Options, ranks: Ranks) -> str:
    """``--device``; auto is this process's GPU where there is one. Raises: UsageProblem (2)."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageProblem("--device cuda: no GPU is here", "leave it out")
    if options.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return ranks.device or "cuda"
