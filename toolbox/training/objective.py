"""What a training job supplies to the loop: losses of micro-batches, and hooks that see gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


class Objective:
    """One training objective as ordered backward passes over the streams of a window.

    The loop knows rows only by number: ``length`` (cost, for sharing out) and ``units`` (what a row adds to its
    pass's divisor) describe them, ``batch`` makes whatever ``loss`` takes. Nothing here is about tokens.
    Losses are sums over units divided by the window's global count, never means of means, so that any split
    into micro-batches and processes gives the same gradient.
    """

    streams: tuple[str, ...] = ("train",)
    """Backward passes in order; gradients add up over them unless a hook takes them away."""

    def length(self, stream: str, row: int) -> int:
        """Cost of a row, in whatever ``max_tokens`` counts."""
        raise NotImplementedError

    def units(self, stream: str, row: int) -> float:
        """What the row adds to the divisor of its pass (labelled tokens, or 1 for a sequence mean)."""
        raise NotImplementedError

    def batch(self, stream: str, rows: Sequence[int]) -> Any:
        """The rows as one batch with a ``to(device)``."""
        raise NotImplementedError

    def loss(self, model: nn.Module, stream: str, batch: Any, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the pass's loss, and detached sums for the report (added over all ranks)."""
        raise NotImplementedError

    def after_pass(self, stream: str, parameters: Sequence[nn.Parameter]) -> None:
        """Called when the reduced gradients of all passes so far are in ``.grad``."""

    def before_step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Called when all passes are done, before clipping and the optimisers."""

    def report(self, sums: dict[str, float], divisors: dict[str, float]) -> dict[str, float]:
        """The step event's numbers; must hold ``loss``."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Tensors of the objective's own that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
