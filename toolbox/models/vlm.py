"""Vision-language models: finding, loading, batching rows, the frozen tower's cached features, the causality check.

Any decoder-only image-text-to-text model of transformers. The embedded tower (``effnet_lite``) is known by its model
type: directories that carry a copy of its class file load here without running that copy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from toolbox.models.load import ModelSource, base_model, find_model, load_model, no_progress_bars, prepare
from toolbox.shell.errors import BadData, ToolboxError, UsageProblem
from toolbox.weights.read import open_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolbox.models.spans import Aligned

FAMILY = "AutoModelForImageTextToText"
OUR_TOWER = "efficientnet_lite"
CONNECTOR_FILE = "connector.safetensors"
"""Beside an adapter: the connector it was trained with, whole."""
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What a processor may make that has a number a token."""


class NotCausal(ToolboxError):
    """A model whose instruction tokens see each other: a loss on them would be copying."""

    exit_code = 1


def find_vlm(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """``find_model`` for an image-text model. Raises: as that, and UsageProblem (2) for a model of another kind."""
    source = find_model(name, trust_remote_code=trust_remote_code or _has_our_tower(Path(name)))
    base = base_model(source, trust_remote_code=trust_remote_code)
    if base.path is not None and (config := base.path / "config.json").is_file():
        content = json.loads(config.read_bytes())
        if "vision_config" not in content:
            what = f"--model {name}: no image-text model (its config.json has no vision_config)"
            raise UsageProblem(what, "lit-build makes one from a vision tower and a language model")
    elif base.kind in ("gguf", "smollm2"):
        what = f"--model {name}: a language model, no image-text model"
        raise UsageProblem(what, "lit-build makes one from a vision tower and a language model")
    return source


def _has_our_tower(path: Path) -> bool:
    try:
        content = json.loads((path / "config.json").read_bytes())
        return content["vision_config"]["model_type"] == OUR_TOWER
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def load_processor(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The processor of ``source``; an adapter without one has that of its base. Raises: BadData (65)."""
    from transformers import AutoProcessor

    if source.kind == "adapter" and source.path is not None and not (source.path / "processor_config.json").is_file():
        return load_processor(
            base_model(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
    try:
        with quiet_transformers():
            processor = AutoProcessor.from_pretrained(str(prepare(source)), trust_remote_code=trust_remote_code)
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        what = str(error).strip().partition("\n")[0][:200]
        advice = "a model whose processor needs torchvision cannot be used"
        raise BadData(f"its processor does not load: {what}", advice, file=source.name) from None
    if getattr(processor, "image_processor", None) is None:
        raise BadData("its processor takes no images", "name an image-text model", file=source.name)
    return processor


def load_vlm(source: ModelSource, *, dtype: Literal["fp32", "bf16"] = "fp32", trust_remote_code: bool = False) -> Any:
    """The image-text model of ``source`` on the CPU, in eval mode; an adapter on top of its base."""
    base = base_model(source, trust_remote_code=trust_remote_code)
    if base.path is not None and _has_our_tower(base.path):
        import_module("toolbox.models.effnet_lite")  # tells transformers of the tower
    with quiet_transformers():
        model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code, family=FAMILY)
    if source.kind == "adapter" and source.path is not None and (own := source.path / CONNECTOR_FILE).is_file():
        with open_weights(own) as weights:
            connector_of(model).load_state_dict({name: weights.tensor(name) for name in weights.names()})
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No advice of transformers' own on stderr, and no bars: that torchvision is missing is meant to be so."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)


# -- batches ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VisionBatch:
    """Padded rows with their images; of the n positions whose next token is asked for, in order of rows:

    ``where`` (n,) index into the flattened (rows · length) positions that predict, ``labels`` (n,) the predicted ids,
    ``row`` (n,) the row. ``inputs`` is all that the model takes: ids, mask and whatever the processor made.
    """

    inputs: dict[str, Tensor]
    where: Tensor
    labels: Tensor
    row: Tensor
    extra: dict[str, Tensor]

    def to(self, device: torch.device | str) -> VisionBatch:
        """All tensors on ``device``."""
        return VisionBatch(
            {name: value.to(device) for name, value in self.inputs.items()},
            self.where.to(device), self.labels.to(device), self.row.to(device),
            {name: value.to(device) for name, value in self.extra.items()},
        )  # fmt: skip


def collate(
    rows: Sequence[Aligned],
    asked: Sequence[Sequence[int]],
    pad_id: int,
    extra: Mapping[str, Sequence[Sequence[float]]] | None = None,
    *,
    left: bool = False,
) -> VisionBatch:
    """Rows as one batch, padded on the right (or the ``left``, to generate).

    ``asked``: for each row the places of the tokens that are predicted (1 or more). ``extra``: numbers a place, put
    into one tensor each. ``pad_id`` only fills: padding is told by the mask, never by id.
    """
    import torch

    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    where: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for index, (row, places) in enumerate(zip(rows, asked, strict=True)):
        first = longest - len(row.ids) if left else 0
        ids[index, first : first + len(row.ids)] = torch.tensor(row.ids)
        mask[index, first : first + len(row.ids)] = 1
        where += [index * longest + first + place - 1 for place in places]
        labels += [row.ids[place] for place in places]
        owner += [index] * len(places)
    inputs = {"input_ids": ids, "attention_mask": mask, **_stacked([row.inputs for row in rows], longest, left)}
    numbers = {
        name: torch.tensor([value for one in values for value in one], dtype=torch.float64)
        for name, values in (extra or {}).items()
    }
    return VisionBatch(inputs, torch.tensor(where), torch.tensor(labels), torch.tensor(owner), numbers)


def _stacked(rows: Sequence[Mapping[str, Any]], longest: int, left: bool) -> dict[str, Tensor]:
    """What the processor made of each row, one behind another; sides that differ are filled with zeros."""
    import torch

    names = dict.fromkeys(name for row in rows for name in row)
    found: dict[str, Tensor] = {}
    for name in names:
        tensors = [_tensor(row[name]) for row in rows if name in row]
        if name in TOKEN_TYPES:
            short = [longest - one.shape[-1] for one in tensors]
            sides = [(missing, 0) if left else (0, missing) for missing in short]
            padded = [torch.nn.functional.pad(one, side) for one, side in zip(tensors, sides, strict=True)]
            found[name] = torch.cat(padded)
            continue
        most = [max(one.shape[axis] for one in tensors) for axis in range(1, tensors[0].ndim)]
        found[name] = torch.cat([_grown(one, most) for one in tensors])
    return found


def _tensor(value: Any) -> Tensor:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, list) and value and hasattr(value[0], "shape"):
        shapes = [np.asarray(one).shape for one in value]
        most = [max(shape[axis] for shape in shapes) for axis in range(len(shapes[0]))]
        return torch.stack([_grown(torch.as_tensor(np.asarray(one))[None], most)[0] for one in value])
    return torch.as_tensor(np.asarray(value))


def _grown(tensor: Tensor, sides: Sequence[int]) -> Tensor:
    import torch

    pads = [
        pad for have, want in zip(reversed(tensor.shape[1:]), reversed(sides), strict=True) for pad in (0, want - have)
    ]
    return torch.nn.functional.pad(tensor, pads) if any(pads) else tensor


# -- the model --------------------------------------------------------------------------------------------------------
def inner(model: Any) -> Any:
    """The model inside an adapter's wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(rows, length, d) what the language-model head is applied to.

    Rows padded on the right need no mask, since attention is causal; without one the fused kernel runs. Where token
    types shape the attention the mask stays.
    """
    given = dict(inputs)
    if not any(name in given for name in TOKEN_TYPES):
        given.pop("attention_mask", None)
    return inner(model).base_model(**given, use_cache=False).last_hidden_state


def connector_of(model: Any) -> Any:
    """The module between the tower and the language model. Raises: UsageProblem (2) where none is known."""
    body = inner(model).base_model
    for name in ("multi_modal_projector", "connector", "projector", "mm_projector", "aligner"):
        if (found := getattr(body, name, None)) is not None:
            return found
    raise UsageProblem(f"{type(inner(model)).__name__}: its connector is not known", "use another model")


def tower_of(model: Any) -> Any:
    """The vision tower."""
    body = inner(model).base_model
    for name in ("vision_tower", "vision_model", "visual"):
        if (found := getattr(body, name, None)) is not None:
            return found
    raise UsageProblem(f"{type(inner(model)).__name__}: its vision tower is not known", "use another model")


def check_causal(model: Any, row: Aligned, place: int, pad_id: int) -> None:
    """Change the token at ``place`` of one row: no state before it may move.

    Prefix language models let the instruction's tokens see each other, so that predicting them is copying.
    Raises: NotCausal (1).
    """
    import torch

    batch = collate([row], [[place]], pad_id)
    changed = {**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}
    changed["input_ids"][0, place] = (int(changed["input_ids"][0, place]) + 1) % 97
    with torch.no_grad():
        before, after = (hidden_states(model, one)[0, :place] for one in (batch.inputs, changed))
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise NotCausal(
            f"{type(inner(model)).__name__} lets instruction tokens see each other: a loss on them would be copying",
            "use a decoder-only model, or --mode vit",
        )
