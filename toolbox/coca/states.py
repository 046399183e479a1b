"""Hidden states of prompts at one position, all layers at once: collected in batches, saved, read back.

Layer 0 are the embeddings, layer i (0 < i < L) is the residual stream behind decoder layer i − 1, and layer L of a
model with L decoder layers is taken behind the final norm: transformers' ``hidden_states``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.coca.intervention import Attached
from toolbox.models.generate import Decoding, LocalBackend, Request
from toolbox.models.token_loss import decoder_layers
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.weights.provenance import KEY, canonical, header, read_provenance
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_file


def layer_name(layer: int, depth: int) -> str:
    """``embeddings``, ``layer 7``, or ``final norm`` for the last of ``depth`` + 1 states."""
    return "embeddings" if layer == 0 else "final norm" if layer == depth else f"layer {layer}"


@dataclass(frozen=True)
class Asked:
    """A row to be read: its ids, and how many of them are the prompt."""

    ids: tuple[int, ...]
    prompt: int


@torch.no_grad()
def hidden_states(model: Any, rows: Sequence[Asked], layers: Sequence[int], attached: Attached | None) -> Tensor:
    """(rows, len(layers), d) fp32 on the CPU: each row's last token, at each of ``layers``.

    Rows are padded on the right and attention is causal, so padding is never seen and no mask is needed.
    """
    device = model.device
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64, device=device)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids, device=device)
    depth = len(decoder_layers(model))
    picked: dict[int, Tensor] = {}

    def keep(layer: int, states: Tensor) -> None:
        if layer in layers:
            picked[layer] = states[torch.arange(len(rows), device=states.device), lengths.to(states.device) - 1]

    with ExitStack() as stack:
        for number, module in enumerate(decoder_layers(model)):

            def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], number: int = number) -> None:
                keep(number, inputs[0] if inputs else named["hidden_states"])

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        with nullcontext() if attached is None else attached.prompts([row.prompt for row in rows]):
            output = model.base_model(input_ids=ids, use_cache=False)
        keep(depth, output.last_hidden_state)
    return torch.stack([picked[layer].float().cpu() for layer in layers], dim=1)


def reasoned(
    model: Any, tokenizer: Any, end_ids: Sequence[int], prompts: Sequence[tuple[int, ...]], tag: str, limit: int
) -> list[Asked | None]:
    """Prompts with what the model writes greedily behind them up to ``</tag>``; None where it does not get there.

    The reply's text is tokenised anew, as training saw it.
    """
    closing = f"</{tag}>"
    # No end token ends a row here, so that a row that stopped did so at the tag.
    backend = LocalBackend(model, tokenizer, end_ids=(), batch_size=max(1, len(prompts)))
    requests = [Request(str(place), ids) for place, ids in enumerate(prompts)]
    ends = [tokenizer.decode([end], skip_special_tokens=False) for end in end_ids]
    found: list[Asked | None] = []
    for ids, done in zip(prompts, backend.complete(requests, Decoding(limit, stop=(closing,))), strict=True):
        if done.finish_reason != "stop" or any(end in done.text for end in ends):
            found.append(None)
            continue
        reply = tokenizer(done.text + closing, add_special_tokens=False)["input_ids"]
        found.append(Asked((*ids, *reply), len(ids)))
    return found


# -- files ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Identity:
    """What states must have in common to be the same: the model, what is on it, how it was asked, and the rows."""

    model: str
    intervention: str
    template: str
    position: str
    rows: str

    @staticmethod
    def digest(*parts: str) -> str:
        return hashlib.sha256(canonical(list(parts)).encode()).hexdigest()


def save_states(path: str, acts: Tensor, labels: Tensor, kept: Tensor, layers: Sequence[int], who: Identity) -> None:
    """``acts`` (n, layers, d), ``labels`` (n,) class numbers, ``kept`` (n,) row numbers, and in the header what
    they are of."""
    metadata = header("coca-probe", {}, None, {})
    content = {**(read_provenance(metadata) or {}), "states": {**vars(who), "layers": list(layers)}}
    tensors = {"acts": acts, "labels": labels, "rows": kept}
    with atomic_file(path) as handle:
        write_file(handle, tensors, {**metadata, KEY: canonical(content)})


def read_states(path: str, layers: Sequence[int], who: Identity) -> tuple[Tensor, Tensor]:
    """``acts`` (n, len(layers), d) and the row numbers that ``save_states`` wrote.

    Raises: BadData (65) for states of another model, intervention, template, position or other rows, for layers that
    were not saved, and for a file that holds no states.
    """
    with open_weights(path) as weights:
        about = (weights.provenance or {}).get("states")
        if not isinstance(about, dict) or {"acts", "rows"} - set(weights.names()):
            raise BadData("holds no hidden states", "name a new file to save them, or one of coca-probe", file=path)
        for name, value in vars(who).items():
            if about.get(name) != value:
                what = {"rows": "other rows", "position": "another position"}.get(name, f"another {name}")
                raise BadData(f"holds states of {what}", "name a new file with --states", file=path)
        saved = about.get("layers", [])
        if missing := [layer for layer in layers if layer not in saved]:
            raise BadData(f"holds no states of layer {missing[0]}", "name a new file with --states", file=path)
        acts = weights["acts"]
        if acts.ndim != 3 or acts.shape[:2] != (len(weights["rows"]), len(saved)):
            raise BadData(f"damaged: states of shape {tuple(acts.shape)}", "collect them anew", file=path)
        return acts[:, [saved.index(layer) for layer in layers]], weights["rows"]


# -- what an eraser does to the next token ----------------------------------------------------------------------------
@torch.no_grad()
def next_token_kl(
    model: Any, rows: Sequence[Asked], layer: int, erase: Callable[[Tensor], Tensor], attached: Attached | None
) -> list[float]:
    """KL(p ‖ p') in nats for each row: p of the next token as it is, p' with the last token's state at ``layer``
    erased. One forward pass each; nothing is generated."""
    found = []
    depth = len(decoder_layers(model))
    for row in rows:
        ids = torch.tensor([row.ids], device=model.device)

        def change(states: Tensor) -> Tensor:
            return torch.cat([states[:, :-1], erase(states[:, -1:])], dim=1)

        def on_input(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if inputs:
                return (change(inputs[0]), *inputs[1:]), named
            return inputs, {**named, "hidden_states": change(named["hidden_states"])}

        with nullcontext() if attached is None else attached.prompts([row.prompt]):
            plain = model(input_ids=ids, use_cache=False).logits[0, -1]
            if layer < depth:
                handle = decoder_layers(model)[layer].register_forward_pre_hook(on_input, with_kwargs=True)
            else:
                handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))
            try:
                erased = model(input_ids=ids, use_cache=False).logits[0, -1]
            finally:
                handle.remove()
        p, q = (torch.log_softmax(one.double(), dim=-1) for one in (plain, erased))
        found.append(max(0.0, float((p.exp() * (p - q)).sum())))
    return found
