"""What can be told of a model without loading its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolbox.models.load import ModelSource, base_model, load_config, prepare
from toolbox.shell.errors import BadData
from toolbox.shell.files import RUN_FILE


def weights_directory(source: ModelSource) -> Path | None:
    """The directory with the safetensors that ``source`` stands for (an adapter's own); None for a model on the hub."""
    where = prepare(source)
    return where if isinstance(where, Path) else None


def is_quantised(source: ModelSource, *, trust_remote_code: bool = False) -> bool:
    """Whether a directory's configuration (an adapter's: its base's) says that its weights are quantised, which cannot
    be trained."""
    base = base_model(source, trust_remote_code=trust_remote_code)
    if base.kind != "directory" or base.path is None:
        return False
    return json.loads((base.path / "config.json").read_bytes()).get("quantization_config") is not None


def context_window(config: Any) -> int | None:
    """How many tokens a model of this transformers configuration was made for; None where it does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def weights_digest(source: ModelSource) -> str | None:
    """sha256 over the weights of ``source``, of an adapter without its base; None for a model on the hub, whose
    revision is its identity."""
    directory = weights_directory(source)
    if directory is None:
        return None
    from toolbox.weights.delta import sha256_weights

    return sha256_weights(directory)


def count_parameters(source: ModelSource, *, trust_remote_code: bool = False) -> int:
    """The number of parameters (shared ones once, an adapter's not), from the configuration alone.

    Raises: BadData (65) for an architecture that transformers does not know.
    """
    import torch
    from transformers import AutoModelForCausalLM

    base = base_model(source, trust_remote_code=trust_remote_code)
    config = load_config(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def run_record(source: ModelSource) -> dict[str, Any] | None:
    """What the run that made ``source`` wrote about itself; None for a model that none of our commands made."""
    path = source.path / RUN_FILE if source.path is not None and source.path.is_dir() else None
    if path is None or not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BadData("not valid JSON", "the model directory is damaged", file=str(path)) from None
    return record if isinstance(record, dict) else None
