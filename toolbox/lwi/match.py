"""One layer's matching: costs between channels, and assignments.

For a group and all weights t that carry it (running statistics of batch norm are none), OLD already aligned on every
other axis, x_c^t and y_d^t are the slices of OLD and NEW at index c, d of the group's axis. A cost C[c, d] (rows: OLD)
is summed over the tensors, and the assignment r minimises sum_d C[r[d], d]: r[d] is the channel of OLD that lands at d.

| metric      | C[c, d]                                        | source                             |
|-------------|------------------------------------------------|------------------------------------|
| sqeuclidean | sum_t |x_c - y_d|^2                            | git-re-basin: same optimum         |
| euclidean   | the square root of that                        | otfusion; the norm of LwI          |
| cosine      | - sum_t <x_c, y_d> / (norms over all tensors)  | an ablation of LwI                 |
| gamf        | - sum over sides of exp(-|x_c - y_d|_4 / 2) / its mean  | GAMF's affinity           |
| edge        | sum_t sum_a |kernel(a, c) - kernel(a, d)|_2    | LwI's distance, edge by edge       |

A "side" is what computes the channels (inputs of the layer) or what reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from toolbox.lwi.plan import TensorPlan
from toolbox.shell.errors import BadData

METRICS = ("sqeuclidean", "euclidean", "cosine", "gamf", "edge")
_SMALL_NETS = 4096
"""Largest group for gamf and edge, which no matrix product computes: beyond it they would run for hours."""


@dataclass(frozen=True)
class Part:
    """A block of a tensor with a dimension a factor: ``dims`` names their groups; OLD is aligned as far as known.

    ``written``: the groups whose channels this tensor computes; ``kernel``: trailing dimensions that are a kernel.
    """

    dims: tuple[str | None, ...]
    old: Tensor
    new: Tensor
    written: frozenset[str]
    kernel: int = 0

    def slices(self, group: str) -> tuple[Tensor, Tensor]:
        """OLD's and NEW's slices at each index of the group, flat: (size, rest) each."""
        place = self.dims.index(group)
        return tuple(one.movedim(place, 0).reshape(one.shape[place], -1) for one in (self.old, self.new))

    def at(self, group: str, old: int, new: int) -> Part:
        """The part at one member of a group: OLD's index ``old`` beside NEW's index ``new``."""
        place = self.dims.index(group)
        dims = self.dims[:place] + self.dims[place + 1 :]
        return Part(dims, self.old.select(place, old), self.new.select(place, new), self.written, self.kernel)


def cut(tensor: TensorPlan, old: Tensor, new: Tensor) -> Iterator[Part]:
    """The parts of a tensor: concatenations cut apart, nested blocks as dimensions of their own."""
    blocks: list[tuple[list[str | None], Tensor, Tensor]] = [([], old, new)]
    for axis in tensor.axes:
        grown = []
        for dims, one, two in blocks:
            start, place = 0, len(dims)
            for segment in axis:
                sizes = [factor.size for factor in segment]
                names = [factor.group for factor in segment]
                length = one.shape[place] if len(axis) == 1 else int(np.prod(sizes))
                cuts = [side.narrow(place, start, length) for side in (one, two)]
                if len(segment) > 1:
                    cuts = [side.unflatten(place, sizes) for side in cuts]
                start += length
                grown.append(([*dims, *names], *cuts))
        blocks = grown
    kernel = 2 if len(tensor.axes) == 4 else 0
    for dims, one, two in blocks:
        yield Part(tuple(dims), one, two, tensor.written, kernel)


# -- costs ----------------------------------------------------------------------------------------------------------
class Cost:
    """C[c, d], summed over the slices that are added one tensor at a time."""

    def __init__(self, metric: str, size: int, device: torch.device | str = "cpu") -> None:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r}")
        if metric in ("gamf", "edge") and size > _SMALL_NETS:
            raise BadData(f"--metric {metric} takes no group of {size} channels", "use sqeuclidean or euclidean")
        self.metric = metric
        self.products = torch.zeros(size, size, device=device)
        self.old, self.new = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.sides: dict[bool, Tensor] = {}

    def add(self, part: Part, group: str) -> None:
        """One part that carries the group."""
        old, new = part.slices(group)
        if self.metric == "gamf":
            side = group in part.written
            self.sides[side] = self.sides.get(side, 0) + torch.cdist(old, new, p=4).pow(4)
        elif self.metric == "edge":
            kernel = old.shape[1] if not part.kernel else int(np.prod(part.old.shape[-part.kernel :]))
            kernel = 1 if not part.kernel else kernel
            for one, two in zip(old.split(kernel, 1), new.split(kernel, 1), strict=True):
                self.products += torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            self.products.addmm_(old, new.T)
            self.old += old.square().sum(1)
            self.new += new.square().sum(1)

    def matrix(self) -> Tensor:
        """The cost (size, size), fp32, rows OLD's channels."""
        if self.metric == "edge":
            return self.products
        if self.metric == "gamf":
            affinities = [torch.exp(-0.5 * fourth.clamp(min=0).pow(0.25)) for fourth in self.sides.values()]
            return -sum(one / one.mean() for one in affinities)
        if self.metric == "cosine":
            norms = self.old.sqrt()[:, None] * self.new.sqrt()[None]
            return -self.products / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        squared = (self.old[:, None] + self.new[None] - 2 * self.products).clamp_(min=0)
        return squared if self.metric == "sqeuclidean" else squared.sqrt_()


