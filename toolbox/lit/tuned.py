"""Which parameters lit-tune trains, how held-out rows are judged, and what is written in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolbox.lit.build import add_tower_file, tower_map
from toolbox.lit.data import Rows
from toolbox.lit.options import Options
from toolbox.models.load import ModelSource
from toolbox.models.vlm import CONNECTOR_FILE, OUR_TOWER, collate, connector_of, inner, tower_of
from toolbox.shell.errors import UsageProblem
from toolbox.training.prepare import without_dropout
from toolbox.training.processes import sum_over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

_JUDGED = 8
"""Held-out rows of one forward pass."""


def trainable(model: Any, options: Options, source: ModelSource) -> Any:
    """The model with its trained parts marked, adapters put on where they are asked for.

    Raises: UsageProblem (2) where a part is not there.
    """
    if source.kind == "adapter":
        if options.lora_r:
            raise UsageProblem("--lora-r on a model that is an adapter itself", "merge it into its base first")
        model = model.merge_and_unload()
    without_dropout(model)
    model.requires_grad_(False)
    if options.grad_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if options.lora_r:
        model = _with_adapters(model, options)
        _train(connector_of(model), options.connector_lr, options.rate)
        return model
    for part, layers in options.parts.items():
        if part == "connector":
            _train(connector_of(model), options.connector_lr, options.rate)
        elif part == "vision":
            _train(tower_of(model), options.vision_lr, options.rate)
        else:
            _train_language(model, layers, options)
    return model


def _train(module: Any, lr: float | None, base: float) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(True)
        if lr is not None:
            parameter.lr_scale = lr / base


def _language(model: Any) -> Any:
    body = inner(model).base_model
    for name in ("language_model", "text_model"):
        if (found := getattr(body, name, None)) is not None:
            return found
    raise UsageProblem(f"{type(inner(model)).__name__}: its language model is not known", "use another model")


def _train_language(model: Any, layers: int | None, options: Options) -> None:
    language = _language(model)
    if layers is None:
        _train(language, None, options.rate)
        _train(inner(model).get_output_embeddings(), None, options.rate)
        return
    if layers > len(language.layers):
        raise UsageProblem(f"--train-parts lm:{layers}: the model has {len(language.layers)} layers", "name fewer")
    for layer in language.layers[-layers:]:
        _train(layer, None, options.rate)


def _with_adapters(model: Any, options: Options) -> Any:
    """LoRA on the linear layers of the language model."""
    from toolbox.models.adapters import add_lora

    ours = {id(module) for module in _language(model).modules()}
    wanted = options.lora_targets
    names = [
        name for name, module in model.named_modules()
        if id(module) in ours and isinstance(module, torch.nn.Linear)
        and (not wanted or name.rpartition(".")[2] in wanted)
    ]  # fmt: skip
    if not names:
        raise UsageProblem(f"--lora-targets {', '.join(wanted)}: no such linear module in the language model", None)
    adapted = add_lora(model, r=options.lora_r, alpha=options.lora_alpha, targets=names, seed=options.seed)
    if options.grad_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


# -- held-out rows ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def judged(accelerator: Accelerator, model: Any, rows: Rows, pad_id: int) -> dict[str, Any]:
    """Token means of −log p of responses and of instructions, over all ranks."""
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.eval()
    sharded = any(hasattr(p, "to_local") for p in unwrapped.parameters())
    rank, world = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
    mine = range(rank, len(rows.rows), world)
    sums = [0.0] * 4
    for start in range(0, len(mine), _JUDGED):
        places = mine[start : start + _JUDGED]
        with accelerator.autocast():
            answers, others, n_answers, n_others = _sums(unwrapped, rows, places, pad_id, accelerator.device)
        sums = [a + b for a, b in zip(sums, (answers, others, n_answers, n_others), strict=True)]
    total = sums if sharded else sum_over_processes(accelerator, sums)
    return {
        "n": len(rows.rows),
        "loss_response": total[0] / total[2] if total[2] else None,
        "loss_instruction": total[1] / total[3] if total[3] else None,
    }


def _sums(model: Any, rows: Rows, places: Sequence[int], pad_id: int, device: Any) -> tuple[float, float, int, int]:
    labelled = [rows.rows[place] for place in places]
    extra = {"response": [[float(on) for on in row.response] for row in labelled]}
    batch = collate([rows.aligned(place) for place in places], [row.places for row in labelled], pad_id, extra)
    batch = batch.to(device)
    nll = model(batch.inputs, batch.where, batch.labels).double()
    response = batch.extra["response"]
    answers = int(response.sum())
    return float((nll * response).sum()), float((nll * (1 - response)).sum()), answers, len(nll) - answers


# -- the result -------------------------------------------------------------------------------------------------------
def save(
    directory: Path, model: Any, processor: Any, options: Options, source: ModelSource, digests: Mapping[str, str],
    state_dict: Mapping[str, Tensor] | None,
) -> None:  # fmt: skip
    """Write the model as a Hugging Face directory, or its adapter with the connector beside it."""
    from toolbox.models.adapters import save_adapter
    from toolbox.models.facts import weights_digest
    from toolbox.training.save import save_whole
    from toolbox.weights.provenance import header
    from toolbox.weights.write import write_file

    digest = weights_digest(source)
    inputs = {**digests, **({"model": digest} if digest else {})}
    metadata = header("lit-tune", options.deciding(), options.seed, inputs)
    if options.lora_r:
        inner(model).name_or_path = source.name
        save_adapter(model, directory, metadata)
        with (directory / CONNECTOR_FILE).open("wb") as handle:
            write_file(handle, dict(connector_of(model).state_dict()), metadata)
    else:
        if model.config.vision_config.model_type == OUR_TOWER:
            add_tower_file(directory)
            model.config.auto_map = tower_map()
        save_whole(directory, model, state_dict, metadata)
    processor.save_pretrained(directory)
