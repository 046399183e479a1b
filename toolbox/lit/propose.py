"""lit-generate --propose: the model asks about an image, then answers; rows for lit-tune come out.

The paper's self-improvement (arXiv: 2503.22215, Table 7). A model trained on instructions has learned what a user says
of an image; the end of a user's turn was never learned from, so a proposal ends with its first question mark, at a
newline, or where the model ends a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from toolbox.lit.answer_local import Ask, LocalAnswers, prompt_of
from toolbox.lit.questions import Question, content_of
from toolbox.lit.rows import MARK, Message, Sample
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.shell.errors import BadData

VARIANT = "proposed"
"""What a stored proposal is called beside the answer to it."""


@dataclass
class Left:
    """Proposals that were left out: without an end or empty, there already, not to be put in a prompt, unanswered."""

    unfinished: int = 0
    repeated: int = 0
    unusable: int = 0
    unanswered: int = 0

    def told(self) -> str | None:
        """As a line for people; None for none."""
        counts = {name: value for name, value in vars(self).items() if value}
        return ", ".join(f"{value} {name}" for name, value in counts.items()) or None


class Proposing:
    """Proposes ``count`` questions an image, the tokens drawn as ``drawing`` says, and answers them by ``decoding``.

    ``suffix`` is put behind each question, a format sentence say.
    """

    def __init__(
        self, answers: LocalAnswers, count: int, suffix: str, drawing: Decoding, decoding: Decoding, logged: bool
    ) -> None:  # fmt: skip
        self.answers, self.count, self.suffix = answers, count, suffix
        self.drawing, self.decoding, self.logged = drawing, decoding, logged
        self.left = Left()

    def rows(self, pictures: Sequence[Question]) -> list[dict[str, Any]]:
        """Conversations about the images of ``pictures``, in order."""
        asked = [
            Ask(TextRequest(one.sample.id, VARIANT, number, content), one.sample, one.ready)
            for one, content in [(one, self._content(one.sample)) for one in pictures]
            for number in range(self.count)
        ]
        proposed = self.answers.complete(asked, self.drawing, opens=True)
        kept: list[tuple[Ask, Completion]] = []
        seen: set[tuple[int, str]] = set()
        for place, (ask, done) in enumerate(zip(asked, proposed, strict=True)):
            text = question_in(done)
            if text is None:
                self.left.unfinished += 1
            elif (place // self.count, text) in seen:
                self.left.repeated += 1
            elif (answer := self._to_answer(ask, text)) is None:
                self.left.unusable += 1
            else:
                seen.add((place // self.count, text))
                kept.append((answer, done))
        told = self.answers.complete([ask for ask, _ in kept], self.decoding)
        found = zip(kept, told, strict=True)
        self.left.unanswered += sum(not done.text.strip() for done in told)
        return [_row(ask, first, done) for (ask, first), done in found if done.text.strip()]

    def _to_answer(self, ask: Ask, text: str) -> Ask | None:
        """The row with the question; None where it cannot stand in a prompt (it spells the image mark, say)."""
        message = Message("user", (*([None] * len(ask.sample.images)), text + self.suffix))
        sample = replace(ask.sample, messages=(message,))
        if MARK in text:
            return None
        try:
            prompt = prompt_of(self.answers.aligner, self.answers.store, sample)
        except BadData as problem:
            if problem.exit_code != BadData.exit_code:
                raise
            return None
        number = ask.request.sample
        return Ask(TextRequest(sample.id, None, number, self._content(sample)), sample, prompt)

    def _content(self, sample: Sample) -> Any:
        return content_of(sample, self.answers.store) if self.logged else ""


def question_in(done: Completion) -> str | None:
    """The question of a proposal, up to its question mark where it has one; None for one without an end, or empty."""
    head, mark, _ = done.text.partition("?")
    if not mark and done.finish_reason != "stop":
        return None
    return (head + mark).strip() or None if head.strip() else None


def _row(ask: Ask, proposed: Completion, done: Completion) -> dict[str, Any]:
    sample = ask.sample
    text = sample.messages[0].text
    content = f"{(MARK + chr(10)) * len(sample.images)}{text}"
    images = {"image": sample.images[0]} if len(sample.images) == 1 else {"images": list(sample.images)}
    return {
        "id": f"{sample.id}/{ask.request.sample}", **images,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": done.text.strip()}],
        "lit": {
            "source": sample.id, "sample": ask.request.sample, "logprob_instruction": summed(proposed),
            "logprob": summed(done), "finish_reason": done.finish_reason,
        },
    }  # fmt: skip


def summed(done: Completion) -> float | None:
    """Σ log p of a completion's tokens; None where they are not told."""
    return None if done.logprobs is None else round(sum(done.logprobs), 4)
