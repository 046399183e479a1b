"""Rows with images in one form, whatever shape they came in. No torch, no numpy.

Nothing is opened here: an image is still the text that names it.
"""

from __future__ import annotations

import importlib.util
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from toolbox.lit.lines import Asking, Caption, Captions, Part, PicturedConversation, PicturedMessages, PicturedPair
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.records import Record, RecordReader, read_records
from toolbox.shell.streams import Streams

MARK = "<image>"
EASY_VQA = "easy-vqa:"
FORMAT_SENTENCE = "Answer the question using a single word or phrase."
"""LLaVA's sentence for one-word answers."""

_ROLES = {"human": "user", "gpt": "assistant"}
_PRIVATE = ("\ue000", "\ue001")
"""Marks that texts are wrapped in while a template renders them: not allowed in data."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: ``parts`` are texts, and None where the next image stands."""

    role: str
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its texts joined."""
        return "".join(part for part in self.parts if part is not None)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row: turns and the names of its images, in order."""

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...]
    file: str
    line: int | None
    index: int
    weight: float = 1.0
    data: dict[str, Any] = field(default_factory=dict)

    def bad(self, what: str, advice: str | None = None, at: str | None = None) -> BadData:
        """A complaint about this row."""
        if self.line is None:
            at = f"$[{self.index}]" + (at or "").removeprefix("$")
        return BadData(what, advice, file=self.file, line=self.line, field=at)


@dataclass
class Counts:
    """What was done to rows on the way in."""

    rows: int = 0
    leading_turns_dropped: int = 0
    images_moved: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become samples.

    ``answers``: whether a row must have an assistant's turn. ``most_images``: the most that a row may have.
    """

    position: Literal["first", "keep"] = "first"
    most_images: int = 8
    answers: bool = True


def read_samples(
    name: str, streams: Streams, reader: RecordReader, how: Reading, counts: Counts, role: str = "the input"
) -> Iterator[Sample]:
    """The samples of one source: a file, stdin, or ``easy-vqa:train|test[:N]``. Bad rows go the reader's way."""
    for record in records_of(name, streams, reader, role):
        try:
            samples = samples_of(record, how, counts)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
            continue
        counts.rows += 1
        yield from samples


def records_of(name: str, streams: Streams, reader: RecordReader, role: str = "the input") -> Iterator[Record]:
    """``read_records``, of which an installed data set may be the source."""
    if name.startswith(EASY_VQA):
        yield from reader(io.BufferedReader(io.BytesIO(_easy_vqa_lines(name))), name)  # type: ignore[arg-type]
    else:
        yield from read_records(name, streams, reader, role)


def samples_of(record: Record, how: Reading, counts: Counts) -> list[Sample]:
    """The samples in a record: one of turns, one a caption of an image with captions.

    Raises: BadData for whatever cannot be learned from or answered.
    """
    value = record.value
    weight = 1.0 if value.weight is None else value.weight
    if isinstance(value, Captions | Caption):
        texts = value.captions if isinstance(value, Captions) else [value.caption]
        check_names(record, [value.image])
        return [
            _sample(record, (Message("user", (None,)), Message("assistant", (text,))), (value.image,), weight, place)
            for place, text in enumerate(texts)
        ]
    messages, images = _turns(record, value)
    messages = _without_leading(messages, counts)
    _check_turns(record, messages, how.answers)
    if len(images) > how.most_images:
        raise record.bad(f"{len(images)} images, more than --max-images-per-row {how.most_images}", None)
    check_names(record, images)
    if how.position == "first":
        moved = [_images_first(message) for message in messages]
        counts.images_moved += moved != messages
        messages = moved
    return [_sample(record, tuple(messages), tuple(images), weight)]


def _sample(
    record: Record, messages: tuple[Message, ...], images: tuple[str, ...], weight: float, place: int = 0
) -> Sample:
    name = f"{record.id}#{place}" if place else record.id
    return Sample(name, messages, images, record.file, record.line, record.index, weight, record.data)


# -- turns and images -------------------------------------------------------------------------------------------------
def _turns(record: Record, value: Any) -> tuple[list[Message], list[str]]:
    named = _named_images(record, value)
    match value:
        case PicturedMessages():
            turns = [(turn.role, turn.content) for turn in value.messages]
        case PicturedConversation():
            turns = [(_ROLES.get(turn.speaker, turn.speaker), turn.value) for turn in value.conversations]
        case PicturedPair():
            turns = [("user", value.prompt), ("assistant", value.completion)]
        case Asking():
            turns = [("user", value.prompt)]
    messages: list[Message] = []
    images: list[str] = []
    used = 0
    for role, content in turns:
        if role == "tool":
            raise record.bad("the role `tool` is not known", "system, user or assistant")
        parts, own, taken = _parts(record, content, named[used:])
        used += taken
        images += own
        if None in parts and role != "user":
            raise record.bad(f"an image in a turn of the {role}", "images belong to user turns")
        messages.append(Message(role, parts))
    if used != len(named):
        what = f"{used} {MARK} {'mark' if used == 1 else 'marks'} for {len(named)} images"
        raise record.bad(what, "one mark an image")
    return messages, images


