"""Samples as tokens with labels, and batches of them with their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from toolbox.lit.images import ImageStore
from toolbox.lit.method import Mode, Supervised, is_response, refine, supervised
from toolbox.lit.rows import Message, Sample
from toolbox.lit.templates import SPLITS
from toolbox.models.spans import Aligned, Aligner, Kind, Piece
from toolbox.shell.errors import BadData

Stage = Literal["finetune", "pretrain"]
Overlong = Literal["drop", "truncate-response", "error"]

_KEPT_BYTES = 512 << 20
"""Pixels kept between epochs: what goes beyond is decoded again each time."""


@dataclass(frozen=True)
class Labelling:
    """How rows become labels."""

    mode: Mode = "lit"
    stage: Stage = "finetune"
    templates: frozenset[str] = frozenset()
    split: tuple[str, ...] = SPLITS
    text_only_instructions: bool = True
    max_length: int = 2048
    overlong: Overlong = "drop"


@dataclass(frozen=True)
class Labelled:
    """One row: its sample, tokens, kinds (T,), and the places that are learned from, answers told apart."""

    sample: Sample
    aligned: Aligned
    kinds: NDArray[np.uint8]
    places: tuple[int, ...]
    response: tuple[bool, ...]

    @property
    def counts(self) -> Supervised:
        """Supervised tokens of either side."""
        answers = sum(self.response)
        return Supervised(answers, len(self.response) - answers, self.sample.weight)


def turns_of(messages: Sequence[Message]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Messages as an ``Aligner`` takes them."""
    return [(message.role, message.parts) for message in messages]


def align(aligner: Aligner, sample: Sample, images: Sequence[Any], stage: Stage = "finetune") -> Aligned:
    """The tokens of a row. Raises: BadData (65) with the row's place."""
    try:
        if stage == "pretrain":
            return _plain_caption(aligner, sample, images)
        return aligner.align(turns_of(sample.messages), images)
    except BadData as problem:
        if problem.exit_code != BadData.exit_code:
            raise
        raise sample.bad(problem.reason, problem.advice) from None


def _plain_caption(aligner: Aligner, sample: Sample, images: Sequence[Any]) -> Aligned:
    """Image, caption, newline; nothing else: how a connector is aligned. Of a conversation its first answer serves."""
    answer = next(message.text for message in sample.messages if message.role == "assistant")
    head = (aligner.image_token or "") * len(images)
    answer = answer.strip() + "\n"
    piece = Piece(1, 0, "assistant", len(head), len(head) + len(answer))
    return aligner.encode(head + answer, [piece], images)


def label(aligned: Aligned, sample: Sample, how: Labelling) -> Labelled:
    """Kinds and supervised places of an aligned row."""
    if how.stage == "pretrain":
        kinds = np.array(aligned.kinds, dtype=np.uint8)
        wanted = supervised(kinds, "vit")
    else:
        texts = [sample.messages[piece.message].parts[piece.part] or "" for piece in aligned.pieces]
        kinds = refine(aligned, texts, how.templates, how.split)
        wanted = supervised(kinds, how.mode, text_only_instructions=how.text_only_instructions)
    answers = is_response(kinds)
    places = tuple(np.flatnonzero(wanted).tolist())
    return Labelled(sample, aligned, kinds, places, tuple(bool(answers[place]) for place in places))


def shorten(row: Labelled, length: int) -> Labelled | None:
    """The first ``length`` tokens of a row; None where that cuts into an image or leaves nothing to learn."""
    images = np.flatnonzero(row.kinds == Kind.IMAGE)
    if len(images) and images[-1] >= length:
        return None
    kept = [(place, on) for place, on in zip(row.places, row.response, strict=True) if place < length]
    if not any(on for _, on in kept):
        return None
    cut = dataclasses.replace(
        row.aligned, ids=row.aligned.ids[:length], kinds=row.aligned.kinds[:length], chars=row.aligned.chars[:length]
    )
    places, response = zip(*kept, strict=True)
    return Labelled(row.sample, cut, row.kinds[:length], places, response)


