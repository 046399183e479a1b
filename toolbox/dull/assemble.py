"""Network, averaged copy, gates, optimisers, objective and loop of a run, put together from its options."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolbox.classify.classifier import Pixels, load_classifier
from toolbox.classify.sync import share_batch_norm
from toolbox.dull.brief import Brief
from toolbox.dull.data import Corpus
from toolbox.dull.epoch import EpochEnd
from toolbox.dull.gates import Gated, auto_lambda
from toolbox.dull.objective import DullObjective
from toolbox.dull.options import Options
from toolbox.training.loop import Loop, LoopSettings
from toolbox.training.prepare import without_dropout
from toolbox.training.windows import Plan, Stream

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.models.load import ModelSource

GATE_RATE = 10.0
"""lr_gate is so many times the learning rate, unless it is given."""


@dataclass(frozen=True)
class Training:
    """What learns. ``average`` has the averaged weights, which are judged and kept; ``end`` is called behind epochs."""

    objective: DullObjective
    average: nn.Module
    end: EpochEnd
    loop: Loop


def assemble(
    accelerator: Accelerator,
    corpus: Corpus,
    options: Options,
    source: ModelSource | None,
    pixels: Pixels,
    brief: Brief,
    *,
    note: Callable[[str], None],
    evaluate: Callable[[], dict[str, Any]],
) -> Training:
    """Everything on its device, behind the saved state where ``brief`` names one; ``evaluate`` is called by epoch."""
    backbone, anew = load_classifier(
        options.model, source, corpus.labels, image_size=pixels.size, seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if anew:
        note(f"the head of {options.model} lacks some of the classes: drawn anew")
    without_dropout(backbone)
    backbone.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, and what tensor cores want
    average = deepcopy(backbone)
    if accelerator.num_processes > 1:
        backbone = share_batch_norm(backbone, accelerator.device)
    model = Gated(backbone, len(corpus.labels), trained=options.method == "dull" and options.ifd)
    plan = Plan(Stream("train", len(corpus.train), options.batch_size), (), float(options.epochs), options.seed)
    lr_gate = GATE_RATE * options.lr if options.lr_gate == "auto" else float(options.lr_gate)
    press = auto_lambda(lr_gate, plan.steps) if options.lambda_gate == "auto" else float(options.lambda_gate)
    weights, optimizers = make_optimizers(model, options, lr_gate)
    prepared, *optimizers = accelerator.prepare(model, *optimizers)
    objective = DullObjective(corpus, model, average, options, pixels, steps=plan.steps, lambda_gate=press)
    end = EpochEnd(accelerator, objective, options, optimizers)
    settings = LoopSettings(
        options.lr, options.warmup, options.schedule, options.max_grad_norm, options.micro_batch, "epoch",
        options.save_every, auto_length=options.batch_size, evaluate_start=False,
    )  # fmt: skip
    loop = Loop(
        accelerator, prepared, objective, optimizers, plan, settings, clipped=weights, evaluate=evaluate,
        state_dir=Path(brief.partial) if brief.partial and options.save_every != 0 else None,
        fingerprint=brief.fingerprint,
    )  # fmt: skip
    average.to(accelerator.device)
    if brief.state is not None:
        loop.resume(Path(brief.state))
        end.load(objective.loaded)
    return Training(objective, average, end, loop)


def make_optimizers(model: Gated, options: Options, lr_gate: float) -> tuple[list[Any], list[Any]]:
    """The trained parameters but the gates; and their optimiser, followed by that of the gates where these are trained.

    Gates go by plain SGD: neither momentum nor decay may move them.
    """
    weights = [p for name, p in model.named_parameters() if p.requires_grad and name != "gates"]
    decay = options.weight_decay
    if options.optimizer == "sgd":
        optimizers: list[Any] = [torch.optim.SGD(weights, lr=options.lr, momentum=options.momentum, weight_decay=decay)]
    else:
        optimizers = [torch.optim.AdamW(weights, lr=options.lr, weight_decay=decay)]
    if model.gates.requires_grad:
        optimizers.append(torch.optim.SGD([{"params": [model.gates], "scale": lr_gate / options.lr}], lr=lr_gate))
    return weights, optimizers
