"""Linear concept erasers on stored hidden states: LEACE, mean-difference projection, and the loop of INLP.

Everything is float64 and made of sums that add up over batches and ranks. An eraser is a measuring instrument:
it says what a linear reader finds in activations, and nothing here applies one while a model generates.

Source: LEACE, arXiv 2306.03819, theorem 4.3; INLP, arXiv 2004.07667, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SVD_TOLERANCE = 0.01
"""Singular values of the whitened cross-covariance below this are dropped, as in the package ``concept-erasure``."""


@dataclass(frozen=True)
class Eraser:
    """``r(x) = x − L R (x − μ)`` with L ``proj_left`` (d, k), R ``proj_right`` (k, d), μ ``mean`` (d,).

    ``rank`` k is 0 where nothing was found to erase: then r is the identity.
    """

    proj_left: Tensor
    proj_right: Tensor
    mean: Tensor

    @property
    def rank(self) -> int:
        return self.proj_left.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` (…, d) erased, computed in float64 and given back in its own dtype."""
        left, right, mean = (part.to(x.device) for part in (self.proj_left, self.proj_right, self.mean))
        wide = x.double()
        return (wide - ((wide - mean) @ right.T) @ left.T).to(x.dtype)


class Moments:
    """Sums from which erasers are made: n, means, and centred second moments, float64, mergeable.

    ``update`` takes a batch, ``merge`` another part's sums (Chan, Golub and LeVeque's pairwise update), so that batches
    and ranks give what one batch gives. Memory is (d² + d·k) numbers however many rows go by.
    """

    def __init__(self, width: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        wide = {"dtype": torch.float64, "device": device}
        self.mean_x, self.mean_z = torch.zeros(width, **wide), torch.zeros(classes, **wide)
        self.xx, self.xz = torch.zeros(width, width, **wide), torch.zeros(width, classes, **wide)

    @torch.no_grad()
    def update(self, x: Tensor, z: Tensor) -> Moments:
        """Add rows: ``x`` (n, d) of any float dtype, promoted here; ``z`` (n,) class numbers, or (n, k) values."""
        if z.ndim == 1:
            z = torch.nn.functional.one_hot(z.long(), len(self.mean_z))
        x, z = (part.to(self.xx.device, torch.float64) for part in (x, z))
        if not len(x):
            return self
        part = Moments.__new__(Moments)
        part.n = len(x)
        part.mean_x, part.mean_z = x.mean(0), z.mean(0)
        centred = x - part.mean_x
        part.xx, part.xz = centred.T @ centred, centred.T @ (z - part.mean_z)
        return self.merge(part)

    def merge(self, other: Moments) -> Moments:
        """Add another part's sums to these."""
        if not other.n:
            return self
        if not self.n:  # nothing to add to: the first batch of a fit is often the only one
            self.n, self.mean_x, self.mean_z = other.n, other.mean_x, other.mean_z
            self.xx, self.xz = other.xx, other.xz
            return self
        total = self.n + other.n
        step_x, step_z = other.mean_x - self.mean_x, other.mean_z - self.mean_z
        weight = self.n * other.n / total
        self.xx = self.xx + other.xx + weight * torch.outer(step_x, step_x)
        self.xz = self.xz + other.xz + weight * torch.outer(step_x, step_z)
        self.mean_x = self.mean_x + step_x * (other.n / total)
        self.mean_z = self.mean_z + step_z * (other.n / total)
        self.n = total
        return self

    def covariance(self, shrinkage: bool) -> Tensor:
        """S_xx (d, d): unbiased, or shrunk towards a multiple of the identity (see ``shrunk``)."""
        return shrunk(self.xx / self.n, self.n) if shrinkage else self.xx / (self.n - 1)

    def cross_covariance(self) -> Tensor:
        """S_xz (d, k), unbiased."""
        return self.xz / (self.n - 1)


def shrunk(covariance: Tensor, n: int) -> Tensor:
    """``α S + β (tr S / d) I``: the optimal linear shrinkage of a sample covariance S (d, d) of n rows.

        1 − α = (tr S)² ‖I₀‖² / (n (‖S‖² ‖I₀‖² − ⟨S, I₀⟩²)),   I₀ = (tr S / d) I,   β = (1 − α) ⟨S, I₀⟩ / ‖I₀‖² = 1 − α

    Source: arXiv 1308.2608, theorem 3.2 with the identity as target; the constants 2.2e-16 that keep a zero matrix
    from dividing by zero stand where the package ``concept-erasure`` has them.
    """
    d, tiny = len(covariance), torch.finfo(covariance.dtype).eps
    trace = covariance.trace()
    target = trace**2 / d  # ‖I₀‖², which is ⟨S, I₀⟩ too
    alpha = 1 - (trace**2 * target / n + tiny) / (covariance.square().sum() * target - target**2 + tiny)
    beta = (1 - alpha) * (target + tiny) / (target + tiny)
    return alpha * covariance + beta * (trace / d) * torch.eye(d, dtype=covariance.dtype, device=covariance.device)


def leace(moments: Moments, *, shrinkage: bool = True, tolerance: float = SVD_TOLERANCE) -> Eraser:
    """The least-squares eraser of z from x.

        r(x) = x − W⁺ P W (x − μ),   W = (S_xx^½)⁺,   P the orthogonal projector on col(W S_xz)

    For two classes that is rank one, ``r(x) = x − S_xz bᵀ (x − μ) / (S_xzᵀ b)`` with ``b = S_xx⁻¹ S_xz``: one Cholesky
    solve. A singular S_xx, or more classes, goes through its eigenvectors with pseudo-inverses. Directions whose
    singular value in W S_xz is at most ``tolerance`` are dropped; where none is left the rank is 0.
    """
    covariance, cross = moments.covariance(shrinkage), moments.cross_covariance()
    if cross.shape[1] <= 2:
        found = _rank_one(covariance, cross, moments.mean_x, tolerance)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept], vectors[:, kept]  # the pseudo-inverse leaves the null space alone
    # In the eigenbasis W is diagonal: rows of S_xz divided by the standard deviations.
    u, s, _ = torch.linalg.svd((vectors.T @ cross) / values.sqrt()[:, None], full_matrices=False)
    u = u[:, s > tolerance]
    left = vectors @ (values.sqrt()[:, None] * u)
    right = (u / values.sqrt()[:, None]).T @ vectors.T
    return Eraser(left, right, moments.mean_x.clone())


