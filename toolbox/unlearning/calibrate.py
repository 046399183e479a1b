"""Unlearning with control (UWC): methods compared at equal retention.

    θ(a) = a·θ_orig + (1 − a)·θ_unl            a* = min { a ∈ [0, 1] : ES_retain(θ(a)) ≥ keep · ES_retain(θ_orig) }

What is reported is ES_forget(θ(a*)). A method that forgets by breaking the model needs a large a to get its retention
back, and gets the forgotten back with it.

Source: Wang et al., "Unlearning with Control: Assessing Real-world Utility for Large Language Model Unlearning", 2024,
arXiv 2406.09179. Its released script looks at a = 0 and a = 1 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolbox.models.load import ModelSource
from toolbox.shell.errors import BadData
from toolbox.weights.read import Weights, open_weights

Tensors = Weights | Mapping[str, Tensor]
"""Named tensors: on disk, read when asked for, or a state dict."""

_WHOLE, _COARSE = 100, 10
"""a is searched in hundredths: by tenths first, then by halving the tenth in which the bar is first met."""
_ROUNDING = 1e-9
"""ES are means of fractions: a mean that meets the bar exactly may come out this much below it."""
_SAME_MODEL = "are these two versions of one model?"


@dataclass(frozen=True)
class Calibration:
    """The smallest ``a`` that keeps enough, the ES there, and every ``(a, es_forget, es_retain)`` that was looked at.

    Unless a is 0, the point one hundredth below it is among ``scanned`` (by rising a) and misses the bar.
    """

    a: float
    es_forget: float
    es_retain: float
    keep: float
    scanned: tuple[tuple[float, float, float], ...]

    def as_record(self) -> dict[str, Any]:
        """The fields for a JSON line."""
        return {
            "a": self.a,
            "es_forget": self.es_forget,
            "es_retain": self.es_retain,
            "keep": self.keep,
            "scanned": [list(one) for one in self.scanned],
        }


def uwc(es: Callable[[float], tuple[float, float]], original_retain: float, keep: float = 0.9) -> Calibration:
    """Search the smallest a, to .01, whose ES on the retain rows is at least ``keep`` times the original model's.

    a = 0, .1, .2 ... is tried until the bar is met, and that tenth is halved down to hundredths. The scan stops there
    whatever the curve does behind: the smallest a is asked for, and a later dip does not make an earlier a larger. On a
    noisy curve the crossing found is the first on the grid of tenths; a passing rise above the bar that lies wholly
    within a tenth can be overlooked, and a lucky row can make it early (``scanned`` shows the neighbours). a = 1 is the
    original model and meets the bar by definition. A bar of 0 (an original that recites nothing) is met by a = 0.

    Args:
        es: ``(ES forget, ES retain)`` of θ(a); asked at most once for an a, 15 times at most.
        original_retain: ES of the original model on the same retain rows.
        keep: share of it to be kept, in (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    if not (math.isfinite(original_retain) and original_retain >= 0):
        raise ValueError(f"the original model's ES must be a number of at least 0, got {original_retain}")
    seen: dict[int, tuple[float, float]] = {}

    def kept(hundredths: int) -> bool:
        if hundredths not in seen:
            seen[hundredths] = es(hundredths / _WHOLE)
        return hundredths == _WHOLE or seen[hundredths][1] >= keep * original_retain - _ROUNDING

    good = next(hundredths for hundredths in range(0, _WHOLE + 1, _COARSE) if kept(hundredths))
    bad = good - _COARSE
    while good > 0 and good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if kept(middle) else (good, middle)
    scanned = tuple((hundredths / _WHOLE, *seen[hundredths]) for hundredths in sorted(seen))
    return Calibration(good / _WHOLE, *seen[good], keep, scanned)


def merged(model: nn.Module) -> nn.Module:
    """A plain model: one with adapters gets them added to its weights, W + (alpha/r)·B·A, in place.

    Mixing, quantising and relearning work on whole weights. For an adapter on the original model itself θ(a) is that
    model with the adapter's part scaled by 1 − a.
    """
    return model.merge_and_unload() if _has_adapters(model) else model  # type: ignore[operator]


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "merge_and_unload")


def needs_merged(model: nn.Module) -> None:
    """ValueError for a model whose adapters are not merged: its weights are not those it computes with."""
    if _has_adapters(model):
        raise ValueError("the model has adapters: merge them first (calibrate.merged)")


@contextmanager
def tensors_of(source: ModelSource, *, trust_remote_code: bool = False) -> Iterator[Tensors]:
    """The weights that ``source`` stands for, as ``Mixture`` takes them.

    From a directory (of a GGUF or the embedded model its de-quantised copy) they are read lazily. An adapter, merged
    with its base, and a model on the hub are loaded whole.
    """
    from toolbox.models.facts import weights_directory
    from toolbox.models.load import load_model

    directory = None if source.kind in ("adapter", "hub") else weights_directory(source)
    if directory is not None:
        with open_weights(directory) as weights:
            yield weights
    else:
        yield merged(load_model(source, trust_remote_code=trust_remote_code)).state_dict()


