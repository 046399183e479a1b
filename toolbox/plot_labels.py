"""Where labels go in a figure so that they cover nothing: plain geometry on boxes, in pixels, y upwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ANGLES = 16
_DISTANCES = (7.0, 13.0, 21.0, 32.0)
_ROUNDS = 3  # the labels placed first see the others only from the second round on


def spread(wanted: Sequence[float], gap: float, floor: float, ceiling: float) -> list[float]:
    """Positions at least ``gap`` apart within [floor, ceiling] with the least sum of squared moves, order kept.

    y_i - i·gap must not fall along the sorted positions, which makes this an isotonic regression, solved by pooling
    neighbours that violate it. Where the range is too short for all, the upper ones leave it.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, weight = min(max(wanted[index], floor), ceiling) - rank * gap, 1
        while pools and pools[-1][0] > mean:
            other, members = pools.pop()
            mean, weight = (other * members + mean * weight) / (members + weight), members + weight
        pools.append((mean, weight))
    top = max(floor, ceiling - (len(wanted) - 1) * gap)
    levels = [min(max(mean, floor), top) for mean, weight in pools for _ in range(weight)]
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = levels[rank] + rank * gap
    return places


def place(
    spots: NDArray[np.float64],
    sizes: NDArray[np.float64],
    marks: NDArray[np.float64],
    frame: tuple[float, float, float, float],
    unit: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Put a label beside each spot: (centres (n, 2), distances (n,) between spot and label's edge).

    Shapes: spots and sizes (n, 2), marks (m, 2) pixels that should stay visible; ``frame`` is (x0, y0, x1, y1),
    ``unit`` the pixels of a typographic point. Each label takes the cheapest of 64 places around its spot; cost: marks
    covered, other labels covered, the part outside the frame, the distance. Repeated, so that early ones give way.
    """
    angle = np.tile(np.arange(_ANGLES) * math.tau / _ANGLES, len(_DISTANCES))
    distance = np.repeat(_DISTANCES, _ANGLES) * unit
    directions = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    reach = distance[None, :, None] + sizes[:, None, :] / 2
    centres = spots[:, None, :] + directions * reach
    low, high = centres - sizes[:, None, :] / 2, centres + sizes[:, None, :] / 2  # (n, places, 2)
    outside = np.maximum(0, frame[:2] - low).sum(axis=2) + np.maximum(0, high - frame[2:]).sum(axis=2)
    chosen = np.full(len(spots), -1)
    for _ in range(_ROUNDS):
        for index in range(len(spots)):
            covered = ((marks > low[index][:, None]) & (marks < high[index][:, None])).all(axis=2).sum(axis=1)
            others = np.flatnonzero((chosen >= 0) & (np.arange(len(spots)) != index))
            other_low, other_high = low[others, chosen[others]], high[others, chosen[others]]
            shared = np.minimum(high[index][:, None], other_high) - np.maximum(low[index][:, None], other_low) + unit
            area = np.where((shared > 0).all(axis=2), 200.0 + shared.prod(axis=2), 0.0).sum(axis=1)
            chosen[index] = np.argmin(8.0 * covered + area + 20.0 * outside[index] + distance / unit)
    return centres[np.arange(len(spots)), chosen], distance[chosen]
