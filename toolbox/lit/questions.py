"""What lit-generate asks: the questions in rows with images, checked before anything is asked. No torch."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.lit.images import ImageStore, Unreadable
from toolbox.lit.lines import ASKABLE, CAPTIONS, Pictures
from toolbox.lit.rows import Counts, Message, Reading, Sample, check_names, records_of, samples_of
from toolbox.models.generate import TextRequest
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import Record, RecordReader, parse_map, write_rejects
from toolbox.shell.streams import display_name

if TYPE_CHECKING:
    from toolbox.lit.answer import Options

_SENT_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Question:
    """One answer that is asked for: of the user's turn ``turn`` (from 0), the row up to it.

    ``variant`` names the turn where a row has several questions. ``ready`` is what the check made of it.
    """

    sample: Sample
    turn: int
    variant: str | None
    ready: Any

    def request(self, content: Any, sample: int = 0) -> TextRequest:
        """As stored responses and endpoints know it."""
        return TextRequest(self.sample.id, self.variant, sample, content)


class Questions:
    """The questions of the input, in order; ``check`` is called for each and may refuse it (BadData, 65)."""

    def __init__(self, options: Options, call: Invocation, check: Callable[[Sample], Any]) -> None:
        self.options, self.call, self.check = options, call, check
        self.rejected: list[bytes] = []
        self.reader = RecordReader(
            ASKABLE, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self.rejected.append(raw),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Question]:
        for record in islice(records_of(self.options.file, self.call.streams, self.reader), self.options.limit):
            try:
                found = [replace(one, ready=self.check(one.sample)) for one in self._of(record)]
            except BadData as problem:
                if problem.exit_code != BadData.exit_code:
                    raise
                self.bad(problem, record.data)
                continue
            yield from found

    def bad(self, problem: BadData, data: dict[str, Any]) -> None:
        """Raise, or count and keep for ``--rejects``."""
        self.reader.bad(problem, msgspec.json.encode(data))

    def finish(self) -> None:
        """Say what was left out."""
        if self.reader.skipped:
            self.call.reporter.warn(f"{display_name(self.options.file)}: {self.reader.skipped} bad rows left out")
        if self.options.rejects and not self.call.dry_run:
            write_rejects(self.options.rejects, self.rejected)

    def _of(self, record: Record) -> list[Question]:
        if self.options.propose:
            return [Question(self._pictured(record, None), 0, None, None)]
        if isinstance(record.value, (*CAPTIONS, Pictures)):
            if self.options.prompt is None:
                raise record.bad("a row with no question", "give --prompt TEXT")
            return [Question(self._pictured(record, self.options.prompt), 0, None, None)]
        sample = self._conversation(record)
        asked = [place for place, message in enumerate(sample.messages) if message.role == "user"]
        if not self.options.all_turns:
            return [Question(_until(sample, asked[-1]), len(asked) - 1, None, None)]
        return [Question(_until(sample, place), turn, str(turn), None) for turn, place in enumerate(asked)]

    def _conversation(self, record: Record) -> Sample:
        how = Reading(self.options.image_position, self.options.max_images_per_row, answers=False)  # type: ignore[arg-type]
        (sample,) = samples_of(record, how, Counts())
        return sample

    def _pictured(self, record: Record, text: str | None) -> Sample:
        """The images of a row with one question about them, or (``text`` is None) with none yet."""
        if isinstance(record.value, (*CAPTIONS, Pictures)):
            image = record.value.image
            names = (image,) if isinstance(image, str) else tuple(image)
            check_names(record, names)
        else:
            names = self._conversation(record).images
            if not names:
                raise record.bad("no image to ask about", "leave the row out")
        parts = (*([None] * len(names)), *([] if text is None else [text]))
        return Sample(
            record.id, (Message("user", parts),), names, record.file, record.line, record.index, data=record.data
        )


def _until(sample: Sample, place: int) -> Sample:
    """The row up to the question at ``place``, with the images seen by then."""
    messages = sample.messages[: place + 1]
    count = sum(part is None for message in messages for part in message.parts)
    return replace(sample, messages=messages, images=sample.images[:count])


# -- for endpoints and logs -------------------------------------------------------------------------------------------
def content_of(sample: Sample, store: ImageStore) -> list[dict[str, Any]]:
    """The row's turns in OpenAI's form, images as data URIs. Raises: BadData (65) for an image that cannot be used."""
    images = iter([_part(sample, store, name) for name in sample.images])
    turns: list[dict[str, Any]] = []
    for message in sample.messages:
        if None not in message.parts:
            turns.append({"role": message.role, "content": message.text})
            continue
        parts = [next(images) if part is None else {"type": "text", "text": part} for part in message.parts]
        turns.append({"role": message.role, "content": parts})
    return turns


def _part(sample: Sample, store: ImageStore, name: str) -> dict[str, Any]:
    try:
        kind, content = data_of(store, name)
    except Unreadable as reason:
        raise sample.bad(f"{name[:80]}: {reason}", "check --image-root", "$.image") from None
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def data_of(store: ImageStore, name: str) -> tuple[str, bytes]:
    """Kind and bytes of an image as it is sent: the file itself where a model here would see it so, else what it would
    see (turned, on white, the first frame), as PNG. Raises: Unreadable."""
    import io

    from PIL import Image as images

    content = store.bytes_of(name)
    seen = store.decode(content, name)
    with images.open(io.BytesIO(content)) as stored:
        kind = _SENT_AS_THEY_ARE.get(stored.format or "")
        turned = stored.getexif().get(0x0112, 1) != 1
        if kind and not turned and stored.mode in ("RGB", "L") and getattr(stored, "n_frames", 1) == 1:
            return kind, content
    drawn = io.BytesIO()
    seen.save(drawn, "PNG")
    return "png", drawn.getvalue()
