"""LoRA adapters: adding, switching off, saving. peft is imported only here, when an adapter is asked for."""

from __future__ import annotations

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
    depends on ``seed`` alone.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        target_modules=list(targets) if targets else "all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module)})
            what = str(error).splitlines()[0]
            raise UsageProblem(f"--lora-targets: {what}", f"linear modules here: {', '.join(names)}") from None


def _linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


@contextmanager
def adapters_off(model: Any) -> Iterator[Any]:
    """The model as it was before its adapters: the reference, without a copy."""
    with model.disable_adapter():
        yield model


def save_adapter(model: Any, directory: Path, metadata: Mapping[str, str]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as peft reads them."""
    from peft import get_peft_model_state_dict

    from toolbox.weights.write import write_sharded

    config = model.peft_config[model.active_adapter]
    inference = config.inference_mode
    config.inference_mode = True
    config.save_pretrained(str(directory))
    config.inference_mode = inference
    tensors = get_peft_model_state_dict(model)
    write_sharded(directory, dict(tensors), metadata, stem="adapter_model", max_shard_bytes=float("inf"))
