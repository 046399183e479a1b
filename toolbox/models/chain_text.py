"""Chains of texts: a text that grows part by part, with the same answers asked behind each part.

Importing this module costs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolbox.models.chains import Asked, Chain
from toolbox.models.tree import common
from toolbox.shell.errors import BadData, UsageProblem


def encode_chain(
    tokenizer: Any,
    parts: Sequence[str | Sequence[int]],
    answers: Sequence[str],
    separator: str = "\n",
    *,
    answer_separator: str | None = None,
) -> Chain:
    """The chain of a text that grows part by part, with all ``answers`` asked behind each part.

    ``parts`` are the context and what follows it. The context may be token ids, of a rendered prompt: what follows is
    then tokenised apart from it, as generation and training see it. A context given as text begins with the tokenizer's
    begin-of-text token if that puts one before plain text; it is never scored. Special tokens that a text spells out
    are ordinary text.

    Between two parts stands ``separator``, before an answer ``answer_separator`` (by default the same); neither where
    the text so far ends in white space.

    The tokens of a continuation are those of separator and answer, as the whole text up to the answer's end is
    tokenised. As a rule they stand behind the tokens of the text without them. A tokenizer that merges, say, a full
    stop with the line break after it spells the beginning of the whole otherwise than that text alone, or than the
    chain does; such a continuation becomes an ``Asked``: its tokens are those of the whole that end behind the text,
    each given all tokens before it. ``Chain.respelt`` counts them. Likewise a part's tokens are those of the chain that
    end in it: one that reaches over the end of a part belongs to the next.

    Raises: BadData for a context or an answer without a token, or one that cannot be told from the other; UsageProblem
    where it matters where tokens end and the tokenizer (a slow one) cannot say.
    """
    speller = _Speller(tokenizer, parts[0])
    states = [speller.text]
    for part in parts[1:]:
        states.append(states[-1] + speller.joint(states[-1], separator) + str(part))
    between = separator if answer_separator is None else answer_separator
    wholes = [state + speller.joint(state, between) + answer for state in states for answer in answers]
    spelt = speller.spell([*states, *wholes])
    own = spelt[len(states) - 1]
    apart = [own[: len(ids)] == ids for ids in spelt[: len(states)]]
    owner = [number for number in range(len(states)) for _ in answers]
    plain = [
        apart[number] and len(ids) > len(spelt[number]) and ids[: len(spelt[number])] == spelt[number]
        for number, ids in zip(owner, spelt[len(states) :], strict=True)
    ]
    merged = [place for place, is_plain in enumerate(plain) if not is_plain]
    spans = dict(zip(merged, speller.spans([wholes[place] for place in merged]), strict=True))
    asked: list[list[tuple[int, ...] | Asked]] = [[] for _ in states]
    for place, number in enumerate(owner):
        ids = spelt[len(states) + place]
        if plain[place]:
            asked[number].append(tuple(ids[len(spelt[number]) :]))
        else:
            start = speller.first_behind(spans[place], len(states[number]))
            asked[number].append(_respelt(speller.head, own, ids, start))
    cuts = [len(ids) for ids in spelt[: len(states)]]
    if not all(apart):
        span = speller.spans([states[-1]])[0]
        for number, state in enumerate(states):
            cuts[number] = cuts[number] if apart[number] else speller.first_behind(span, len(state))
    if len(speller.head) + cuts[0] == 0:
        raise BadData("the context has no token", "a model needs at least one token to go on from")
    return Chain((*speller.head, *own), tuple(len(speller.head) + cut for cut in cuts), tuple(map(tuple, asked)))


def _respelt(head: tuple[int, ...], own: Sequence[int], ids: Sequence[int], start: int) -> Asked:
    """A continuation that begins with token ``start`` of ``ids``, a whole text behind ``head``."""
    if start == len(ids):
        raise BadData("an answer has no token", "leave empty answers out")
    if len(head) + start == 0:
        raise BadData("context and answer begin in one token", "take a longer context, or another separator")
    at = min(common(own, ids), len(ids) - 1)
    return Asked(len(head) + at, tuple(ids[at:]), len(head) + start)


@dataclass(frozen=True, slots=True)
class _Spans:
    """A text's token ids, where each ends in it by the tokenizer's account, and the text."""

    ids: Sequence[int]
    ends: Sequence[int]
    text: str


class _Speller:
    """Texts that all begin with the same context, as token ids behind ``head``.

    ``head`` are ids that no text changes: a context given as ids, or the begin-of-text token. ``text`` is what a
    context given as text begins every text with.
    """

    def __init__(self, tokenizer: Any, context: str | Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._guard, self._guard_ids = "", []
        if isinstance(context, str):
            bos = tokenizer.bos_token_id
            self.head = (bos,) if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else ()
            self.text = self._before = context
            return
        self.head, self.text = tuple(context), ""
        self._before = tokenizer.decode(self.head[-8:], clean_up_tokenization_spaces=False)
        self._find_guard()

    def joint(self, text: str, separator: str) -> str:
        """What stands between ``text`` and what follows it."""
        return "" if (text or self._before)[-1:].isspace() else separator

    def spell(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without ``head``."""
        return [ids for ids, _ in self._spell(texts, offsets=False)]

    def spans(self, texts: Sequence[str]) -> list[_Spans]:
        """Ids of each text, and where they end."""
        if texts and not self._tokenizer.is_fast:
            raise UsageProblem(
                "the tokenizer merges text and continuation and cannot say where its tokens end",
                "take a model with a tokenizer.json, or another separator",
            )
        spelt = self._spell(texts, offsets=True)
        return [_Spans(ids, ends, text) for text, (ids, ends) in zip(texts, spelt, strict=True)]

    def first_behind(self, spans: _Spans, length: int) -> int:
        """The first token that ends behind the text's first ``length`` characters."""
        found = next((place for place, end in enumerate(spans.ends) if end > length), len(spans.ids))
        while found and self._end(spans, found - 1) > length:
            found -= 1
        return found

    def _end(self, spans: _Spans, place: int) -> int:
        """Where a token truly ends: some tokenizers leave the white space that it ends in out of its span."""
        shown = self._tokenizer.decode([spans.ids[place]], clean_up_tokenization_spaces=False)
        core, end = shown.rstrip(), spans.ends[place]
        missing = core and end > 0 and not spans.text[end - 1].isspace()
        return end + (len(shown) - len(core) if missing else 0)

    def _spell(self, texts: Sequence[str], offsets: bool) -> list[tuple[list[int], list[int]]]:
        """Ids and ends of each text. One that merges with the guard is spelt without it, as a row of training is."""
        if not texts:
            return []
        guarded = self._call([self._guard + text for text in texts], offsets)
        if not self._guard:
            return guarded
        count, width = len(self._guard_ids), len(self._guard)
        merged = [place for place, (ids, _) in enumerate(guarded) if ids[:count] != self._guard_ids]
        again = iter(self._call([texts[place] for place in merged], offsets) if merged else [])
        return [
            next(again) if ids[:count] != self._guard_ids else (ids[count:], [end - width for end in ends[count:]])
            for ids, ends in guarded
        ]

    def _call(self, texts: Sequence[str], offsets: bool = False) -> list[tuple[list[int], list[int]]]:
        found = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False,
            **({"return_offsets_mapping": True} if offsets else {}),
        )  # fmt: skip
        ends = [[end for _, end in row] for row in found["offset_mapping"]] if offsets else [[]] * len(texts)
        return list(zip(found["input_ids"], ends, strict=True))

    def _find_guard(self) -> None:
        """A text behind which another is spelt as if it went on from tokens: tokenizers of the SentencePiece family
        put a space before every text."""
        (start, _), (follower, _) = self._call(["x", "y"])
        if self._tokenizer.decode(start + follower) == "xy":
            return
        for guard in ("\n", "\t", "~", "."):
            (before, _), (both, _) = self._call([guard, guard + "y"])
            if both[: len(before)] == before and self._tokenizer.decode(start + both[len(before) :]) == "xy":
                self._guard, self._guard_ids = guard, before
                return
