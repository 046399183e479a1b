"""The learner: ENCO's belief about the graph, fitted a round at a time and warm-started.

Everything random comes from a generator keyed by (seed, round, purpose), so nothing but the numbers themselves has to
be kept between rounds, and a design that is replayed from its rows gives the same belief to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolbox.legit.conditionals import FORMS, Conditionals, distribution_loss
from toolbox.legit.data import Table
from toolbox.legit.method import (
    LAMBDA_SPARSE,
    GammaAdam,
    ThetaAdam,
    edge_effects,
    edge_probabilities,
    gamma_gradient,
    learned_graph,
    project_to_dag,
    sample_graphs,
    theta_gradient,
    theta_step_mask,
)
from toolbox.shell.errors import BadData, TryAgain

DISTRIBUTION_LR = 5e-3


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """ENCO's settings. ``obs_iters`` distribution steps come first, then ``model_iters`` + ``graph_iters`` a round;
    ``fit_rows`` all also uses rows of interventions, for the variables that were not the target."""

    hidden: int = 64
    num_graphs: int = 100
    batch: int = 128
    lambda_sparse: float = LAMBDA_SPARSE
    obs_iters: int = 1000
    model_iters: int = 100
    graph_iters: int = 100
    fit_rows: str = "obs"
    mask_states: bool = True


def keyed(seed: int, number: int, purpose: str) -> torch.Generator:
    """The generator of one purpose in one round."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Belief:
    """What is believed of the graph: gamma, theta, p [N, N]; the graph as learned, and its projection to a DAG."""

    p: NDArray[np.float32]
    p_edge: NDArray[np.float32]
    p_orient: NDArray[np.float32]
    raw: NDArray[np.bool_]
    dag: NDArray[np.bool_]
    dropped: tuple[tuple[int, int], ...]


