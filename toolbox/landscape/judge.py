"""How a verifier is judged: on questions it has not seen, within questions, and against a fair vote.

Paths of one question resemble one another, and questions differ in difficulty. So folds never divide a question, the
headline is the AUC among the paths of one poll (a score that only tells easy questions from hard ones has .5 there),
and intervals resample questions. A gain is one over the plurality of the answers given: a vote that blanks may win is
no fair baseline.

Source of the vote weighted by a verifier: Zhou et al. 2025, arXiv 2503.22165. What it is judged by is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.method import Floats, Integers
from toolbox.models.votes import vote
from toolbox.stats import Interval, auc, bootstrap_mean, paired_bootstrap, sign_flip, wilson

DRAWS = 2000
SIGNIFICANT = 0.05
FEW_QUESTIONS = 20
"""Below this many questions intervals are too narrow and one question more may turn a result."""


@dataclass(frozen=True, eq=False, slots=True)
class Polls:
    """P paths as votes see them, in the order in which they came.

    ``unit`` (P,): the poll a path votes in, that of one question, model and variant. ``question`` (P,): what is
    resampled as a whole. ``answer`` (P,): a number that is the same for equal answers of a poll, −1 for none.
    ``correct`` (P,): 1, 0, −1 where the right answer is not known, which is so for all paths of a question or none.
    """

    unit: Integers
    question: Integers
    answer: Integers
    correct: NDArray[np.int8]

    def only(self, keep: NDArray[np.bool_] | Integers) -> Polls:
        """The paths where ``keep`` (P,) is true, or at these places in this order."""
        return Polls(self.unit[keep], self.question[keep], self.answer[keep], self.correct[keep])

    def parts(self) -> list[Integers]:
        """The paths of each poll, polls in order of number, paths in order."""
        order = np.argsort(self.unit, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.unit[order])) + 1) if len(order) else []


@dataclass(frozen=True, slots=True)
class Quality:
    """What a score is worth.

    ``within``: mean AUC within polls of both outcomes, over these polls; ``p``: two-sided, of flipping each question's
    distance from .5; both None without such a poll. ``pooled``: the AUC over all paths, None for one outcome.
    ``brier``: mean squared distance from the outcome, None for scores that are no probabilities. ``best``: accuracy of
    the path with the highest score of each poll. ``questions``: those with a poll of both outcomes.
    """

    name: str
    within: Interval | None
    p: float | None
    pooled: float | None
    brier: float | None
    best: Interval
    questions: int


@dataclass(frozen=True, slots=True)
class Control:
    """Within-poll and pooled AUC of verifiers that learned shuffled labels, one a shuffle."""

    within: tuple[float, ...]
    pooled: tuple[float, ...]

    @classmethod
    def of(cls, found: Iterable[tuple[float, float]]) -> Control | None:
        """None where nothing could be shuffled."""
        pairs = list(found)
        return cls(*zip(*pairs, strict=True)) if pairs else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All that is said of a verifier.

    ``accuracies``: name to accuracy over polls; ``gain``: weighted − plurality, paired by poll, and its two-sided
    ``gain_p`` of flipping the signs of whole questions.
    """

    paths: int
    scored: int
    polls: int
    questions: int
    verifier: Quality
    free: tuple[Quality, ...]
    accuracies: Mapping[str, Interval]
    gain: Interval
    gain_p: float
    control: Control | None = None

    @property
    def has_skill(self) -> bool:
        """Whether the within-question AUC is above chance: above .5, p < .05 over questions, above every control."""
        within, p = self.verifier.within, self.verifier.p
        if within is None or p is None or within.estimate <= 0.5 or p >= SIGNIFICANT:
            return False
        return self.control is None or all(within.estimate > one for one in self.control.within)

    @property
    def has_gain(self) -> bool | None:
        """True: weighted votes are right more often than fair ones; False: less often; None: neither is shown.

        By the interval and by p, since over a handful of questions the interval alone is too narrow. Without skill
        there is no gain: where most votes are wrong, any weights at all make some of them right.
        """
        if self.gain_p >= SIGNIFICANT:
            return None
        if self.gain.low > 0:
            return True if self.has_skill else None
        return False if self.gain.high < 0 else None


# --- held-out scores --------------------------------------------------------------------------------------------------


class Model(Protocol):
    def predict(self, x: Floats) -> Floats: ...


Fit = Callable[[Floats, NDArray[np.bool_]], Model]


