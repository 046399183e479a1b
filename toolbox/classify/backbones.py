"""Residual networks for small images that transformers has no class for, registered with its Auto classes.

``import toolbox.classify.backbones`` once, and AutoConfig and AutoModelForImageClassification know two model types:

- ``cifar-resnet``: K. He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2: a
  3 x 3 stem, three stages of n basic blocks with 16, 32 and 64 channels, 6n + 2 layers. Where a stage changes width
  its first block's shortcut is a 1 x 1 convolution with batch norm (their option B), as in FACIL's ResNet-32, so that
  every stage has channels of its own.
- ``preact-resnet``: K. He et al., "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027): norm and ReLU
  before each convolution, none behind the sum, and one norm and ReLU before the pooling.

Pixels are float32 of shape (batch, channels, height, width), normalised by the caller; logits are (batch, classes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

BACKBONES: dict[str, dict[str, object]] = {
    "cifar-resnet8": {"model_type": "cifar-resnet", "depths": [1, 1, 1]},
    "cifar-resnet20": {"model_type": "cifar-resnet", "depths": [3, 3, 3]},
    "cifar-resnet32": {"model_type": "cifar-resnet", "depths": [5, 5, 5]},
    "preact-resnet18": {"model_type": "preact-resnet", "depths": [2, 2, 2, 2]},
}
"""The sizes that have a name."""


class CifarResNetConfig(PreTrainedConfig):
    """``depths``: basic blocks a stage; ``widths``: channels a stage (default: the paper's)."""

    model_type = "cifar-resnet"
    default_widths = (16, 32, 64)

    def __init__(
        self,
        depths: list[int] | None = None,
        widths: list[int] | None = None,
        image_size: int = 32,
        num_channels: int = 3,
        **kwargs: object,
    ) -> None:
        self.depths = list(depths or [1] * len(self.default_widths))
        self.widths = list(widths or self.default_widths[: len(self.depths)])
        if len(self.widths) != len(self.depths) or min(*self.depths, *self.widths) < 1:
            raise ValueError(f"depths {self.depths} and widths {self.widths}: one positive number of each a stage")
        self.image_size = image_size
        self.num_channels = num_channels
        super().__init__(**kwargs)


class PreActResNetConfig(CifarResNetConfig):
    """As ``CifarResNetConfig``, with the widths of ResNet-18."""

    model_type = "preact-resnet"
    default_widths = (64, 128, 256, 512)

    def __init__(self, **settings: object) -> None:  # transformers makes one of its own where a class has none
        super().__init__(**settings)


def _conv(inner: int, outer: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2, bias=False)


class _Projection(nn.Module):
    """The shortcut of a block that changes width or size: 1 x 1 convolution, and batch norm if asked for."""

    def __init__(self, inner: int, outer: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.convolution = _conv(inner, outer, 1, stride)
        self.norm = nn.BatchNorm2d(outer) if norm else None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.convolution(hidden)
        return hidden if self.norm is None else self.norm(hidden)


class _BasicBlock(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inner, outer, 3, stride), nn.BatchNorm2d(outer)
        self.conv2, self.norm2 = _conv(outer, outer, 3), nn.BatchNorm2d(outer)
        changes = stride != 1 or inner != outer
        self.shortcut = _Projection(inner, outer, stride, norm=True) if changes else None

    def forward(self, hidden: Tensor) -> Tensor:
        skipped = hidden if self.shortcut is None else self.shortcut(hidden)
        hidden = F.relu(self.norm1(self.conv1(hidden)))
        return F.relu(self.norm2(self.conv2(hidden)) + skipped)


class _PreActBlock(nn.Module):
    """conv2(relu(norm2(conv1(a)))) + shortcut, with a = relu(norm1(x)); the shortcut is x, or a projection of a."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inner), _conv(inner, outer, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(outer), _conv(outer, outer, 3)
        changes = stride != 1 or inner != outer
        self.shortcut = _Projection(inner, outer, stride, norm=False) if changes else None

    def forward(self, hidden: Tensor) -> Tensor:
        active = F.relu(self.norm1(hidden))
        skipped = hidden if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.norm2(self.conv1(active)))) + skipped


def _stages(block: type[nn.Module], config: CifarResNetConfig) -> nn.ModuleList:
    """The stages; all but the first halve the image in their first block."""
    stages, inner = nn.ModuleList(), config.widths[0]
    for number, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        blocks = nn.ModuleList()
        for place in range(depth):
            blocks.append(block(inner, width, 2 if number and not place else 1))
            inner = width
        stages.append(nn.ModuleDict({"blocks": blocks}))
    return stages


class _ResNet(PreTrainedModel):
    """What both networks share: initialisation, pooling, the loss."""

    main_input_name = "pixel_values"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.reset_running_stats()
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def _classified(self, hidden: Tensor, labels: Tensor | None) -> ImageClassifierOutput:
        logits = self.classifier(hidden.mean(dim=(2, 3)))
        return ImageClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


class CifarResNetForImageClassification(_ResNet):
    """He et al.'s residual network for 32 x 32 images (any size of at least 4 works)."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.stem = nn.ModuleDict({
            "convolution": _conv(config.num_channels, config.widths[0], 3), "norm": nn.BatchNorm2d(config.widths[0])
        })  # fmt: skip
        self.stages = _stages(_BasicBlock, config)
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: object) -> ImageClassifierOutput:
        """Logits of shape (batch, classes), and the mean cross entropy where ``labels`` (batch,) are given."""
        hidden = F.relu(self.stem["norm"](self.stem["convolution"](pixel_values)))
        for stage in self.stages:
            for block in stage["blocks"]:
                hidden = block(hidden)
        return self._classified(hidden, labels)


class PreActResNetForImageClassification(_ResNet):
    """He et al.'s pre-activation network with a 3 x 3 stem, for images of 32 to 64 pixels."""

    config_class = PreActResNetConfig

    def __init__(self, config: PreActResNetConfig) -> None:
        super().__init__(config)
        self.stem = nn.ModuleDict({"convolution": _conv(config.num_channels, config.widths[0], 3)})
        self.stages = _stages(_PreActBlock, config)
        self.norm = nn.BatchNorm2d(config.widths[-1])
        self.classifier = nn.Linear(config.widths[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: object) -> ImageClassifierOutput:
        """Logits of shape (batch, classes), and the mean cross entropy where ``labels`` (batch,) are given."""
        hidden = self.stem["convolution"](pixel_values)
        for stage in self.stages:
            for block in stage["blocks"]:
                hidden = block(hidden)
        return self._classified(F.relu(self.norm(hidden)), labels)


for _config, _model in (
    (CifarResNetConfig, CifarResNetForImageClassification),
    (PreActResNetConfig, PreActResNetForImageClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForImageClassification.register(_config, _model, exist_ok=True)


def backbone_config(name: str, labels: list[str], image_size: int = 32, **changes: object) -> CifarResNetConfig:
    """The configuration of a named backbone for these classes, in this order. KeyError: a name not known."""
    settings = {**BACKBONES[name], **changes}
    names = dict(enumerate(labels))
    return AutoConfig.for_model(
        str(settings.pop("model_type")),
        image_size=image_size,
        id2label=names,
        label2id={label: number for number, label in names.items()},
        **settings,
    )


def new_backbone(config: CifarResNetConfig, seed: int) -> PreTrainedModel:
    """The network with weights drawn by ``seed``, whatever torch's own generator is at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForImageClassification.from_config(config)
