"""LoFiT offsets as part of a plain checkpoint: what they add behind W_o is a constant, the bias of ``o_proj``.

Configurations of the Llama family hold that bias with ``attention_bias``, and with it biases of q, k and v: 0 here.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolbox.coca.lofit import Lofit, merged_biases, output_projection
from toolbox.models.token_loss import decoder_layers
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    from toolbox.coca.train import Options
    from toolbox.shell.command import Invocation
    from toolbox.shell.files import OutputDirectory
    from toolbox.training.finetune import Outcome


def biased_config(config: Any) -> Any:
    """``config`` such that the model has an ``o_proj`` bias. BadData (65) where the architecture has none."""
    biased = copy.deepcopy(config)
    if hasattr(biased, "attention_bias"):
        biased.attention_bias = True
    twin = _on_meta(biased)
    if output_projection(decoder_layers(twin)[0]).bias is None:
        raise BadData(
            f"--merge: {type(twin).__name__} has no bias behind its attention heads to hold the offsets",
            "leave --merge out and use the intervention, or --method lora",
        )
    return biased


def merge(model: Any, lofit: Lofit) -> Any:
    """``model`` itself, changed: the offsets of ``lofit`` in its ``o_proj`` biases, new other biases 0.

    Hooks of ``lofit`` must be off. Plain transformers loads what it saves. Raises: as ``biased_config``.
    """
    config = biased_config(model.config)
    missing = set(_on_meta(config).state_dict()) - set(model.state_dict())
    for name in sorted(missing):
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(parent)
        if leaf != "bias" or not isinstance(linear, nn.Linear):
            raise BadData(f"--merge: {name} would be new in the checkpoint", "use the intervention without --merge")
        weight = linear.weight
        linear.bias = nn.Parameter(torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
    with torch.no_grad():
        for layer, bias in merged_biases(model, lofit).items():
            output_projection(decoder_layers(model)[layer]).bias.add_(bias.to(model.device))
    model.config = config
    return model


def write_merged(outcome: Outcome, options: Options, call: Invocation, out: OutputDirectory) -> None:
    """The model that ``outcome`` trained an intervention for, with it inside, as a Hugging Face directory."""
    from toolbox.coca.intervention import load_intervention
    from toolbox.models.chat import Chat
    from toolbox.models.load import find_model, load_model, load_tokenizer
    from toolbox.shell.files import RUN_FILE, atomic_file
    from toolbox.training.save import save_model

    trust = options.trust_remote_code
    if options.method == "lora":
        adapted = find_model(str(outcome.directory), trust_remote_code=trust)
        model = load_model(adapted, trust_remote_code=trust).merge_and_unload()
    else:
        lofit = load_intervention(outcome.directory).module
        assert isinstance(lofit, Lofit)
        model = merge(load_model(outcome.source, trust_remote_code=trust), lofit)
    tokenizer = load_tokenizer(outcome.source, trust_remote_code=trust)
    record = json.loads((outcome.directory / RUN_FILE).read_bytes())
    save_model(
        out.partial, model, tokenizer, Chat(tokenizer, options.template, options.system), command=call.command,
        settings=call.settings, seed=options.seed, inputs=record["inputs"], source=outcome.source, state_dict=None,
        adapter=False, taught=True,
    )  # fmt: skip
    with atomic_file(out.partial / RUN_FILE) as handle:
        handle.write(json.dumps({**record, "merged": True}, indent=2).encode() + b"\n")
    out.commit()
    call.reporter.note(f"wrote {options.merge}, the model with what was trained inside")


def _on_meta(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
