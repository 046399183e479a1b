"""Completions of prompts with images: the local backend, its prompts run with their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolbox.models.cache import new_cache
from toolbox.models.facts import context_window
from toolbox.models.generate import LocalBackend
from toolbox.models.spans import Aligned, Aligner, Kind
from toolbox.models.vlm import collate, inner

if TYPE_CHECKING:
    import torch
    from transformers import Cache


def end_ids(aligner: Aligner) -> tuple[int, ...]:
    """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
    found = aligner.align([("user", ("x",)), ("assistant", ("y",))])
    ends = [token for token, kind in zip(found.ids, found.kinds, strict=True) if kind == Kind.END_OF_TURN]
    ids = (*ends, aligner.tokenizer.eos_token_id)
    return tuple(dict.fromkeys(one for one in ids if one is not None))


class VisionBackend(LocalBackend):
    """``LocalBackend`` for an image-text model.

    ``rows`` has the aligned prompt of every request by its key; ``request.prompt_ids`` are that prompt's ids.
    """

    def __init__(self, model: Any, tokenizer: Any, *, end_ids: tuple[int, ...], batch_size: int = 8) -> None:
        super().__init__(model, tokenizer, end_ids=end_ids, batch_size=batch_size)
        self.rows: Mapping[str, Aligned] = {}
        self.window = context_window(inner(model).config)

    def _prefill(self, rows: list[Any], room: int) -> tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]:
        import torch

        prompts = [self.rows[row.request.key] for row in rows]
        batch = collate(prompts, [[] for _ in prompts], 0, left=True).to(self._model.device)
        inputs = dict(batch.inputs)
        held = inputs.pop("attention_mask")
        mask = torch.cat([held, held.new_ones(len(rows), room)], dim=1)
        positions = (held.cumsum(-1) - 1).clamp_(min=0)
        cache = new_cache(inner(self._model).config.get_text_config(decoder=True))
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            **inputs, attention_mask=held, past_key_values=cache, use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )  # fmt: skip
        return output.logits[:, -1].float(), cache, mask, positions[:, -1:]
