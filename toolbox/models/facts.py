"""What can be told of a model without loading its weights."""

from __future__ import annotations

from pathlib import Path

from toolbox.models.load import ModelSource, prepare


def weights_directory(source: ModelSource) -> Path | None:
    """The directory with the safetensors that ``source`` stands for; None for a model on the hub."""
    return None if source.kind == "hub" else prepare(source)


def weights_digest(source: ModelSource) -> str | None:
    """sha256 over the weights of ``source``; None for a model on the hub, whose revision is its identity."""
    directory = weights_directory(source)
    if directory is None:
        return None
    from toolbox.weights.delta import sha256_weights

    return sha256_weights(directory)


def count_parameters(source: ModelSource, *, trust_remote_code: bool = False) -> int:
    """The number of parameters (shared ones once), from the configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    where = weights_directory(source) or source.name
    if source.kind == "adapter":
        from peft import PeftConfig

        where = PeftConfig.from_pretrained(str(where)).base_model_name_or_path
    config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
