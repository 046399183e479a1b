"""The prompts of lm-generate, a window at a time, and what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from toolbox.models.generate import Completion, Content, TextRequest
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import PROMPT_SHAPES, Record, RecordReader, parse_map, read_records

if TYPE_CHECKING:
    from toolbox.lm.generate import Options


@dataclass(frozen=True, slots=True)
class Answered:
    """A row with all its samples."""

    record: Record
    completions: Sequence[Completion]


class Windows:
    """Validated records, a window at a time, with duplicate paths refused inside a window."""

    def __init__(self, options: Options, call: Invocation) -> None:
        self.rejected: list[bytes] = []
        self.reader = RecordReader(
            PROMPT_SHAPES,
            renames=parse_map(options.map_fields),
            on_bad=options.on_bad,
            rejects=lambda raw, _: self.rejected.append(raw),
        )
        self.options = options
        self._records = self._checked(read_records(options.file, call.streams, self.reader))

    def _checked(self, records: Iterator[Record]) -> Iterator[Record]:
        taken = 0
        if self.options.limit == 0:
            return
        for record in records:
            if "completion" in record.data:
                self.bad(
                    record.bad(
                        "the row has a `completion` already", "keep it with --map reference=completion", "$.completion"
                    ),
                    record,
                )
                continue
            taken += 1
            yield record
            if taken == self.options.limit:  # and not one row more is read: the pipe may stay open
                return

    def bad(self, problem: BadData, record: Record) -> None:
        """Raise, or count and keep for ``--rejects``."""
        self.reader.bad(problem, msgspec.json.encode(record.data))

    def next(self) -> list[Record]:
        """The records of the next window; empty at the end."""
        window: list[Record] = []
        lines: dict[str, int | None] = {}
        for record in self._records:
            if (path := self.stem(record)) in lines:
                what = f"the path {path} stands on line {lines[path]} already"
                self.bad(record.bad(what, "give each row an `id` of its own", "$.id"), record)
                continue
            lines[path] = record.line
            window.append(record)
            if len(window) == self.options.window:
                break
        return window

    def requests(self, record: Record, content: Content) -> list[TextRequest]:
        """The samples wanted of a row."""
        variant = record.value.variant
        return [TextRequest(record.id, variant, sample, content) for sample in range(self.options.n)]

    @staticmethod
    def stem(record: Record) -> str:
        """``id/variant``, or ``id``: the path id without its sample."""
        return f"{record.id}/{record.value.variant}" if record.value.variant is not None else record.id


def contents(record: Record) -> list[Content]:
    """The forms of a row's prompt: its ``messages``, its ``prompt``, or both in this order."""
    messages, prompt = getattr(record.value, "messages", None), record.value.prompt
    turns = None if messages is None else [{"role": one.role, "content": one.content} for one in messages]
    return [form for form in (turns, prompt) if form is not None]
