"""Vision features of a frozen tower, computed once: without it the tower costs more than a small model's training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from toolbox.lit.images import ImageStore
from toolbox.models.vlm import inner, tower_of
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.files import atomic_file

if TYPE_CHECKING:
    from toolbox.lit.rows import Sample

_BATCH = 16
_KEY = "toolbox_vision"


class CachedTower(nn.Module):
    """Stands in for the tower: what comes in are the features of the layer that the model selects."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutputWithPooling:
        """The features as every hidden state."""
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values, hidden_states=(pixel_values,) * self.layers)


class Features:
    """Features of images by the SHA-1 of their files, all of one shape (tokens, channels), in bf16."""

    def __init__(self, table: Tensor, places: dict[str, int], digests: dict[str, str]) -> None:
        self.table, self._places, self._digests = table, places, digests

    def of(self, images: Sequence[str]) -> Tensor:
        """(images, tokens, channels) in fp32."""
        return self.table[[self._places[self._digests[name]] for name in images]].float()


def cached_features(
    model: Any, processor: Any, samples: Iterable[Sample], store: ImageStore, path: str, tell: Callable[[str], None]
) -> Features:
    """The features of every image of ``samples``; ``path`` is read where it is there, and written with what it lacked.

    Raises: UsageProblem (2) for a model whose tower is not selected by one layer, BadData (65) for a file that another
    tower or another preprocessing made.
    """
    config = inner(model).config
    layer = getattr(config, "vision_feature_layer", None)
    if config.model_type != "llava" or not isinstance(layer, int):
        raise UsageProblem(f"--cache-vision: not for models of type {config.model_type}", "leave it out")
    mark = _mark(model, processor, layer)
    digests: dict[str, str] = {}
    for name in (name for sample in samples for name in sample.images):
        if name not in digests:
            digests[name] = hashlib.sha1(store.bytes_of(name)).hexdigest()  # a name, no protection
    table, names = _read(path, mark)
    places = {name: place for place, name in enumerate(names)}
    first_of: dict[str, str] = {}
    for name, digest in digests.items():
        if digest not in places:
            first_of.setdefault(digest, name)
    if first_of:
        tell(f"{len(first_of)} images through the vision tower (once)")
        parts = _cut(list(first_of.values()))
        made = torch.cat([_through(model, processor, [store.open(name) for name in part], layer) for part in parts])
        table = made if table is None else torch.cat([table, made])
        for digest in first_of:
            places[digest] = len(places)
        _write(path, table, places, mark)
    assert table is not None
    return Features(table, places, digests)


def use_cached(model: Any) -> nn.Module:
    """Put a ``CachedTower`` in the tower's place; returns the tower, to be put back."""
    body = inner(model).base_model
    tower = body.vision_tower
    layer = inner(model).config.vision_feature_layer
    body.vision_tower = CachedTower(abs(layer) + 1)
    return tower


def put_back(model: Any, tower: nn.Module) -> None:
    """Undo ``use_cached``."""
    inner(model).base_model.vision_tower = tower


def _cut(names: list[str]) -> list[list[str]]:
    return [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]


@torch.no_grad()
def _through(model: Any, processor: Any, images: list[Any], layer: int) -> Tensor:
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    tower = tower_of(model)
    found = tower(pixels.to(next(tower.parameters()).device), output_hidden_states=True, return_dict=True)
    return found.hidden_states[layer].to("cpu", torch.bfloat16)


def _mark(model: Any, processor: Any, layer: int) -> str:
    """Tower, preprocessing and layer as one hash."""
    hasher = hashlib.sha256(json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str).encode())
    hasher.update(str(layer).encode())
    for name, tensor in sorted(tower_of(model).state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _read(path: str, mark: str) -> tuple[Tensor | None, list[str]]:
    from toolbox.weights.read import open_weights

    if not Path(path).is_file():
        return None, []
    with open_weights(path) as weights:
        header = weights.metadata
        try:
            content = json.loads(header[_KEY])
            names = list(content["images"])
        except (KeyError, ValueError, TypeError):
            raise BadData("no cache of vision features", "choose another --cache-vision", file=path) from None
        if content.get("mark") != mark:
            raise BadData("features of another tower or preprocessing", "choose another --cache-vision", file=path)
        return weights.tensor("features"), names


def _write(path: str, table: Tensor, places: dict[str, int], mark: str) -> None:
    from toolbox.weights.write import write_file

    names = sorted(places, key=lambda name: places[name])
    metadata = {"format": "pt", _KEY: json.dumps({"mark": mark, "images": names}, separators=(",", ":"))}
    with atomic_file(path) as handle:
        write_file(handle, {"features": table}, metadata)
