"""Batch-norm statistics of a fused network, estimated anew.

The average of two variances is the variance of neither net, nor of the fused one. One pass over images in training mode
gives the statistics that the fused weights really have, as REPAIR does after matching (K. Jordan et al., arXiv
2211.08403, section 4, without its rescaling).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from toolbox.classify.augment import CIFAR_MEAN, CIFAR_STD, normalise
from toolbox.classify.images import load_images
from toolbox.classify.manifest import read_manifest
from toolbox.lwi.checkpoint import Checkpoint, Model
from toolbox.lwi.verify import load_network
from toolbox.shell.errors import UsageProblem
from toolbox.shell.streams import Streams

_BATCH = 256
_DEFAULT_SIZE = 64


def recalibrated(
    like: Checkpoint, fused: Model, source: str, streams: Streams, say: Callable[[str], None]
) -> dict[str, Tensor]:
    """``running_mean`` and ``running_var`` of every batch norm by the images of ``source``, under the files' names.

    mean and unbiased variance over all batches, each counting alike (torch's cumulative average). Images are brought to
    the size and scale of the model's configuration and preprocessor.

    Raises: UsageProblem (2) for a model without batch norm, or a bare file; BadData (65) as the readers of images.
    """
    if like.directory is None:
        raise UsageProblem("--recalibrate needs a model directory", "a bare file has no images' size")
    if not any(key.endswith("running_var") for key in fused.names()):
        raise UsageProblem("--recalibrate: the model has no batch norm", "leave it out")
    network = load_network(like, {key: fused.read(key) for key in fused.names()})
    norms = {name: one for name, one in network.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)}
    size = getattr(network.config, "image_size", None) or _DEFAULT_SIZE
    images = load_images(read_manifest(source, streams), size if isinstance(size, int) else size[0])
    mean, std = _scale(like)
    for one in norms.values():
        one.reset_running_stats()
        one.momentum = None
        one.train()
    # Batches of nearly one size: a short last one would count as much as the others.
    batches = images.pixels.tensor_split(-(-len(images.pixels) // _BATCH))
    with torch.inference_mode():
        for batch in batches:
            network(pixel_values=normalise(batch, mean, std))
    say(f"statistics of {len(norms)} batch norms from {len(images.pixels)} images")
    return {
        f"{name}.{part}": getattr(one, part).clone()
        for name, one in norms.items()
        for part in ("running_mean", "running_var")
    }


def _scale(like: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the model's preprocessor, CIFAR's where it has none."""
    assert like.directory is not None
    path = like.directory / "preprocessor_config.json"
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
        return tuple(map(float, mean)), tuple(map(float, std))
    return CIFAR_MEAN, CIFAR_STD
