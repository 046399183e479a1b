"""How a classifier is judged: logits of all images in order, accuracy, confusion, and rows for a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.classify.augment import normalise
from toolbox.classify.images import Images
from toolbox.stats import wilson


def predict(
    model: nn.Module, pixels: Tensor, *, batch_size: int = 256, prepare: Callable[[Tensor], Tensor] = normalise
) -> Tensor:
    """Logits (n, classes), fp32 on the CPU, of uint8 images in their order; the model is in eval mode meanwhile."""
    device = next(model.parameters()).device
    before, parts = model.training, []
    model.eval()
    try:
        with torch.inference_mode():
            for batch in pixels.split(batch_size):
                parts.append(model(pixel_values=prepare(batch.to(device))).logits.float().cpu())
    finally:
        model.train(before)
    return torch.cat(parts)


def among(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """arg-max over these classes only, int64 (n,): what a task-aware judge takes."""
    index = torch.as_tensor(list(classes))
    return index[logits[:, index].argmax(1)]


def accuracy(predicted: Tensor, targets: Tensor) -> dict[str, Any]:
    """``accuracy`` with its Wilson 95 % interval ``ci`` and ``n``. ValueError: no images."""
    right, count = int((predicted == targets).sum()), len(targets)
    interval = wilson(right, count)
    return {"accuracy": right / count, "n": count, "ci": [interval.low, interval.high]}


def confusion(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): rows are the truth, columns what was said."""
    return torch.bincount(targets * classes + predicted, minlength=classes * classes).view(classes, classes)


def prediction_rows(images: Images, logits: Tensor) -> Iterator[dict[str, Any]]:
    """Each row as it came in, with ``pred`` (a label), ``prob`` (its probability) and ``correct``."""
    for sample, values in zip(images.samples, logits.softmax(1), strict=True):
        best = int(values.argmax())
        label = images.labels[best]
        yield {**sample.data, "id": sample.id, "pred": label, "prob": float(values[best]),
               "correct": label == sample.label}  # fmt: skip
