"""TOFU's metrics as functions of mean token losses: probability, truth ratio, model utility, forget quality.

A loss is L/T in nats: the sum of -log p over the T tokens of an answer (its end token among them) divided by T. Then
exp(-loss) is the answer's length-normalised probability P, and everything below is a function of such numbers, whether
a model has just given them or a stored log. Ratios stay logarithms until the end, so that a model that is broken
beyond the range of a float still has finite metrics.

Source: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs" (2024), section 2.2, and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolbox.stats import KolmogorovSmirnov

VARIANTS = ("arithmetic", "geometric")
"""How the probabilities of several wrong answers become one: their mean, or the exponential of their mean log.

TOFU's model utility takes the first and its forget quality the second; open-unlearning takes the second everywhere.
"""


def probability(loss: float) -> float:
    """P(answer) = exp(-loss)."""
    return math.exp(-loss)


def chosen_probability(loss: float, wrong_losses: Sequence[float]) -> float:
    """P(answer) / (P(answer) + Σ P(wrong)): the share of the right one, each P length-normalised."""
    logs = [-loss, *(-wrong for wrong in wrong_losses)]
    return math.exp(-loss - _log_sum_exp(logs))


def log_truth_ratio(paraphrase_loss: float, perturbed_losses: Sequence[float], variant: str = "geometric") -> float:
    """ln R with R = P(perturbed) / P(paraphrased): above 0 the model finds the wrong answers likelier.

    ``arithmetic``: P(perturbed) is the mean of the P of the wrong answers; ``geometric``: exp of the mean of their
    logarithms, so that ln R = loss(paraphrase) - mean loss(perturbed).
    """
    count = len(perturbed_losses)
    if variant == "geometric":
        return paraphrase_loss - math.fsum(perturbed_losses) / count
    if variant == "arithmetic":
        return _log_sum_exp([-loss for loss in perturbed_losses]) - math.log(count) + paraphrase_loss
    raise ValueError(f"no truth ratio is called {variant}")


def balance(log_ratio: float) -> float:
    """min(R, 1/R): 1 where right and wrong answers are equally likely. How the forget set's ratios are summed up.

    Blind spot: a model that was never taught and one that was broken both come out near 1, and so may a model that
    knows the facts in other words than the paraphrase.
    """
    return math.exp(-abs(log_ratio))


def preference(log_ratio: float) -> float:
    """max(0, 1 - R): how much likelier the right answer is. How the ratios of every other set are summed up."""
    return max(0.0, -math.expm1(min(log_ratio, 0.0)))


def model_utility(parts: Sequence[float]) -> float:
    """The harmonic mean of nine means: {retain, authors, facts} x {probability, ROUGE-L recall, truth ratio}.

    0 as soon as one of them is 0, its limit.
    """
    return len(parts) / math.fsum(1 / part for part in parts) if all(part > 0 for part in parts) else 0.0


def forget_quality(log_ratios: Sequence[float], reference: Sequence[float]) -> KolmogorovSmirnov:
    """Two-sample Kolmogorov-Smirnov test of the forget set's truth ratios against those of a retain-trained model.

    Its p is TOFU's forget quality: large where the two models cannot be told apart. Taken on ln R, which has the order
    of R, and the order is all that the test sees. p depends on the numbers of items; a model that is broken gets a
    tiny p as well.
    """
    from toolbox.stats import ks

    return ks(log_ratios, reference)


def _log_sum_exp(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(math.fsum(math.exp(value - top) for value in logs))
