"""Imagined experiments: graphs drawn from the belief, and rows that the current model would give under them.

GIT, AIT and CBED rate a target by what an experiment on it would show. Nothing here knows the true system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolbox.legit.conditionals import Conditionals

_SUREST = 1 - 1e-7


def sample_dags(p: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` DAGs [M, N, N] (float) drawn from edge probabilities ``p`` [N, N], and an order of each [M, N].

    First an order: a root j among the remaining nodes, again and again, with log-weight sum_i log(1 - p_ij) over the
    remaining i. Then, for i before j, the edge with probability p_ij / q_ij, where q_ij = (1 - p_ji)/(2 - p_ij - p_ji)
    is the chance that i is drawn before j when the two are alone. The ratio never passes 1, and each pair keeps its
    edge probability: a plain Bernoulli(p_ij) would count the orientation twice.
    """
    p = p.detach().double().cpu()
    size = len(p)
    absent = torch.log1p(-p.clamp(max=_SUREST))
    remaining = torch.ones(count, size, dtype=torch.bool)
    orders = torch.empty(count, size, dtype=torch.long)
    for step in range(size):
        weights = remaining.double() @ absent
        noise = -torch.log(-torch.log(torch.rand(count, size, generator=generator, dtype=torch.float64).clamp(1e-300)))
        orders[:, step] = (weights + noise).masked_fill(~remaining, -torch.inf).argmax(1)
        remaining.scatter_(1, orders[:, step, None], False)
    rank = orders.argsort(1)
    before = rank[:, :, None] < rank[:, None, :]
    q = (1 - p.t()) / (2 - p - p.t())
    drawn = torch.rand(count, size, size, generator=generator, dtype=torch.float64) < (p / q).clamp(max=1)
    return (before & drawn).float(), orders


@dataclass(frozen=True)
class Imagined:
    """Rows [M, T, B, N] of T experiments in each of M graphs [M, N, N]; ``targets`` are the T variables set."""

    rows: Tensor
    graphs: Tensor
    targets: tuple[int, ...]

    @property
    def flat(self) -> Tensor:
        """All rows [M T B, N]."""
        return self.rows.flatten(0, 2)

    def groups(self) -> Tensor:
        """Which (graph, target) each of the flat rows belongs to: [M T B], target varying faster."""
        graphs, targets, rows, _ = self.rows.shape
        return torch.arange(graphs * targets, device=self.rows.device).repeat_interleave(rows)


@torch.no_grad()
def imagine(
    model: Conditionals, graphs: Tensor, orders: Tensor, targets: tuple[int, ...], rows: int, generator: torch.Generator
) -> Imagined:
    """``rows`` rows a graph and target, by ancestral sampling from ``model`` under do(target ~ uniform).

    One pass over a graph's order serves all its experiments: a node is drawn for the rows of all targets at once.
    """
    device = model.embedding.device
    graphs = graphs.to(device)
    size, block = model.variables, len(targets) * rows
    found = torch.zeros(len(graphs), block, size, dtype=torch.long, device=device)
    noise = torch.rand(len(graphs), block, size, generator=generator).to(device)
    own = {target: slice(place * rows, (place + 1) * rows) for place, target in enumerate(targets)}
    for place, (graph, order) in enumerate(zip(graphs, orders.tolist(), strict=True)):
        values = found[place]
        for node in order:
            above = graph[:, node].nonzero()[:, 0]
            first = model.embedding[node, above[:, None], values[:, above].t()].sum(0)
            cumulative = model.logits(node, first).softmax(-1).cumsum(-1)
            states = model.states[node]
            drawn = (noise[place, :, node, None] >= cumulative[:, : states - 1]).sum(1)
            if node in own:
                uniform = (noise[place, own[node], node] * states).long().clamp(max=states - 1)
                drawn[own[node]] = uniform
            values[:, node] = drawn
    return Imagined(found.view(len(graphs), len(targets), rows, size), graphs, targets)
