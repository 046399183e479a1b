"""lm-generate: completions of prompts, as a filter over JSON lines.

Rows are read in windows, which bound memory and the delay before a row leaves. Batches are cut from a window before
it is shared among ranks, so that the number of processes does not show in the output.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.models.generate import Completion, Decoding, LocalBackend, Request, plan_batches
from toolbox.models.load import find_model
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, Unavailable, UsageProblem
from toolbox.shell.records import PROMPT_SHAPES, Record, RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank

if TYPE_CHECKING:
    from toolbox.models.chat import Chat
    from toolbox.models.generate import Backend


@dataclass(frozen=True, kw_only=True)
class Options:
    """lm-generate's options."""

    file: str = "-"
    model: str = "smollm2"
    trust_remote_code: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    limit: int | None = None
    template: str = "auto"
    system: str | None = None
    raw: bool = False
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"
    batch_tokens: int | None = None
    window: int = 256
    threads: int | None = None


class Item(msgspec.Struct):
    """One prompt of a window, as it travels to the ranks: the tokens, and the paths (samples) wanted of it."""

    ids: list[int]
    paths: list[str]


class Result(msgspec.Struct, array_like=True):
    """One completion on its way back."""

    place: int
    text: str
    finish_reason: str
    n_prompt_tokens: int
    n_completion_tokens: int
    logprobs: list[float] | None


def check(options: Options) -> None:
    """What does not fit together."""
    if options.n > 1 and options.temperature == 0:
        raise UsageProblem(
            f"--n {options.n} with --temperature 0 would give {options.n} equal completions", "add --temperature 1"
        )
    if options.raw and options.template not in ("auto", "raw"):
        raise UsageProblem("--raw and --template exclude one another", "give one of them")


class Windows:
    """Rank 0's side: validated records, a window at a time, with duplicate paths refused inside a window."""

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

    @staticmethod
    def stem(record: Record) -> str:
        """``id/variant``, or ``id``: the path id without its sample."""
        return f"{record.id}/{record.value.variant}" if record.value.variant is not None else record.id


def run(options: Options, call: Invocation) -> None:
    """Complete every prompt of ``options.file``; one JSON line a completion, in input order."""
    check(options)
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    leader = process_rank() == 0
    windows = Windows(options, call) if leader else None
    first = windows.next() if windows is not None else []
    if call.dry_run:
        if windows is not None:
            _dry_run(windows, first, options, call)
        return
    if leader and not first and "WORLD_SIZE" not in os.environ:
        _finish(windows, options, call)
        return
    _Generation(options, call, source, windows).run(first)


def _dry_run(windows: Windows, first: list[Record], options: Options, call: Invocation) -> None:
    rows, window = 0, first
    while window:
        rows += len(window)
        window = windows.next()
    writer = JsonlWriter(call.streams)
    writer.write({"event": "plan", "command": call.command, "rows": rows, "completions": rows * options.n,
                  "skipped": windows.reader.skipped, "settings": call.settings})  # fmt: skip
    writer.close()


def _finish(windows: Windows | None, options: Options, call: Invocation) -> None:
    if windows is None:
        return
    if windows.reader.skipped:
        call.reporter.warn(f"{windows.reader.skipped} bad rows left out")
    if options.rejects is not None:
        write_rejects(options.rejects, windows.rejected)