def grouped_folds(groups: Sequence[Hashable], folds: int, seed: int = 0) -> Integers:
    """(P,) the fold of each path, 0 .. min(folds, groups) − 1; all paths of a group are in one.

    Groups go, the largest first and equal ones in an order drawn by ``seed``, to the fold that has the fewest paths.
    ValueError: fewer than two groups or folds.
    """
    numbers: dict[Hashable, int] = {}
    of = np.fromiter((numbers.setdefault(group, len(numbers)) for group in groups), np.int64, len(groups))
    if min(len(numbers), folds) < 2:
        raise ValueError(f"{len(numbers)} groups do not make {folds} folds")
    sizes = np.bincount(of)
    drawn = np.random.default_rng(seed).permutation(len(sizes))
    filled = np.zeros(min(folds, len(sizes)), dtype=np.int64)
    fold = np.empty(len(sizes), dtype=np.int64)
    for group in drawn[np.argsort(-sizes[drawn], kind="stable")]:
        fold[group] = np.argmin(filled)
        filled[fold[group]] += sizes[group]
    return fold[of]


def out_of_fold(x: Floats, correct: NDArray[np.bool_], fold: Integers, fit: Fit) -> Floats:
    """(n,) the score of each row by the model that was fitted to all other folds."""
    scores = np.empty(len(x))
    for held_out in np.unique(fold):
        test = fold == held_out
        scores[test] = fit(x[~test], correct[~test]).predict(x[test])
    return scores


def shuffled(correct: NDArray[np.bool_], unit: Integers, draw: np.random.Generator) -> NDArray[np.bool_]:
    """The outcomes in another order inside each poll: what is true of a poll as a whole stays true."""
    places, drawn = np.argsort(unit, kind="stable"), np.lexsort((draw.random(len(unit)), unit))
    result = np.empty_like(correct)
    result[places] = correct[drawn]  # poll by poll, since both orders have the polls one after the other
    return result


def controls(
    x: Floats, polls: Polls, fold: Integers, fit: Fit, shuffles: int, seed: int = 0
) -> Iterator[tuple[float, float]]:
    """Within-poll and pooled AUC of out-of-fold scores learned from, and judged by, shuffled labels; one a shuffle.

    Without a poll of both outcomes there is nothing to shuffle, and nothing comes.
    """
    for number in range(shuffles):
        correct = shuffled(polls.correct == 1, polls.unit, np.random.default_rng([seed, number]))
        there = Polls(polls.unit, polls.question, polls.answer, correct.astype(np.int8))
        scores = out_of_fold(x, correct, fold, fit)
        values, _ = within_aucs(scores, there)
        if len(values):
            yield float(values.mean()), float(auc(scores[correct], scores[~correct]))


def relabelled(score: Floats, polls: Polls, shuffles: int, seed: int = 0) -> Iterator[tuple[float, float]]:
    """The same of fixed scores, as those of a loaded verifier, against shuffled labels."""
    for number in range(shuffles):
        correct = shuffled(polls.correct == 1, polls.unit, np.random.default_rng([seed, number]))
        values, _ = within_aucs(score, Polls(polls.unit, polls.question, polls.answer, correct.astype(np.int8)))
        if len(values):
            yield float(values.mean()), float(auc(score[correct], score[~correct]))


# --- figures ----------------------------------------------------------------------------------------------------------


def within_aucs(score: Floats, polls: Polls) -> tuple[Floats, Integers]:
    """The AUC of each poll that has right and wrong paths with a score, and its question. NaN: no score."""
    values, questions = [], []
    for rows in polls.parts():
        rows = rows[~np.isnan(score[rows])]
        right, wrong = (score[rows[polls.correct[rows] == outcome]] for outcome in (1, 0))
        if len(right) and len(wrong):
            values.append(auc(right, wrong))
            questions.append(polls.question[rows[0]])
    return np.array(values, dtype=np.float64), np.array(questions, dtype=np.int64)


def quality(name: str, score: Floats, polls: Polls, *, probability: bool = False, seed: int = 0) -> Quality:
    """``Quality`` of (P,) scores, NaN for none, over the paths whose outcome is known. ValueError: no such path."""
    known = polls.correct >= 0
    score, polls = score[known], polls.only(known)
    values, questions = within_aucs(score, polls)
    there = ~np.isnan(score)
    right, wrong = (score[there & (polls.correct == outcome)] for outcome in (1, 0))
    best, of = _by_poll(polls, lambda rows: _best(score[rows], polls.correct[rows]))
    return Quality(
        name,
        _resampled(values, questions, seed) if len(values) else None,
        sign_flip(values - 0.5, clusters=questions.tolist(), seed=seed) if len(values) else None,
        auc(right, wrong) if len(right) and len(wrong) else None,
        float(np.mean((score[there] - polls.correct[there]) ** 2)) if probability and there.any() else None,
        _resampled(best, of, seed),
        len(np.unique(questions)),
    )


