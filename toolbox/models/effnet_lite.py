"""EfficientNet-Lite0 as a vision tower of a LLaVA model: torch and transformers alone.

This file stands by itself: a copy of it lies in every model directory that has this tower, so that plain transformers
can load such a directory (with ``trust_remote_code=True``). Importing it tells transformers of the tower's classes.

Architecture: Tan and Le, "EfficientNet" (ICML 2019), in the Lite variant of 2020: ReLU6, no squeeze and excitation,
stem and head of fixed width. Convolutions are padded as TensorFlow's "SAME".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

_BLOCKS = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
           (3, 1, 6, 320, 1))  # fmt: skip
"""Stages: kernel, stride of the first block, expansion, width, blocks."""

_EPS = 1e-3


class EfficientNetLiteConfig(PreTrainedConfig):
    """``image_size`` pixels a side; one feature of ``hidden_size`` channels for each ``patch_size`` square."""

    model_type = "efficientnet_lite"

    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3


class SameConv(nn.Conv2d):
    """A convolution that gives ceil(size / stride) whatever the size: more padding on the right and below."""

    def forward(self, pixels: Tensor) -> Tensor:
        pads: list[int] = []
        for side in (-1, -2):
            stride, kernel, size = self.stride[side], self.kernel_size[side], pixels.shape[side]
            wanted = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [wanted // 2, wanted - wanted // 2]
        return super().forward(nn.functional.pad(pixels, pads))


def _conv(wide_in: int, wide_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(wide_in, wide_out, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """Expand, filter each channel, project; added to what came in where the shapes agree."""

    def __init__(self, wide_in: int, wide_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = wide_in * expansion
        self.expand = _conv(wide_in, wide) if expansion > 1 else None
        self.expand_norm = nn.BatchNorm2d(wide, eps=_EPS) if expansion > 1 else None
        self.depthwise = _conv(wide, wide, kernel, stride, groups=wide)
        self.depthwise_norm = nn.BatchNorm2d(wide, eps=_EPS)
        self.project = _conv(wide, wide_out)
        self.project_norm = nn.BatchNorm2d(wide_out, eps=_EPS)
        self.adds = stride == 1 and wide_in == wide_out

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        if self.expand is not None and self.expand_norm is not None:
            hidden = nn.functional.relu6(self.expand_norm(self.expand(hidden)))
        hidden = nn.functional.relu6(self.depthwise_norm(self.depthwise(hidden)))
        hidden = self.project_norm(self.project(hidden))
        return inputs + hidden if self.adds else hidden


class EfficientNetLiteModel(PreTrainedModel):
    """Pixels (n, 3, h, w) to features (n, h/32 · w/32, 1280), each channel less ``feature_mean``, by ``feature_scale``.

    Its normalisation layers always use their stored statistics: a frozen tower must not follow its batches.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _conv(config.num_channels, 32, 3, 2)
        self.stem_norm = nn.BatchNorm2d(32, eps=_EPS)
        blocks: list[Block] = []
        wide = 32
        for kernel, stride, expansion, out, count in _BLOCKS:
            for place in range(count):
                blocks.append(Block(wide, out, kernel, 1 if place else stride, expansion))
                wide = out
        self.blocks = nn.ModuleList(blocks)
        self.head = _conv(wide, config.hidden_size)
        self.head_norm = nn.BatchNorm2d(config.hidden_size, eps=_EPS)
        self.register_buffer("feature_mean", torch.zeros(config.hidden_size))
        self.register_buffer("feature_scale", torch.ones(config.hidden_size))
        self.post_init()

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        hidden = nn.functional.relu6(self.stem_norm(self.stem(pixel_values.to(self.stem.weight.dtype))))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = nn.functional.relu6(self.head_norm(self.head(hidden)))
        features = (hidden.flatten(2).transpose(1, 2) - self.feature_mean) / self.feature_scale
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=features.mean(1), hidden_states=(features,)
        )


class EfficientNetLlavaConfig(LlavaConfig):
    """LLaVA with this tower: what a directory's ``auto_map`` names."""


class EfficientNetLlava(LlavaForConditionalGeneration):
    """LLaVA with this tower."""

    config_class = EfficientNetLlavaConfig


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
