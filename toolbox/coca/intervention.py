"""Trained interventions on disk, and hooked into a model for the time of a ``with`` block.

    with load_intervention("trained").attach(model):
        backend.complete(requests, decoding)

LoReFT acts on prompts alone. A pass whose key-value cache is empty, or that has none, is a prompt in all its unpadded
columns; a pass that goes on from a filled cache is generated text and left as it is. Whoever runs prompt and generated
tokens together without a cache says how long the prompts are (``Attached.prompts``).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.coca.lofit import HeadGrid, Lofit, read_heads
from toolbox.coca.loreft import FORMS, Loreft, Positions
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.weights.provenance import KEY, canonical, read_provenance
from toolbox.weights.read import Weights, open_weights

FILE = "intervention.safetensors"
_SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "rope_theta", "hidden_act", "tie_word_embeddings"),
)
"""What of a configuration makes two models fit the same intervention."""


def config_digest(config: Any) -> str:
    """sha256 over the sizes and kind of a model: stable over versions of transformers, blind to names and types."""
    text = config.get_text_config(decoder=True)
    shape = {name: getattr(text, name, None) for name in _SHAPE}
    if not shape["head_dim"]:  # some configurations leave it to be divided out
        shape["head_dim"] = HeadGrid.of(config).width
    return hashlib.sha256(canonical(shape).encode()).hexdigest()


@dataclass(frozen=True)
class Intervention:
    """A trained intervention: ``method`` (lofit, loreft, lora), where it was read from, and what its header says.

    ``about``: ``base`` (digests of the model's shape, and of its weights where they are known), ``template`` and
    ``template_sha256`` that it was trained with, and what belongs to the method.
    """

    method: str
    path: Path
    about: Mapping[str, Any]
    module: nn.Module | None = None

    def check_base(self, config: Any, weights_sha256: str | None = None) -> None:
        """BadData (65) where the model is not the one this was trained on."""
        base = self.about.get("base", {})
        if (wanted := base.get("config_sha256")) is not None and wanted != config_digest(config):
            raise self._other_base("its layers or sizes differ")
        known = base.get("weights_sha256")
        if known is not None and weights_sha256 is not None and known != weights_sha256:
            raise self._other_base("its weights differ")

    def _other_base(self, why: str) -> BadData:
        trained = self.about.get("base", {}).get("name")
        return BadData(
            f"was trained on another model{f' ({trained})' if trained else ''}: {why}",
            "give the model it was trained on with --model", file=str(self.path),
        )  # fmt: skip

    @contextmanager
    def attach(self, model: Any) -> Iterator[Attached]:
        """The model with this intervention, as long as the block lasts; afterwards it is what it was.

        ``model``: a transformers causal language model, on whatever device and in whatever dtype.
        Raises: BadData (65) for another base model.
        """
        self.check_base(model.config)
        with ExitStack() as stack:
            if self.module is None:
                yield stack.enter_context(_adapted(self.path, model))
                return
            self.module.to(model.device)
            yield stack.enter_context(hooked(self.module, model))


class Attached:
    """A model with an intervention on it."""

    def __init__(self, loreft: Loreft | None) -> None:
        self._loreft = loreft
        self._lengths: Tensor | None = None

    @contextmanager
    def prompts(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Inside this block the first ``lengths`` (rows,) unpadded tokens of each row are its prompt, whatever
        follows in the same pass."""
        self._lengths = torch.as_tensor(lengths)
        try:
            yield
        finally:
            self._lengths = None

    def before_pass(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Tell LoReFT which columns of this pass are prompts."""
        assert self._loreft is not None
        ids = named.get("input_ids", inputs[0] if inputs else None)
        shape = named["inputs_embeds"].shape[:2] if ids is None else ids.shape
        cache = named.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            self._loreft.prompts(None, None)
            return
        mask = named.get("attention_mask")
        if mask is None or mask.ndim != 2:
            starts, lengths = torch.zeros(shape[0], dtype=torch.int64), torch.full((shape[0],), shape[1])
        else:
            starts, lengths = (mask != 0).int().argmax(dim=1), (mask != 0).sum(dim=1)
        if self._lengths is not None:
            lengths = torch.minimum(self._lengths.to(lengths.device), lengths)
        self._loreft.prompts(starts, lengths)


@contextmanager
def hooked(module: Lofit | Loreft | nn.Module, model: Any) -> Iterator[Attached]:
    """``module``'s hooks in ``model``, and for LoReFT one before each pass that finds the prompts."""
    attached = Attached(module if isinstance(module, Loreft) else None)
    handles = module.hook(model)  # type: ignore[operator]
    if isinstance(module, Loreft):
        # The decoder, not the whole model: losses and probes here call it without the head.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        handles.append(inner.base_model.register_forward_pre_hook(attached.before_pass, with_kwargs=True))
    try:
        yield attached
    finally:
        for handle in handles:
            handle.remove()
        if isinstance(module, Loreft):
            module.prompts(None, None)


@contextmanager
def _adapted(path: Path, model: Any) -> Iterator[Attached]:
    """A PEFT adapter's layers inside ``model``, taken out again at the end."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own call, nobody's here
            adapted = PeftModel.from_pretrained(model, str(path), torch_device=str(model.device)).eval()
    except (RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[0][:200]
        raise BadData(f"does not fit the model: {what}", "give the model it was trained on", file=str(path)) from None
    try:
        yield Attached(None)
    finally:
        adapted.unload()


# -- reading ----------------------------------------------------------------------------------------------------------
def load_intervention(path: str | Path) -> Intervention:
    """The intervention in ``path``: a directory of coca-train, or its ``intervention.safetensors``.

    Raises: MissingInput (66) where there is none; UsageProblem (2) for erasers of coca-probe, and for heads that were
    chosen without offsets; BadData (65) for what is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInput(f"{path}: no such file or directory", "an output of coca-train is expected")
    if (path / "adapter_config.json").is_file():
        return Intervention("lora", path, _about_adapter(path))
    with open_intervention(path) as weights:
        return _read(weights, path)


def open_intervention(path: str | Path) -> Weights:
    """The tensors of an output of coca-train; MissingInput (66) where there are none."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.exists():
        raise MissingInput(f"{path}: {'no such file' if file == path else f'holds no {FILE}'}",
                           "an output of coca-train is expected")  # fmt: skip
    return open_weights(file)


def _about_adapter(path: Path) -> dict[str, Any]:
    with open_weights(path / "adapter_model.safetensors") as weights:
        return (weights.provenance or {}).get("intervention", {})


def _read(weights: Weights, path: Path) -> Intervention:
    names = weights.names()
    header = weights.provenance or {}
    if header.get("command") == "coca-probe" or any(name.endswith(".proj_left") for name in names):
        raise UsageProblem(
            f"{path}: holds linear erasers of coca-probe, which are measuring instruments",
            "erasing what a model reads as harmful can make it refuse less; train an intervention with coca-train",
        )
    about = header.get("intervention")
    if not isinstance(about, dict) or about.get("method") not in ("lofit", "loreft"):
        raise BadData("is not an intervention", "an output of coca-train is expected", file=str(path))
    try:
        module = _lofit(weights, about) if about["method"] == "lofit" else _loreft(weights, about)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadData(f"damaged: {type(error).__name__}: {error}", "train it anew", file=str(path)) from None
    return Intervention(about["method"], path, about, module.requires_grad_(False).eval())


def _lofit(weights: Weights, about: Mapping[str, Any]) -> Lofit:
    grid = HeadGrid(**about["grid"])
    places, _ = read_heads(weights, grid, None, weights.where)
    layers = sorted({place // grid.heads for place in places})
    if f"lofit.v.{layers[0]}" not in weights:
        raise UsageProblem(
            f"{weights.where}: holds the heads of stage a and no offsets", "train them: --stage b --heads-from it"
        )
    offsets = torch.cat([weights[f"lofit.v.{layer}"] for layer in layers])
    if tuple(offsets.shape) != (len(places), grid.width):
        raise ValueError(f"offsets of shape {tuple(offsets.shape)} for {len(places)} heads of {grid.width}")
    found = Lofit(grid, count=len(places), places=places)
    assert found.v is not None
    found.v.data.copy_(offsets)
    return found


def _loreft(weights: Weights, about: Mapping[str, Any]) -> Loreft:
    if about["form"] not in FORMS:
        raise ValueError(f"form {about['form']!r}")
    tensors = {name: weights[name] for name in weights.names()}
    return Loreft.stored(tensors, Positions.parse(about["positions"]), about["form"])


def described(metadata: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, str]:
    """A weight file's header with what there is to say about its intervention."""
    content = read_provenance(metadata) or {}
    return {**metadata, KEY: canonical({**content, "intervention": dict(about)})}
