"""The model of a task: built or gone on with, and written with the heads of all tasks as one layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.classify.augment import CIFAR_MEAN, CIFAR_STD
from toolbox.classify.classifier import Pixels, find_classifier, load_classifier, stored_pixels
from toolbox.classify.learned import TASKS_KEY, learned_tasks
from toolbox.lwi.objective import SplitHead, find_head
from toolbox.lwi.training_options import DEFAULT_MODEL, DEFAULT_SIZE, Options
from toolbox.models.load import ModelSource
from toolbox.shell.errors import BadData, ToolboxError
from toolbox.weights.write import write_sharded

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

DEFAULT_PIXELS = Pixels(DEFAULT_SIZE, CIFAR_MEAN, CIFAR_STD)


@dataclass(frozen=True)
class Start:
    """Where a task begins: the checked model, its images, and what it has learned (nothing, for a new one)."""

    name: str
    source: ModelSource | None
    pixels: Pixels
    learned: tuple[tuple[str, ...], ...] = ()

    @property
    def old(self) -> list[str]:
        """All learned classes, in the order of the head's rows."""
        return [label for task in self.learned for label in task]


def find_start(options: Options) -> Start:
    """The model of --init or --model, checked without loading its weights.

    Raises: MissingInput (66), BadData (65), Unavailable (69) as ``find_model`` does.
    """
    if options.init is None:
        name = options.model or DEFAULT_MODEL
        source = find_classifier(name)
        pixels = DEFAULT_PIXELS if source is None else stored_pixels(source, None, DEFAULT_PIXELS)
        return Start(name, source, _sized(pixels, options.image_size))
    return stored_model(options.init, options.image_size, "--init")


def stored_model(name: str, image_size: int | None, told: str) -> Start:
    """A model that lwi-train or lwi-fuse wrote, or any image classifier; ``told`` is what messages call it."""
    try:
        source = find_classifier(name)
        if source is None or source.kind != "directory":
            raise BadData(f"--model {name}: a model directory is expected", None)
    except ToolboxError as error:
        error.what = error.what.replace("--model", told)
        raise
    config = read_config(source)
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    learned = learned_tasks(config.to_dict(), labels, name)
    if [label for task in learned for label in task] != labels:
        raise BadData(f"{TASKS_KEY} has another order than id2label", "write both as lwi-train does", file=name)
    return Start(name, source, _sized(stored_pixels(source, None, DEFAULT_PIXELS), image_size), learned)


def read_config(source: ModelSource) -> Any:
    """The configuration of a directory. Raises: BadData (65) where transformers knows no such model."""
    from transformers import AutoConfig

    import toolbox.classify.backbones  # noqa: F401 (registers them)

    try:
        return AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        why = (str(error).splitlines() or ["unknown"])[0][:160]
        raise BadData(f"no image classifier ({why})", None, file=str(source.path)) from None


def _sized(pixels: Pixels, size: int | None) -> Pixels:
    return pixels if size is None else Pixels(size, pixels.mean, pixels.std)


def load(start: Start, labels: Sequence[str], seed: int, told: str = "--init") -> PreTrainedModel:
    """The network of ``start`` in fp32 with a head for ``labels``. Raises: BadData (65)."""
    try:
        return load_classifier(start.name, start.source, labels, image_size=start.pixels.size, seed=seed)[0]
    except BadData as error:
        error.what = error.what.replace("--model", told)
        raise


def build(options: Options, start: Start, labels: Sequence[str]) -> tuple[PreTrainedModel, nn.Module | None]:
    """The network to train, and its teacher (None: nothing to distil from).

    With learned classes the head is split: their rows are frozen, those of ``labels`` are new.
    """
    if not start.learned:
        return load(start, labels, options.seed, "--model"), None
    model = load(start, start.old, options.seed)
    teacher = copy.deepcopy(model) if options.kd > 0 else None
    try:
        place = find_head(model, len(start.old))
    except KeyError:
        raise BadData(f"no linear head with {len(start.old)} rows", "as its id2label says", file=start.name) from None
    model.set_submodule(place, SplitHead(model.get_submodule(place), len(start.old), len(labels), options.seed))
    return model, teacher


def write(
    directory: Path,
    model: PreTrainedModel,
    tasks: Sequence[Sequence[str]],
    pixels: Pixels,
    metadata: Mapping[str, str],
) -> None:
    """A Hugging Face directory whose one linear head has the rows of all tasks, in order."""
    from transformers.core_model_loading import revert_weight_conversion

    split = [name for name, one in model.named_modules() if isinstance(one, SplitHead)]
    for name in split:
        model.set_submodule(name, model.get_submodule(name).merged())
    names = dict(enumerate(label for task in tasks for label in task))
    config = copy.deepcopy(model.config)
    config.id2label, config.label2id = names, {label: number for number, label in names.items()}
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    setattr(config, TASKS_KEY, [list(task) for task in tasks])
    if hasattr(config, "image_size"):
        config.image_size = pixels.size
    config.save_pretrained(directory)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_sharded(directory, revert_weight_conversion(model, tensors), metadata)
    pixels.write(directory)
