"""The models that are fused: on disk, relabelled, or fused already; one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolbox.lwi.groups import Permutations, relabel
from toolbox.lwi.plan import Plan
from toolbox.shell.errors import BadData, ToolboxError, UsageProblem
from toolbox.weights.read import Weights, open_weights

OUR_BACKBONES = ("cifar-resnet", "preact-resnet")
_QUANTISED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
_DE_QUANTISE = "de-quantise first: load it in transformers with dtype=float32 and save it"


class Model:
    """Named tensors of one network. ``labels``: the class of each row of its head, None where it has no classes."""

    name: str
    labels: tuple[str, ...] | None = None

    def names(self) -> list[str]:
        raise NotImplementedError

    def shape(self, key: str) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, key: str) -> Tensor:
        """One tensor: floating values in fp32, whole numbers as they are."""
        raise NotImplementedError


@dataclass
class Checkpoint(Model):
    """A model on disk. ``directory`` is None for a bare file; ``config`` is then empty."""

    name: str
    directory: Path | None
    weights: Weights
    config: dict[str, Any]
    labels: tuple[str, ...] | None = None
    _finite: set[str] = field(default_factory=set, repr=False)

    def names(self) -> list[str]:
        return self.weights.names()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.weights.shape(key)

    def read(self, key: str) -> Tensor:
        """As ``Model.read``. Raises: BadData (65) for values that are not finite, naming file and key."""
        values = self.weights.copy(key)
        if not values.is_floating_point():
            return values
        if key not in self._finite:
            if not torch.isfinite(values).all():
                raise BadData(f"tensor {key!r} holds values that are not finite", "was its training cut off?",
                              file=self.weights.where)  # fmt: skip
            self._finite.add(key)
        return values.to(torch.float32)

    def original(self, key: str) -> Tensor:
        """The tensor in its own type."""
        return self.weights.copy(key)

    @property
    def tasks(self) -> int | None:
        """How many tasks the model has learned (``lwi_tasks`` of its configuration); None where it does not say."""
        tasks = self.config.get("lwi_tasks")
        return len(tasks) if isinstance(tasks, list) and tasks else None

    @property
    def parameters(self) -> int:
        """Numbers in all its tensors."""
        return sum(int(torch.Size(self.shape(key)).numel()) for key in self.names())


@dataclass
class Relabelled(Model):
    """``model`` under other channel numbers: the same function."""

    model: Model
    plan: Plan
    perms: Permutations

    def __post_init__(self) -> None:
        self.name, self.labels = self.model.name, self.model.labels

    def names(self) -> list[str]:
        return self.model.names()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.model.shape(key)

    def read(self, key: str) -> Tensor:
        return relabel(self.plan, self.plan.tensors[key], self.model.read(key), self.perms)


# -- opening --------------------------------------------------------------------------------------------------------
def open_checkpoint(name: str, say: Any = None) -> Checkpoint:
    """Open a Hugging Face directory, a bare .safetensors file, or ``smollm2``; nothing but headers is read.

    Raises: MissingInput (66); BadData (65) for pickles, adapters, quantised weights, a damaged configuration;
    UsageProblem (2) for a hub id.
    """
    path = Path(name)
    if path.is_file() or path.suffix == ".safetensors":
        return Checkpoint(name, None, open_weights(path), {})
    directory = _directory(name, say)
    if (directory / "adapter_config.json").is_file():
        raise BadData(
            "an adapter, not a model", "merge it first: peft's merge_and_unload(), save_pretrained()", file=name
        )
    config = _configuration(directory)
    if config.get("quantization_config"):
        raise BadData("its weights are quantised", _DE_QUANTISE, file=str(directory / "config.json"))
    weights = open_weights(directory)
    for key in weights:
        if weights.dtype(key) in _QUANTISED and len(weights.shape(key)) > 1:
            raise BadData(f"tensor {key!r} is quantised ({weights.dtype(key)})", _DE_QUANTISE, file=weights.where)
    return Checkpoint(name, directory, weights, config, _labels(config))


def _directory(name: str, say: Any) -> Path:
    from toolbox.models.load import find_model, prepare

    if Path(name).is_dir() and (Path(name) / "adapter_config.json").is_file():
        return Path(name)  # refused by the caller, whatever its base is
    try:
        source = find_model(name)
        where = prepare(source, say)
    except ToolboxError as error:
        error.what = error.what.removeprefix("--model ")
        raise
    if not isinstance(where, Path):
        raise UsageProblem(f"{name}: a model of the hub", "download it, and name the directory")
    return where


def _configuration(directory: Path) -> dict[str, Any]:
    """config.json with the defaults of its class, where transformers (or our backbones) know it."""
    from transformers import AutoConfig

    raw = json.loads((directory / "config.json").read_bytes())  # find_model has checked that this is an object
    if raw.get("model_type") in OUR_BACKBONES:
        import toolbox.classify.backbones  # noqa: F401 (registers them)
    try:
        full = AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict()
    except (ValueError, KeyError, OSError, TypeError):
        full = {}
    return {**full, **raw, **({"id2label": full["id2label"]} if full.get("id2label") else {})}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


# -- two models side by side ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rows:
    """Head rows of the labels that two models share: where they are in OLD and in NEW."""

    old: Tensor
    new: Tensor


def pair_labels(old: Model, new: Model, plan: Plan) -> Rows | None:
    """How head rows pair by label name; None where no tensor has label rows, or bare files have no names.

    Raises: BadData (65) for a label of OLD that NEW lacks, for names that occur twice, or heads of other sizes.
    """
    heads = [key for key, tensor in plan.tensors.items() if tensor.labels]
    if not heads or old.labels is None or new.labels is None:
        return None
    for model in (old, new):
        assert model.labels is not None
        if len(set(model.labels)) != len(model.labels):
            raise BadData("two classes have the same label", "name every class in id2label", file=model.name)
        for key in heads:
            if model.shape(key)[0] != len(model.labels):
                what = f"tensor {key!r} has {model.shape(key)[0]} rows for {len(model.labels)} labels of id2label"
                raise BadData(what, "correct config.json", file=model.name)
    if lacking := [label for label in old.labels if label not in new.labels]:
        named = ", ".join(map(repr, lacking[:5]))
        raise BadData(f"{new.name} has no label {named} of {old.name}", "train NEW from OLD with lwi-train, or rename")
    place = {label: row for row, label in enumerate(new.labels)}
    return Rows(torch.arange(len(old.labels)), torch.tensor([place[label] for label in old.labels]))


def check_alike(old: Model, new: Model, plan: Plan) -> None:
    """Keys and shapes must be equal, but for the rows of labels. Raises: BadData (65), the first five named."""
    one, two = set(old.names()), set(new.names())
    if one != two:
        for has, lacks, keys in ((old, new, sorted(one - two)), (new, old, sorted(two - one))):
            if keys:
                named = ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
                tied = (
                    " (one ties its output to its embedding, the other does not)" if keys == ["lm_head.weight"] else ""
                )
                raise BadData(
                    f"{lacks.name} has no {named}, which {has.name} has{tied}", "fuse models of one architecture"
                )
    different = []
    for key in old.names():
        first = 1 if plan.tensors[key].labels else 0
        if old.shape(key)[first:] != new.shape(key)[first:]:
            different.append(f"{key!r} {list(old.shape(key))} and {list(new.shape(key))}")
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise BadData(
            f"{old.name} and {new.name} differ in shape: {', '.join(different[:5])}{more}",
            "fuse models of one architecture, size and vocabulary",
        )


@dataclass
class Paired:
    """OLD and NEW tensor by tensor, of heads only the rows of the labels that both have."""

    old: Model
    new: Model
    plan: Plan
    rows: Rows | None

    def __call__(self, key: str) -> tuple[Tensor, Tensor]:
        old, new = self.old.read(key), self.new.read(key)
        if self.rows is not None and self.plan.tensors[key].labels:
            old, new = old[self.rows.old], new[self.rows.new]
        return old, new


@dataclass
class Fused(Model):
    """w_old * aligned OLD + w_new * NEW, in fp32; head rows that only NEW has, and whole numbers, are NEW's."""

    aligned: Model
    new: Model
    plan: Plan
    rows: Rows | None
    k: float

    def __post_init__(self) -> None:
        self.name, self.labels = self.new.name, self.new.labels

    def names(self) -> list[str]:
        return self.new.names()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.new.shape(key)

    def read(self, key: str) -> Tensor:
        new = self.new.read(key)
        if not new.is_floating_point():
            return new
        old = self.aligned.read(key)
        if self.rows is not None and self.plan.tensors[key].labels:
            result = new.clone()
            result[self.rows.new] = torch.lerp(new[self.rows.new], old[self.rows.old], self.k)
            return result
        return torch.lerp(new, old, self.k)
