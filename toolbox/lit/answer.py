"""lit-generate: the job. Rows with images in, answers out, in order.

Batches are cut from a window of the input before they are shared among ranks, so that the number of processes does not
show in the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import msgspec

from toolbox.lit.build import DEFAULT, vlm_named
from toolbox.lit.data import turns_of
from toolbox.lit.images import ImageStore
from toolbox.lit.lines import ASKABLE, CAPTIONS, Pictures
from toolbox.lit.rows import Counts, Message, Reading, Sample, check_names, records_of, samples_of
from toolbox.models.spans import Aligned, Aligner
from toolbox.models.vlm import find_vlm, load_processor, load_vlm
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import Record, RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name, process_rank

WINDOW = 64
"""Rows read before the first one leaves."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-generate's options."""

    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    image_root: str | None = None
    max_image_pixels: float = 50e6
    max_images_per_row: int = 8
    limit: int | None = None
    model: str = DEFAULT
    trust_remote_code: bool = False
    prompt: str | None = None
    all_turns: bool = False
    image_position: str = "first"
    control_tokens: str = "escape"
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    batch_size: int = 8
    dtype: str = "auto"
    seed: int = 0
    threads: int | None = None


class Question(msgspec.Struct):
    """One answer that is asked for; ``index`` is its place in the output."""

    index: int
    turn: int
    sample: Sample


class Answer(msgspec.Struct, array_like=True):
    """One answer on its way back."""

    index: int
    text: str
    logprob: float
    tokens: int
    finish_reason: str


def run(options: Options, call: Invocation) -> None:
    """Answer every row."""
    source = find_vlm(vlm_named(options.model, call.reporter.note), trust_remote_code=options.trust_remote_code)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    processor = load_processor(source, trust_remote_code=options.trust_remote_code)
    aligner = Aligner(processor, options.control_tokens)  # type: ignore[arg-type]
    asking = _Asking(options, call, aligner, store)
    leader = process_rank() == 0
    if call.dry_run:
        if leader:
            count = sum(1 for _ in asking.questions())
            asking.finish()
            writer = JsonlWriter(call.streams)
            writer.write({"event": "plan", "command": call.command, "settings": call.settings, "answers": count})
            writer.close()
        return
    from toolbox.training.processes import broadcast_bytes, gather_bytes, start_processes

    accelerator = start_processes("fp32")
    writer = JsonlWriter(call.streams)
    questions = asking.questions() if leader else iter(())
    backend = None
    while True:
        window = list(islice(questions, WINDOW)) if leader else []
        sent = [Question(one.index, one.turn, replace(one.sample, data={})) for one in window]
        sent = msgspec.json.decode(
            broadcast_bytes(accelerator, msgspec.json.encode(sent) if leader else None), type=list[Question]
        )
        if not sent:
            break
        if backend is None:  # no model for no rows
            backend = _backend(source, options, aligner, accelerator)
        mine = _answers(sent, backend, aligner, store, options, accelerator)
        parts = gather_bytes(accelerator, msgspec.json.encode(mine))
        if leader:
            found = [one for part in parts for one in msgspec.json.decode(part, type=list[Answer])]
            _write(writer, window, {one.index: one for one in found})
    if leader:
        writer.close()
        asking.finish()


def _backend(source: Any, options: Options, aligner: Aligner, accelerator: Any) -> Any:
    from toolbox.models.vision_generate import VisionBackend, end_ids

    dtype = options.dtype if options.dtype != "auto" else "bf16" if accelerator.device.type == "cuda" else "fp32"
    model = load_vlm(source, dtype=dtype, trust_remote_code=options.trust_remote_code)  # type: ignore[arg-type]
    model = model.to(accelerator.device)
    return VisionBackend(model, aligner.tokenizer, end_ids=end_ids(aligner), batch_size=options.batch_size)


