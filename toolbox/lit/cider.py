"""CIDEr-D: how much a caption says what people said, weighted by how rare the words are. numpy-free.

Vedantam, Zitnick and Parikh, "CIDEr" (CVPR 2015), in the robust variant of the COCO caption evaluation.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SIGMA = 6.0
ORDERS = 4
_WORD = re.compile(r"\w+(?:'\w+)?")

Grams = Counter[tuple[str, ...]]


def simple_tokens(text: str) -> list[str]:
    """Lower case, words and numbers, punctuation dropped."""
    return _WORD.findall(text.lower())


def grams_of(tokens: Sequence[str]) -> Grams:
    """Raw counts of all n-grams, n = 1..4."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


def cider_d(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each candidate (tokens) against its references (tokens of each).

    With g_k(s) = tf_k · (log|I| − log max(1, df_k)), df over images:

        CIDErD_n = (10/m) Σ_j exp(−(l_c − l_j)² / 2·6²) · Σ_k min(g_k(c), g_k(s_j)) g_k(s_j) / (‖g(c)‖ ‖g(s_j)‖)

    averaged over n = 1..4. As the reference implementation has it, l is the number of bigrams, and a norm of zero
    leaves the value undivided. The document frequencies are those of the references given: a subset's score is not a
    part of the whole's.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    counted = [[grams_of(one) for one in each] for each in references]
    for each in counted:
        frequency.update({gram for grams in each for gram in grams})
    images = math.log(float(len(references)))
    scores = []
    for tokens, each in zip(candidates, counted, strict=True):
        mine = _Vector(grams_of(tokens), frequency, images)
        total = [0.0] * ORDERS
        for grams in each:
            for order, value in enumerate(mine.similarity(_Vector(grams, frequency, images))):
                total[order] += value
        scores.append(10.0 * sum(total) / ORDERS / len(each))
    return scores


class _Vector:
    """tf-idf of a sentence by order, its norms, and its length in bigrams."""

    def __init__(self, grams: Grams, frequency: Counter[tuple[str, ...]], images: float) -> None:
        self.weights: list[dict[tuple[str, ...], float]] = [defaultdict(float) for _ in range(ORDERS)]
        self.length = 0
        squares = [0.0] * ORDERS
        for gram, count in grams.items():
            order = len(gram) - 1
            weight = float(count) * (images - math.log(max(1.0, frequency[gram])))
            self.weights[order][gram] = weight
            squares[order] += weight**2
            if order == 1:
                self.length += count
        self.norms = [math.sqrt(one) for one in squares]

    def similarity(self, other: _Vector) -> list[float]:
        """Of each order, with the penalty of unlike lengths."""
        gap = float(self.length - other.length)
        found = []
        for order in range(ORDERS):
            theirs = other.weights[order]
            value = sum(min(w, theirs[g]) * theirs[g] for g, w in self.weights[order].items() if g in theirs)
            if self.norms[order] and other.norms[order]:
                value /= self.norms[order] * other.norms[order]
            found.append(value * math.exp(-(gap**2) / (2 * SIGMA**2)))
        return found
