"""lm-generate's local backend: a model in this process, or in each of several.

Batches are cut from a window of the input alone, before they are shared among ranks and before the log is looked at, so
that neither the number of processes nor an interruption shows in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.lm.windows import Answered, Windows, contents
from toolbox.models.device import find_device
from toolbox.models.generate import Completion, Content, FinishReason, LocalBackend, Request, TextRequest, plan_batches
from toolbox.models.responses import ResponseLog, describe_run, digest, model_identity
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import Record

if TYPE_CHECKING:
    from toolbox.lm.generate import Options
    from toolbox.models.chat import Chat


class _Item(msgspec.Struct):
    """One prompt of a window, as it travels to the ranks: the tokens, and the paths (samples) wanted of it."""

    ids: list[int]
    paths: list[str]


class _Work(msgspec.Struct):
    """A window on its way to the ranks: its prompts, and which of its batches have to be run."""

    items: list[_Item]
    batches: list[int]


class _Result(msgspec.Struct, array_like=True):
    """One completion on its way back."""

    place: int
    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int | None
    n_completion_tokens: int | None
    logprobs: list[float] | None

    def completion(self) -> Completion:
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Completion(self.text, self.finish_reason, self.n_prompt_tokens, self.n_completion_tokens, logprobs)


@dataclass(slots=True)
class _Window:
    """Rank 0's view of a window; ``found`` has a place for every sample, filled from the log or by the model."""

    records: list[Record]
    items: list[_Item]
    requests: list[TextRequest]
    keys: list[str]
    found: list[Completion | None]


