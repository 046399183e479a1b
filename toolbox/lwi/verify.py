"""Proof by running: a relabelled network must compute what it computed before, or nothing is written.

A random member of every group is applied to NEW, and the real model class is run on random inputs before and after; so
is OLD before and after its alignment. Costs and shares of moved channels prove nothing: a spec that forgets one axis
lowers costs as well.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from toolbox.lwi.checkpoint import OUR_BACKBONES, Checkpoint, Model, Relabelled
from toolbox.lwi.expand import expand
from toolbox.lwi.groups import Permutations, random_relabelling, relabel
from toolbox.lwi.plan import Plan
from toolbox.lwi.spec import Spec
from toolbox.shell.errors import BadData, InternalError, ToolboxError

TOLERANCE = 1e-3
"""Largest accepted |f(relabelled) - f(x)| / max |f(x)| in fp32: rounding in another order of sums stays below 1e-5."""

_SHRUNK_LAYERS, _SHRUNK_VOCABULARY = 2, 512
_UNRUNNABLE = "give a Hugging Face directory whose class is known, or --no-verify (recorded in the header)"


@dataclass(frozen=True)
class Verdict:
    """``how``: full, shrunk or off; ``worst`` the largest relative difference seen, None when off."""

    how: str
    worst: float | None


def model_class(config: Mapping[str, Any]) -> Any:
    """The class that ``architectures`` names, in transformers or among our backbones; None if there is none."""
    import transformers

    module: Any = transformers
    if config.get("model_type") in OUR_BACKBONES:
        from toolbox.classify import backbones as module
    for name in config.get("architectures") or []:
        if isinstance(name, str) and isinstance(found := getattr(module, name, None), type):
            return found
    return None


class Runner:
    """Runs one checkpoint's network on one fixed random batch, with whatever weights it is given."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, seed: int) -> None:
        self.checkpoint, self.plan, self.seed = checkpoint, plan, seed
        self.kind = model_class(checkpoint.config) if checkpoint.directory is not None else None
        if self.kind is None and plan.spec not in ("mlp", "cnn"):
            raise BadData(
                "its network cannot be run here, so nothing can be verified", _UNRUNNABLE, file=checkpoint.name
            )

    def __call__(self, model: Model) -> Tensor:
        """The outputs, fp32. Raises: BadData (65) when the weights do not fit the class or give no finite outputs."""
        tensors = {key: model.read(key) for key in model.names()}
        with torch.no_grad():
            outputs = self._built_in(tensors) if self.kind is None else self._by_class(tensors)
        if not torch.isfinite(outputs).all() or not outputs.abs().max() > 0:
            raise BadData("its outputs on random inputs are not finite, or all zero", _UNRUNNABLE, file=model.name)
        return outputs

    def _built_in(self, tensors: dict[str, Tensor]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return bare_forward(tensors, self.plan, generator)

    def _by_class(self, tensors: dict[str, Tensor]) -> Tensor:
        return _run(load_network(self.checkpoint, tensors), self.seed)


def load_network(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> Any:
    """The network of ``checkpoint``'s class and configuration with other weights, fp32, in eval mode.

    Raises: BadData (65) for a class that is not known, or weights that it does not take.
    """
    from transformers import AutoConfig

    kind = model_class(checkpoint.config)
    if kind is None:
        raise BadData("its network cannot be run here", _UNRUNNABLE, file=checkpoint.name)
    with _plain_errors(checkpoint.name):
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
    return _loaded(kind, config, tensors, checkpoint.name)


def _loaded(kind: Any, config: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The network with these weights, all of them used and none drawn at random."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _plain_errors(name):
            network, report = kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
            )
    finally:
        if shown:
            logging.enable_progress_bar()
    for what in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, report.get(what) or ())):
            raise BadData(
                f"{what.replace('_', ' ')} for {kind.__name__}: {', '.join(wrong[:5])}", _UNRUNNABLE, file=name
            )
    return network.eval()


@contextlib.contextmanager
def _plain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (ToolboxError, MemoryError):
        raise
    except Exception as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise BadData(f"its network does not load: {what}", _UNRUNNABLE, file=name) from None


def _run(network: Any, seed: int) -> Tensor:
    """The network's first output on random token ids or pixels."""
    generator, config = torch.Generator().manual_seed(seed), network.config
    if network.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        inputs = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)
    else:
        longest = getattr(config, "max_position_embeddings", None) or 16
        inputs = torch.randint(config.vocab_size, (2, min(16, longest)), generator=generator)
    return network(**{network.main_input_name: inputs})[0].float()


