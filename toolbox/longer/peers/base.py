"""No history at all: what the candidate and its context say alone."""

from __future__ import annotations

from torch import Tensor, nn

from toolbox.longer.method import Cache, History


class Base(nn.Module):
    """A sequence part of width 0."""

    output_width = 0

    def prefill(self, history: History) -> Cache:
        """Nothing is kept."""
        return {}

    def score(self, cache: Cache, candidates: Tensor) -> Tensor:
        """(B, R, 0)."""
        return candidates[..., :0]
