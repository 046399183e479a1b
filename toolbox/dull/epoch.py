"""Behind every epoch: what q says of every label, what the safety gate makes of it, what the next epoch learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolbox.classify.evaluate import predict
from toolbox.dull import labels as aml
from toolbox.dull.data import Corpus
from toolbox.dull.objective import DullObjective, Labels
from toolbox.dull.options import Options
from toolbox.dull.safety import (
    ClassFacts,
    EpochFacts,
    SafetyGate,
    cap,
    decode,
    encode,
    evidence,
    keep_most_doubtful,
)
from toolbox.training.processes import gather_bytes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.classify.classifier import Pixels

Array = NDArray[np.float64]

DOUBTED = 0.5
"""P(clean) below which a label is flagged."""
PRIOR_STEP = 0.1


@dataclass(frozen=True)
class Doubts:
    """What a table of posteriors says of given labels. ``right`` is arg-max q, ``flagged`` whether to doubt the label.

    ``cap_share`` (C,) is condition 4's bound before the ramp.
    """

    mixtures: list[aml.Mixture | None]
    clean: Array
    sets: NDArray[np.bool_]
    right: NDArray[np.int64]
    flagged: NDArray[np.bool_]
    transition: Array
    cap_share: Array


def doubts(q: Array, given: NDArray[np.int64], prior: Array, counts: NDArray[np.int64], scope: str) -> Doubts:
    """Judge every given label: flagged are those whose class's mixture calls them wrong and whose set holds arg-max q.

    With the scope ``t2h`` only smaller classes than the given one come into question: that noise runs one way.
    """
    classes = q.shape[1]
    losses = aml.given_losses(q, given)
    mixtures = aml.fit_by_class(losses, given, classes)
    clean = aml.clean_probabilities(losses, given, mixtures)
    own = np.eye(classes, dtype=bool)[given]
    sets = aml.label_sets(q, given, aml.thresholds(q))
    if scope == "t2h":
        sets &= own | (counts[None, :] < counts[given][:, None])
    right = q.argmax(1)
    rows = np.arange(len(given))
    flagged = (right != given) & sets[rows, right] & (clean < DOUBTED)
    posterior = aml.with_prior(q, prior)
    wrong = aml.wrong_share(posterior, given)
    smaller = [0.0 if one is None else float(one.weights.min()) for one in mixtures]
    shares = np.array([cap(one, float(two), 1.0) for one, two in zip(smaller, wrong, strict=True)])
    return Doubts(mixtures, clean, sets, right, flagged, aml.transition(q, given), shares)


def class_facts(found: Doubts, given: NDArray[np.int64], last: NDArray[np.int32]) -> list[ClassFacts]:
    """What the gate asks of each given class."""
    facts = []
    for number, mixture in enumerate(found.mixtures):
        members = given == number
        flagged = members & found.flagged
        agreement = float((found.right[flagged] == last[flagged]).mean()) if flagged.any() else None
        apart = (0.0, 0.0) if mixture is None else (mixture.separation, float(mixture.weights.min()))
        facts.append(ClassFacts(int(members.sum()), *apart, agreement))
    return facts


def act(
    found: Doubts, q: Array, given: NDArray[np.int64], which: Sequence[bool], share: Array, options: Options
) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Rows to act upon in the open classes, at most ``share`` of each; their targets t; the classes taken for right."""
    acting = np.zeros(len(given), dtype=bool)
    for number in np.flatnonzero(which):
        members = given == number
        most = int(np.floor(share[number] * members.sum()))
        acting |= keep_most_doubtful(found.flagged & members, found.clean, most)
    rows = np.flatnonzero(acting)
    if options.aml:
        targets = aml.soft_targets(q[rows], given[rows], found.clean[rows], found.sets[rows])
    else:
        targets = np.eye(q.shape[1])[given[rows]]
    return rows, targets, found.right[rows]


def predict_shared(accelerator: Accelerator, model: nn.Module, images: Tensor, pixels: Pixels) -> Array:
    """Logits (n, C) on every rank, each having computed its part."""
    cut = np.linspace(0, len(images), accelerator.num_processes + 1).round().astype(int)
    mine = images[cut[accelerator.process_index] : cut[accelerator.process_index + 1]]
    found = predict(model, mine, prepare=pixels.prepare).numpy() if len(mine) else np.zeros((0, 0), np.float32)
    parts = [np.frombuffer(part, np.float32) for part in gather_bytes(accelerator, found.tobytes())]
    return np.concatenate(parts).reshape(len(images), -1).astype(np.float64)


