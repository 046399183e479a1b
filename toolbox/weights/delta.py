"""Differences between two sets of weights: what a training run changed, small to send on its own when compressed.

delta = new - base, in fp32, one tensor at a time. base + delta gives new back bit for bit where the difference needs
no more than fp32's 24 bits: for fp32 weights of the same sign and within a factor 2 of the old ones (Sterbenz,
Floating-Point Computation, 1974, theorem 4.3.1), for bf16 within a factor 2^15, for fp16 within 2^12, and where either
is 0. Elsewhere a rounding of the difference and one of the sum remain: |error| <= 2^-24 (|new - base| + |new|).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.weights.layout import LazyTensor
from toolbox.weights.provenance import with_input
from toolbox.weights.read import Weights, open_weights
from toolbox.weights.write import write_file

if TYPE_CHECKING:
    import torch

BASE = "base"
_WHOLE_UP_TO = 2**24


def sha256_weights(path: str | Path) -> str:
    """The digest of a checkpoint: of one file its SHA-256; of shards, that of ``sha256sum *.safetensors``'s output."""
    with open_weights(path) as weights:
        return weights.sha256()


def write_delta(
    base: Weights,
    new: Weights | Mapping[str, torch.Tensor],
    path: str | Path,
    header: Mapping[str, str],
    *,
    overwrite: bool = True,
) -> None:
    """Write new - base in fp32 under the names of ``base``, with the base's SHA-256 among the header's inputs.

    Raises: BadData (65) when names or shapes differ, or an integer tensor changed by more than fp32 can hold.
    """
    shapes = {name: tuple(new.shape(name) if isinstance(new, Weights) else new[name].shape) for name in new}
    _check_same(base, shapes, "the new weights")
    import torch

    tensors = {
        name: LazyTensor(torch.float32, base.shape(name), lambda name=name: _difference(name, base, new[name]))
        for name in base.names()
    }
    with atomic_file(path, overwrite=overwrite) as handle:
        write_file(handle, tensors, with_input(header, BASE, base.sha256()))


def apply_delta(
    base: Weights, delta: Weights, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, base + delta) a tensor at a time, in the base's types or, for floats, in ``dtype``.

    The sum is made in fp32 (fp64 for fp64 weights) and rounded once to the type asked for.

    Raises: BadData (65) when names or shapes differ, or the delta was made from other weights (by its SHA-256).
    """
    _check_same(base, {name: delta.shape(name) for name in delta}, delta.where)
    inputs = (delta.provenance or {}).get("inputs")
    made_from = inputs.get(BASE) if isinstance(inputs, dict) else None
    if made_from is not None and made_from != base.sha256():
        raise BadData(
            "was made from other weights than these", f"give the base of SHA-256 {made_from}", file=delta.where
        )
    for name in base.names():
        old, change = base.tensor(name), delta.tensor(name)
        if old.is_floating_point():
            wide = _wide(old)
            yield name, (old.to(wide) + change.to(wide)).to(dtype or old.dtype)
        else:
            import torch

            yield name, (old.to(torch.int64) + change.to(torch.int64)).to(old.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _difference(name: str, base: Weights, new: torch.Tensor) -> torch.Tensor:
    """new - base in fp32; of integers exactly, or not at all."""
    import torch

    old, new = base.tensor(name), new.detach().cpu()
    if old.is_complex() or new.is_complex() or old.is_floating_point() != new.is_floating_point():
        raise BadData(f"tensor {name!r}: no difference of {new.dtype} and {old.dtype}", "are these the same model?")
    if old.is_floating_point():
        wide = torch.promote_types(_wide(old), _wide(new))
        return (new.to(wide) - old.to(wide)).to(torch.float32)
    change = new.to(torch.int64) - old.to(torch.int64)
    if change.numel() and change.abs().max() > _WHOLE_UP_TO:
        raise BadData(f"tensor {name!r}: its integers changed by more than fp32 can hold", "keep both checkpoints")
    return change.to(torch.float32)


def _check_same(base: Weights, shapes: Mapping[str, tuple[int, ...]], other: str) -> None:
    """Names and shapes must agree: BadData (65) naming the first that do not."""
    advice = "are these two versions of one model?"
    differing = sorted(set(base.names()) ^ set(shapes))
    if differing:
        lacking = other if differing[0] in base else base.where
        what = f"{lacking}: has no tensor {differing[0]!r}"
        raise BadData(what + (f" ({len(differing)} names differ)" if len(differing) > 1 else ""), advice)
    for name in base.names():
        if base.shape(name) != shapes[name]:
            raise BadData(f"{other}: {name!r} has shape {list(shapes[name])}, not {list(base.shape(name))}", advice)
