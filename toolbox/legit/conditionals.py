"""ENCO's conditional networks: p(x_n | parents of n) for every variable n, and their negative log-likelihoods.

Source: Lippe, Cohen and Gavves, "Efficient Neural Causal Discovery without Acyclicity Constraints" (ICLR 2022),
section 3.2 and appendix A. The likelihood of many graphs on many rows is computed in three forms that agree:

- ``gather_nll`` runs every (graph, row, child) through the network, as the published code does;
- ``dense_nll`` sums the parents' embeddings of all graphs in one product a child;
- ``unique_nll`` evaluates each distinct parent set and each distinct row once and scatters the results back.

Graphs are {0, 1} tensors [K, N, N], row = cause: ``graphs[k, i, j]`` is the edge i -> j. Rows are integer states
[B, N]. A negative log-likelihood is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1
"""Of the leaky ReLUs."""

IMPOSSIBLE = -1e9
"""The logit of a state that a variable does not have."""


class Conditionals(nn.Module):
    """One network a variable n, all of one shape, held together.

    A parent j in state x_j contributes ``embedding[n, j, x_j]``; then h1 = LeakyReLU(sum over parents + b1),
    h2 = LeakyReLU(h1 W2 + b2), logits = h2 W3 + b3. Shapes: ``embedding`` [N, N, C, H] (child, parent, state),
    ``bias_1`` [N, H], ``weight_2`` [N, H, H] (input, output), ``bias_2`` [N, H], ``weight_3`` [N, H, C], ``bias_3``
    [N, C].

    ``states`` are the C_n; with ``mask_states`` logits of states >= C_n are ``IMPOSSIBLE``. Weights are drawn from
    ``generator``: embeddings normal with deviation 2/sqrt(N), matrices uniform within sqrt(6/H), biases 0.
    """

    def __init__(
        self, states: Sequence[int], hidden: int = 64, *, mask_states: bool = True, generator: torch.Generator
    ) -> None:
        super().__init__()
        count, most = len(states), max(states)
        bound = math.sqrt(6 / hidden)

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(*shape, generator=generator) - 1) * bound)

        deviation = 2 / math.sqrt(count)
        self.embedding = nn.Parameter(torch.randn(count, count, most, hidden, generator=generator) * deviation)
        self.bias_1 = nn.Parameter(torch.zeros(count, hidden))
        self.weight_2 = uniform(count, hidden, hidden)
        self.bias_2 = nn.Parameter(torch.zeros(count, hidden))
        self.weight_3 = uniform(count, hidden, most)
        self.bias_3 = nn.Parameter(torch.zeros(count, most))
        self.states = tuple(states)
        absent = torch.arange(most)[None, :] >= torch.tensor(self.states)[:, None]
        self.register_buffer("absent", absent if mask_states else torch.zeros_like(absent), persistent=False)

    @property
    def variables(self) -> int:
        return len(self.states)

    def logits(self, child: int, first: Tensor) -> Tensor:
        """From the summed embeddings of a child's parents [..., H] to its logits [..., C]."""
        hidden = F.leaky_relu(first + self.bias_1[child], SLOPE)
        hidden = F.leaky_relu(torch.addmm(self.bias_2[child], hidden.flatten(0, -2), self.weight_2[child]), SLOPE)
        logits = torch.addmm(self.bias_3[child], hidden, self.weight_3[child])
        return logits.masked_fill(self.absent[child], IMPOSSIBLE).unflatten(0, first.shape[:-1])

    def contributions(self, child: int, rows: Tensor) -> Tensor:
        """What each variable would contribute as a parent of ``child``: [N, B, H] for rows [B, N]."""
        every = torch.arange(self.variables, device=rows.device)[:, None]
        return self.embedding[child][every, rows.t().long()]

    def nll(self, child: int, first: Tensor, values: Tensor) -> Tensor:
        """-log p of the child's ``values`` [B] given summed embeddings [P, B, H]: [P, B]."""
        logits = self.logits(child, first)
        chosen = logits.gather(-1, values.long().expand(logits.shape[:-1])[..., None])[..., 0]
        return torch.logsumexp(logits, -1) - chosen