@dataclass(frozen=True)
class _Part:
    """One tensor of the model, with where its two ends come from."""

    tensor: Tensor
    original: Callable[[], Tensor]
    unlearned: Callable[[], Tensor]


class Mixture:
    """Sets a model in place to θ(a) = θ_unl + a·(θ_orig − θ_unl), computed in fp32 (float64 where a weight is).

    a = 0 and a = 1 give the two ends bit for bit, rounded to the model's own type where that is narrower. Tied weights
    are mixed once, under whichever of their names each side stores. ``set(0)`` gives the unlearned model back.

    Memory beyond the model: none that grows with it when both sides are ``Weights`` (a tensor at a time is read; keep
    them open); without ``unlearned``, a copy of those tensors that differ from the original's.

    Args:
        model: a plain model (``merged`` where it has adapters).
        original: θ_orig, under the names of the model's state dict.
        unlearned: θ_unl; by default what is in the model now.

    Raises: BadData (65) where names, shapes or kinds of numbers do not agree with the model's.
    """

    def __init__(self, model: nn.Module, original: Tensors, unlearned: Tensors | None = None) -> None:
        needs_merged(model)
        owned = _owned(model)
        for source, role in ((original, "the original model"), (unlearned, "the unlearned model")):
            if source is not None:
                _check_names(source, owned, role)
        self._parts: list[_Part] = []
        for names, tensor in owned:
            theirs = _reader(original, names, tensor, "the original model")
            if unlearned is not None:
                self._parts.append(_Part(tensor, theirs, _reader(unlearned, names, tensor, "the unlearned model")))
            elif not _same_bits(theirs().to(tensor.dtype), tensor.detach().cpu()):
                self._parts.append(_Part(tensor, theirs, tensor.detach().clone().clone))

    @torch.no_grad()
    def set(self, a: float) -> None:
        """Make the model θ(a). ValueError: a outside [0, 1]. BadData: integers that differ between the two sides."""
        if not 0 <= a <= 1:
            raise ValueError(f"a mixture needs 0 ≤ a ≤ 1, got {a}")
        for part in self._parts:
            if a == 0:
                part.tensor.copy_(part.unlearned())
            elif a == 1:
                part.tensor.copy_(part.original())
            else:
                part.tensor.copy_(_mixed(part.unlearned(), part.original(), a, part.tensor.device))


def _mixed(unlearned: Tensor, original: Tensor, a: float, device: torch.device) -> Tensor:
    if not original.is_floating_point():
        if torch.equal(unlearned, original):
            return original
        raise BadData("integer tensors of the two models differ and cannot be mixed", _SAME_MODEL)
    wide = torch.float64 if torch.float64 in (unlearned.dtype, original.dtype) else torch.float32
    start = unlearned.to(device, wide)
    return start + a * (original.to(device, wide) - start)


def _owned(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Every tensor of the model once, with all its names: tied weights have several."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _check_names(source: Tensors, owned: list[tuple[list[str], Tensor]], role: str) -> None:
    where = _where(source, role)
    known = {name for names, _ in owned for name in names}
    if lacking := [names[0] for names, _ in owned if not any(name in source for name in names)]:
        raise BadData(f"{where}: has no tensor {lacking[0]!r}{_more(lacking)}", _SAME_MODEL)
    if spare := sorted(name for name in source if name not in known):
        raise BadData(f"{where}: has a tensor {spare[0]!r} that the other model lacks{_more(spare)}", _SAME_MODEL)


def _more(names: list[str]) -> str:
    return f" ({len(names)} names differ)" if len(names) > 1 else ""


def _reader(source: Tensors, names: list[str], tensor: Tensor, role: str) -> Callable[[], Tensor]:
    """How to get one tensor of ``source``, checked against the model's by what can be told without reading it."""
    name = next(name for name in names if name in source)
    on_disk = isinstance(source, Weights)
    shape = source.shape(name) if on_disk else tuple(source[name].shape)
    dtype = source.dtype(name) if on_disk else source[name].dtype
    if not on_disk and tensor.numel() and source[name].data_ptr() == tensor.data_ptr():
        raise ValueError(f"{role}: {name!r} is the model's own memory, which mixing overwrites")
    if shape != tuple(tensor.shape):
        what = f"{name!r} has shape {list(shape)}, not {list(tensor.shape)}"
        raise BadData(f"{_where(source, role)}: {what}", _SAME_MODEL)
    if dtype.is_floating_point != tensor.dtype.is_floating_point or dtype.is_complex:
        raise BadData(f"{_where(source, role)}: {name!r} is of type {dtype}, not {tensor.dtype}", _SAME_MODEL)
    return lambda: source[name]


def _where(source: Tensors, role: str) -> str:
    return source.where if isinstance(source, Weights) else role


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Equality that tells 0 from −0, so that nothing is left out of a copy that must be exact."""
    return torch.equal(one.cpu().ravel().view(torch.uint8), other.ravel().view(torch.uint8))
