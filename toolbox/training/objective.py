"""What a training job supplies to the loop: losses of micro-batches, and hooks that see gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from toolbox.training.processes import sum_over_processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from toolbox.training.windows import Window


@dataclass(frozen=True)
class Pass:
    """One pass over the rows that a window takes from ``stream``; without ``gradient`` it only measures."""

    name: str
    stream: str
    gradient: bool = True


@dataclass(frozen=True)
class Ground:
    """Where an objective works: the prepared model and its trained parameters by name.

    Where parameters are ``sharded`` every rank holds its part of every gradient, else the same whole ones.
    """

    accelerator: Accelerator
    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    sharded: bool

    def reduce(self, values: Sequence[float]) -> list[float]:
        """Numbers computed from gradients, summed over the ranks that hold parts of them."""
        return sum_over_processes(self.accelerator, values) if self.sharded else list(values)


class Objective:
    """One training objective as ordered passes over the streams of a window.

    The loop knows rows only by number: ``length`` (cost, for sharing out) and ``units`` (what a row adds to its
    pass's divisor) describe them, ``batch`` makes whatever ``loss`` takes. Nothing here is about tokens.
    Losses are sums over units divided by the window's global count, never means of means, so that any split
    into micro-batches and processes gives the same gradient.
    """

    passes: tuple[Pass, ...] = (Pass("train", "train"),)
    """In order; gradients add up over them unless a hook takes them away."""

    ahead: bool = False
    """Whether ``state()`` holds a part of the step under way already: such a state is not saved."""

    def start(self, ground: Ground) -> None:
        """Called once before the first step of this process, behind ``load_state`` where a run goes on."""

    def length(self, stream: str, row: int) -> int:
        """Cost of a row, in whatever ``max_tokens`` counts."""
        raise NotImplementedError

    def units(self, one: Pass, row: int) -> float:
        """What the row adds to the divisor of the pass (labelled tokens, or 1 for a sequence mean)."""
        raise NotImplementedError

    def before_window(self, window: Window) -> None:
        """Called before the first pass of a step."""

    def batch(self, one: Pass, rows: Sequence[int]) -> Any:
        """The rows as one batch with a ``to(device)``."""
        raise NotImplementedError

    def loss(self, model: nn.Module, one: Pass, batch: Any, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the pass's loss, and detached sums for the report, added over all ranks.

        No two passes name a sum the same.
        """
        raise NotImplementedError

    def after_pass(self, one: Pass, sums: Mapping[str, Any] | None) -> None:
        """Called when the reduced gradients of all passes so far are in ``.grad``.

        A pass without gradient hands in its own ``sums`` over all ranks. Raises FloatingPointError where what it finds
        is not finite: the step is given up then.
        """

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        """The step event's numbers; must hold ``loss``. What stands under ``log`` goes to the run's own files only."""
        raise NotImplementedError

    def after_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        """Called behind the optimisers' step, gradients still in place; more numbers for the event."""
        return {}

    def summary(self, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the last event says of all ``step`` events, those of resumed parts included."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors of the objective's own that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
