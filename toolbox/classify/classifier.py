"""An image classifier by name: one of our backbones, a Hugging Face directory or a hub id; and how its pixels are made.

A head that lacks some of the classes at hand keeps the rows of its own; one of other classes is drawn anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.models.load import ModelSource, find_model, no_progress_bars
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PREPROCESSOR = "preprocessor_config.json"
NAMED = ("cifar-resnet8", "cifar-resnet20", "cifar-resnet32", "preact-resnet18")
"""The backbones of ``toolbox.classify.backbones``, named here without torch."""


@dataclass(frozen=True)
class Pixels:
    """How bytes become what the network sees: square images of ``size``, (x/255 − mean) / std."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, size, size) as fp32."""
        from toolbox.classify.augment import normalise

        return normalise(images, self.mean, self.std)

    def write(self, directory: Path) -> None:
        """As transformers' image processors store it."""
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (directory / PREPROCESSOR).write_text(json.dumps(content, indent=2) + "\n")


def find_classifier(name: str, *, trust_remote_code: bool = False) -> ModelSource | None:
    """A checked ``--model``: None for a backbone of ours. Raises: as ``find_model``."""
    return None if name in NAMED else find_model(name, trust_remote_code=trust_remote_code)


def stored_pixels(source: ModelSource, size: int | None, default: Pixels) -> Pixels:
    """What the model directory says of its pixels, ``default`` where it says nothing; ``size`` wins."""
    stored: dict[str, Any] = {}
    if source.path is not None and (source.path / PREPROCESSOR).is_file():
        try:
            stored = json.loads((source.path / PREPROCESSOR).read_bytes())
            found = stored.get("size", {})
            found = found if isinstance(found, int) else found.get("height", found.get("shortest_edge", default.size))
            mean, std = (tuple(map(float, stored.get(key, getattr(default, key[6:])))) for key in _MOMENTS)
            if not (len(mean) == len(std) == 3 and min(std) > 0):
                raise ValueError
            return Pixels(size or int(found), mean, std)
        except (ValueError, TypeError, AttributeError):
            raise BadData("is not what an image processor stores", None, file=str(source.path / PREPROCESSOR)) from None
    return Pixels(size or default.size, default.mean, default.std)


_MOMENTS = ("image_mean", "image_std")


def load_classifier(
    name: str,
    source: ModelSource | None,
    labels: Sequence[str],
    *,
    image_size: int,
    seed: int,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, bool]:
    """The network in fp32 for these classes, in this order; and whether any row of a stored head was drawn anew.

    A stored head keeps its rows where all its classes are among these, by name or, unnamed, where they are as many, by
    number. What is new is drawn by ``seed``.
    Raises: BadData (65) where the directory holds no image classifier, or lacks weights of more than the head, which
    transformers would draw at random.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageClassification

    from toolbox.classify.backbones import backbone_config, new_backbone

    if source is None:
        return new_backbone(backbone_config(name, list(labels), image_size), seed), False
    where = str(source.path or source.name)
    names = dict(enumerate(labels))
    given = {"trust_remote_code": trust_remote_code, "local_files_only": source.path is not None}
    try:
        config = AutoConfig.from_pretrained(where, **given)
        before = [str(config.id2label[number]) for number in range(config.num_labels)]
        unnamed = before == [f"LABEL_{number}" for number in range(len(before))]
        anew = len(before) != len(labels) or (before != list(labels) and not unnamed)
        config.id2label, config.label2id = names, {label: number for number, label in names.items()}
        with torch.random.fork_rng(devices=[]), no_progress_bars():
            torch.manual_seed(seed)
            model, report = AutoModelForImageClassification.from_pretrained(
                where, config=config, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
                output_loading_info=True, **given,
            )  # fmt: skip
            place, head = _head(model, len(labels))
            missing, resized = report["missing_keys"], {key[0] for key in report["mismatched_keys"]}
            anew = anew or bool(missing or resized)
            if anew:
                head.reset_parameters()
            if anew and not missing and set(before) <= set(labels):  # goes on: what it knows stays
                old = _stored_head(where, len(before), given)
                rows = torch.tensor([list(labels).index(label) for label in before])
                with torch.no_grad():
                    for mine, stored in zip(head.parameters(), old.parameters(), strict=True):
                        mine[rows] = stored
                anew = len(before) < len(labels)
    except (ValueError, KeyError, OSError, RuntimeError, StopIteration) as error:
        why = (str(error).splitlines() or ["it has no linear head"])[0][:160]
        advice = f"a Hugging Face image classifier, or {', '.join(NAMED)}"
        raise BadData(f"--model {name}: no image classifier ({why})", advice) from None
    if lost := sorted(key for key in {*missing, *resized} if not key.startswith(f"{place}.")):
        raise BadData(
            f"the weights of {len(lost)} tensors are missing or of another size, {lost[0]} among them",
            "not a whole model, or weights of another one",
            file=name,
        )
    return model, anew


def _head(model: PreTrainedModel, rows: int) -> tuple[str, torch.nn.Linear]:
    """The last linear layer of so many rows, and its name. Raises: StopIteration where there is none."""
    import torch

    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    return next((name, one) for name, one in reversed(layers) if one.out_features == rows)


def _stored_head(where: str, rows: int, given: dict[str, Any]) -> torch.nn.Linear:
    import torch
    from transformers import AutoModelForImageClassification

    stored = AutoModelForImageClassification.from_pretrained(where, dtype=torch.float32, use_safetensors=True, **given)
    return _head(stored, rows)[1]
