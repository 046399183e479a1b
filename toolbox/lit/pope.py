"""POPE: yes-or-no questions about objects, and how answers to them are read and scored. No numpy, no torch.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models" (EMNLP 2023).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

STRATEGIES = ("random", "popular", "adversarial")
_PLURAL = ("skis", "scissors")


def article(name: str) -> str:
    """a or an; nothing before a plural."""
    if name in _PLURAL:
        return ""
    return "an" if name[:1] in "aeiou" else "a"


def question_of(pattern: str, name: str) -> str:
    """``Is there {a} {object} in the image?`` for one object."""
    text = pattern.replace("{a}", article(name)).replace("{object}", name)
    if name in _PLURAL:
        text = text.replace("Is there", "Are there")
    return re.sub(r" {2,}", " ", text)


@dataclass
class Corpus:
    """Objects of all images: how often each occurs, and how often two occur together."""

    counts: Counter[str] = field(default_factory=Counter)
    together: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, objects: Collection[str]) -> None:
        """One image."""
        self.counts.update(objects)
        for name in objects:
            self.together.setdefault(name, Counter()).update(one for one in objects if one != name)

    def absent(self, present: Collection[str], strategy: str, count: int, draw: random.Random) -> list[str]:
        """``count`` objects of the corpus that an image does not have: drawn evenly, the most frequent ones, or those
        that occur most with what it has (sums; ties by frequency, then by name)."""
        others = sorted(name for name in self.counts if name not in present)
        if strategy == "random":
            return draw.sample(others, min(count, len(others)))
        if strategy == "popular":
            rank: Callable[[str], tuple[int, ...]] = lambda name: (-self.counts[name],)  # noqa: E731
        else:
            near = {name: sum(self.together[one][name] for one in present) for name in others}
            rank = lambda name: (-near[name], -self.counts[name])  # noqa: E731
        return sorted(others, key=lambda name: (*rank(name), name))[:count]


def read_answer(text: str) -> str:
    """``yes`` or ``no`` as the reference reads it: of the first sentence, no where a word is no or not, else yes."""
    words = text.split(".")[0].replace(",", "").split()
    return "no" if any(word.lower() in ("no", "not") for word in words) else "yes"


def unparsable(text: str) -> bool:
    """Whether the first sentence says neither yes nor no: the reference takes it for a yes."""
    words = {word.strip("!?:;\"'").lower() for word in text.split(".")[0].replace(",", " ").split()}
    return not words & {"yes", "no", "not"}


def pope(pairs: Sequence[tuple[str, str]], *, strict: bool = False) -> dict[str, float | int | None]:
    """Scores of ``(answer text, gold)`` pairs, yes being positive; with ``strict`` what says neither is wrong."""
    tp = fp = tn = fn = yes = odd = 0
    for text, gold in pairs:
        answer, strange = read_answer(text), unparsable(text)
        odd += strange
        yes += answer == "yes"
        if strict and strange:
            answer = "no" if gold == "yes" else "yes"
        tp += (answer, gold) == ("yes", "yes")
        fp += (answer, gold) == ("yes", "no")
        tn += (answer, gold) == ("no", "no")
        fn += (answer, gold) == ("no", "yes")
    precision = tp / (tp + fp) if tp + fp else None
    recall = tp / (tp + fn) if tp + fn else None
    both = (precision or 0) + (recall or 0)
    return {
        "accuracy": (tp + tn) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * (precision or 0) * (recall or 0) / both if both else 0.0,
        "yes_ratio": yes / len(pairs),
        "unparsable": odd,
    }
