"""Augmentation in torch, on the device that the batch is on, every draw from a generator of the caller's.

Batches are uint8 (n, 3, size, size); ``normalise`` makes them fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)
"""CIFAR-100's, as FACIL and LwI use them."""


def normalise(images: Tensor, mean: tuple[float, ...] = CIFAR_MEAN, std: tuple[float, ...] = CIFAR_STD) -> Tensor:
    """(x/255 - mean) / std in fp32, a channel."""
    shape = (1, len(mean), 1, 1)
    centre, spread = (torch.tensor(values, device=images.device).view(shape) for values in (mean, std))
    return (images.float() / 255 - centre) / spread


def _draw(count: int, high: int, images: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers below ``high``, drawn on the CPU: the same on every device."""
    return torch.randint(high, (count,), generator=generator).to(images.device)


def pad_crop(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Pad with black and cut a window of the old size at a random place, another for each image."""
    top, left = (_draw(len(images), 2 * pad + 1, images, generator) for _ in range(2))
    return crop_at(images, pad, top, left)


def crop_at(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad with black and cut a window of the old size at these places (n,), from 0 to twice ``pad``."""
    count, channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    index = rows[:, None, :, None] * padded.shape[3] + columns[:, None, None, :]
    flat = padded.flatten(2).gather(2, index.expand(count, channels, height, width).flatten(2))
    return flat.view(count, channels, height, width)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    return flip_where(images, _draw(len(images), 2, images, generator).bool())


def flip_where(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those images left to right for which ``mirrored`` (n,) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def cutout(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Blacken a square of ``size`` around a random point of each image (DeVries and Taylor, arXiv 1708.04552)."""
    count, _, height, width = images.shape
    y, x = _draw(count, height, images, generator), _draw(count, width, images, generator)
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    half = size // 2
    inside_y = (rows >= (y - half)[:, None]) & (rows < (y - half + size)[:, None])
    inside_x = (columns >= (x - half)[:, None]) & (columns < (x - half + size)[:, None])
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0)


def colour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale brightness, contrast and saturation of each image by factors from 1 - strength to 1 + strength."""
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, generator=generator) - 1).to(images.device)
    values = images.float() * factors[0]
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    grey = (values * weights).sum(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    values = mean + factors[1] * (values - mean)
    grey = (values * weights).sum(1, keepdim=True)
    return (grey + factors[2] * (values - grey)).round().clamp(0, 255).to(images.dtype)


def weak(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """CIFAR's usual: pad, crop, flip."""
    return flip(pad_crop(images, pad, generator), generator)
