"""Writing a trained model as a Hugging Face (or PEFT) directory that loads in plain transformers (or peft)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.models.load import ModelSource
from toolbox.training.language import NOT_DECIDING

if TYPE_CHECKING:
    from torch import Tensor

    from toolbox.models.chat import Chat

_PREFIX = "model."  # of the module that wraps the model during training, a reference copy perhaps beside it


def save_model(
    directory: Path,
    model: Any,
    tokenizer: Any,
    chat: Chat,
    *,
    command: str,
    settings: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, str],
    source: ModelSource,
    state_dict: Mapping[str, Tensor] | None,
    adapter: bool,
    taught: bool,
) -> None:
    """Write weights, configuration and tokenizer below ``directory``.

    ``state_dict`` holds gathered full tensors where ``model``'s own are shards. The template that conversations were
    ``taught`` with becomes the tokenizer's chat template, so that any user of the directory prompts the model likewise.
    """
    metadata = weights_header(command, settings, seed, inputs, source)
    if adapter:
        from toolbox.models.adapters import save_adapter

        save_adapter(model, directory, metadata, None if state_dict is None else _unwrapped(state_dict))
    else:
        save_whole(directory, model, state_dict, metadata)
    if taught and chat.name not in ("chat", "raw"):
        tokenizer.chat_template = chat.source
    tokenizer.save_pretrained(directory)


def weights_header(
    command: str, settings: Mapping[str, Any], seed: int, inputs: Mapping[str, str], source: ModelSource
) -> dict[str, str]:
    """The header of weights that a run made from ``source``."""
    from toolbox.models.facts import weights_digest
    from toolbox.weights.provenance import header

    digest = weights_digest(source)
    deciding = {name: value for name, value in settings.items() if name not in NOT_DECIDING}
    return header(command, deciding, seed, {**inputs, **({"model": digest} if digest else {})})


def save_whole(directory: Path, model: Any, state_dict: Mapping[str, Tensor] | None, metadata: dict[str, str]) -> None:
    """Write weights (tied ones once) and configuration of a transformers model below ``directory``.

    ``state_dict``: gathered full tensors, named as in the module that wrapped the model as its ``model``.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from toolbox.weights.write import write_sharded

    tensors = dict(model.state_dict() if state_dict is None else _unwrapped(state_dict))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for copy, original in dict(tied).items():
        if copy in tensors and original in tensors:
            del tensors[copy]
    # Some architectures are renamed while they load; what is written carries the names of the original checkpoint.
    tensors = revert_weight_conversion(model, tensors)
    model.config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    write_sharded(directory, tensors, metadata)


def _unwrapped(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(_PREFIX)}