# -- assignments ----------------------------------------------------------------------------------------------------
class Solver(Protocol):
    """Gives r with sum_d cost[r[d], d] minimal."""

    def __call__(self, cost: np.ndarray) -> np.ndarray: ...


def standardised(cost: np.ndarray) -> np.ndarray:
    """The cost in float64, centred and divided by its standard deviation: same optimum, no huge numbers."""
    cost = np.asarray(cost, dtype=np.float64)
    cost = cost - cost.mean()
    scale = cost.std()
    return cost / scale if scale > 0 else cost


def hungarian(cost: np.ndarray) -> np.ndarray:
    """The exact assignment: r[d] is the row that column d gets."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(standardised(cost).T)[1]


def sinkhorn_plan(cost: np.ndarray, tau: float, iterations: int) -> np.ndarray:
    """The entropic plan M[d, c] of the standardised cost: rows and columns sum to 1; tau -> 0 gives the assignment.

    log M = -C/tau - f - g, rows and columns normalised in turn in the log domain (Cuturi, NeurIPS 2013).
    """
    log_plan = -standardised(cost).T / tau
    for _ in range(iterations):
        for axis in (0, 1):
            largest = log_plan.max(axis, keepdims=True)
            log_plan -= largest + np.log(np.exp(log_plan - largest).sum(axis, keepdims=True))
    return np.exp(log_plan)


@dataclass(frozen=True)
class Sinkhorn:
    """An entropic plan, read out hard: the permutation that has the most of its mass."""

    tau: float = 0.05
    iterations: int = 200

    def __call__(self, cost: np.ndarray) -> np.ndarray:
        return hungarian(-np.log(np.maximum(sinkhorn_plan(cost, self.tau, self.iterations), 1e-300)).T)


@dataclass(frozen=True)
class Solved:
    """An assignment: ``step`` r, its cost, what the positions as they are cost, and whether that is worth a change."""

    step: Tensor
    before: float
    after: float
    better: bool


def assign(cost: Tensor, solver: Solver, *, dissimilar: bool = False, tolerance: float = 1e-6) -> Solved:
    """Solve one square cost; ``dissimilar`` maximises it. A gain below the rounding of the sums counts as none.

    Raises: BadData (65) for a cost that is not finite.
    """
    matrix = cost.cpu().numpy()
    if not np.isfinite(matrix).all():
        raise BadData("weights too large to compare: a distance is not finite", "are these trained checkpoints?")
    rows = solver(-matrix if dissimilar else matrix)
    here = np.arange(len(matrix))
    before, after = float(matrix.trace(dtype=np.float64)), float(matrix[rows, here].sum(dtype=np.float64))
    gain = after - before if dissimilar else before - after
    better = gain > tolerance * float(np.abs(matrix).mean(dtype=np.float64)) * len(matrix)
    return Solved(torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)), before, after, better)