class EpochEnd:
    """Called behind every epoch on every process, with equal results; holds the gate and the last good weights.

    ``found`` is what the last call made of the training rows, None for a baseline. ``acted``: the rows whose targets
    the epoch behind it did change; none where the breaker has taken that epoch back.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: DullObjective,
        options: Options,
        optimizers: Sequence[torch.optim.Optimizer],
    ) -> None:
        self.accelerator, self.objective, self.options = accelerator, objective, options
        self.optimizers = [getattr(one, "optimizer", one) for one in optimizers]
        self.corpus: Corpus = objective.corpus
        self.gate = SafetyGate.new(len(self.corpus.labels), options.gate)
        self.observed = objective.labels.prior.copy()
        self.good: dict[str, Tensor] = {}
        self.found: Doubts | None = None
        self.acted = np.zeros(0, dtype=np.int64)
        objective.extra["safety"] = self._state

    # -- one epoch ----------------------------------------------------------------------------------------------------
    def __call__(self, epoch: int) -> dict[str, Any]:
        """The epoch's figures; afterwards ``objective.labels`` are those of the next epoch."""
        objective = self.objective
        facts: dict[str, Any] = {}
        self.acted = objective.labels.acting
        if objective.watches:
            objective.table.exchange(self.accelerator)
        if self.options.method != "dull":
            return facts
        facts["gate_density"] = float(objective.model.gates.detach().mean())
        q, given = objective.table.get(slice(None)), objective.given
        found = doubts(q, given, objective.labels.prior, self.corpus.counts, self.options.ifpu_scope)
        facts |= {"flagged_share": float(found.flagged.mean()), "acting_share": 0.0}
        facts["dprime"] = [None if one is None else round(one.separation, 3) for one in found.mixtures]
        if epoch >= self.options.warm:
            facts |= self._judge(epoch, q, given, found)
        told = [one.agreement for one in class_facts(found, given, objective.table.last)]
        facts["agreement"] = [None if one is None else round(one, 3) for one in told]
        facts["gate_open"] = [self.corpus.labels[n] for n, is_open in enumerate(self.gate.open) if is_open]
        self.found = found
        return facts

    def _judge(self, epoch: int, q: Array, given: NDArray[np.int64], found: Doubts) -> dict[str, Any]:
        objective, options = self.objective, self.options
        whole = self._whole(given, found)
        verdict = self.gate.judge(whole)
        if verdict == "opened":
            self._keep()
        if verdict == "tripped":
            self._restore()
            self.acted = np.zeros(0, dtype=np.int64)
        ramp = min(1.0, (epoch + 1 - options.warm) / max(1.0, min(16.0, 0.3 * options.epochs)))
        bound = np.full(len(found.cap_share), 0.5) if options.gate == "open" else found.cap_share
        fresh = Labels(self.observed.copy() if self.gate.tripped else objective.labels.prior)
        if self.gate.any_open:
            fresh.acting, fresh.targets, fresh.right = act(found, q, given, self.gate.open, ramp * bound, options)
            fresh.ramp = ramp
            if options.aml:
                counts = np.bincount(given, minlength=q.shape[1]).astype(np.float64)
                np.subtract.at(counts, given[fresh.acting], 1.0)
                counts += fresh.targets.sum(0)
                fresh.prior = (1 - PRIOR_STEP) * objective.labels.prior + PRIOR_STEP * counts / len(given)
        if options.h2t:
            fresh.mixing = 0.5 if options.h2t_always else 0.5 * sum(self.gate.open) / len(self.gate.open)
        objective.labels = fresh
        return {
            "acting_share": len(fresh.acting) / len(given), "evidence": whole.gain, "evidence_error": whole.error,
            "holdout_loglik": whole.log_likelihood, "rarest": whole.rarest, "gate": verdict,
        }  # fmt: skip

    def _whole(self, given: NDArray[np.int64], found: Doubts) -> EpochFacts:
        """The gate's view of this epoch; without a hold-out there is no evidence and auto stays shut."""
        classes = class_facts(found, given, self.objective.table.last)
        held = self.corpus.holdout
        if not len(held):
            return EpochFacts(classes, 0.0, 1.0, 0.0, 1.0)
        objective = self.objective
        images = self.corpus.pixels[torch.from_numpy(held)]
        logits = predict_shared(self.accelerator, objective.average, images, objective.pixels)
        prior = objective.labels.prior
        log_prior = np.log(np.maximum(prior, 1e-12))
        balanced = _softmax(logits if self.options.uses_prior else logits - log_prior)
        direct = _softmax(logits + log_prior if self.options.uses_prior else logits)
        noisy = self.corpus.given[held]
        gain, error = evidence(direct, balanced, noisy, found.transition)
        likelihood = float(np.log(np.maximum(direct[np.arange(len(held)), noisy], 1e-12)).mean())
        return EpochFacts(classes, gain, error, likelihood, float((direct.mean(0) / prior).min()))

    # -- the last good weights ----------------------------------------------------------------------------------------
    def _keep(self) -> None:
        average = self.objective.average.state_dict()
        self.good = {name: value.detach().clone() for name, value in average.items()}
        self.good["gates"] = self.objective.model.gates.detach().clone()

    @torch.no_grad()
    def _restore(self) -> None:
        """Back to the copy kept when the gate opened: network, average and gates; momenta start anew."""
        weights = {name: value for name, value in self.good.items() if name != "gates"}
        self.objective.average.load_state_dict(weights)
        mine = self.objective.model.backbone.state_dict()
        for name, value in weights.items():
            mine[name].copy_(value)
        self.objective.model.gates.copy_(self.good["gates"])
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()
        self.good = {}

    # -- going on from a saved state ----------------------------------------------------------------------------------
    def _state(self) -> dict[str, Tensor]:
        text = torch.from_numpy(np.frombuffer(encode(self.gate), np.uint8).copy())
        return {"gate": text, "observed": torch.from_numpy(self.observed.copy()),
                "acted": torch.from_numpy(self.acted.copy()),
                **{f"good/{name}": value for name, value in self.good.items()}}  # fmt: skip

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what the objective's state holds of this."""
        self.gate = decode(state["safety/gate"].numpy().tobytes())
        self.observed = state["safety/observed"].numpy().copy()
        self.acted = state["safety/acted"].numpy().copy()
        device = self.objective.model.gates.device
        self.good = {
            name.removeprefix("safety/good/"): value.clone().to(device)
            for name, value in state.items()
            if name.startswith("safety/good/")
        }


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
