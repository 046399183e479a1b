"""LoRA adapters: adding, switching off, saving. peft is imported only here, when an adapter is asked for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolbox.shell.errors import UsageProblem


def add_lora(
    model: Any, *, r: int, alpha: float | None = None, targets: Sequence[str] | None = None, seed: int = 0
) -> Any:
    """``model`` with LoRA adapters ``W + (alpha/r)·B·A``, its own weights frozen; B starts at 0.

    ``alpha`` is 2r by default; ``targets`` are names of linear modules, by default all but the head. The draw of A
    depends on ``seed`` alone, and leaves the global random state as it was.

    Raises: UsageProblem (2) when a target names no module, or one that cannot be adapted.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, targets or ())
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        target_modules=list(targets) if targets else "all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # peft draws on the CPU wherever the model lies; forking all generators would start CUDA on every device.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own call, nobody's here
        torch.default_generator.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise _wrong_targets(model, str(error).partition("\n")[0]) from None


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    """peft passes over a name that matches nothing as long as another one matches."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _wrong_targets(model, f"no module is named {target}")


def _wrong_targets(model: Any, what: str) -> UsageProblem:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module)})
    return UsageProblem(f"--lora-targets: {what}", f"linear modules here: {', '.join(names)}")


def _linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, which stores its matrix transposed

    return isinstance(module, nn.Linear | Conv1D)


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The model as it was before its adapters: the reference, without a copy."""
    # peft leaves every adapter trainable behind, frozen ones included.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield model
    finally:
        for parameter, was in trainable:
            parameter.requires_grad_(was)


def save_adapter(
    model: Any, directory: Path, metadata: Mapping[str, str], state_dict: Mapping[str, Any] | None = None
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them.

    ``state_dict`` holds gathered full tensors where ``model``'s own are shards. Equal adapters give equal bytes.
    Nothing of ``model`` changes.
    """
    from peft import get_peft_model_state_dict

    from toolbox.weights.write import write_sharded

    name = model.active_adapter
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    for field, value in vars(config).items():
        if isinstance(value, set):  # written in the order of its hashes, which differs from process to process
            setattr(config, field, sorted(value))
    config.save_pretrained(str(directory))
    # "auto" would look the base up, on the hub if need be, to see whether its vocabulary was changed; ours never is.
    tensors = get_peft_model_state_dict(
        model, None if state_dict is None else dict(state_dict), adapter_name=name, save_embedding_layers=False
    )
    write_sharded(directory, dict(tensors), metadata, stem="adapter_model", max_shard_bytes=float("inf"))