def _named_images(record: Record, value: Any) -> list[str]:
    if value.image is not None and value.images is not None:
        raise record.bad("both `image` and `images`", "keep one")
    if value.image is not None:
        return [value.image] if isinstance(value.image, str) else list(value.image)
    return list(value.images or ())


def _parts(
    record: Record, content: str | list[Part], waiting: Sequence[str]
) -> tuple[tuple[str | None, ...], list[str], int]:
    """Parts of a turn, the images they name in order, and how many of the waiting ones they took."""
    if isinstance(content, str):
        parts = _cut_at_marks(content)
        count = sum(part is None for part in parts)
        if count > len(waiting):
            raise record.bad(f"{MARK} without an image", "name it in `image`, or write the word otherwise")
        return parts, list(waiting[:count]), count
    found: list[str | None] = []
    images: list[str] = []
    taken = 0
    for part in content:
        if part.type == "text":
            if part.text is None:
                raise record.bad("a text part without `text`")
            if MARK in part.text:
                raise record.bad(f"{MARK} without an image", 'use a part {"type":"image"}')
            found.append(part.text)
            continue
        own = part.image if part.type == "image" else part.image_url
        if isinstance(own, str | None):
            name = own
        else:
            name = own.url
        if name is None:
            if taken >= len(waiting):
                raise record.bad("an image part without an image", "name it in the part or in `images`")
            name, taken = waiting[taken], taken + 1
        images.append(name)
        found.append(None)
    return tuple(found), images, taken


def _cut_at_marks(text: str) -> tuple[str | None, ...]:
    """Texts and None for each mark; one newline beside a mark goes with it."""
    if MARK not in text:
        return (text,)
    pieces: list[str] = text.split(MARK)
    parts: list[str | None] = []
    for place, piece in enumerate(pieces):
        if place:
            parts.append(None)
            if piece.startswith("\n"):
                piece = piece[1:]
            elif parts[:-1] and isinstance(parts[-2], str) and parts[-2].endswith("\n"):
                parts[-2] = parts[-2][:-1]
        if piece:
            parts.append(piece)
    return tuple(part for part in parts if part != "")


def _images_first(message: Message) -> Message:
    images = tuple(part for part in message.parts if part is None)
    return Message(message.role, (*images, *(part for part in message.parts if part is not None)))


def _without_leading(messages: list[Message], counts: Counts) -> list[Message]:
    """Assistant turns before the first user turn answer nothing: dropped, as LLaVA does."""
    kept: list[Message] = []
    for message in messages:
        if message.role == "assistant" and not any(one.role == "user" for one in kept):
            counts.leading_turns_dropped += 1
        else:
            kept.append(message)
    return kept


def _check_turns(record: Record, messages: Sequence[Message], answers: bool) -> None:
    before = None
    for place, message in enumerate(messages):
        if any(mark in message.text for mark in _PRIVATE):
            raise record.bad("a text holds the private-use characters U+E000 or U+E001", "take them out")
        if message.role == before:
            raise record.bad(f"two {message.role} turns in a row", "join them")
        if message.role == "system" and place:
            raise record.bad("a system turn that is not the first", "put it first")
        if not message.text.strip() and (message.role == "assistant" or None not in message.parts):
            raise record.bad(f"an empty {message.role} turn", "fill it or take it out")
        before = message.role
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise record.bad("no user turn", "add one")
    if answers and "assistant" not in roles:
        raise record.bad("no assistant turn to learn from", "add one")


def check_names(record: Record, images: Sequence[str]) -> None:
    """Refuse addresses and what can be no file name. Raises: BadData."""
    for name in images:
        head = name[:16].lower()
        if "://" in name[:64] or head.startswith(("http:", "https:", "file:", "ftp:")):
            raise record.bad(
                "an image is named by an address; nothing is ever fetched", "name a file below --image-root"
            )
        if not name or "\0" in name:
            raise record.bad("not a file name", "name a file below --image-root", "$.image")


# -- easy-VQA ---------------------------------------------------------------------------------------------------------
def easy_vqa_folder() -> Path:
    """Where the installed package keeps its data; it is found, never imported. Raises: MissingInput (66)."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise MissingInput("easy-vqa is not installed", "pip install --no-deps easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


def _easy_vqa_lines(name: str) -> bytes:
    """The questions of ``easy-vqa:SPLIT[:N]`` as JSON lines; N draws a fixed sample, in the order of the data."""
    split, _, count = name.removeprefix(EASY_VQA).partition(":")
    if split not in ("train", "test") or (count and not count.isdigit()):
        raise UsageProblem(f"{name}: not a part of easy-VQA", "easy-vqa:train, easy-vqa:test, or easy-vqa:test:100")
    questions = msgspec.json.decode((easy_vqa_folder() / split / "questions.json").read_bytes())
    places = range(len(questions))
    if count and int(count) < len(questions):
        places = sorted(random.Random(0).sample(places, int(count)))  # type: ignore[assignment]
    rows = []
    for place in places:
        question, answer, picture = questions[place]
        human = f"{MARK}\n{question[:1].upper()}{question[1:]}\n{FORMAT_SENTENCE}"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
        image = f"{EASY_VQA}{split}/{picture}.png"
        rows.append(msgspec.json.encode({"id": f"{split}-{place}", "image": image, "conversations": turns}))
    return b"\n".join(rows) + b"\n"