class Enco:
    """ENCO over variables of ``sizes`` states; ``seed`` decides the initial weights and all that is drawn later."""

    def __init__(self, sizes: tuple[int, ...], options: LearnerOptions, seed: int, device: str = "cpu") -> None:
        self.sizes, self.options, self.seed = sizes, options, seed
        self.device = torch.device(device)
        self.model = Conditionals(
            sizes, options.hidden, mask_states=options.mask_states, generator=keyed(seed, 0, "weights")
        ).to(self.device)
        self.adam = WeightsAdam(list(self.model.parameters()), DISTRIBUTION_LR)
        self.gamma = torch.zeros(len(sizes), len(sizes), device=self.device)
        self.theta = torch.zeros_like(self.gamma)
        self.gamma_adam, self.theta_adam = GammaAdam(self.gamma), ThetaAdam(self.theta)
        self.form = FORMS["dense" if self.device.type == "cuda" else "unique"]

    # -- fitting ------------------------------------------------------------------------------------------------------
    def fit_first(self, table: Table) -> None:
        """Distribution fitting before any experiment: ``obs_iters`` steps on the observed rows."""
        self.fit_distribution(table, self.options.obs_iters, keyed(self.seed, 0, "distribution"))

    def fit_round(self, table: Table, number: int) -> None:
        """One round's share: ``model_iters`` distribution steps and ``graph_iters`` graph steps on ``table``."""
        self.fit_distribution(table, self.options.model_iters, keyed(self.seed, number, "distribution"))
        self.fit_graph(table, self.options.graph_iters, keyed(self.seed, number, "graph"))

    def fit_distribution(self, table: Table, steps: int, generator: torch.Generator) -> None:
        """Adam on the conditionals; each row of a batch has a graph of its own, A ~ Bernoulli(p).

        Raises: BadData (65) where no row serves, TryAgain (75) when the loss is no number any more.
        """
        every = self.options.fit_rows == "all"
        chosen = np.arange(len(table)) if every else np.flatnonzero(table.targets < 0)
        if not len(chosen):
            raise BadData(
                "there are no observed rows (`targets` empty) to fit distributions on",
                "measure some without an intervention, or use --fit-rows all", file=table.file,
            )  # fmt: skip
        rows = torch.from_numpy(table.states[chosen]).to(self.device)
        targets = torch.from_numpy(table.targets[chosen].astype(np.int64)).to(self.device)
        p = edge_probabilities(self.gamma, self.theta)
        names = torch.arange(len(self.sizes), device=self.device)
        batches = _Batches(len(rows), self.options.batch, generator)
        loss = torch.zeros(())
        for _ in range(steps):
            picked = batches.next().to(self.device)
            masks = sample_graphs(p, len(picked), generator)
            weights = (targets[picked][:, None] != names).float() if every else None
            loss = distribution_loss(self.model, rows[picked], masks, weights)
            self.adam.step(torch.autograd.grad(loss, self.adam.parameters))
        if not torch.isfinite(loss):
            raise TryAgain("distribution fitting diverged: its loss is not finite", "try another --seed")

    @torch.no_grad()
    def fit_graph(self, table: Table, steps: int, generator: torch.Generator) -> None:
        """Steps of gamma and theta, each on rows of one target, targets in a shuffled cycle over those tried."""
        tried = sorted(set(table.targets[table.targets >= 0].tolist()))
        if not tried:
            return
        own = {one: torch.from_numpy(table.states[table.targets == one]).to(self.device) for one in tried}
        batches = {one: _Batches(len(rows), self.options.batch, generator) for one, rows in own.items()}
        never = self.never(table)
        cycle: list[int] = []
        for _ in range(steps):
            cycle = cycle or [tried[place] for place in torch.randperm(len(tried), generator=generator).tolist()]
            target = cycle.pop(0)
            rows = own[target][batches[target].next().to(self.device)]
            graphs = sample_graphs(edge_probabilities(self.gamma, self.theta), self.options.num_graphs, generator)
            effects = edge_effects(self.form(self.model, rows, graphs, target), graphs)
            for_gamma = gamma_gradient(effects, self.gamma, self.theta, target, self.options.lambda_sparse)
            for_theta = theta_gradient(effects, self.gamma, self.theta, target, never)
            self.gamma_adam.step(for_gamma)
            self.theta_adam.step(for_theta, theta_step_mask(target, never))

    def never(self, table: Table) -> Tensor:
        """U, bool [N]: the variables that no row of ``table`` has as its target."""
        never = torch.ones(len(self.sizes), dtype=torch.bool, device=self.device)
        never[torch.from_numpy(table.targets[table.targets >= 0].astype(np.int64))] = False
        return never

    # -- the belief ---------------------------------------------------------------------------------------------------
    def belief(self) -> Belief:
        """What is believed now."""
        p = edge_probabilities(self.gamma, self.theta)
        raw = learned_graph(self.gamma, self.theta)
        dag, dropped = project_to_dag(raw, p)
        edge, orient = torch.sigmoid(self.gamma), torch.sigmoid(self.theta)
        return Belief(
            p.cpu().numpy(), edge.cpu().numpy(), orient.cpu().numpy(), raw.cpu().numpy(), dag.numpy(), tuple(dropped)
        )

    # -- what is kept -------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything that decides what comes next: weights, belief, all moments and step counts."""
        kept = {"gamma": self.gamma, "theta": self.theta}
        for stem, adam in (("gamma_adam", self.gamma_adam), ("theta_adam", self.theta_adam)):
            kept |= {f"{stem}.{name}": tensor for name, tensor in adam.tensors().items()}
        kept |= {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        kept |= {f"model_adam.{name}": tensor for name, tensor in self.adam.tensors().items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``tensors`` gave; KeyError or RuntimeError where it does not fit."""
        self.gamma.copy_(tensors["gamma"])
        self.theta.copy_(tensors["theta"])
        for stem, adam in (("gamma_adam", self.gamma_adam), ("theta_adam", self.theta_adam)):
            adam.restore({name: tensors[f"{stem}.{name}"] for name in ("first", "second", "count")})
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name, _ in self.model.named_parameters()})
        self.adam.restore({name: tensors[f"model_adam.{name}"] for name in ("first", "second", "count")})


class WeightsAdam:
    """Adam over the weights of the conditionals, laid end to end, with torch.optim.Adam's defaults and results.

    Not that class itself: its first step imports torch's compiler, ten CPU seconds in every process, where a round of
    a design takes one.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = parameters, lr
        flat = torch.cat([one.detach().flatten() for one in parameters])
        for one, part in zip(parameters, flat.split([one.numel() for one in parameters]), strict=True):
            one.data = part.view_as(one)  # a step on the whole is a step on each
        self.flat, self.first, self.second = flat, torch.zeros_like(flat), torch.zeros_like(flat)
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """One step down ``gradients``, one a parameter; betas (0.9, 0.999), epsilon 1e-8."""
        gradient = torch.cat([one.flatten() for one in gradients])
        self.count += 1
        steps = int(self.count)
        self.first.lerp_(gradient, 1 - 0.9)
        self.second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        spread = self.second.sqrt().div_((1 - 0.999**steps) ** 0.5).add_(1e-8)
        self.flat.addcdiv_(self.first, spread, value=-self.lr / (1 - 0.9**steps))

    def tensors(self) -> dict[str, Tensor]:
        """Moments and step count."""
        return {"first": self.first, "second": self.second, "count": self.count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what ``tensors`` gave."""
        for name in ("first", "second", "count"):
            getattr(self, name).copy_(tensors[name])


class _Batches:
    """Row numbers without replacement, shuffled anew when they are used up; all of them where they are few."""

    def __init__(self, rows: int, size: int, generator: torch.Generator) -> None:
        self.rows, self.size, self.generator = rows, min(size, rows), generator
        self._left = torch.empty(0, dtype=torch.long)

    def next(self) -> Tensor:
        if self.size == self.rows:
            return torch.arange(self.rows)
        if len(self._left) < self.size:
            self._left = torch.randperm(self.rows, generator=self.generator)
        picked, self._left = self._left[: self.size], self._left[self.size :]
        return picked
