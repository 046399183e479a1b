"""The language-model head applied to chunks of positions, so that the logits of a whole batch never exist.

Both losses here recompute their logits in the backward pass: hidden states go in, one number a position comes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: ``z = cap(scale · (W h + b))``; ``weight`` (V, d), ``bias`` (V,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(model: Any) -> Head:
        """The head of a transformers model that ends in a causal one, in the dtype that autocast asks for."""
        config, output = model.config.get_text_config(decoder=True), model.get_output_embeddings()
        # The three ways architectures of this family alter logits after the head.
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        weight = output.weight
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        cap = getattr(config, "final_logit_softcapping", None)
        return Head(weight, getattr(output, "bias", None), float(scale) / float(divisor), cap)

    def detached(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.weight.detach(), bias, self.scale, self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) in fp32, or float64 where the model is."""
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """∂z/∂(W h + b) where z are these ``logits``."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap).square())


class _Gradients:
    """Gradients of hidden states, weight and bias, added up chunk by chunk."""

    def __init__(self, needs: tuple[bool, ...], hidden: Tensor, head: Head) -> None:
        self._inputs, self._head = hidden, head
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = torch.zeros_like(head.weight) if needs[1] else None
        self.bias = torch.zeros_like(head.bias) if head.bias is not None and needs[2] else None

    def add(self, part: slice, grad: Tensor, slope: Tensor | float) -> None:
        """``grad`` (chunk, V) is ∂loss/∂z of the positions ``part``; it is overwritten."""
        if not isinstance(slope, float) or slope != 1.0:
            grad *= slope
        weight = self._head.weight
        grad = grad.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[part] = (grad @ weight).to(self.hidden.dtype)
        if self.weight is not None:
            self.weight.addmm_(grad.T, self._inputs[part].to(weight.dtype))
        if self.bias is not None:
            self.bias += grad.sum(0)


def _parts(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, count, chunk))


def _backwards(count: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in reversed(range(0, count, chunk)))


class _ChunkedNll(torch.autograd.Function):
    """l_i = logsumexp(z_i) − z_i[y_i].

    The last chunk's logits are kept for the backward pass (they are in memory anyway), the others are recomputed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, head: Head
    ) -> tuple[Tensor, Tensor]:
        nll = hidden.new_empty(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
        hits = torch.empty_like(labels, dtype=torch.bool)
        log_norm = torch.empty_like(nll)
        kept = None
        for part in _parts(len(labels), chunk):
            logits = head.logits(hidden[part])
            log_norm[part] = torch.logsumexp(logits, dim=-1)
            nll[part] = log_norm[part] - logits.gather(1, labels[part, None]).squeeze(1)
            hits[part] = logits.argmax(dim=-1) == labels[part]
            kept = logits
        ctx.save_for_backward(hidden, weight, bias, labels, log_norm)
        ctx.kept = kept if any(ctx.needs_input_grad) else None
        ctx.chunk, ctx.scale, ctx.softcap = chunk, head.scale, head.softcap
        ctx.mark_non_differentiable(hits)
        return nll, hits

    @staticmethod
    def backward(ctx: Any, grad_nll: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, log_norm = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        found = _Gradients(ctx.needs_input_grad, hidden, head)
        for part in _backwards(len(labels), ctx.chunk):
            logits, ctx.kept = ctx.kept, None
            if logits is None:
                logits = head.logits(hidden[part])
            slope = head.slope(logits)
            grad = logits.sub_(log_norm[part, None]).exp_()  # softmax; the buffer becomes ∂l/∂z in place
            grad[torch.arange(len(grad), device=grad.device), labels[part]] -= 1
            grad *= grad_nll[part, None]
            found.add(part, grad, slope)
        return found.hidden, found.weight, found.bias, None, None, None


def token_nll(hidden: Tensor, head: Head, labels: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, and whether it is the most probable token.

    Args:
        hidden: (n, d) hidden states at the predicting positions.
        labels: (n,) token ids.
        chunk: positions whose (chunk, V) logits exist at once.

    Returns:
        l (n,) in nats, differentiable, in fp32 (or float64 where the model is); hits (n,) bool.
    """
    return _ChunkedNll.apply(hidden, head.weight, head.bias, labels, chunk, head)


@dataclass(frozen=True)
class SoftTarget:
    """A distribution t over the vocabulary to learn at each labelled position instead of its label y.

    ========== ======================================= ===============================
    kind       t                                        loss of a position
    ========== ======================================= ===============================
    reference  softmax(z_ref)                           KL(t ‖ p)
    lowered    softmax(z_ref − strength · onehot(y))    cross-entropy −Σ t log p
    others     softmax(z with z[y] = −∞), detached      cross-entropy −Σ t log p
    ========== ======================================= ===============================

    ``lowered`` is what UNDIAL distils, ``others`` what CE-U does (arXiv: 2402.10052 and 2503.01224).
    """

    kind: Literal["reference", "lowered", "others"]
    strength: float = 0.0

    @property
    def needs_reference(self) -> bool:
        return self.kind != "others"

    def log_target(self, logits: Tensor, reference: Tensor | None, labels: Tensor) -> Tensor:
        """log t (n, V); −∞ where t is 0."""
        target = (logits if reference is None else reference).clone()
        if self.kind != "reference":
            places = torch.arange(len(labels), device=labels.device)
            if self.kind == "lowered":
                target[places, labels] -= self.strength
            else:
                target[places, labels] = -torch.inf
        return torch.log_softmax(target, dim=-1)


class _ChunkedSoftLoss(torch.autograd.Function):
    """−Σ_v t_v log p_v, plus Σ_v t_v log t_v for the KL; ∂/∂z = p − t, with everything recomputed by chunks."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int, head: Head,
        target: SoftTarget, other_hidden: Tensor | None, other_head: Head | None,
    ) -> Tensor:  # fmt: skip
        loss = hidden.new_empty(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part in _parts(len(labels), chunk):
            log_p, log_t, _ = _log_pair(part, hidden, head, labels, target, other_hidden, other_head)
            t = log_t.exp()
            # Where t is 0 its logarithm is −∞ and the product must be 0.
            surprise = log_t.nan_to_num(neginf=0.0) - log_p if target.kind == "reference" else -log_p
            loss[part] = (t * surprise).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, labels, other_hidden)
        ctx.chunk, ctx.scale, ctx.softcap, ctx.target, ctx.other_head = (
            chunk,
            head.scale,
            head.softcap,
            target,
            other_head,
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, other_hidden = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        found = _Gradients(ctx.needs_input_grad, hidden, head)
        for part in _backwards(len(labels), ctx.chunk):
            log_p, log_t, slope = _log_pair(part, hidden, head, labels, ctx.target, other_hidden, ctx.other_head)
            grad = log_p.exp_().sub_(log_t.exp_())
            grad *= grad_loss[part, None]
            found.add(part, grad, slope)
        return found.hidden, found.weight, found.bias, *([None] * 6)


def _log_pair(
    part: slice, hidden: Tensor, head: Head, labels: Tensor, target: SoftTarget,
    other_hidden: Tensor | None, other_head: Head | None,
) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
    """(log p, log t, slope of the head) of the positions ``part``."""
    logits = head.logits(hidden[part])
    other = other_head.logits(other_hidden[part]) if other_head is not None and other_hidden is not None else None
    log_t = target.log_target(logits, other, labels[part])
    return torch.log_softmax(logits, dim=-1), log_t, head.slope(logits)


def soft_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    target: SoftTarget,
    reference: tuple[Tensor, Head] | None = None,
    chunk: int = 1024,
) -> Tensor:
    """The loss (n,) of each position against a soft target, differentiable in ``hidden`` and the head alone.

    ``reference`` are the reference model's hidden states (n, d') and head, where the target is made of them.
    """
    if target.needs_reference and reference is None:
        raise ValueError(f"the target {target.kind!r} is made of a reference model's logits")
    other_hidden, other_head = reference if reference is not None and target.needs_reference else (None, None)
    return _ChunkedSoftLoss.apply(
        hidden, head.weight, head.bias, labels, chunk, head, target,
        None if other_hidden is None else other_hidden.detach(), None if other_head is None else other_head.detached(),
    )  # fmt: skip


def plain_head(model: nn.Module) -> bool:
    """Whether the model's head is one linear layer, as everything here takes for granted."""
    return type(model.get_output_embeddings()) is nn.Linear  # type: ignore[operator]
