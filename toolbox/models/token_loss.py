"""Negative log-likelihoods of labelled tokens, without ever holding the logits of a whole batch.

Hidden states are gathered at the positions that predict a labelled token; the language-model head is applied to
chunks of those positions and its logits are computed again in the backward pass. Every token-weighted objective is
a function of the returned vector ``l``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.models.chat import Encoded
from toolbox.models.head import Head, SoftTarget, plain_head, soft_loss, token_nll
from toolbox.shell.errors import UsageProblem


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows and their labelled tokens.

    ``ids`` (rows, length) int64 and ``mask`` (rows, length) int64; over the n labelled tokens of all rows in order:
    ``where`` (n,) index into the flattened (rows · length) positions that predict them, ``labels`` (n,) their ids,
    ``row`` (n,) the row each belongs to, ``end`` (n,) whether it is an end-of-turn token.
    """

    ids: Tensor
    mask: Tensor
    where: Tensor
    labels: Tensor
    row: Tensor
    end: Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def collate(rows: Sequence[Encoded], pad_id: int) -> TokenBatch:
    """Put encoded rows into one batch. ``pad_id`` only fills: padding is told by length, never by id."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    where, labels, owner, end = [], [], [], []
    for index, row in enumerate(rows):
        length = len(row.ids)
        ids[index, :length] = torch.tensor(row.ids)
        mask[index, :length] = 1
        for position in range(1, length):
            if row.labelled[position]:
                where.append(index * longest + position - 1)
                labels.append(row.ids[position])
                owner.append(index)
                end.append(row.end[position])
    return TokenBatch(
        ids, mask, torch.tensor(where, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64),
        torch.tensor(owner, dtype=torch.int64), torch.tensor(end, dtype=torch.bool),
    )  # fmt: skip


@dataclass(frozen=True)
class HiddenState:
    """What RMU looks at: the output of decoder layer ``layer`` (from 0) at the labelled tokens' own positions.

    ``reference``: the reference model's too.
    """

    layer: int
    reference: bool = False


class TokenLoss(nn.Module):
    """A causal language model whose forward gives the ``l`` of labelled tokens, or what else a loss is made of.

    Everything is computed inside this module's forward, so that a sharding engine has gathered the weights by then.

    Args:
        model: a transformers causal language model, or a peft model around one.
        chunk: positions whose logits exist at once.
        reference: a frozen copy of the model for losses that compare with it. A peft model needs none: with its
            adapters off it is its own reference.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024, reference: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        self.reference = reference
        if not plain_head(_base(model)):
            raise UsageProblem("the language-model head must be a plain linear layer", "leave it out of --lora-targets")
        _check_head(_base(model))

    def forward(
        self, ids: Tensor, where: Tensor, labels: Tensor, want: SoftTarget | HiddenState | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the labelled tokens of a ``TokenBatch`` give.

        ``want`` nothing: ``(l, hits)``, both (n,). A ``SoftTarget``: ``(loss, l detached)``, both (n,). A
        ``HiddenState``: ``(h, h of the reference)``, both (n, d).

        Rows are padded on the right and attention is causal, so no labelled token ever sees padding and no attention
        mask is needed; without one the fused causal kernel runs.
        """
        if isinstance(want, HiddenState):
            here = where + 1
            other = self._with_reference(_layer_output, ids, want.layer).flatten(0, 1)[here] if want.reference else None
            hidden = _layer_output(self.model, ids, want.layer).flatten(0, 1)[here] + self._nothing()
            return hidden, hidden if other is None else other
        reference = None
        if want is not None and want.needs_reference:
            reference = self._with_reference(_states, ids, where)
        hidden, head = _states(self.model, ids, where)
        if want is None:
            return token_nll(hidden, head, labels, self.chunk)
        with torch.no_grad():
            nll, _ = token_nll(hidden, head, labels, self.chunk)
        return soft_loss(hidden, head, labels, want, reference, self.chunk), nll

    def _nothing(self) -> Tensor | float:
        """0, of which every trained parameter is a part: DDP insists that none is left out of a backward pass, and
        those above a layer are no part of its output. Shards may be left out."""
        trained = [p for p in self.parameters() if p.requires_grad]
        if not torch.distributed.is_initialized() or any(hasattr(p, "to_local") for p in trained):
            return 0.0
        return 0.0 * sum(p.sum() for p in trained)

    def _with_reference(self, compute: Callable[..., Any], ids: Tensor, what: Any) -> Any:
        """``compute`` on the reference model, without gradient."""
        with torch.no_grad():
            if self.reference is not None:
                return compute(self.reference, ids, what)
            if not hasattr(self.model, "disable_adapter"):
                raise ValueError("this loss compares with a reference model, and none was given")
            from toolbox.models.adapters import adapters_off

            with adapters_off(self.model) as bare:
                return compute(bare, ids, what)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _check_head(model: Any) -> None:
    """That the model's logits are those of ``Head``: some architectures scale or cap them in ways of their own.

    Raises: UsageProblem where they differ by more than rounding.
    """
    training = model.training
    model.eval()
    try:
        ids = torch.arange(2, device=model.get_output_embeddings().weight.device)[None]
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours, theirs = Head.of(model).logits(hidden), model(input_ids=ids, use_cache=False).logits[0]
    finally:
        model.train(training)
    if not bool(theirs.isfinite().all()):
        return  # damaged weights: whoever uses the losses says so
    if not torch.allclose(ours, theirs.to(ours.dtype), rtol=0.02, atol=0.02 * float(theirs.abs().max())):
        raise UsageProblem(
            f"{type(model).__name__} changes its logits behind the head in a way that is not known here",
            "use a model whose head is a linear layer, a scale or a soft cap",
        )


def _states(model: nn.Module, ids: Tensor, where: Tensor) -> tuple[Tensor, Head]:
    """Hidden states at ``where`` (n, d), and the head."""
    base = _base(model)
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[where], Head.of(base)


def _layer_output(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """(rows, length, d) what decoder layer ``layer`` gives."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    base = _base(model)
    hook = decoder_layers(base)[layer].register_forward_hook(keep)
    try:
        base.base_model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found[0]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a transformers causal language model, wherever its architecture keeps them."""
    count = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    found = next((one for one in lists if len(one) == count), None)
    if found is None:
        raise UsageProblem("this architecture's decoder layers are not one list", "use another objective")
    return found
