"""How a row becomes texts: the context, the cutting of a completion into thoughts, the answer strings.

Source: Zhou et al. (2025), arXiv 2503.22165, and its released code, which ``Wording.compat`` follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from toolbox.shell.errors import UsageProblem
from toolbox.shell.items import Choices

Context = Literal["auto", "prompt", "question"]

TEMPLATE = "Answer is: {label}) {text}"
LETTER_TEMPLATE = "Answer is: {label}"  # the released code's

_SLOT = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’)\]*_]*\s+(?=\S)|[。！？]+["'”’）」』]*\s*(?=\S)""")
_NO_END = re.compile(
    r"\A\(?(?:\d{1,3}|[A-Za-z])\.\Z|(?:\A|[\s(])(?:e\.g|i\.e|cf|vs|approx|eq|fig|no|dr|mr|mrs|ms|prof|st)\.\Z", re.I
)
"""A full stop that ends no sentence: behind the number or letter of an item, and behind an abbreviation."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How a row becomes the texts that are scored.

    ``template`` of the answer string, with slots ``{label}`` and ``{text}``; ``context`` prompt is the text under which
    the path was sampled, question the question with its choices, auto the first where the row has it; ``separator``
    stands between thoughts; ``split`` line, sentence or regex:PATTERN cuts a completion into thoughts. ``compat``: as
    the released code has contexts, joints and answers.

    Raises: UsageProblem for a template without a slot or with an unknown one, and for a bad pattern.
    """

    template: str = TEMPLATE
    context: Context = "auto"
    separator: str = "\n"
    split: str = "line"
    drop_answer_thought: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        slots = set(_SLOT.findall(self.template))
        if unknown := slots - {"label", "text"}:
            raise UsageProblem(
                f"--answer-template has an unknown slot {{{min(unknown)}}}", "the slots are {label} and {text}"
            )
        if not slots:
            raise UsageProblem(
                "--answer-template has no slot: all answers would be the same", "as in 'Answer is: {label}) {text}'"
            )
        split_thoughts("", self.split)

    @staticmethod
    def reference(split: str = "line") -> Wording:
        """The released code's: the bare question with its choices in one line, thoughts joined by blanks, the answer's
        letter right behind them."""
        return Wording(LETTER_TEMPLATE, "question", " ", split, compat=True)

    @property
    def answer_separator(self) -> str:
        """What stands before an answer."""
        return "" if self.compat else self.separator

    def answers(self, choices: Choices) -> tuple[str, ...]:
        """The answer strings a_1..a_k. ValueError where the template needs texts and there are only labels."""
        if "{text}" in self.template and not choices.texts:
            raise ValueError("no texts")
        texts = choices.texts or ("",) * len(choices.labels)
        return tuple(
            _SLOT.sub(lambda slot, given={"label": label, "text": text}: given[slot[1]], self.template)
            for label, text in zip(choices.labels, texts, strict=True)
        )

    def question(self, question: str, passage: str | None, choices: Choices) -> str:
        """The question with its choices, one a line; where the row has a passage, it comes first."""
        pairs = [*zip(choices.labels, choices.texts, strict=False)]
        if self.compat:
            return f"{question}\nOptions: {' '.join(f'{label}){text}' for label, text in pairs)}"
        opening = f"{passage}\n\n" if passage else ""
        return "\n".join([opening + question, *(f"{label}) {text}" for label, text in pairs)])


def split_thoughts(text: str, split: str) -> list[str]:
    """The thoughts of a completion, stripped, without empty ones.

    ``line``: its lines, as in the released code. ``sentence``: the sentences of its lines. ``regex:PATTERN``: what
    stands between the places that the pattern finds. Raises: UsageProblem for another word or a bad pattern.
    """
    if split == "line":
        parts = text.split("\n")
    elif split == "sentence":
        parts = [sentence for line in text.split("\n") for sentence in _sentences(line.strip())]
    elif split.startswith("regex:") and len(split) > len("regex:"):
        try:
            found = re.compile(split.removeprefix("regex:")).finditer(text)
        except (re.error, RecursionError) as error:
            raise UsageProblem(f"--split {split}: {error}", "a Python regular expression is expected") from None
        parts = _between(text, ((place.start(), place.end()) for place in found))
    else:
        raise UsageProblem(f"--split {split}: not known", "line, sentence, or regex:PATTERN as in 'regex:\\n\\n+'")
    return [stripped for part in parts if (stripped := part.strip())]


def _between(text: str, places: Iterator[tuple[int, int]]) -> list[str]:
    parts, start = [], 0
    for begin, end in places:
        parts.append(text[start:begin])
        start = end
    return [*parts, text[start:]]


def _sentences(line: str) -> Iterator[str]:
    start = 0
    for found in _SENTENCE_END.finditer(line):
        end = found.end()
        # "approx. 5 km" goes on in lower case or is known; "1. Find x" is one thought, number and all.
        if line[end].islower() or (found[0][0] == "." and _NO_END.search(line[start : found.start() + 1])):
            continue
        yield line[start:end]
        start = end
    yield line[start:]
