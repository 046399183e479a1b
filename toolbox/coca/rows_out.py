"""Where rows go: accepted ones to stdout or to a file that is whole or not there, rejected ones to their own file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from toolbox.coca.ablate import Ablation
from toolbox.coca.pairs import Row
from toolbox.coca.teacher import Outcome
from toolbox.shell.files import atomic_file
from toolbox.shell.records import Record
from toolbox.shell.streams import JsonlWriter, Streams

if TYPE_CHECKING:
    from toolbox.coca.refactor_rows import Rows

PRIVATE = 0o600
"""Mode of files that hold harmful prompts: for their owner alone."""


def answer_digest(answer: str) -> str:
    """SHA-256 of an answer without the blanks around it, which a record need not keep."""
    return hashlib.sha256(answer.strip().encode("utf-8", "surrogatepass")).hexdigest()


class Output:
    """The rows of a run and its rejects.

    Rejects are told apart by what they hold: a bad record stands as it came, a pair that was rejected as
    ``{"line", "id", "codes", "why"}``. They are written at the end, in the order of the input.
    """

    def __init__(self, path: str, streams: Streams, rejects: str | None, *, overwrite: bool) -> None:
        self.path, self.rejects, self.overwrite = path, rejects, overwrite
        self._streams = streams
        self._rejected: list[tuple[int, bytes]] = []
        self._encode = msgspec.json.Encoder().encode

    def __enter__(self) -> Output:
        self._stack = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._writer: JsonlWriter | None = None
        if self.path == "-":
            self._writer = JsonlWriter(self._streams)
        else:
            self._file = self._stack.enter_context(atomic_file(self.path, overwrite=self.overwrite))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.flush()
        self._stack.__exit__(kind, error, trace)

    def write(self, row: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(row)
        else:
            assert self._file is not None
            self._file.write(self._encode(row) + b"\n")

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def reject(self, record: Record, codes: Mapping[str, str], raw: Sequence[str] | None) -> None:
        """Note a rejected pair; its text only where that was asked for."""
        if self.rejects is None:
            return
        why = "; ".join(dict.fromkeys(codes.values()))
        entry: dict[str, Any] = {"line": record.line, "id": record.id, "codes": sorted(codes), "why": why}
        if raw is not None:
            entry["raw"] = raw[0] if len(raw) == 1 else list(raw)
        self._rejected.append((record.index, self._encode(entry)))

    def finish(self, bad: Sequence[tuple[int, bytes]]) -> None:
        """All rows are written: close stdout, and write the rejects with the bad records among them."""
        if self._writer is not None:
            self._writer.close()
        if self.rejects is None:
            return
        with atomic_file(self.rejects) as handle:
            if os.path.isfile(self.rejects) or not os.path.exists(self.rejects):
                os.fchmod(handle.fileno(), PRIVATE)
            for _, line in sorted([*self._rejected, *bad], key=lambda one: one[0]):
                handle.write(line.replace(b"\n", b" ") + b"\n")


def enhanced(row: Row, outcomes: Sequence[Outcome], ablation: Ablation | None, rows: Rows) -> dict[str, Any]:
    """The row as it came, its answers replaced by records; what was found under ``coca``."""
    options, grammar = rows.options, rows.options.grammar
    answers, found = [], []
    for pair, one in zip(row.pairs, outcomes, strict=True):
        assert one.texts is not None
        text = grammar.render(one.texts) if ablation is None else ablation.render(one.texts, grammar)
        answers.append(text)
        meta: dict[str, Any] = {
            "think": one.texts["think"],
            "concept": list(one.concepts),
            "check": list(one.unsafe),
            "decision": one.decision,
            "response_source": one.source,
            "vanilla_sha256": answer_digest(pair.answer),
            "backend": options.backend,
            "model": None if options.backend == "replay" else options.model,
            "template": rows.teacher.template.name,
            "seed": options.seed,
            "attempts": one.attempts,
            "usage": {"prompt_tokens": one.usage.prompt_tokens, "completion_tokens": one.usage.completion_tokens},
        }
        if ablation is not None:
            meta["ablation"] = ablation.name
        if options.keep_vanilla_text:
            meta["vanilla"] = pair.answer
        found.append(meta)
    data = {**row.replaced(answers), "id": row.id}
    if options.meta:
        data["coca"] = found[0] if len(found) == 1 else {"turns": found}
    elif options.keep_vanilla_text:
        data["coca"] = {"vanilla": [pair.answer for pair in row.pairs]}
    return data
