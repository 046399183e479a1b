"""Completions of prompts with images: the local backend, its prompts run with their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolbox.models.cache import new_cache
from toolbox.models.facts import context_window
from toolbox.models.generate import LocalBackend, Request, StopRule
from toolbox.models.spans import Aligned, Aligner, Kind
from toolbox.models.vlm import TOKEN_TYPES, collate, inner
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    import torch
    from transformers import Cache

_PROBE = "What is it?"


def end_ids(aligner: Aligner) -> tuple[int, ...]:
    """Ids that end an answer: the template's end of turn and the tokenizer's end of text."""
    found = aligner.align([("user", ("x",)), ("assistant", ("y",))])
    ends = [token for token, kind in zip(found.ids, found.kinds, strict=True) if kind == Kind.END_OF_TURN]
    ids = (*ends, aligner.tokenizer.eos_token_id)
    return tuple(dict.fromkeys(one for one in ids if one is not None))


def opened_turn(aligner: Aligner, images: Sequence[Any]) -> Aligned:
    """``images`` and a user's turn that is open: what comes next is what a user says of them.

    A turn with a question is rendered, and cut where the question's first token begins.
    Raises: BadData (65) where the template puts an image behind the text.
    """
    whole = aligner.align([("user", (*[None] * len(images), _PROBE))], images)
    cut = whole.kinds.index(Kind.INSTRUCTION)
    if Kind.IMAGE in whole.kinds[cut:]:
        raise BadData("the chat template puts images behind the text", "take a model that sees them first")
    inputs = {name: _cut(value, cut) if name in TOKEN_TYPES else value for name, value in whole.inputs.items()}
    return Aligned(whole.ids[:cut], whole.kinds[:cut], whole.chars[:cut], (), inputs)


def _cut(value: Any, length: int) -> Any:
    return [row[:length] for row in value]


@dataclass(frozen=True, slots=True)
class VisionRequest(Request):
    """A request with the aligned prompt that ``prompt_ids`` are of, pixels and all."""

    prompt: Aligned | None = field(default=None, compare=False)

    @staticmethod
    def of(key: str, prompt: Aligned, rule: StopRule | None = None) -> VisionRequest:
        """The request for what comes behind ``prompt``."""
        return VisionRequest(key, prompt.ids, rule, prompt)


class VisionBackend(LocalBackend):
    """``LocalBackend`` for an image-text model; takes ``VisionRequest``s."""

    def __init__(self, model: Any, tokenizer: Any, *, end_ids: tuple[int, ...], batch_size: int = 8) -> None:
        super().__init__(model, tokenizer, end_ids=end_ids, batch_size=batch_size)
        self.window = context_window(inner(model).config)

    def _prefill(self, rows: list[Any], room: int) -> tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]:
        import torch

        found = {id(row.request.prompt): row.request.prompt for row in rows}  # samples of one prompt share its run
        prompts = list(found.values())
        batch = collate(prompts, [[] for _ in prompts], 0, left=True).to(self._model.device)
        inputs = dict(batch.inputs)
        held = inputs.pop("attention_mask")
        mask = torch.cat([held, held.new_ones(len(prompts), room)], dim=1)
        positions = (held.cumsum(-1) - 1).clamp_(min=0)
        cache = new_cache(inner(self._model).config.get_text_config(decoder=True))
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            **inputs, attention_mask=held, past_key_values=cache, use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )  # fmt: skip
        logits, positions = output.logits[:, -1].float(), positions[:, -1:]
        if len(prompts) < len(rows):
            place = {one: n for n, one in enumerate(found)}
            index = torch.tensor([place[id(row.request.prompt)] for row in rows], device=mask.device)
            cache.reorder_cache(index)
            logits, mask, positions = logits[index], mask[index], positions[index]
        return logits, cache, mask, positions
