"""The safety gate: whether labels of a given class may be touched, judged from noisy data alone; and the breaker.

Ours, and required: on small runs every naive correction either never fired or fed on its own errors until the model had
collapsed. A pure state machine: numbers of one epoch go in, open classes come out, the state is JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SEPARATION, SMALLER_WEIGHT, SAMPLES = 1.5, 0.05, 50
AGREEMENT, RUNNING = 0.8, 2
FALL, RARE = 0.05, 0.25
MOST = 0.5
"""Starting values, set before any run; not tuned on clean labels."""


class ClassFacts(msgspec.Struct):
    """What an epoch shows of one given class: its mixture, and its flagged samples.

    ``agreement`` is the share of flagged samples whose arg-max of q is that of the last prediction; None: none flagged.
    """

    samples: int
    separation: float
    smaller_weight: float
    agreement: float | None

    @property
    def apart(self) -> bool:
        """Condition 1: the mixture's two parts are really two."""
        return self.samples >= SAMPLES and self.separation > SEPARATION and self.smaller_weight >= SMALLER_WEIGHT


class EpochFacts(msgspec.Struct):
    """What an epoch shows as a whole. ``gain`` and ``error``: see ``evidence``.

    ``log_likelihood``: mean log p(y~ | x) on the hold-out. ``rarest``: the least ratio, over classes, of how often a
    class is predicted to how often π expects it.
    """

    classes: list[ClassFacts]
    gain: float
    error: float
    log_likelihood: float
    rarest: float


class SafetyGate(msgspec.Struct):
    """``open`` and ``agreed`` (epochs in a row) are by class. ``opened``: some class is open or was."""

    mode: str
    open: list[bool]
    agreed: list[int]
    reference: float | None = None
    bad: int = 0
    tripped: bool = False

    @classmethod
    def new(cls, classes: int, mode: str = "auto") -> SafetyGate:
        """Shut, for ``auto``, ``open`` or ``shut``."""
        return cls(mode, [False] * classes, [0] * classes)

    @property
    def any_open(self) -> bool:
        return any(self.open)

    def judge(self, facts: EpochFacts) -> str:
        """One epoch behind the warm-up. Returns ``kept``, ``opened`` (from all shut: keep a copy of the weights),
        ``closed`` (all shut again) or ``tripped`` (restore that copy).

        A class is open while its mixture is apart, its flags agree with the model's latest predictions in two epochs
        running, and the hold-out bears the transition out by more than one standard error.
        """
        if self.mode == "shut" or self.tripped:
            return "kept"
        before = self.any_open
        if self.mode == "open":
            self.open = [True] * len(self.open)
            return "kept" if before else "opened"
        if before and self._breaks(facts):
            self.open, self.tripped = [False] * len(self.open), True
            return "tripped"
        proven = facts.gain > facts.error
        for number, one in enumerate(facts.classes):
            agrees = one.agreement is not None and one.agreement >= AGREEMENT
            self.agreed[number] = self.agreed[number] + 1 if agrees else 0
            self.open[number] = one.apart and proven and self.agreed[number] >= RUNNING
        if self.any_open and not before:
            # Never lowered: opening and closing in turn must not let the model slide down step by step.
            worse = self.reference is not None and facts.log_likelihood < self.reference - FALL
            if worse:
                self.open = [False] * len(self.open)
                return "kept"
            before_it = facts.log_likelihood if self.reference is None else self.reference
            self.reference = max(facts.log_likelihood, before_it)
            self.bad = 0
            return "opened"
        return "closed" if before and not self.any_open else "kept"

    def _breaks(self, facts: EpochFacts) -> bool:
        assert self.reference is not None
        fell = not facts.log_likelihood >= self.reference - FALL  # not-a-number counts as fallen
        self.bad = self.bad + 1 if fell or not facts.rarest >= RARE else 0
        return self.bad >= RUNNING


def evidence(direct: Array, posterior: Array, given: NDArray[np.int64], matrix: Array) -> tuple[float, float]:
    """How much better T̂ explains the noisy labels of a hold-out than no transition does: mean gain, standard error.

    With p(r | x) the ``posterior`` (n, C) among balanced classes: log Σ_r p(r|x) T̂[r, y~] against
    log((1 − ε) p(y~|x) + ε/C) with ``direct`` the p of the latter, prior included, and the one rate ε fitted to these
    very labels, which favours it. Both sides know the class sizes, T̂ by its rows: against a balanced p(y~|x) T̂ would
    win by these alone.
    """
    classes = posterior.shape[1]
    rows = np.arange(len(given))
    explained = np.log(np.maximum((posterior @ matrix)[rows, given], 1e-12))
    own = direct[rows, given]
    rates = np.linspace(0, 1, 101)
    plain = np.log(np.maximum((1 - rates[:, None]) * own + rates[:, None] / classes, 1e-12))
    difference = explained - plain[plain.mean(1).argmax()]
    if len(given) < 2:
        return 0.0, float("inf")
    error = float(difference.std(ddof=1) / np.sqrt(len(given)))
    return float(difference.mean()), max(error, 1e-9)  # two equal sides differ by rounding, which is no evidence


def cap(mixture_share: float, transition_share: float, ramp: float) -> float:
    """Condition 4: the flagged share of a class is at most ramp · min(ρ̂, .5), ρ̂ the smaller of two estimates."""
    return ramp * min(mixture_share, transition_share, MOST)


def keep_most_doubtful(flagged: NDArray[np.bool_], clean: Array, most: int) -> NDArray[np.bool_]:
    """At most ``most`` of the flagged samples: those of the smallest P(clean); ties by their order."""
    places = np.flatnonzero(flagged)
    kept = places[np.argsort(clean[places], kind="stable")[:most]]
    result = np.zeros_like(flagged)
    result[kept] = True
    return result


def encode(gate: SafetyGate) -> bytes:
    """The state as JSON."""
    return msgspec.json.encode(gate)


def decode(raw: bytes) -> SafetyGate:
    """The state from JSON."""
    return msgspec.json.decode(raw, type=SafetyGate)


def describe(facts: Sequence[ClassFacts]) -> dict[str, Any]:
    """The classes' figures for an event."""
    return {"dprime": [round(one.separation, 3) for one in facts]}
