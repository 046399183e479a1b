"""ENCO's graph fitting: edge beliefs, their gradients from sampled graphs, the two optimisers, and the DAG projection.

Source: Lippe, Cohen and Gavves, "Efficient Neural Causal Discovery without Acyclicity Constraints" (ICLR 2022),
sections 3.3 and 3.4 (equations 3 and 4) and the authors' released code. Symbols: ``gamma`` and ``theta`` [N, N], row =
cause, theta_ij = -theta_ji; ``target`` is the variable k that was intervened on; ``never`` [N] marks U, the variables
that no experiment has targeted yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAMBDA_SPARSE = 0.004
"""ENCO's default sparsity regulariser."""

UNTRIED_STEP = 0.1
"""Step weight of theta between two variables that were never intervened on."""


def edge_probabilities(gamma: Tensor, theta: Tensor) -> Tensor:
    """p_ij = sigma(gamma_ij) sigma(theta_ij), 0 on the diagonal: [N, N]. So p_ij + p_ji <= 1."""
    p = torch.sigmoid(gamma) * torch.sigmoid(theta)
    return p.fill_diagonal_(0)


def sample_graphs(p: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` graphs [K, N, N] of independent edges A_ij ~ Bernoulli(p_ij); cycles are possible."""
    drawn = torch.rand(count, *p.shape, generator=generator).to(p.device)
    return (drawn < p).to(p.dtype)


@dataclass(frozen=True)
class EdgeEffects:
    """``difference`` d_ij = mean L_j over graphs with i -> j minus mean L_j over those without, 0 where one is empty;
    ``known`` marks the pairs that both kinds of graph were drawn for. Both [..., N, N]."""

    difference: Tensor
    known: Tensor


def edge_effects(nll: Tensor, graphs: Tensor) -> EdgeEffects:
    """What having an edge did to its child's negative log-likelihood ``nll`` [..., K, N], over graphs [K, N, N].

    The children's L are centred over the graphs first: the difference is the same and single precision keeps it.
    """
    with_edge = graphs.sum(0)
    without = len(graphs) - with_edge
    centred = nll - nll.mean(-2, keepdim=True)
    present = torch.einsum("kij,...kj->...ij", graphs, centred)
    # Centred values sum to 0, so the sum over the graphs without the edge is the negative of that over those with it.
    difference = present / with_edge.clamp(min=1) + present / without.clamp(min=1)
    known = (with_edge > 0) & (without > 0)
    known = known & ~torch.eye(graphs.shape[1], dtype=torch.bool, device=graphs.device)
    return EdgeEffects(difference * known, known.expand(difference.shape))


def gamma_gradient(
    effects: EdgeEffects, gamma: Tensor, theta: Tensor, target: int, lambda_sparse: float = LAMBDA_SPARSE
) -> Tensor:
    """d loss / d gamma_ij = g (1 - g) s (d_ij + lambda) with g = sigma(gamma_ij), s = sigma(theta_ij) (equation 3).

    0 where ``effects`` knows nothing, on the diagonal, and in the target's column: its own mechanism was cut.
    """
    g, s = torch.sigmoid(gamma), torch.sigmoid(theta)
    gradient = effects.known * g * (1 - g) * s * (effects.difference + lambda_sparse)
    gradient[..., :, target] = 0
    return gradient


def theta_gradient(effects: EdgeEffects, gamma: Tensor, theta: Tensor, target: int, never: Tensor) -> Tensor:
    """d loss / d theta_ij = s (1 - s) g d_ij, antisymmetric (equation 4).

    Only edges out of the target count, and those between two variables of ``never``: for all others an intervention
    elsewhere tells nothing about the direction. Then the transpose is subtracted, since theta_ji = -theta_ij.
    """
    g, s = torch.sigmoid(gamma), torch.sigmoid(theta)
    gradient = effects.known * s * (1 - s) * g * effects.difference
    kept = never[:, None] & never[None, :]
    kept[target, :] = True
    gradient = gradient * kept
    return gradient - gradient.transpose(-1, -2)


def theta_step_mask(target: int, never: Tensor) -> Tensor:
    """How far theta may move for an intervention on ``target``: [N, N] of 1 (its row and column), 0.1 (U x U) and 0."""
    mask = UNTRIED_STEP * (never[:, None] & never[None, :]).to(torch.float32)
    mask[target, :] = 1
    mask[:, target] = 1
    mask[target, target] = 0
    return mask


class GammaAdam:
    """Adam over all of gamma, betas (0.9, 0.9) as in ENCO; ``parameter`` [N, N] is changed in place."""

    def __init__(self, parameter: Tensor, lr: float = 2e-2, betas: tuple[float, float] = (0.9, 0.9)) -> None:
        self.parameter, self.lr, self.betas = parameter, lr, betas
        self.first, self.second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self.count = torch.zeros_like(parameter)

    def step(self, gradient: Tensor, mask: Tensor | None = None) -> None:
        """One step. With ``mask`` moments, step counts and values change only where it is above 0, and the step is
        scaled by it: a variable pair that learns seldom keeps the memory of its own few gradients."""
        beta_1, beta_2 = self.betas
        moves = torch.ones_like(gradient) if mask is None else (mask > 0).to(gradient.dtype)
        scale = moves if mask is None else mask
        self.count += moves
        self.first = torch.where(moves > 0, beta_1 * self.first + (1 - beta_1) * gradient, self.first)
        self.second = torch.where(moves > 0, beta_2 * self.second + (1 - beta_2) * gradient**2, self.second)
        steps = self.count.clamp(min=1)
        corrected = self.first / (1 - beta_1**steps)
        spread = (self.second / (1 - beta_2**steps)).sqrt() + 1e-8
        self.parameter -= self.lr * scale * corrected / spread

    def tensors(self) -> dict[str, Tensor]:
        """All that a step depends on besides its gradient."""
        return {"first": self.first, "second": self.second, "count": self.count}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what ``tensors`` gave."""
        for name in ("first", "second", "count"):
            getattr(self, name).copy_(tensors[name])


class ThetaAdam(GammaAdam):
    """Adam over theta, whose moments and step counts are kept per element; ``step`` needs ``theta_step_mask``."""

    def __init__(self, parameter: Tensor, lr: float = 1e-1, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(parameter, lr, betas)


# -- graphs -----------------------------------------------------------------------------------------------------------
def learned_graph(gamma: Tensor, theta: Tensor) -> Tensor:
    """The believed edges, bool [N, N]: ij where gamma_ij > 0 and theta_ij > 0. Cycles of three and more may be."""
    graph = (gamma > 0) & (theta > 0)
    return graph.fill_diagonal_(False)


def project_to_dag(graph: Tensor, p: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """``graph`` [N, N] without the edges that close cycles, and which were dropped, in order.

    While a strongly connected component has more than one node, the edge of lowest ``p`` inside the components goes
    (ties: the first by row, then column). Knows nothing but the graph and the belief.
    """
    import numpy as np
    from scipy.sparse.csgraph import connected_components

    kept = graph.cpu().numpy().astype(bool).copy()
    belief = p.detach().cpu().numpy()
    dropped: list[tuple[int, int]] = []
    while True:
        _, component = connected_components(kept, directed=True, connection="strong")
        inside = kept & (component[:, None] == component[None, :])
        if not inside.any():
            return torch.from_numpy(kept), dropped
        place = int(np.argmin(np.where(inside, belief, np.inf)))
        edge = divmod(place, len(kept))
        kept[edge] = False
        dropped.append(edge)


def is_acyclic(graph: Tensor) -> bool:
    """Whether a bool graph [N, N] holds no directed cycle."""
    return not project_to_dag(graph, torch.zeros(graph.shape))[1]