def bare_forward(tensors: Mapping[str, Tensor], plan: Plan, generator: torch.Generator) -> Tensor:
    """A plain MLP or CNN on a random batch: layers in the plan's order, each with its norm and a ReLU behind it.

    Maps are pooled to the size that the first fully connected layer expects. Any point-wise function and any pooling
    would do: they treat all channels alike.
    """
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in plan.tensors))
    layers = [name for name in names if tensors[f"{name}.weight"].dim() > 1]
    shape = tensors[f"{layers[0]}.weight"].shape
    hidden = torch.randn(16, shape[1], *((32, 32) if len(shape) == 4 else ()), generator=generator)
    for place, name in enumerate(layers):
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        if weight.dim() == 4:
            hidden = F.conv2d(hidden, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
            norm = name.replace("conv", "bn")
            if f"{norm}.running_mean" in tensors:
                statistics = [tensors[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
                hidden = F.batch_norm(hidden, *statistics)
        else:
            if hidden.dim() == 4:
                area = weight.shape[1] // hidden.shape[1]
                side = int(area**0.5)
                hidden = F.adaptive_avg_pool2d(hidden, (side, side) if side * side == area else (1, area)).flatten(1)
            hidden = F.linear(hidden, weight, bias)
        if place + 1 < len(layers):
            hidden = hidden.relu()
    return hidden


def difference(one: Tensor, two: Tensor) -> float:
    """max |one - two| / max |one|."""
    return float((one - two).abs().max() / one.abs().max())


def _broken(spec: Spec, worst: float, where: str) -> ToolboxError:
    what = f"the spec {spec.name} does not keep the function of {where} (relative difference {worst:.1e})"
    if spec.builtin:
        return InternalError(
            f"{what}; nothing was written", "this is a fault of the tool: please report the model's class"
        )
    return BadData(what, "a group's channels are on more axes than the spec says", file=spec.where)


def check_spec(spec: Spec, checkpoint: Checkpoint, plan: Plan, seed: int, limit: float) -> Verdict:
    """Relabel the network by a random member of every group, and compare; the group at fault is named.

    Above ``limit`` parameters a copy of the configuration with two layers and random weights stands for it.
    Raises: BadData (65) for a user's spec that breaks the function, InternalError (70) for one of ours.
    """
    if checkpoint.parameters > limit:
        return _check_shrunk(spec, checkpoint, seed)
    run = Runner(checkpoint, plan, seed)
    member = random_relabelling(plan, seed)
    before = run(checkpoint)
    worst = difference(before, run(Relabelled(checkpoint, plan, member)))
    if not worst <= TOLERANCE:
        raise _broken(spec, worst, f"{checkpoint.name} when {_culprit(run, checkpoint, plan, member, before)} moves")
    return Verdict("full", worst)


def _culprit(run: Runner, checkpoint: Checkpoint, plan: Plan, member: Permutations, before: Tensor) -> str:
    """One group that breaks the function on its own, by halving; or all of them together."""
    names = list(member)
    while len(names) > 1:
        half = names[: len(names) // 2]
        moved = run(Relabelled(checkpoint, plan, {name: member[name] for name in half}))
        names = half if difference(before, moved) > TOLERANCE else names[len(names) // 2 :]
    alone = run(Relabelled(checkpoint, plan, {name: member[name] for name in names}))
    return names[0] if difference(before, alone) > TOLERANCE else "more than one group"


def check_aligned(
    spec: Spec, checkpoint: Checkpoint, model: Model, plan: Plan, perms: Permutations, seed: int, limit: float
) -> float:
    """``model``, which is run as ``checkpoint``'s class, against itself aligned, in the same way.

    Above ``limit`` parameters only that each permutation is one. Raises: as ``check_spec``.
    """
    for name, perm in perms.items():
        if not torch.equal(perm.sort(-1).values, torch.arange(perm.shape[-1]).expand(perm.shape)):
            raise InternalError(f"{name}: not a permutation", "this is a fault of the tool: please report it")
    if checkpoint.parameters > limit:
        return 0.0
    run = Runner(checkpoint, plan, seed)
    worst = difference(run(model), run(Relabelled(model, plan, perms)))
    if not worst <= TOLERANCE:
        raise _broken(spec, worst, f"{model.name} when it is aligned")
    return worst


def _check_shrunk(spec: Spec, checkpoint: Checkpoint, seed: int) -> Verdict:
    """The spec on a network of the same class and width with two layers, a small vocabulary and random weights."""
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    kind = model_class(checkpoint.config) if checkpoint.directory is not None else None
    if kind is None:
        raise BadData("its network cannot be run here, so nothing can be verified", _UNRUNNABLE, file=checkpoint.name)
    with _plain_errors(checkpoint.name):
        config = copy.deepcopy(AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False))
        for name, most in (("num_hidden_layers", _SHRUNK_LAYERS), ("n_layer", _SHRUNK_LAYERS),
                           ("vocab_size", _SHRUNK_VOCABULARY)):  # fmt: skip
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, min(getattr(config, name), most))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if hasattr(config, name):
                setattr(config, name, None)
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = config.layer_types[: config.num_hidden_layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = kind(config).float().eval()
            tensors = _stirred(revert_weight_conversion(network, _untied(network)))
    settings = {**config.to_dict(), "architectures": checkpoint.config.get("architectures")}
    plan = expand(spec, {key: tuple(value.shape) for key, value in tensors.items()}, settings)
    member = random_relabelling(plan, seed)
    moved = {key: relabel(plan, plan.tensors[key], value, member) for key, value in tensors.items()}
    with torch.no_grad():
        before = _run(_loaded(kind, config, tensors, checkpoint.name), seed)
        worst = difference(before, _run(_loaded(kind, config, moved, checkpoint.name), seed))
    if not worst <= TOLERANCE:
        raise _broken(spec, worst, f"a two-layer {kind.__name__}")
    return Verdict("shrunk", worst)


def _untied(network: Any) -> dict[str, Tensor]:
    tensors = dict(network.state_dict())
    for copied, original in dict(getattr(network, "all_tied_weights_keys", None) or {}).items():
        if copied in tensors and original in tensors:
            del tensors[copied]
    return tensors


def _stirred(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random changes on every tensor: fresh biases are 0 and norms 1, which any permutation would keep."""
    result = {}
    for key, value in tensors.items():
        if value.is_floating_point():
            scale = float(value.std()) if value.numel() > 1 else 0.0
            value = value + (0.2 * scale if scale > 0 else 0.1) * torch.randn_like(value)
            value = value.abs() + 0.5 if key.endswith("running_var") else value
        result[key] = value
    return result
