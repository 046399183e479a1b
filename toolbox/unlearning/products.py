"""Inner products over lists of gradients as if each list were ONE vector: exact, and without a copy of it.

Lists hold LOCAL tensors (plain ones, or this rank's shards) in one order, None where a parameter has no gradient in
this step; ``reduce`` sums numbers over the ranks that hold shards and is the identity where gradients are replicated.
A parameter without gradient is not moved, so it is left out of all products.

Sums that decide are made in float64, piece by piece: over 28 million elements one fp32 sum leaves a cosine of 5e-5
where it should be 0, and float64 copies of all gradients would take twice their memory again.
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

_LEAST_SQUARE = 1e-30
"""A mean square below which terms may leave fp32's range (1e-38)."""


@torch.no_grad()
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """⟨a_k, b_k⟩ of each pair of tensors on this rank; dtypes and devices may differ within a pair."""
    exact = Exact()
    return [row[0] for row in fetched([_pair(one, other, 0.0, exact) for one, other in zip(a, b, strict=True)])]


@torch.no_grad()
def cosine(a: Gradients, b: Gradients, *, reduce: Reduce) -> float:
    """cos(a, b) of two whole vectors; 0 where one of them is zero. FloatingPointError when a product is not finite."""
    return cosine_of(*column_sums(tensor_products(a, b, reduce), 3))


@torch.no_grad()
def tensor_products(
    gradients: Gradients, others: Gradients, reduce: Reduce, coefs: Sequence[float] | None = None
) -> list[list[float]]:
    """⟨g,h⟩, ⟨g,g⟩ and ⟨h,h⟩ of each pair over all ranks, in one reduction; zeros where there is no gradient.

    With ``coefs``, none of them 0, c·h is taken from g in place first, in the same pass over memory. What these say is
    a measurement that nothing is computed from: ⟨h,h⟩, known by then, is not made again, and the pieces of fp32 tensors
    on a CPU are summed in fp32, which is good to some 1e-8 of ‖g‖·‖h‖ and half the price. A missing h counts as zero.
    FloatingPointError, on all ranks alike, when a product is not finite.
    """
    totals, exact = [], Exact()
    for place, (gradient, other) in enumerate(zip(gradients, others, strict=True)):
        if gradient is None:
            totals.append(torch.zeros(3, dtype=torch.float64))
        else:
            other = zeros_as(gradient) if other is None else other
            totals.append(_pair(gradient, other, coefs[place] if coefs is not None else 0.0, exact))
    numbers = reduced([number for row in fetched(totals) for number in row], reduce)
    return [numbers[start : start + 3] for start in range(0, len(numbers), 3)]


def _pair(gradient: Tensor, other: Tensor, coef: float, exact: Exact) -> Tensor:
    """(3,) ⟨g,h⟩, ⟨g,g⟩, ⟨h,h⟩; with ``coef`` of g − coef·h, and 0 for the last."""
    device = sum_device(gradient)
    quick = bool(coef) and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in (gradient, other))
    sums = []
    for x, y in pieces(gradient, other):
        y = y.to(x.device)
        if coef:
            x.add_(y, alpha=-coef)
        x, y = (x.reshape(-1), y.reshape(-1)) if quick else (exact(x, device, 0), exact(y, device, 1))
        sums += [torch.dot(x, y), torch.dot(x, x), x.new_zeros(()) if coef else torch.dot(y, y)]
    total = torch.stack(sums).double().view(-1, 3).sum(0)
    if quick and not (total.isfinite().all() and total[1] > _LEAST_SQUARE * gradient.numel()):
        return _pair(gradient, other, 0.0, exact)
    return total


def _piece(device: torch.device) -> int:
    return _PIECE if device.type == "cpu" else _DEVICE_PIECE


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of matching parts of tensors of one shape, one small piece after another."""
    most = _piece(tensors[0].device)
    if all(tensor.is_contiguous() for tensor in tensors):
        tensors = tuple(tensor.view(-1) for tensor in tensors)
    rows = max(1, most * len(tensors[0]) // max(1, tensors[0].numel()))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class Exact:
    """Pieces as float64 vectors, in buffers that are used again: fresh memory for each would cost page faults."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[torch.device, int], Tensor] = {}

    def __call__(self, piece: Tensor, device: torch.device, place: int) -> Tensor:
        """``piece`` on ``device``; the copy lasts until the next one for the same ``place``."""
        room = self._rooms.get((device, place))
        if room is None or len(room) < piece.numel():
            room = self._rooms[device, place] = torch.empty(
                max(piece.numel(), _piece(device)), dtype=torch.float64, device=device
            )
        found = room[: piece.numel()]
        found.view(piece.shape).copy_(piece)
        return found


def sum_device(tensor: Tensor) -> torch.device:
    """Where sums over ``tensor`` are made: beside it, but Apple's devices have no float64."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


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