@dataclass
class Tally:
    """What became of rows on the way to labels."""

    kept: int = 0
    dropped_overlong: int = 0
    truncated: int = 0
    dropped_unsupervised: int = 0
    bad: int = 0
    empty_instruction: int = 0
    kinds: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(Kind), dtype=np.int64))
    response: int = 0
    instruction: int = 0

    def record(self) -> dict[str, Any]:
        """As ``run.json`` keeps it."""
        return {
            **{name: getattr(self, name) for name in ("kept", "dropped_overlong", "truncated", "dropped_unsupervised")},
            "bad": self.bad,
            "empty_instruction": self.empty_instruction,
            "supervised": {"response": self.response, "instruction": self.instruction},
            "tokens": {kind.label: int(self.kinds[kind]) for kind in Kind if kind != Kind.PAD},
        }


class Rows:
    """Labelled rows, and their images again when a batch needs them.

    ``features``: cached vision features by image, in place of pixels (see ``vision_cache``). Without ``keep`` no pixels
    stay in memory.
    """

    def __init__(self, aligner: Aligner, store: ImageStore, how: Labelling, *, keep: bool = True) -> None:
        self.aligner, self.store, self.how = aligner, store, how
        self.rows: list[Labelled] = []
        self.tally = Tally()
        self.features: Any = None
        self._room = _KEPT_BYTES if keep else 0

    def add(self, samples: Sequence[Sample], fail: Callable[[Sample, BadData], None]) -> None:
        """Align, label and keep ``samples``; every image is decoded here once, so that a bad one is found at once.

        ``fail`` is told of each bad row: it raises, or the row is left out.
        """
        for sample in samples:
            try:
                row = self._labelled(sample)
            except BadData as problem:
                if problem.exit_code != BadData.exit_code:
                    raise
                fail(sample, problem)
                self.tally.bad += 1
                continue
            if row is not None:
                self._keep(row)

    def _labelled(self, sample: Sample) -> Labelled | None:
        row = label(align(self.aligner, sample, self.store.of(sample), self.how.stage), sample, self.how)
        if len(row.aligned.ids) > self.how.max_length:
            if self.how.overlong == "error":
                what = f"{len(row.aligned.ids)} tokens, more than --max-length {self.how.max_length}"
                raise sample.bad(what, "raise --max-length, or --overlong drop")
            short = shorten(row, self.how.max_length) if self.how.overlong == "truncate-response" else None
            if short is None:
                self.tally.dropped_overlong += 1
                return None
            self.tally.truncated += 1
            row = short
        if not row.places:
            self.tally.dropped_unsupervised += 1
            return None
        return row

    def _keep(self, row: Labelled) -> None:
        counts = row.counts
        self.tally.kept += 1
        self.tally.response += counts.response
        self.tally.instruction += counts.instruction
        self.tally.empty_instruction += not counts.instruction
        self.tally.kinds += np.bincount(row.kinds, minlength=len(Kind))
        size = sum(_size(value) for value in row.aligned.inputs.values())
        if size > self._room:
            row = dataclasses.replace(row, aligned=dataclasses.replace(row.aligned, inputs={}))
        else:
            self._room -= size
        self.rows.append(row)

    def aligned(self, place: int) -> Aligned:
        """Row ``place`` with its pixels, or with cached features in their stead."""
        row = self.rows[place]
        if not row.sample.images:
            return row.aligned
        if self.features is not None:
            return dataclasses.replace(row.aligned, inputs={"pixel_values": self.features.of(row.sample.images)})
        if row.aligned.inputs:
            return row.aligned
        made = align(self.aligner, row.sample, self.store.of(row.sample), self.how.stage)
        return dataclasses.replace(row.aligned, inputs=made.inputs)


def _size(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_size(one) for one in value)
    return int(getattr(value, "nbytes", 64))


def user_texts(samples: Collection[Sample]) -> list[tuple[str, list[str]]]:
    """``(id, texts of the user's turns)`` of each row, for the table of sentences."""
    return [(one.id, [message.text for message in one.messages if message.role == "user"]) for one in samples]
