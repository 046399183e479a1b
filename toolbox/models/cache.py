"""Key-value caches for decoding token by token.

Importing this module costs no torch.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Cache


@functools.cache
def roomy_layer() -> type:
    """The class of a key-value cache layer that keeps room at its end (made late: it inherits from transformers).

    The stock layer concatenates, that is copies all it holds, in every step; this one writes one column.
    """
    from transformers.cache_utils import DynamicLayer

    class RoomyLayer(DynamicLayer):
        """``keys`` and ``values``, [rows, heads, columns, width], are views of buffers with spare columns."""

        buffers: tuple[torch.Tensor, torch.Tensor]

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
                self.buffers = (self.keys, self.values)
            start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            if end > self.buffers[0].shape[2]:
                self.buffers = (self._with_room(self.keys, end), self._with_room(self.values, end))
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = states
            self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
            super().reorder_cache(beam_idx)
            self.buffers = (self.keys, self.values)

        @staticmethod
        def _with_room(states: torch.Tensor, columns: int) -> torch.Tensor:
            rows, heads, held, width = states.shape
            buffer = states.new_empty(rows, heads, columns + max(64, columns // 4), width)
            buffer[:, :, :held] = states
            return buffer

    return RoomyLayer


def new_cache(config: Any) -> Cache:
    """An empty cache for a model: transformers' own, its plain attention layers replaced by roomy ones."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    cache.layers = [roomy_layer()() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_gaps(cache: Cache) -> bool:
    """Whether every layer holds all columns, so that masked ones may lie between others."""
    return all(isinstance(layer, roomy_layer()) for layer in cache.layers)
