"""Inner products over lists of gradients as if each list were ONE vector: exact, and without a copy of it.

Lists hold LOCAL tensors (plain ones, or this rank's shards) in one order, None where a parameter has no gradient in
this step; ``reduce`` sums numbers over the ranks that hold shards and is the identity where gradients are replicated.
A parameter without gradient is not moved, so it is left out of all products.

Sums are made in float64, piece by piece: over 28 million elements one fp32 sum leaves a cosine of 5e-5 where it should
be 0, fp32 pieces lose 4e-6 of the squared norm of a real gradient, whose tails are heavy, and float64 copies of all
gradients would take twice their memory again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Reduce = Callable[[Sequence[float]], list[float]]
Gradients = Sequence[Tensor | None]

_PIECE = 1 << 17
"""Elements of a piece: two float64 copies (2 MiB) stay in a core's caches, so that memory is read once."""
_DEVICE_PIECE = 1 << 22
"""... on an accelerator, where launches count: 32 MiB a float64 copy."""


@torch.no_grad()
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """⟨a_k, b_k⟩ of each pair of tensors on this rank; dtypes and devices may differ within a pair."""
    scratch = Scratch()
    return [row[0] for row in fetched([_pair(one, other, scratch) for one, other in zip(a, b, strict=True)])]


@torch.no_grad()
def cosine(a: Gradients, b: Gradients, *, reduce: Reduce) -> float:
    """cos(a, b) of two whole vectors; 0 where one of them is zero. FloatingPointError when a product is not finite."""
    return cosine_of(*column_sums(tensor_products(a, b, reduce), 3))


@torch.no_grad()
def tensor_products(gradients: Gradients, others: Gradients, reduce: Reduce) -> list[list[float]]:
    """⟨g,h⟩, ⟨g,g⟩ and ⟨h,h⟩ of each pair over all ranks, in one reduction.

    Zeros where there is no gradient; a missing h counts as zero. FloatingPointError, on all ranks alike, when a product
    is not finite.
    """
    totals, scratch = [], Scratch()
    for gradient, other in zip(gradients, others, strict=True):
        if gradient is None:
            totals.append(torch.zeros(3, dtype=torch.float64))
        else:
            totals.append(_pair(gradient, zeros_as(gradient) if other is None else other, scratch))
    numbers = reduced([number for row in fetched(totals) for number in row], reduce)
    return [numbers[start : start + 3] for start in range(0, len(numbers), 3)]


def _pair(gradient: Tensor, other: Tensor, scratch: Scratch) -> Tensor:
    """(3,) ⟨g,h⟩, ⟨g,g⟩, ⟨h,h⟩ of one pair."""
    sums = []
    for x, y in pieces(gradient, other):
        x, y = scratch.exact(x, y)
        sums += [torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)]
    return torch.stack(sums).view(-1, 3).sum(0)


@torch.no_grad()
def take_away(
    gradients: Gradients, others: Gradients, coefs: Sequence[float], reduce: Reduce, quick: bool = False
) -> list[float]:
    """g ← g − c·h in place, and ⟨g,h⟩ of what it has become, over all ranks: one pass over memory, one reduction.

    With ``quick`` the products of fp32 tensors on a CPU are made in fp32 and added up as a tree: good to some 1e-8 of
    ‖g‖·‖h‖ for a third of the price, where no product leaves fp32's range.
    """
    totals, scratch = [], Scratch()
    for gradient, other, coef in zip(gradients, others, coefs, strict=True):
        if gradient is None or other is None:
            totals.append(torch.zeros(1, dtype=torch.float64))
            continue
        fp32 = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in (gradient, other))
        sums = []
        for x, y in pieces(gradient, other):
            y = y.to(x.device)
            x.add_(y, alpha=-coef)
            if quick and fp32:
                room = scratch.room(0, x.numel(), x.dtype, x.device).view(x.shape)
                sums.append(torch.mul(x, y, out=room).sum())
            else:
                sums.append(torch.dot(*scratch.exact(x, y)))
        totals.append(torch.stack(sums).double().sum(0, keepdim=True))
    return reduced([row[0] for row in fetched(totals)], reduce)


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _DEVICE_PIECE


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of matching parts of tensors of one shape, one small piece after another."""
    most = _piece(tensors[0].device)
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    rows = max(1, most * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class Scratch:
    """Buffers for pieces, used again and again: fresh memory for each piece would cost page faults."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def room(self, place: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(size,) the buffer at ``place``, with anything in it."""
        room = self._rooms.get((place, dtype, device))
        if room is None or len(room) < size:
            room = torch.empty(max(size, _piece(device)), dtype=dtype, device=device)
            self._rooms[place, dtype, device] = room
        return room[:size]

    def exact(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Both pieces as float64 vectors: copies that last until the next call."""
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # Apple's devices have no float64
        copies = [self.room(place, one.numel(), torch.float64, device) for place, one in enumerate((x, y))]
        for copy, one in zip(copies, (x, y), strict=True):
            copy.view(one.shape).copy_(one)
        return copies[0], copies[1]


def zeros_as(tensor: Tensor) -> Tensor:
    """Zeros of the shape of ``tensor`` that take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand_as(tensor)


def reduced(numbers: Sequence[float], reduce: Reduce) -> list[float]:
    """Numbers summed over ranks; FloatingPointError, on all ranks alike, when one is not finite."""
    total = list(reduce(numbers))
    if not all(map(math.isfinite, total)):
        raise FloatingPointError("an inner product of gradients is not finite")
    return total


def fetched(totals: Sequence[Tensor]) -> list[list[float]]:
    """Totals as numbers, fetched from their device at once: waiting for each would stall it."""
    if not totals:
        return []
    device = max((total.device for total in totals), key=lambda one: one.type != "cpu")
    return torch.stack([total.to(device) for total in totals]).tolist()


def column_sums(rows: Sequence[Sequence[float]], width: int) -> list[float]:
    """The exact sum of each of ``width`` columns."""
    return [math.fsum(row[column] for row in rows) for column in range(width)]


def cosine_of(product: float, first: float, second: float) -> float:
    """⟨a,b⟩/(‖a‖‖b‖) from ⟨a,b⟩ and the squared norms; 0 for a zero vector."""
    norms = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, product / norms)) if norms > 0 else 0.0
