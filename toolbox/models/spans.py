"""Where every message of a conversation lies in its tokens, for any chat template and any image processor.

Each text is wrapped in private-use characters, the template is rendered, the marks are read off and taken out again:
what is left must be the rendering of the conversation itself. That gives character spans without knowing anything of
the template. Tokens come from the processor's own call, whose image placeholders shift the spans. Nothing is searched
for by a role word, so that what a user writes cannot move a boundary; what cannot be aligned is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any, Literal

from toolbox.shell.errors import BadData, UsageProblem

_OPEN, _CLOSE = "\ue000", "\ue001"
_MARKED = re.compile(f"{_OPEN}([0-9]+){_OPEN}(.*?){_CLOSE}", re.DOTALL)


class Kind(IntEnum):
    """What a token is. ``TASK_TEMPLATE`` and ``PRE_IMAGE`` are instructions that a training method may tell apart."""

    PAD = 0
    IMAGE = 1
    SYSTEM_TEMPLATE = 2
    SYSTEM_CONTENT = 3
    INSTRUCTION = 4
    TASK_TEMPLATE = 5
    PRE_IMAGE = 6
    RESPONSE = 7
    END_OF_TURN = 8

    @property
    def label(self) -> str:
        """As users see it: ``end-of-turn``."""
        return self.name.lower().replace("_", "-")


_OF_ROLE = {"system": Kind.SYSTEM_CONTENT, "user": Kind.INSTRUCTION, "assistant": Kind.RESPONSE}

Parts = Sequence[str | None]
"""Texts of one message, and None where an image stands."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a message: which (message, part), its role, and where it lies in the rendered text.

    ``cut`` characters of its beginning were left out by the template (white space).
    """

    message: int
    part: int
    role: str
    start: int
    stop: int
    cut: int = 0


@dataclass(frozen=True)
class Aligned:
    """One conversation as tokens.

    ``ids``, ``kinds`` (values of ``Kind``), ``chars``: for tokens of a message ``(piece number, first, last + 1
    character in that part's text)``, else None. ``inputs``: what else the processor made, pixels above all.
    """

    ids: tuple[int, ...]
    kinds: tuple[int, ...]
    chars: tuple[tuple[int, int, int] | None, ...]
    pieces: tuple[Piece, ...]
    inputs: dict[str, Any] = field(default_factory=dict)


class Aligner:
    """A processor (or a plain tokenizer) whose conversations are aligned.

    ``controls``: what becomes of a text that spells a control token such as ``<|im_end|>``: ``escape`` makes it plain
    text, ``reject`` refuses the row, ``keep`` leaves it to the tokenizer.

    Raises: UsageProblem (2) for a processor without a chat template or without a fast tokenizer.
    """

    def __init__(self, processor: Any, controls: Literal["escape", "reject", "keep"] = "escape") -> None:
        self.processor, self.controls = processor, controls
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(self.template, dict):  # several named templates
            self.template = self.template.get("default") or next(iter(self.template.values()))
        if self.template is None:
            raise UsageProblem("the model has no chat template", "add a chat_template to its processor")
        if not self.tokenizer.is_fast:
            raise UsageProblem("the model's tokenizer tells no offsets", "convert it to a fast one (tokenizer.json)")
        self.image_token: str | None = getattr(processor, "image_token", None)
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted({*added, *([self.image_token] if self.image_token else [])}, key=lambda t: (-len(t), t))
        self._controls = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._special = set(self.tokenizer.all_special_ids) | {
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self.image_ids = self._image_ids()

    # -- conversations ------------------------------------------------------------------------------------------------
    def align(
        self, turns: Sequence[tuple[str, Parts]], images: Sequence[Any] = (), *, generation: bool = False
    ) -> Aligned:
        """The tokens of ``turns`` (role and parts each) with their kinds; with ``generation`` an answer is opened.

        Raises: BadData (65) where the template or the processor refuses the conversation, or cannot be aligned.
        """
        plain, pieces = self.locate(turns, generation=generation)
        return self.encode(plain, pieces, images)

    def locate(self, turns: Sequence[tuple[str, Parts]], *, generation: bool = False) -> tuple[str, tuple[Piece, ...]]:
        """The rendered text and where each text lies in it."""
        plain = self._render(turns, generation)
        marked = self._render(_wrapped(turns), generation)
        found = _read_marks(marked, turns)
        if found is not None and found[0] == plain:
            return plain, found[1]
        stripped = [(role, [part if part is None else part.strip() for part in parts]) for role, parts in turns]
        found = _read_marks(self._render(_wrapped(stripped), generation), stripped)
        if found is not None and found[0] == plain:
            return plain, tuple(_shifted(piece, turns) for piece in found[1])
        return plain, _searched(plain, turns)

    def encode(self, text: str, pieces: Sequence[Piece], images: Sequence[Any] = ()) -> Aligned:
        """Tokens of a text that was put together from ``pieces`` and whatever stands between them."""
        spelled = self._spelled(text, pieces)
        if spelled and self.controls == "reject":
            what = text[spelled[0][0] : spelled[0][1]]
            raise BadData(f"a message spells the control token {what}", "--control-tokens escape makes it plain text")
        if any(text[start:stop] == self.image_token for start, stop in spelled):
            raise BadData(f"a message spells the image mark {self.image_token}", "write the word otherwise")
        safe = text
        if self.controls == "escape":
            for start, stop in spelled:  # same length, no control token
                safe = f"{safe[:start]}{'x' * (stop - start)}{safe[stop:]}"
        made = self._process(safe, images)
        ids, offsets = made.pop("input_ids")[0], made.pop("offset_mapping")[0]
        grown = made.pop("text_replacement_offsets", [[]])[0]
        made.pop("attention_mask", None)
        shift = _Shift(grown)
        if spelled and self.controls == "escape":
            ids, offsets = self._spell(shift.expand(text), [(shift(a), shift(b)) for a, b in spelled])
        placed = [(shift(piece.start), shift(piece.stop), piece) for piece in pieces]
        kinds, chars = self._kinds(list(map(int, ids)), offsets, placed, shift.blocks)
        self._mark_ends(ids, offsets, placed, kinds, shift.expand(text))
        return Aligned(tuple(map(int, ids)), tuple(kinds), tuple(chars), tuple(pieces), made)

    # -- inside -------------------------------------------------------------------------------------------------------
    def _render(self, turns: Sequence[tuple[str, Parts]], generation: bool) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [
            {
                "role": role,
                "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
            }
            for role, parts in turns
        ]
        if self.image_token is None:  # a plain language model: its template knows strings only
            messages = [{"role": role, "content": "".join(part or "" for part in parts)} for role, parts in turns]
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], chat_template=self.template, add_generation_prompt=generation,
                **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BadData(f"the chat template refuses this conversation: {reason[:200]}") from None
        return rendered[0]

    def _spelled(self, text: str, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
        """Where contents spell out control tokens."""
        return [
            (found.start() + piece.start, found.end() + piece.start)
            for piece in pieces
            for found in self._controls.finditer(text[piece.start : piece.stop])
        ]

    def _process(self, text: str, images: Sequence[Any]) -> dict[str, Any]:
        how = {"add_special_tokens": False, "return_offsets_mapping": True}
        try:
            if self.processor is self.tokenizer:
                return dict(self.tokenizer([text], verbose=False, **how))
            how["return_text_replacement_offsets"] = True
            more = {"images": list(images)} if images else {}
            return dict(self.processor(text=[text], **more, **how))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise BadData(f"the processor refuses this row: {str(error).partition(chr(10))[0][:200]}") from None

    def _spell(self, text: str, spelled: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of ``text`` in which what lies in ``spelled`` is ordinary text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        edges = [0, *(edge for span in spelled for edge in span), len(text)]
        for number, (start, stop) in enumerate(pairwise(edges)):
            if start == stop:
                continue
            made = self.tokenizer(
                text[start:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False,
                split_special_tokens=bool(number % 2),
            )  # fmt: skip
            ids += made["input_ids"]
            offsets += [(start + a, start + b) for a, b in made["offset_mapping"]]
        return ids, offsets

    def _kinds(
        self,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        placed: Sequence[tuple[int, int, Piece]],
        blocks: Sequence[tuple[int, int]],
    ) -> tuple[list[int], list[tuple[int, int, int] | None]]:
        kinds: list[int] = []
        chars: list[tuple[int, int, int] | None] = []
        first = 0  # pieces before this one end before the token begins
        block = 0
        for number, (start, stop) in zip(ids, offsets, strict=True):
            while block < len(blocks) and blocks[block][1] <= start:
                block += 1
            in_block = block < len(blocks) and blocks[block][0] <= start < blocks[block][1]
            if in_block or number in self.image_ids:
                kinds.append(Kind.IMAGE)
                chars.append(None)
                continue
            while first < len(placed) and placed[first][1] <= start:
                first += 1
            best, most = None, 0
            for place in range(first, len(placed)):
                left, right, _ = placed[place]
                if left >= stop:
                    break
                if (shared := min(stop, right) - max(start, left)) > most:
                    best, most = place, shared
            if best is None:
                kinds.append(Kind.SYSTEM_TEMPLATE)
                chars.append(None)
                continue
            left, right, piece = placed[best]
            kinds.append(_OF_ROLE[piece.role])
            chars.append((best, max(start, left) - left + piece.cut, min(stop, right) - left + piece.cut))
        return kinds, chars

    def _mark_ends(
        self,
        ids: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        placed: Sequence[tuple[int, int, Piece]],
        kinds: list[int],
        text: str,
    ) -> None:
        """The first special token behind each answer, with nothing but white space between, ends its turn."""
        ends = [right for _, right, piece in placed if piece.role == "assistant"]
        place = 0
        for right in ends:
            while place < len(ids) and offsets[place][0] < right:
                place += 1
            while place < len(ids) and offsets[place][1] <= right:  # bytes of one character share its span
                place += 1
            while place < len(ids) and int(ids[place]) not in self._special and text[slice(*offsets[place])].isspace():
                place += 1
            if place < len(ids) and int(ids[place]) in self._special and kinds[place] == Kind.SYSTEM_TEMPLATE:
                kinds[place] = Kind.END_OF_TURN

    def _image_ids(self) -> set[int]:
        """Ids that have no text of their own: the placeholders of images."""
        names = [getattr(self.processor, name, None) for name in ("image_token_id", "image_ids")]
        numbers = {one for name in names for one in (name if isinstance(name, list | tuple) else [name])}
        if self.image_token is not None:
            numbers.add(self.tokenizer.convert_tokens_to_ids(self.image_token))
        return {int(one) for one in numbers if isinstance(one, int)}


class _Shift:
    """Positions before and behind the growth of image placeholders."""

    def __init__(self, grown: Sequence[Mapping[str, Any]]) -> None:
        self._grown = sorted(grown, key=lambda one: one["span"][0])
        self.blocks: list[tuple[int, int]] = []
        moved = 0
        for one in self._grown:
            start, stop = one["span"]
            self.blocks.append((start + moved, start + moved + len(one["replacement"])))
            moved += len(one["replacement"]) - (stop - start)

    def __call__(self, position: int) -> int:
        """Where a character of the text lies once images have grown."""
        moved = sum(
            len(one["replacement"]) - (one["span"][1] - one["span"][0])
            for one in self._grown
            if one["span"][1] <= position
        )
        return position + moved

    def expand(self, text: str) -> str:
        """``text`` with its placeholders grown."""
        parts, start = [], 0
        for one in self._grown:
            parts += [text[start : one["span"][0]], one["replacement"]]
            start = one["span"][1]
        return "".join([*parts, text[start:]])


def _wrapped(turns: Sequence[tuple[str, Parts]]) -> list[tuple[str, list[str | None]]]:
    number = 0
    wrapped: list[tuple[str, list[str | None]]] = []
    for role, parts in turns:
        found: list[str | None] = []
        for part in parts:
            found.append(part if part is None else f"{_OPEN}{number}{_OPEN}{part}{_CLOSE}")
            number += part is not None
        wrapped.append((role, found))
    return wrapped


def _texts(turns: Sequence[tuple[str, Parts]]) -> list[tuple[int, int, str, str]]:
    return [
        (place, index, role, part)
        for place, (role, parts) in enumerate(turns)
        for index, part in enumerate(parts)
        if part is not None
    ]


def _read_marks(marked: str, turns: Sequence[tuple[str, Parts]]) -> tuple[str, tuple[Piece, ...]] | None:
    """The text without marks and the pieces they told; None where marks were lost, changed or repeated."""
    texts = _texts(turns)
    plain: list[str] = []
    length = start = 0
    pieces: list[Piece] = []
    for expected, found in enumerate(_MARKED.finditer(marked)):
        if expected >= len(texts) or int(found[1]) != expected or found[2] != texts[expected][3]:
            return None
        plain += [marked[start : found.start()], found[2]]
        length += found.start() - start
        message, part, role, text = texts[expected]
        pieces.append(Piece(message, part, role, length, length + len(text)))
        length += len(text)
        start = found.end()
    if len(pieces) != len(texts):
        return None
    return "".join([*plain, marked[start:]]), tuple(pieces)


def _shifted(piece: Piece, turns: Sequence[tuple[str, Parts]]) -> Piece:
    text = turns[piece.message][1][piece.part]
    assert text is not None
    cut = len(text) - len(text.lstrip())
    return Piece(piece.message, piece.part, piece.role, piece.start, piece.stop, cut)


def _searched(plain: str, turns: Sequence[tuple[str, Parts]]) -> tuple[Piece, ...]:
    """Texts found one behind another, each in one place only; refused otherwise."""
    pieces: list[Piece] = []
    start = 0
    for message, part, role, text in _texts(turns):
        core = text.strip()
        place = plain.find(core, start) if core else start
        later = plain.find(core, place + 1) if core else -1
        if place < 0 or later >= 0:
            raise Unalignable(
                f"message {message} cannot be found again in what the chat template makes of it",
                "use a template that renders contents as they are",
            )
        cut = len(text) - len(text.lstrip())
        pieces.append(Piece(message, part, role, place, place + len(core), cut))
        start = place + len(core)
    return tuple(pieces)


class Unalignable(BadData):
    """A template that changes contents, so that their tokens cannot be told."""

    exit_code = 1