def _best(score: Floats, correct: NDArray[np.int8]) -> float:
    """Whether the path with the highest score is right, the first of equals; without any score it is not."""
    return 0.0 if np.isnan(score).all() else float(correct[np.nanargmax(score)] == 1)


def vote_outcomes(score: Floats, polls: Polls) -> tuple[dict[str, Floats], Integers]:
    """Name to (U,) outcome of each poll whose right answer is known, 0 to 1, and the (U,) question of each.

    ``mean path``: share of right paths; ``plurality``: most frequent answer, where paths without one do not vote;
    ``plurality, blanks vote``: the same where no answer is an answer, and wrong; ``weighted``: by the score, where
    paths without a score or an answer do not vote; ``best of r``: the path with the highest score; ``oracle``: any.
    """
    known = polls.correct >= 0
    score, polls = score[known], polls.only(known)

    def voted(kind: str, rows: Integers, blank: bool = False) -> float:
        given = [one if one >= 0 else None for one in polls.answer[rows].tolist()]
        weights = [None if math.isnan(one) else one for one in score[rows].tolist()]
        winner = vote(kind, given, scores=weights, blank=blank).winner
        return 0.0 if winner is None else float(any(polls.correct[rows[polls.answer[rows] == winner]] == 1))

    rules: dict[str, Callable[[Integers], float]] = {
        "mean path": lambda rows: float(np.mean(polls.correct[rows] == 1)),
        "plurality": lambda rows: voted("plurality", rows),
        "plurality, blanks vote": lambda rows: voted("plurality", rows, blank=True),
        "weighted": lambda rows: voted("weighted", rows),
        "best of r": lambda rows: _best(score[rows], polls.correct[rows]),
        "oracle": lambda rows: float(np.any(polls.correct[rows] == 1)),
    }
    outcomes = {name: _by_poll(polls, rule) for name, rule in rules.items()}
    return {name: values for name, (values, _) in outcomes.items()}, outcomes["oracle"][1]


def _by_poll(polls: Polls, rule: Callable[[Integers], float]) -> tuple[Floats, Integers]:
    parts = polls.parts()
    return np.array([rule(rows) for rows in parts]), np.array([polls.question[rows[0]] for rows in parts])


def _resampled(values: Floats, questions: Integers, seed: int) -> Interval:
    """The bootstrap over questions; Wilson's interval over them where all values are 0 or all 1.

    There the bootstrap draws the same every time, and an interval without width would claim certainty.
    """
    if values.min() == values.max() and values[0] in (0, 1):
        n = len(np.unique(questions))
        found = wilson(int(values[0]) * n, n)
        return Interval(found.estimate, found.low, found.high, len(values))
    return bootstrap_mean(values, clusters=questions.tolist(), draws=DRAWS, seed=seed)


def evaluate(
    score: Floats,
    polls: Polls,
    free: Mapping[str, Floats] | None = None,
    *,
    control: Control | None = None,
    name: str = "verifier",
    seed: int = 0,
) -> Evaluation:
    """Everything about (P,) ``score`` (probabilities, NaN for none) and the training-free scores beside it.

    Paths whose outcome is not known are left out. ValueError: no other.
    """
    outcomes, questions = vote_outcomes(score, polls)
    known = polls.correct >= 0
    pair, clusters = (outcomes["weighted"], outcomes["plurality"]), questions.tolist()
    return Evaluation(
        int(known.sum()),
        int((known & ~np.isnan(score)).sum()),
        len(questions),
        len(np.unique(questions)),
        quality(name, score, polls, probability=True, seed=seed),
        tuple(quality(one, values, polls, seed=seed) for one, values in (free or {}).items()),
        {one: _resampled(values, questions, seed) for one, values in outcomes.items()},
        paired_bootstrap(*pair, clusters=clusters, draws=DRAWS, seed=seed),
        sign_flip(pair[0] - pair[1], clusters=clusters, seed=seed),
        control,
    )