class LocalAnswers:
    """Completes window after window; ``windows`` and ``log`` are rank 0's alone."""

    def __init__(
        self, options: Options, call: Invocation, source: Any, windows: Windows | None, log: ResponseLog | None
    ) -> None:
        import torch

        from toolbox.models.load import load_model, load_tokenizer, prepare
        from toolbox.training.processes import start_processes

        self.options, self.windows, self.log = options, windows, log
        self.decoding = options.decoding()
        self.accelerator = start_processes()
        device = self.accelerator.device if options.device == "auto" else find_device(options.device)
        dtype = options.dtype
        if dtype == "auto":
            dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        with self.accelerator.main_process_first():
            prepare(source, call.reporter.note)
        self.tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
        model = load_model(source, dtype=dtype, trust_remote_code=options.trust_remote_code).to(device)
        self.chat, self.plain = self._templates()
        size = options.batch_size
        self.batch_size = (32 if device.type == "cuda" else 16) if size == "auto" else int(size)
        self.backend = LocalBackend(
            model, self.tokenizer, end_ids=self.chat.end_ids, batch_size=self.batch_size,
            batch_tokens=options.batch_tokens,
        )  # fmt: skip
        if log is not None:
            run = describe_run(
                "local", model_identity(source, trust_remote_code=options.trust_remote_code), self.decoding,
                system=options.system, dtype=dtype, template=digest([self.chat.source, self.plain.source]),
            )  # fmt: skip
            if not log.begin(run, options.model):
                call.reporter.warn(f"{log.path}: holds no response of this model with these options")

    def _templates(self) -> tuple[Chat, Chat]:
        """How ``messages`` are rendered, and how a bare ``prompt`` is."""
        from toolbox.models.chat import Chat

        options = self.options
        chat = Chat(self.tokenizer, "raw" if options.raw else options.template, options.system)
        if options.template == "auto" and self.tokenizer.chat_template is None:
            return chat, Chat(self.tokenizer, "raw", options.system)
        return chat, chat

    def __call__(self, first: list[Record]) -> Iterator[list[Answered]]:
        """The rows of each window, on rank 0; until the input ends."""
        from toolbox.training.processes import broadcast_bytes

        going, taken = first, None
        while True:
            if self.windows is not None:
                taken = self._take(going) if going else None
            work = None if taken is None else _Work(taken.items, self._wanted(taken))
            work = msgspec.json.decode(broadcast_bytes(self.accelerator, msgspec.json.encode(work)), type=_Work | None)
            if work is None:
                return
            self._complete(work, taken)
            if self.windows is not None and taken is not None:
                yield list(self._answered(taken))
                going = self.windows.next()

    # -- rank 0 -------------------------------------------------------------------------------------------------------
    def _take(self, window: Sequence[Record]) -> _Window:
        """The window's prompts as tokens and what the log has; prompts that do not fit the model are bad rows."""
        assert self.windows is not None
        taken = _Window([], [], [], [], [])
        for record in window:
            try:
                content, ids = self._prompt(record)
                self.backend.room(Request(record.id, tuple(ids)), self.decoding)
            except BadData as problem:
                self.windows.bad(record.bad(problem.reason, problem.advice, problem.field), record)
                continue
            requests = self.windows.requests(record, content)
            taken.records.append(record)
            taken.items.append(_Item(ids, [request.key for request in requests]))
            taken.requests += requests
        if self.log is None:
            taken.found = [None] * len(taken.requests)
        else:
            taken.keys = [self.log.key(request) for request in taken.requests]
            taken.found = [self.log.find(key) for key in taken.keys]
        return taken

    def _prompt(self, record: Record) -> tuple[Content, list[int]]:
        """``messages`` where the model has a chat template, else the plain ``prompt`` if there is one."""
        forms = contents(record)
        text = forms[-1] if isinstance(forms[-1], str) else None
        if text is not None and (len(forms) == 1 or self.plain is not self.chat):
            return text, self.plain.prompt([{"role": "user", "content": text}])
        return forms[0], self.chat.prompt(forms[0])

    def _wanted(self, taken: _Window) -> list[int]:
        """The batches with a sample that the log lacks: they are run whole, as an uninterrupted run has them."""
        batches = self._batches(taken.items)
        return [number for number, batch in enumerate(batches) if any(taken.found[place] is None for place in batch)]

    def _answered(self, taken: _Window) -> Iterator[Answered]:
        samples = iter(taken.found)
        for record, item in zip(taken.records, taken.items, strict=True):
            done = [next(samples) for _ in item.paths]
            assert all(one is not None for one in done)
            yield Answered(record, done)  # type: ignore[arg-type]

    def _keep(self, taken: _Window, place: int, done: Completion) -> None:
        """A new completion to its place and to the log; where the log has one already, that one stands."""
        if taken.found[place] is None:
            if self.log is not None:
                done = self.log.add(taken.keys[place], taken.requests[place], done)
            taken.found[place] = done

    # -- every rank ---------------------------------------------------------------------------------------------------
    def _batches(self, items: Sequence[_Item]) -> list[list[int]]:
        lengths = [len(item.ids) + self.options.max_new_tokens for item in items for _ in item.paths]
        return plan_batches(lengths, self.batch_size, self.options.batch_tokens)

    def _complete(self, work: _Work, taken: _Window | None) -> None:
        """Run the wanted batches, shared among the ranks. With a log rank 0 gets the results after every round of them,
        without one at the end: each round costs a wait for the slowest."""
        from toolbox.training.processes import gather_bytes

        requests = [Request(path, tuple(item.ids)) for item in work.items for path in item.paths]
        batches = self._batches(work.items)
        ranks = self.accelerator.num_processes
        step = ranks if self.options.log is not None else max(1, len(work.batches))
        for start in range(0, len(work.batches), step):
            chosen = [batches[number] for number in work.batches[start : start + step]]
            mine: list[_Result] = []
            for batch in chosen[self.accelerator.process_index :: ranks]:
                done = self.backend.complete([requests[place] for place in batch], self.decoding)
                mine += [_result(place, one) for place, one in zip(batch, done, strict=True)]
            parts = gather_bytes(self.accelerator, msgspec.json.encode(mine))
            if taken is None:
                continue
            found = {one.place: one for part in parts for one in msgspec.json.decode(part, type=list[_Result])}
            for place in (place for batch in chosen for place in batch):
                self._keep(taken, place, found[place].completion())


def _result(place: int, one: Completion) -> _Result:
    logprobs = None if one.logprobs is None else list(one.logprobs)
    return _Result(place, one.text, one.finish_reason, one.n_prompt_tokens, one.n_completion_tokens, logprobs)
