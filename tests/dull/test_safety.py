"""The gate opens only on evidence from noisy labels, stays shut on noise, trips, and forgets nothing over a restart."""

from __future__ import annotations

import numpy as np
import pytest

from toolbox.dull.labels import transition, with_prior
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

GOOD = ClassFacts(100, 2.0, 0.2, 0.9)


def facts(*classes: ClassFacts, gain=0.1, error=0.01, likelihood=-1.0, rarest=0.9) -> EpochFacts:
    return EpochFacts(list(classes), gain, error, likelihood, rarest)


def test_a_class_opens_when_all_conditions_hold_two_epochs_running_and_shuts_when_one_fails():
    gate = SafetyGate.new(2)
    never = ClassFacts(100, 1.4, 0.2, 0.9)
    assert gate.judge(facts(GOOD, never)) == "kept"
    assert not gate.any_open
    assert gate.judge(facts(GOOD, never)) == "opened"
    assert gate.open == [True, False]
    assert gate.judge(facts(GOOD, never)) == "kept"
    assert gate.judge(facts(ClassFacts(100, 2.0, 0.2, 0.7), never)) == "closed"
    assert gate.judge(facts(GOOD, never)) == "kept"
    assert gate.judge(facts(GOOD, never)) == "opened"


@pytest.mark.parametrize(
    ("one", "more"),
    [
        (ClassFacts(100, 1.5, 0.2, 0.9), {}),
        (ClassFacts(49, 2.0, 0.2, 0.9), {}),
        (ClassFacts(100, 2.0, 0.04, 0.9), {}),
        (ClassFacts(100, 2.0, 0.2, 0.79), {}),
        (ClassFacts(100, 2.0, 0.2, None), {}),
        (GOOD, {"gain": 0.01, "error": 0.01}),
        (GOOD, {"gain": float("nan")}),
    ],
)
def test_each_condition_alone_keeps_it_shut(one, more):
    gate = SafetyGate.new(1)
    for _ in range(5):
        assert gate.judge(facts(one, **more)) == "kept"
    assert gate.open == [False]


@pytest.mark.parametrize("bad", [{"likelihood": -1.06}, {"rarest": 0.2}, {"likelihood": float("nan")}])
def test_the_breaker_trips_after_two_bad_epochs_and_for_good(bad):
    gate = SafetyGate.new(1)
    for _ in range(2):
        gate.judge(facts(GOOD))
    assert gate.judge(facts(GOOD, **bad)) == "kept"
    assert gate.judge(facts(GOOD)) == "kept", "one bad epoch is forgiven"
    gate.judge(facts(GOOD, **bad))
    gate = decode(encode(gate))  # as over a restart
    assert gate.judge(facts(GOOD, **bad)) == "tripped"
    for _ in range(4):
        assert gate.judge(facts(GOOD)) == "kept"
    assert not gate.any_open
    assert gate.tripped


def test_opening_and_closing_in_turn_cannot_slide_down():
    gate = SafetyGate.new(1)
    for _ in range(2):
        gate.judge(facts(GOOD, likelihood=-1.0))
    gate.judge(facts(GOOD, gain=0.0, likelihood=-1.04))
    gate.judge(facts(GOOD, gain=0.0, likelihood=-1.2))
    assert gate.judge(facts(GOOD, likelihood=-1.2)) == "kept"
    assert not gate.any_open
    assert gate.judge(facts(GOOD, likelihood=-1.02)) == "opened"
    assert gate.reference == -1.0


def test_open_and_shut_are_what_they_say():
    shut, wide = SafetyGate.new(2, "shut"), SafetyGate.new(2, "open")
    bad = facts(ClassFacts(3, 0, 0, None), GOOD, gain=-1.0, likelihood=-9.0, rarest=0.0)
    assert [wide.judge(bad), wide.judge(bad), wide.judge(bad)] == ["opened", "kept", "kept"]
    assert wide.open == [True, True]
    assert [shut.judge(facts(GOOD, GOOD)) for _ in range(3)] == ["kept"] * 3
    assert not shut.any_open


def labelled(n=3000, seed=0):
    """True classes of a long tail, labels with tail-to-head noise, and the posterior of a good model."""
    draw = np.random.default_rng(seed)
    prior = np.array([0.6, 0.3, 0.1])
    true = draw.choice(3, n, p=prior)
    matrix = np.array([[1, 0, 0], [0.4, 0.6, 0], [0.3, 0.3, 0.4]])
    given = (draw.random(n)[:, None] >= matrix.cumsum(1)[true]).sum(1)
    known = 0.9 * np.eye(3)[true] + 0.1 * prior
    return known, given, matrix, np.bincount(given, minlength=3) / n


def test_evidence_is_found_where_there_is_some_and_not_in_class_sizes_alone():
    known, given, matrix, observed = labelled()
    gain, error = evidence(known, known, given, matrix)
    assert gain > 5 * error
    nothing = np.full((len(given), 3), 1 / 3)
    uninformed = with_prior(nothing, observed)
    estimate = transition(uninformed, given)
    gain, error = evidence(uninformed, uninformed, given, estimate)
    assert gain <= error, "a model that knows class sizes and no image has shown nothing"
    gain, error = evidence(uninformed, nothing, given, transition(nothing, given))
    assert gain == pytest.approx(0, abs=1e-9), "with the prior on both sides"
    scrambled = np.random.default_rng(1).permutation(known)
    half = len(given) // 2  # what T is estimated from is not what it is judged on
    estimate = transition(scrambled[:half], given[:half])
    gain, error = evidence(uninformed[half:], scrambled[half:], given[half:], estimate)
    assert gain <= error


def test_the_one_fitted_rate_is_the_best_one():
    known, given, matrix, _ = labelled(200)
    own = known[np.arange(200), given]
    best = max(np.mean(np.log((1 - e) * own + e / 3)) for e in np.linspace(0, 1, 101))
    explained = [np.log(sum(known[i, r] * matrix[r, given[i]] for r in range(3))) for i in range(200)]
    assert evidence(known, known, given, matrix)[0] == pytest.approx(np.mean(explained) - best)


def test_the_cap_and_who_is_dropped_first():
    assert cap(0.3, 0.2, 0.5) == pytest.approx(0.1)
    assert cap(0.9, 0.8, 1.0) == pytest.approx(0.5)
    clean = np.array([0.4, 0.1, 0.3, 0.1, 0.0])
    flagged = np.array([True, True, True, True, False])
    assert keep_most_doubtful(flagged, clean, 2).tolist() == [False, True, False, True, False]
    assert keep_most_doubtful(flagged, clean, 9).tolist() == flagged.tolist()
    assert not keep_most_doubtful(flagged, clean, 0).any()