class _Asking:
    """The questions of the input, checked: prompts are aligned with their images before anything is asked."""

    def __init__(self, options: Options, call: Invocation, aligner: Aligner, store: ImageStore) -> None:
        self.options, self.call, self.aligner, self.store = options, call, aligner, store
        self.rejected: list[bytes] = []
        self.reader = RecordReader(
            ASKABLE, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self.rejected.append(raw),
        )  # fmt: skip

    def questions(self) -> Iterator[Question]:
        """In the order of the input."""
        index = 0
        for record in islice(records_of(self.options.file, self.call.streams, self.reader), self.options.limit):
            try:
                found = [(turn, sample) for turn, sample in self._of(record)]
                for _, sample in found:
                    prompt_of(self.aligner, self.store, sample)
            except BadData as problem:
                if problem.exit_code != BadData.exit_code:
                    raise
                self.reader.bad(problem, msgspec.json.encode(record.data))
                continue
            for turn, sample in found:
                yield Question(index, turn, sample)
                index += 1

    def finish(self) -> None:
        """Say what was left out."""
        if self.reader.skipped:
            self.call.reporter.warn(f"{display_name(self.options.file)}: {self.reader.skipped} bad rows left out")
        if self.options.rejects and not self.call.dry_run:
            write_rejects(self.options.rejects, self.rejected)

    def _of(self, record: Record) -> list[tuple[int, Sample]]:
        if isinstance(record.value, (*CAPTIONS, Pictures)):
            if self.options.prompt is None:
                raise record.bad("a row with no question", "give --prompt TEXT")
            image = record.value.image
            names = (image,) if isinstance(image, str) else tuple(image)
            check_names(record, names)
            parts = (*([None] * len(names)), self.options.prompt)
            sample = Sample(
                record.id, (Message("user", parts),), names, record.file, record.line, record.index, data=record.data
            )
            return [(0, sample)]
        how = Reading(self.options.image_position, self.options.max_images_per_row, answers=False)  # type: ignore[arg-type]
        (sample,) = samples_of(record, how, Counts())
        asked = [place for place, message in enumerate(sample.messages) if message.role == "user"]
        turns = list(enumerate(asked))
        return [(turn, _until(sample, place)) for turn, place in (turns if self.options.all_turns else turns[-1:])]


def _until(sample: Sample, place: int) -> Sample:
    """The row up to the question at ``place``, with the images seen by then."""
    messages = sample.messages[: place + 1]
    count = sum(part is None for message in messages for part in message.parts)
    return replace(sample, messages=messages, images=sample.images[:count])


def prompt_of(aligner: Aligner, store: ImageStore, sample: Sample) -> Aligned:
    """The prompt of a row with its images, an answer opened. Raises: BadData (65) with the row's place."""
    try:
        return aligner.align(turns_of(sample.messages), store.of(sample), generation=True)
    except BadData as problem:
        if problem.exit_code != BadData.exit_code or problem.file is not None:
            raise
        raise sample.bad(problem.reason, problem.advice) from None


def _answers(
    sent: list[Question], backend: Any, aligner: Aligner, store: ImageStore, options: Options, accelerator: Any
) -> list[Answer]:
    """This rank's answers of a window."""
    from toolbox.models.generate import Decoding, Request

    rank, world = accelerator.process_index, accelerator.num_processes
    batches = [sent[start : start + options.batch_size] for start in range(0, len(sent), options.batch_size)]
    decoding = Decoding(
        options.max_new_tokens, options.temperature, options.top_p, options.stop, options.seed, logprobs=True
    )
    found: list[Answer] = []
    for batch in batches[rank::world]:
        prompts: dict[str, Aligned] = {}
        for one in batch:
            key = f"{one.sample.id}/{one.turn}"  # what sampling depends on: not the place of the row
            prompts[key if key not in prompts else f"{key}/{one.index}"] = prompt_of(aligner, store, one.sample)
        backend.rows = prompts
        requests = [Request(key, prompt.ids) for key, prompt in prompts.items()]
        for one, done in zip(batch, backend.complete(requests, decoding), strict=True):
            logprob = round(float(sum(done.logprobs or ())), 4)
            found.append(Answer(one.index, done.text, logprob, int(done.n_completion_tokens), done.finish_reason))
    return found


def _write(writer: JsonlWriter, window: list[Question], found: dict[int, Answer]) -> None:
    for one in window:
        answer = found[one.index]
        writer.write({
            **one.sample.data, "id": one.sample.id, "turn": one.turn, "prompt": one.sample.messages[-1].text,
            "text": answer.text, "logprob": answer.logprob, "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
        })  # fmt: skip
    writer.flush()
