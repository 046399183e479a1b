"""Negative log-likelihoods of labelled tokens, without ever holding the logits of a whole batch.

Hidden states are gathered at the positions that predict a labelled token; the language-model head is applied to
chunks of those positions and its logits are computed again in the backward pass. Every token-weighted objective is
a function of the returned vector ``l``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.models.chat import Encoded
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
class _Head:
    """How hidden states become logits: ``logits = cap(scale · (W h + b))``."""

    scale: float = 1.0
    softcap: float | None = None


class _ChunkedNll(torch.autograd.Function):
    """l_i = logsumexp(z_i) − z_i[y_i] with z = cap(scale · (h Wᵀ + b)), by chunks of positions.

    The last chunk's logits are kept for the backward pass (they are in memory anyway), the others are recomputed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, head: _Head
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hits = torch.empty_like(labels, dtype=torch.bool)
        log_norm = torch.empty_like(nll)
        kept = None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, head)
            log_norm[part] = torch.logsumexp(logits, dim=-1)
            nll[part] = log_norm[part] - logits.gather(1, labels[part, None]).squeeze(1)
            hits[part] = logits.argmax(dim=-1) == labels[part]
            kept = logits
        ctx.save_for_backward(hidden, weight, bias, labels, log_norm)
        ctx.kept = kept if any(ctx.needs_input_grad) else None
        ctx.chunk, ctx.head = chunk, head
        ctx.mark_non_differentiable(hits)
        return nll, hits

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_norm = ctx.saved_tensors
        head: _Head = ctx.head
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        starts = range(0, len(labels), ctx.chunk)
        for start in reversed(starts):
            part = slice(start, start + ctx.chunk)
            logits, ctx.kept = ctx.kept, None
            if logits is None:
                logits = _logits(hidden[part], weight, bias, head)
            if head.softcap is not None:
                slope = head.scale * (1 - (logits / head.softcap).square())
            grad = logits.sub_(log_norm[part, None]).exp_()  # softmax; the buffer becomes dl/dz in place
            grad[torch.arange(len(grad), device=grad.device), labels[part]] -= 1
            grad *= grad_nll[part, None]
            if head.softcap is not None:
                grad *= slope
            elif head.scale != 1.0:
                grad *= head.scale
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = (grad @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part].to(weight.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: _Head) -> Tensor:
    logits = hidden.to(weight.dtype) @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits += bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def token_nll(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, chunk: int = 1024, head: Any = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and whether it is the most probable token.

    Args:
        hidden: (n, d) hidden states at the predicting positions.
        weight: (V, d) the head's matrix; ``bias``: (V,) or None.
        labels: (n,) token ids.
        chunk: positions whose (chunk, V) logits exist at once.
        head: scaling and soft-capping of the logits (``_Head``); none by default.

    Returns:
        l (n,) in nats, differentiable, in fp32 (or float64 where the model is); hits (n,) bool.
    """
    return _ChunkedNll.apply(hidden, weight, bias, labels, chunk, head or _Head())


class TokenLoss(nn.Module):
    """A causal language model whose forward gives the ``l`` of labelled tokens.

    The head is applied inside this module's forward, so that a sharding engine has gathered its weight by then.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if type(base.get_output_embeddings()) is not nn.Linear:
            raise UsageProblem("the language-model head must be a plain linear layer", "leave it out of --lora-targets")
        config = base.config
        # The three ways architectures of this family alter logits after the head.
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        self._head = _Head(float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))

    def forward(self, ids: Tensor, where: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``(l, hits)`` of the labelled tokens of a ``TokenBatch``.

        Rows are padded on the right and attention is causal, so no labelled token ever sees padding and no attention
        mask is needed; without one the fused causal kernel runs.
        """
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        flat = hidden.flatten(0, 1)[where]
        output = base.get_output_embeddings()
        weight, bias = output.weight, getattr(output, "bias", None)
        if torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
        return token_nll(flat, weight, labels, bias=bias, chunk=self.chunk, head=self._head)
