"""lit-generate's local backend: an image-text model in this process, or in each of several.

Batches are cut from the input before they are shared among ranks and before the log is looked at, so that neither the
number of processes nor an interruption shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.lit.data import turns_of
from toolbox.lit.images import ImageStore
from toolbox.lit.rows import Sample
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.models.load import ModelSource
from toolbox.models.responses import ResponseLog, describe_run, digest, model_identity
from toolbox.models.spans import Aligned, Aligner
from toolbox.models.vision_generate import VisionBackend, VisionRequest, end_ids, opened_turn
from toolbox.models.vlm import CONNECTOR_FILE, load_vlm
from toolbox.shell.errors import BadData
from toolbox.shell.files import sha256_file

if TYPE_CHECKING:
    from toolbox.lit.answer import Options


def prompt_of(aligner: Aligner, store: ImageStore, sample: Sample, opens: bool = False) -> Aligned:
    """The prompt of a row with its images: an answer is opened, or (``opens``) a user's turn about the images.

    Raises: BadData (65) with the row's place.
    """
    try:
        images = store.of(sample)
        return opened_turn(aligner, images) if opens else aligner.align(
            turns_of(sample.messages), images, generation=True
        )  # fmt: skip
    except BadData as problem:
        if problem.exit_code != BadData.exit_code or problem.file is not None:
            raise
        raise sample.bad(problem.reason, problem.advice) from None


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion that is wanted: how it is known, the row, and its prompt where this process has made it."""

    request: TextRequest
    sample: Sample
    prompt: Aligned


class _Item(msgspec.Struct):
    """An ``Ask`` on its way to the ranks."""

    key: str
    sample: Sample


class _Work(msgspec.Struct):
    """Completions on their way to the ranks, and which batches of them have to be run.

    ``opens``: the prompts end in an open user's turn, and a completion ends with its first question mark.
    """

    items: list[_Item]
    batches: list[list[int]]
    decoding: Decoding
    opens: bool


class LocalAnswers:
    """A model on every rank. Rank 0 calls ``complete`` and in the end ``close``, the others ``serve``."""

    def __init__(
        self, options: Options, source: ModelSource, aligner: Aligner, store: ImageStore, accelerator: Any,
        log: ResponseLog | None, warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.options, self.source, self.aligner, self.store = options, source, aligner, store
        self.accelerator, self.log, self.warn = accelerator, log, warn
        self._backend: VisionBackend | None = None
        self._identity: str | None = None
        self._warned = False

    @property
    def window(self) -> int:
        """Rows that are completed together: a batch a rank."""
        return self.options.batch_size * self.accelerator.num_processes

    def complete(self, asked: Sequence[Ask], decoding: Decoding, *, opens: bool = False) -> list[Completion]:
        """One completion each, in order; with a log each is in it before this returns."""
        size, ranks = self.options.batch_size, self.accelerator.num_processes
        places = list(range(len(asked)))
        batches = [places[start : start + size] for start in range(0, len(places), size)]
        found: list[Completion | None] = [None] * len(asked)
        keys: list[str] = []
        if self.log is not None:
            self._begin(decoding)
            keys = [self.log.key(one.request) for one in asked]
            found = [self.log.find(key) for key in keys]
        wanted = [batch for batch in batches if any(found[place] is None for place in batch)]
        items = [_Item(one.request.key, replace(one.sample, data={})) for one in asked]
        for start in range(0, len(wanted), ranks):
            work = _Work(items, wanted[start : start + ranks], decoding, opens)
            for place, done in self._share(work, [one.prompt for one in asked]):
                if found[place] is None:
                    found[place] = done if self.log is None else self.log.add(keys[place], asked[place].request, done)
        assert all(one is not None for one in found)
        return found  # type: ignore[return-value]

    def close(self) -> None:
        """Tell the other ranks that nothing more comes."""
        self._send(None)

    def serve(self) -> None:
        """Work for rank 0 until it closes."""
        while (work := self._send(None)) is not None:
            self._share(work, None, sent=True)

    # -- every rank ---------------------------------------------------------------------------------------------------
    def _send(self, work: _Work | None) -> _Work | None:
        from toolbox.training.processes import broadcast_bytes

        mine = msgspec.json.encode(work) if self.accelerator.is_main_process else None
        return msgspec.json.decode(broadcast_bytes(self.accelerator, mine), type=_Work | None)

    def _share(
        self, work: _Work, prompts: Sequence[Aligned] | None, *, sent: bool = False
    ) -> list[tuple[int, Completion]]:
        """A batch a rank; on rank 0 everything that came of it."""
        from toolbox.training.processes import gather_bytes

        if not sent and self.accelerator.num_processes > 1:
            self._send(work)
        mine: list[tuple[int, Completion]] = []
        for batch in work.batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            mine += zip(batch, self._run(work, batch, prompts), strict=True)
        if self.accelerator.num_processes == 1:
            return mine
        parts = gather_bytes(self.accelerator, msgspec.json.encode(mine))
        return [one for part in parts for one in msgspec.json.decode(part, type=list[tuple[int, Completion]])]

    def _run(self, work: _Work, batch: Sequence[int], prompts: Sequence[Aligned] | None) -> list[Completion]:
        made: dict[int, Aligned] = {}
        requests = []
        for place in batch:
            item = work.items[place]
            if prompts is not None:
                prompt = prompts[place]
            else:
                same = hash((item.sample.images, item.sample.messages))
                prompt = made.get(same) or prompt_of(self.aligner, self.store, item.sample, work.opens)
                made[same] = prompt
            requests.append(VisionRequest.of(item.key, prompt, _asked if work.opens else None))
        return self._model().complete(requests, work.decoding)

    def _model(self) -> VisionBackend:
        if self._backend is None:  # no model for no rows
            model = load_vlm(self.source, dtype=self._dtype(), trust_remote_code=self.options.trust_remote_code)  # type: ignore[arg-type]
            self._backend = VisionBackend(
                model.to(self.accelerator.device), self.aligner.tokenizer, end_ids=end_ids(self.aligner),
                batch_size=self.options.batch_size,
            )  # fmt: skip
        return self._backend

    def _dtype(self) -> str:
        if self.options.dtype != "auto":
            return self.options.dtype
        return "bf16" if self.accelerator.device.type == "cuda" else "fp32"

    # -- the log ------------------------------------------------------------------------------------------------------
    def _begin(self, decoding: Decoding) -> None:
        """The log takes responses of this model with ``decoding`` from now on."""
        assert self.log is not None
        if self._identity is None:
            self._identity = model_identity(self.source, trust_remote_code=self.options.trust_remote_code)
        own = self.source.path / CONNECTOR_FILE if self.source.path is not None else None
        run = describe_run(
            "local", self._identity, decoding, dtype=self._dtype(), template=digest(self.aligner.template),
            connector=sha256_file(own) if own is not None and own.is_file() else None,
            control_tokens=self.options.control_tokens,
        )  # fmt: skip
        if not self.log.begin(run, self.options.model) and not self._warned:
            self._warned = True
            self.warn(f"{self.log.path}: holds no response of this model with these options")


def _asked(_: int, text: Any) -> bool:
    return "?" in text()