def _device(name: str) -> Any:
    """A device that is there."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Unavailable(f"--device {name}: {error}", "auto takes a GPU where there is one, else the CPU") from None
    return device


class _Generation:
    """The part that needs a model."""

    def __init__(self, options: Options, call: Invocation, source: Any, windows: Windows | None) -> None:
        import torch

        from toolbox.models.load import load_model, load_tokenizer, prepare
        from toolbox.training.processes import start_processes

        self.options, self.call, self.windows = options, call, windows
        self.decoding = Decoding(
            options.max_new_tokens, options.temperature, options.top_p, options.stop, options.seed, options.logprobs
        )
        self.accelerator = start_processes()
        device = self.accelerator.device if options.device == "auto" else _device(options.device)
        dtype = options.dtype
        if dtype == "auto":
            dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        with self.accelerator.main_process_first():
            prepare(source, call.reporter.note)
        self.tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
        model = load_model(source, dtype=dtype, trust_remote_code=options.trust_remote_code).to(device)
        self.chat, self.plain = self._templates()
        self.backend = self._backend(model, device)

    def _templates(self) -> tuple[Chat, Chat]:
        """How ``messages`` are rendered, and how a bare ``prompt`` is."""
        from toolbox.models.chat import Chat

        options = self.options
        chat = Chat(self.tokenizer, "raw" if options.raw else options.template, options.system)
        if options.template == "auto" and self.tokenizer.chat_template is None:
            return chat, Chat(self.tokenizer, "raw", options.system)
        return chat, chat

    def _backend(self, model: Any, device: Any) -> Backend:
        size = self.options.batch_size
        self.batch_size = (32 if device.type == "cuda" else 16) if size == "auto" else int(size)
        return LocalBackend(
            model, self.tokenizer, end_ids=self.chat.end_ids, batch_size=self.batch_size,
            batch_tokens=self.options.batch_tokens,
        )  # fmt: skip

    def run(self, first: list[Record]) -> None:
        """Window after window until the input ends."""
        from toolbox.training.processes import broadcast_bytes

        writer = JsonlWriter(self.call.streams)
        window = first
        with self.call.reporter.progress("row", None) as bar:
            while True:
                records, items = self._items(window) if self.windows is not None else ([], [])
                payload = broadcast_bytes(self.accelerator, msgspec.json.encode((bool(window), items)))
                going, items = msgspec.json.decode(payload, type=tuple[bool, list[Item]])
                if not going:
                    break
                results = self._complete(items)
                if self.windows is not None:
                    for row in self._rows(records, items, results):
                        writer.write(row)
                    writer.flush()
                    bar.advance(len(records))
                    window = self.windows.next()
        writer.close()
        _finish(self.windows, self.options, self.call)

    def _items(self, window: Sequence[Record]) -> tuple[list[Record], list[Item]]:
        """The window's prompts as tokens; rows whose prompt does not fit the model are bad rows."""
        assert self.windows is not None
        records, items = [], []
        for record in window:
            try:
                ids = self._prompt_ids(record)
                self.backend.room(Request(record.id, tuple(ids)), self.decoding)
            except BadData as problem:
                self.windows.bad(record.bad(problem.reason, problem.advice, problem.field), record)
                continue
            stem = Windows.stem(record)
            records.append(record)
            items.append(Item(ids, [f"{stem}/{sample}" for sample in range(self.options.n)]))
        return records, items

    def _prompt_ids(self, record: Record) -> list[int]:
        """``messages`` where the model has a chat template, else the plain ``prompt`` if there is one."""
        value = record.value
        messages = getattr(value, "messages", None)
        if messages is None or (self.plain is not self.chat and value.prompt is not None):
            return self.plain.prompt([{"role": "user", "content": value.prompt}])
        return self.chat.prompt([{"role": message.role, "content": message.content} for message in messages])

    def _complete(self, items: Sequence[Item]) -> list[Completion]:
        """All completions of a window, prompt by prompt and sample by sample, on every rank."""
        from toolbox.training.processes import gather_bytes

        options = self.options
        requests = [Request(path, tuple(item.ids)) for item in items for path in item.paths]
        batches = plan_batches(
            [len(request.prompt_ids) + options.max_new_tokens for request in requests], self.batch_size,
            options.batch_tokens,
        )  # fmt: skip
        mine: list[Result] = []
        for batch in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            done = self.backend.complete([requests[place] for place in batch], self.decoding)
            mine += [
                Result(place, one.text, one.finish_reason, one.n_prompt_tokens, one.n_completion_tokens,
                       None if one.logprobs is None else list(one.logprobs))
                for place, one in zip(batch, done, strict=True)
            ]  # fmt: skip
        found: dict[int, Completion] = {}
        for part in gather_bytes(self.accelerator, msgspec.json.encode(mine)):
            for result in msgspec.json.decode(part, type=list[Result]):
                logprobs = None if result.logprobs is None else tuple(result.logprobs)
                found[result.place] = Completion(
                    result.text, result.finish_reason, result.n_prompt_tokens, result.n_completion_tokens, logprobs
                )  # type: ignore[arg-type]
        return [found[place] for place in range(len(requests))]

    def _rows(
        self, records: Sequence[Record], items: Sequence[Item], completions: Sequence[Completion]
    ) -> Iterator[dict[str, Any]]:
        """Output rows: what came in, and the path that was taken."""
        places = iter(completions)
        for record, item in zip(records, items, strict=True):
            for sample, path in enumerate(item.paths):
                one = next(places)
                row = {
                    **record.data,
                    "id": record.id,
                    "path_id": path,
                    "sample": sample,
                    "model": self.options.model,
                    "completion": one.text,
                    "finish_reason": one.finish_reason,
                    "n_prompt_tokens": one.n_prompt_tokens,
                    "n_completion_tokens": one.n_completion_tokens,
                }
                if one.logprobs is not None:
                    row["logprobs"] = list(one.logprobs)
                yield row
