"""The accuracy of short answers. No numpy, no torch.

Antol et al., "VQA" (ICCV 2015), with the normalisation that its evaluation describes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
}
_ARTICLES = {"a", "an", "the"}
_MARKS = re.compile(r"[^\w\s.:'-]|(?<!\d)[.:]|[.:](?!\d)")


def normalise(text: str) -> str:
    """Lower case, number words as digits, articles and punctuation out."""
    words = _MARKS.sub(" ", text.lower().replace("'", "").replace("-", " ")).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """One reference: 1 for a match. Several people's: the mean over leave-one-out subsets of min(matches / 3, 1)."""
    given = normalise(answer)
    wanted = [normalise(one) for one in references]
    if len(wanted) == 1:
        return float(given == wanted[0])
    matches = [given == one for one in wanted]
    return sum(min((sum(matches) - one) / 3, 1.0) for one in matches) / len(matches)