def distribution_loss(model: Conditionals, rows: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """What distribution fitting descends: the cross-entropy summed over variables, as the mean over rows.

    ``rows`` [B, N]; ``masks`` [B, N, N] holds a graph of its own for each row. ``weights`` [B, N], where given, leaves
    (row, variable) pairs out: a variable's loss is then the mean over the pairs of weight 1.
    """
    count, most = model.variables, model.embedding.shape[2]
    one_hot = F.one_hot(rows.long(), most).to(model.embedding.dtype)  # [B, N, C]
    inputs = (one_hot[None] * masks.permute(2, 0, 1)[..., None]).flatten(2)  # [child, B, N C]
    hidden = torch.baddbmm(model.bias_1[:, None], inputs, model.embedding.flatten(1, 2))
    hidden = F.leaky_relu(hidden, SLOPE)
    hidden = F.leaky_relu(torch.baddbmm(model.bias_2[:, None], hidden, model.weight_2), SLOPE)
    logits = torch.baddbmm(model.bias_3[:, None], hidden, model.weight_3)
    logits = logits.masked_fill(model.absent[:, None], IMPOSSIBLE)
    losses = F.cross_entropy(logits.flatten(0, 1), rows.t().flatten().long(), reduction="none").view(count, -1)
    if weights is None:
        return losses.mean(1).sum()
    kept = weights.t()
    return ((losses * kept).sum(1) / kept.sum(1).clamp(min=1)).sum()


# -- the likelihood of many graphs ------------------------------------------------------------------------------------
def _children(model: Conditionals, skip: int | None) -> Iterable[int]:
    return (child for child in range(model.variables) if child != skip)


def _without_loops(graphs: Tensor) -> Tensor:
    return graphs * (1 - torch.eye(graphs.shape[1], dtype=graphs.dtype, device=graphs.device))


@torch.no_grad()
def gather_nll(model: Conditionals, rows: Tensor, graphs: Tensor, skip: int | None = None) -> Tensor:
    """The mean negative log-likelihood [K, N] of each variable under each graph; ``skip``'s column is 0.

    One network call for every (graph, row, child), each looking up and summing all N masked embeddings: the slow form.
    """
    graphs = _without_loops(graphs.to(model.embedding.dtype))
    result = graphs.new_zeros(len(graphs), model.variables)
    many = rows.repeat(len(graphs), 1)  # [K B, N], as the published code runs them
    masks = graphs.repeat_interleave(len(rows), 0)
    for child in _children(model, skip):
        parts = model.contributions(child, many)  # [N, K B, H]
        first = (parts * masks[:, :, child].t()[..., None]).sum(0)
        result[:, child] = model.nll(child, first[None], many[:, child]).view(len(graphs), -1).mean(1)
    return result


@torch.no_grad()
def dense_nll(model: Conditionals, rows: Tensor, graphs: Tensor, skip: int | None = None) -> Tensor:
    """As ``gather_nll``; the embeddings of all graphs are one product [K, N] @ [N, B H] a child."""
    graphs = _without_loops(graphs.to(model.embedding.dtype))
    result = graphs.new_zeros(len(graphs), model.variables)
    for child in _children(model, skip):
        parts = model.contributions(child, rows)
        first = (graphs[:, :, child] @ parts.flatten(1)).view(len(graphs), *parts.shape[1:])
        result[:, child] = model.nll(child, first, rows[:, child]).mean(1)
    return result


@torch.no_grad()
def unique_nll(model: Conditionals, rows: Tensor, graphs: Tensor, skip: int | None = None) -> Tensor:
    """As ``gather_nll``; each distinct parent set of a child and each distinct row is evaluated once.

    Exact: the results are scattered back to the graphs, and rows are weighed by how often they occur.
    """
    return grouped_nll(model, rows, graphs, torch.zeros(len(rows), dtype=torch.long, device=rows.device), 1, skip)[0]


@torch.no_grad()
def grouped_nll(
    model: Conditionals, rows: Tensor, graphs: Tensor, groups: Tensor, count: int, skip: int | None = None
) -> Tensor:
    """The mean negative log-likelihood of each variable in each group of rows under each graph: [count, K, N].

    ``groups`` [B] says which of ``count`` groups a row belongs to; each group holds at least one row.
    """
    graphs = _without_loops(graphs.to(model.embedding.dtype))
    distinct, places = distinct_rows(rows, model.states)
    shares = graphs.new_zeros(len(distinct), count)
    shares.index_put_((places, groups), torch.ones_like(shares[0, 0]), accumulate=True)
    shares /= shares.sum(0, keepdim=True)
    states = distinct.t().long()
    sets = distinct_sets(graphs)
    if _fits(model, states, sets):
        means = _all_nll(model, states, sets.masks) @ shares  # [N, P, count]
        result = means.gather(1, sets.places.t()[..., None].expand(-1, -1, count))
        if skip is not None:
            result[skip] = 0
        return result.permute(2, 1, 0)
    result = graphs.new_zeros(model.variables, len(graphs), count)
    for child in _children(model, skip):
        blocks = [block @ shares for block in _set_nll(model, child, states, sets.of(child))]
        result[child] = torch.cat(blocks)[sets.places[:, child]]
    return result.permute(2, 1, 0)


@torch.no_grad()
def log_likelihoods(model: Conditionals, rows: Tensor, graphs: Tensor, skip: Tensor, floor: float) -> Tensor:
    """log p(row | graph) [K, B], summed over all variables but ``skip`` [B]; a factor below ``floor`` counts as it.

    Zero cells are common in real tables: off what was seen a factor may be as small as e^-50 by chance alone.
    """
    graphs = _without_loops(graphs.to(model.embedding.dtype))
    distinct, places = distinct_rows(rows, model.states)
    total = graphs.new_zeros(len(graphs), len(rows))
    states = distinct.t().long()
    sets = distinct_sets(graphs)
    for child in range(model.variables):
        lost = torch.cat(list(_set_nll(model, child, states, sets.of(child)))).clamp(max=-floor)
        total -= lost[sets.places[:, child]][:, places] * (skip != child)
    return total


_CELLS = 1 << 21
"""Floats of one block's hidden layer: 8 MiB, near what a cache holds."""


def _set_nll(model: Conditionals, child: int, states: Tensor, sets: Tensor) -> Iterable[Tensor]:
    """-log p of a child in each row under each parent set [P, N]: blocks that make up [P, B]; ``states`` [N, B].

    As ``Conditionals.nll``, with as few passes over memory as this takes: only parents of some set are looked up.
    """
    used = sets.any(0).nonzero()[:, 0] if len(sets) < sets.shape[1] else torch.arange(len(states), device=states.device)
    rows = states.shape[1]
    flat = model.embedding[child][used[:, None], states[used]].flatten(1)
    bias = model.bias_1[child].repeat(rows)
    values = states[child].expand(len(sets), rows)
    for block, own in zip(
        sets[:, used].split(step := max(1, _CELLS // flat.shape[1])), values.split(step), strict=True
    ):
        hidden = F.leaky_relu_(torch.addmm(bias, block, flat), SLOPE).view(-1, model.bias_2.shape[1])
        hidden = F.leaky_relu_(torch.addmm(model.bias_2[child], hidden, model.weight_2[child]), SLOPE)
        logits = torch.addmm(model.bias_3[child], hidden, model.weight_3[child])
        logits = logits.masked_fill_(model.absent[child], IMPOSSIBLE).view(len(block), rows, -1)
        yield torch.logsumexp(logits, -1) - logits.gather(-1, own[..., None])[..., 0]


def _fits(model: Conditionals, states: Tensor, sets: ParentSets) -> bool:
    """Whether all children at once stay within a block: fewer and larger products, where the sets are few."""
    cells = states.numel() * model.bias_2.shape[1]
    return cells * max(sets.masks.shape[1], model.variables) <= 2 * _CELLS


def _all_nll(model: Conditionals, states: Tensor, masks: Tensor) -> Tensor:
    """-log p of every child in each row under each of its parent sets ``masks`` [N, P, N]: [N, P, B]."""
    every = torch.arange(model.variables, device=states.device)
    parts = model.embedding[every[:, None, None], every[None, :, None], states[None]].flatten(2)  # [child, parent, B H]
    rows, hidden = states.shape[1], model.bias_2.shape[1]
    found = torch.baddbmm(model.bias_1.repeat(1, rows)[:, None], masks, parts)
    found = F.leaky_relu_(found, SLOPE).view(len(masks), -1, hidden)
    found = F.leaky_relu_(torch.baddbmm(model.bias_2[:, None], found, model.weight_2), SLOPE)
    logits = torch.baddbmm(model.bias_3[:, None], found, model.weight_3).masked_fill_(model.absent[:, None], IMPOSSIBLE)
    logits = logits.view(*masks.shape[:2], rows, -1)
    own = states[:, None, :, None].expand(-1, masks.shape[1], -1, -1)
    return torch.logsumexp(logits, -1) - logits.gather(-1, own)[..., 0]


@dataclass(frozen=True)
class ParentSets:
    """The distinct parent sets of each child among K graphs: ``masks`` [child, P, N], padded with empty sets to the
    most that a child has; ``counts`` [child]; ``places`` [K, child] says which one each graph has."""

    masks: Tensor
    counts: tuple[int, ...]
    places: Tensor

    def of(self, child: int) -> Tensor:
        """The sets of one child [P, N]."""
        return self.masks[child, : self.counts[child]]


def distinct_sets(graphs: Tensor) -> ParentSets:
    """The distinct parent sets among graphs [K, N, N]."""
    size = graphs.shape[1]
    # A set as whole numbers of 32 bits, all children at once: to sort rows, child by child, costs many times more.
    weights = 2 ** (torch.arange(size, device=graphs.device) % 32)
    words = [(graphs[:, at : at + 32].long() * weights[at : at + 32, None]).sum(1) for at in range(0, size, 32)]
    codes = words[0]
    for word in words[1:]:  # what is distinct so far, and the next word: again a number below 2^63
        codes = _ranks(codes)[2] * 2**32 + word
    first, order, places = _ranks(codes)
    counts = places.max(0).values + 1
    masks = graphs.new_zeros(size, int(counts.max()), size)
    rank, child = first.nonzero(as_tuple=True)
    row = order[rank, child]
    masks[child, places[row, child]] = graphs[row, :, child]
    return ParentSets(masks, tuple(counts.tolist()), places)


def _ranks(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column of ``codes`` [K, N]: where a new value begins in sorted order, that order, every value's rank."""
    ordered, order = codes.sort(dim=0, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return first, order, torch.empty_like(order).scatter_(0, order, first.long().cumsum(0) - 1)


def distinct_rows(rows: Tensor, states: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Distinct rows [U, N] and where each row stands among them; all rows where one number cannot tell them apart."""
    strides = [1]
    for size in states:
        strides.append(strides[-1] * size)
    own = torch.arange(len(rows), device=rows.device)
    if strides[-1] >= 2**62:
        return rows, own
    codes = (rows.long() * torch.tensor(strides[:-1], device=rows.device)).sum(1)
    found, places = codes.unique(return_inverse=True)
    first = torch.zeros(len(found), dtype=torch.long, device=rows.device)
    first[places] = own
    return rows[first], places


FORMS = {"gather": gather_nll, "dense": dense_nll, "unique": unique_nll}
