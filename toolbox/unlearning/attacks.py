"""What brings forgotten knowledge back: low-precision weights, and a little fine-tuning on some of the rows.

Both change the model in place: have the weights elsewhere (a directory, ``calibrate.Mixture``) if they are needed
again.

Sources: round-to-nearest as the plainest weight quantisation (Frantar et al., "GPTQ", arXiv 2210.17323, its baseline);
that 4 bits restore unlearned knowledge: Zhang et al., arXiv 2410.16454; relearning: Hu et al., arXiv 2406.13356.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from toolbox.models.chat import Encoded
from toolbox.models.token_loss import TokenLoss
from toolbox.shell.errors import UsageProblem
from toolbox.unlearning.calibrate import needs_merged

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

_SPARE_BITS = 0xFF
"""Low bits of a scale's fp32 significand that are dropped: with the 16 that stay, an integer of 8 bits times the scale
is exact in fp32, and quantising twice gives the same values. (Formats in use keep fewer: fp16 11, bf16 8.)"""


@dataclass(frozen=True)
class Quantized:
    """What was rounded: how many ``tensors`` and ``parameters`` out of ``total`` (shared ones counted once), and the
    mean |w′ − w| over them."""

    bits: int
    group: int
    tensors: int
    parameters: int
    total: int
    mean_abs_error: float


@torch.no_grad()
def quantize_(model: nn.Module, bits: int, group: int = 128) -> Quantized:
    """Round the model's linear layers to int4 or int8 and back, in place: w′ = s·clamp(round(w/s), −Q, Q).

    Symmetric, weights only: Q = 2^(bits−1) − 1 (7 or 127), s = max|w|/Q over ``group`` consecutive weights along the
    input dimension of one output (the last group may be smaller), ties to even. |w′ − w| ≤ s/2; a second time changes
    nothing; zeros stay zeros. Values stay in the model's own type, so everything runs as before; a type of less than 24
    bits rounds w′ once more.

    All ``nn.Linear`` and transformers ``Conv1D`` weights are rounded, save the language-model head, embeddings and what
    is tied to them; biases and norms stay. Experts that a model keeps as stacked parameters are no linear layers and
    stay too: ``parameters`` of ``total`` tells how much was reached.

    ValueError: other bits, a group below 1, unmerged adapters, or a model without a linear layer to round.
    """
    if bits not in (4, 8) or group < 1:
        raise ValueError(f"bits must be 4 or 8 and a group at least 1, got {bits} and {group}")
    needs_merged(model)
    error, count, seen = 0.0, 0, 0
    for weight, transposed in _linear_weights(model):
        matrix = weight.T if transposed else weight
        rounded = round_to_nearest(matrix, bits, group)
        error += float((rounded.float() - matrix.float()).abs().sum(dtype=torch.float64))
        matrix.copy_(rounded)
        count += weight.numel()
        seen += 1
    if not seen:
        raise ValueError("the model has no linear layer to round")
    return Quantized(bits, group, seen, count, sum(p.numel() for p in model.parameters()), error / count)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """``quantize_`` of one matrix (outputs, inputs), as a new tensor of its type."""
    most = 2 ** (bits - 1) - 1
    outputs, inputs = weight.shape
    wide = nn.functional.pad(weight.float(), (0, -inputs % group)).view(outputs, -1, group)
    scale = wide.abs().amax(dim=-1, keepdim=True) / most
    scale = (scale.view(torch.int32) & ~_SPARE_BITS).view(torch.float32)
    steps = torch.where(scale > 0, wide / scale, 0.0).round_().clamp_(-most, most)
    return steps.mul_(scale).view(outputs, -1)[:, :inputs].to(weight.dtype)


def _linear_weights(model: nn.Module) -> list[tuple[Tensor, bool]]:
    """(weight, whether it is stored as (inputs, outputs)) of each linear layer but the head, shared ones once."""
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, which stores its matrix transposed

    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    seen = {id(end.weight) for end in ends if end is not None}
    seen |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found.append((module.weight, isinstance(module, Conv1D)))
    return found


def split_relearn(rows: Sequence[T], n: int, seed: int) -> tuple[list[T], list[T]]:
    """``(learned, others)``: n forget rows drawn by ``seed`` to be learned again, and the rest, which is scored.

    Both are in the order of ``rows``.

    Raises: UsageProblem (2) when nothing would be left to score, or nothing to learn.
    """
    if not 0 < n < len(rows):
        raise UsageProblem(
            f"--relearn {n} of {len(rows)} forget rows: some must be learned and some be left to score",
            f"give a number from 1 to {len(rows) - 1}" if len(rows) > 1 else "give more forget rows",
        )
    drawn = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n].tolist())
    return [row for i, row in enumerate(rows) if i in drawn], [row for i, row in enumerate(rows) if i not in drawn]


def relearn(
    head: TokenLoss,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    accelerator: Accelerator,
) -> list[float]:
    """Fine-tune all weights on ``rows``, in place: L = (1/N) Σ l_i, AdamW, constant rate, no weight decay, no dropout.

    ``steps`` steps of ``batch_size`` rows in passes shuffled by ``seed`` (the last step of a pass may have fewer rows).
    Weights should be fp32: narrower ones lose small steps. One process or DDP; equal on any number of them. The
    accelerator forgets what it had prepared before.

    Returns: the loss of each step, before its update.
    Raises: TryAgain (75) where a loss or gradient is not finite. ValueError: no row, no step, or unmerged adapters.
    """
    from toolbox.training.loop import Loop, LoopSettings
    from toolbox.training.prepare import without_dropout
    from toolbox.training.token_rows import SupervisedObjective
    from toolbox.training.windows import Plan, Stream

    if not rows or steps < 1 or batch_size < 1:
        raise ValueError(f"relearning needs rows, steps and a batch size: {len(rows)}, {steps}, {batch_size}")
    needs_merged(head.model)
    without_dropout(head.model)
    training = head.model.training
    frozen = [p for p in head.model.parameters() if not p.requires_grad]
    head.model.requires_grad_(True)
    plan = Plan(Stream("train", len(rows), batch_size), (), steps / math.ceil(len(rows) / batch_size), seed)
    # A wrapper of its own: under autocast accelerate puts another forward on the module that it prepares.
    model, optimizer = accelerator.prepare(
        TokenLoss(head.model, head.chunk), torch.optim.AdamW(head.model.parameters(), lr=lr, weight_decay=0.0)
    )
    settings = LoopSettings(lr, eval_every=0, save_every=0)
    try:
        loop = Loop(accelerator, model, SupervisedObjective({"train": rows}, pad_id), [optimizer], plan, settings)
        return [event["loss"] for event in loop.run()]
    finally:
        optimizer.zero_grad(set_to_none=True)
        accelerator.free_memory()  # it would keep every model that it ever prepared
        for parameter in frozen:
            parameter.requires_grad_(False)
        head.model.train(training)
