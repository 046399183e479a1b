"""A power law through few points: y = a · x^b + c, with what it explains and how sure its exponent is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 4
"""Points: three parameters through three points always fit."""


@dataclass(frozen=True)
class PowerLaw:
    """y = a · x^b + c over ``n`` points; ``r2`` of the fit; ``b_interval``: percentile 95 % over resampled points."""

    a: float
    b: float
    c: float
    r2: float
    b_interval: tuple[float, float] | None
    n: int

    def __call__(self, x: float) -> float:
        return self.a * x**self.b + self.c


def fit_power_law(x: Sequence[float], y: Sequence[float], draws: int = 200, seed: int = 0) -> PowerLaw:
    """Bounded least squares, b within [-2, 2]; x is scaled by its geometric mean inside, so that units do not matter.

    ValueError: fewer than four points, an x that is not above 0, or all x equal.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) < LEAST or len(xs) != len(ys):
        raise ValueError(f"a power law needs at least {LEAST} points, got {len(xs)}")
    if not (xs > 0).all() or len(np.unique(xs)) < LEAST:
        raise ValueError(f"a power law needs {LEAST} different x above 0")
    scale = float(np.exp(np.log(xs).mean()))
    a, b, c = _fit(xs / scale, ys)
    rest = ys - (a * (xs / scale) ** b + c)
    spread = float(((ys - ys.mean()) ** 2).sum())
    generator = np.random.Generator(np.random.PCG64(seed))
    exponents = []
    for _ in range(draws):
        chosen = generator.integers(0, len(xs), len(xs))
        if len(np.unique(xs[chosen])) >= LEAST:
            exponents.append(_fit(xs[chosen] / scale, ys[chosen])[1])
    interval = tuple(np.quantile(exponents, (0.025, 0.975)).tolist()) if len(exponents) > draws // 10 else None
    r2 = 1 - float((rest**2).sum()) / spread if spread else 1.0
    return PowerLaw(a / scale**b, b, c, r2, interval, len(xs))  # type: ignore[arg-type]


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """For each b the best a and c are linear: search b, refine it by golden section."""

    def solve(b: float) -> tuple[float, float, float]:
        basis = np.stack((x**b, np.ones_like(x)), 1) if abs(b) > 1e-9 else np.stack((np.log(x), np.ones_like(x)), 1)
        found, *_ = np.linalg.lstsq(basis, y, rcond=None)
        return float(((basis @ found - y) ** 2).sum()), float(found[0]), float(found[1])

    grid = np.concatenate((np.linspace(-2, -0.02, 100), np.linspace(0.02, 2, 100)))
    at = int(np.argmin([solve(b)[0] for b in grid]))
    low, high = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    if low < 0 < high:  # no step across 0, where the curve is a logarithm
        low, high = (grid[at], grid[at]) if at in (99, 100) else (low, high)
    ratio = (5**0.5 - 1) / 2
    for _ in range(60):
        one, two = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, two) if solve(one)[0] <= solve(two)[0] else (one, high)
    b = (low + high) / 2
    _, a, c = solve(b)
    return a, float(b), c
