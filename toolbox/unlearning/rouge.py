"""ROUGE-L recall of what a model wrote against the true answer, as rouge-score defines it."""

from __future__ import annotations

import functools
from typing import Any


def rouge_l_recall(answer: str, written: str) -> float:
    """Length of the longest common subsequence of words over the number of words in ``answer``.

    Words are runs of letters a-z and digits, lower-cased; those of more than three characters are reduced to their stem
    (Porter). Recall alone, as in TOFU: words beyond the answer cost nothing. 0 where ``answer`` has no such word.
    Source: Lin, "ROUGE: A package for automatic evaluation of summaries" (2004).
    """
    return float(_scorer().score(answer, written)["rougeL"].recall)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # late: its stemmer's package takes two seconds to import

    return RougeScorer(["rougeL"], use_stemmer=True)