def _rank_one(covariance: Tensor, cross: Tensor, mean: Tensor, tolerance: float) -> Eraser | None:
    """The eraser of a binary z, None where S_xx is not positive definite to working precision.

    The two one-hot columns are one another's negative: W S_xz has the singular value √(2 cᵀ S_xx⁻¹ c) then.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = factor.diagonal()
    # A pivot lost to rounding: pseudo-inverses would drop that direction, so they decide.
    if failed or diagonal.min() ** 2 <= diagonal.max() ** 2 * len(diagonal) * torch.finfo(diagonal.dtype).eps:
        return None
    first = cross[:, :1]
    solved = torch.cholesky_solve(first, factor)
    strength = (first.T @ solved).item()
    if (cross.shape[1] * strength) ** 0.5 <= tolerance:
        return _nothing(mean)
    return Eraser(first.clone(), (solved / strength).T.contiguous(), mean.clone())


def mean_difference(moments: Moments) -> Eraser:
    """Orthogonal projection off the differences of the class means: ``r(x) = x − Q Qᵀ (x − μ)``, Q a basis of
    col(S_xz), which the class means span. For two classes one direction."""
    u, s, _ = torch.linalg.svd(moments.cross_covariance(), full_matrices=False)
    kept = u[:, s > max(float(s[0]) * 1e-10, torch.finfo(s.dtype).tiny)]
    return Eraser(kept, kept.T.contiguous(), moments.mean_x.clone())


def projected_off(directions: Sequence[Tensor], mean: Tensor) -> Eraser:
    """Orthogonal projection off ``directions`` (each (d,)) around ``mean``."""
    if not directions:
        return _nothing(mean)
    basis, _ = torch.linalg.qr(torch.stack(list(directions), dim=1).double())
    return Eraser(basis, basis.T.contiguous(), mean.clone())


def inlp(
    x: Tensor, mean: Tensor, reader: Callable[[Tensor], tuple[Tensor, float]], *, rounds: int = 32, until: float = 0.55
) -> tuple[Eraser, int | None]:
    """Iterative nullspace projection: fit a linear reader, project its direction out, repeat.

    ``reader(x)`` gives the weights (d,), or (k, d) of a reader with several, and its held-out accuracy, on rows erased
    so far. Ends where that is at most ``until``, or after ``rounds``. Returns the eraser and how many directions it
    took, None where ``until`` was not reached.
    """
    directions: list[Tensor] = []
    basis: list[Tensor] = []
    eraser = _nothing(mean)
    for _ in range(rounds + 1):
        weights, accuracy = reader(eraser(x))
        if accuracy <= until:
            return eraser, len(directions)
        if len(directions) >= rounds:
            break
        for weight in weights.reshape(-1, len(mean)).double():
            for other in basis:  # standardising readers may point back into what is gone
                weight = weight - (weight @ other) * other
            if weight.norm() > 1e-12:
                basis.append(weight / weight.norm())
                directions.append(basis[-1])
        eraser = projected_off(directions, mean)
    return eraser, None


def _nothing(mean: Tensor) -> Eraser:
    empty = torch.zeros(len(mean), 0, dtype=torch.float64, device=mean.device)
    return Eraser(empty, empty.T.contiguous(), mean.clone().double())


def distortion(eraser: Eraser, x: Tensor) -> float:
    """E‖r(x) − x‖² / E‖x − μ‖² over the rows of ``x`` (n, d), μ their own mean: 1 erases everything."""
    wide = x.double()
    moved = (eraser(wide) - wide).square().sum()
    spread = (wide - wide.mean(0)).square().sum()
    return float(moved / spread) if float(spread) > 0 else float("nan")


def condition_number(covariance: Tensor) -> float:
    """Greatest over least eigenvalue of S_xx; infinite where it is singular to working precision."""
    values = torch.linalg.eigvalsh(covariance)
    least, most = float(values[0]), float(values[-1])
    return most / least if least > most * len(values) * torch.finfo(values.dtype).eps else float("inf")
