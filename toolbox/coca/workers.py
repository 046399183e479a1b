"""A model in this process, or in each of several: completes prompts and chooses among options, in batches.

Rank 0 knows what is to be done and gets the results; the others serve. Batches are cut before they are shared, so that
the number of processes does not show in the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from toolbox.models.choose import choice_chain, likeliest, mean_logprobs
from toolbox.models.device import find_device
from toolbox.models.generate import Completion, Decoding, FinishReason, LocalBackend, Request, StopRule, plan_batches
from toolbox.models.load import ModelSource, load_model, load_tokenizer, prepare
from toolbox.shell.errors import BadData
from toolbox.shell.progress import Reporter


class Prompt(msgspec.Struct):
    """One prompt: its path, its tokens, the options it chooses from, and the cap of its rule, if it has one."""

    key: str
    ids: list[int]
    options: list[str] = []
    cap: int | None = None


class _Work(msgspec.Struct):
    """A round: prompts that are decoded alike, which batches of them are run, and by which of the run's wrappings."""

    prompts: list[Prompt]
    batches: list[list[int]]
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int
    around: str = ""


class _Result(msgspec.Struct, array_like=True):
    place: int
    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int
    n_completion_tokens: int


class Workers:
    """``rule`` makes the stop rule of a row from its cap; ``around`` are contexts, by name, that a round may run in (an
    intervention hooked into the model)."""

    def __init__(
        self,
        source: ModelSource,
        reporter: Reporter,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = "auto",
        trust_remote_code: bool = False,
        rule: Callable[[int], StopRule] | None = None,
        share_beginnings: bool = False,
    ) -> None:
        import torch

        from toolbox.models.chat import Chat
        from toolbox.training.processes import start_processes

        self.accelerator = start_processes()
        place = self.accelerator.device if device == "auto" else find_device(device)
        if dtype == "auto":
            dtype = "bf16" if place.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
        self.dtype = dtype
        with self.accelerator.main_process_first():
            prepare(source, reporter.note)
        self.tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        self.model: Any = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code).to(place)  # type: ignore[arg-type]
        self.chat = Chat(self.tokenizer)
        self.batch_size = (32 if place.type == "cuda" else 16) if batch_size == "auto" else int(batch_size)
        self.backend = LocalBackend(
            self.model, self.tokenizer, end_ids=self.chat.end_ids, batch_size=self.batch_size,
            share_beginnings=share_beginnings,
        )  # fmt: skip
        self.rule = rule
        self.around: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {}

    @property
    def leader(self) -> bool:
        return self.accelerator.is_main_process

    # -- rank 0 -------------------------------------------------------------------------------------------------------
    def fits(self, prompt: Prompt, decoding: Decoding) -> None:
        """BadData for a prompt that leaves no room in the model's window."""
        room = Decoding(1) if prompt.options else decoding
        self.backend.room(Request(prompt.key, tuple(prompt.ids)), room)
        if prompt.options and self.backend.window is not None:
            longest = max(len(chain) for chain in self._spelt(prompt))
            if len(prompt.ids) + longest > self.backend.window:
                raise BadData(f"the prompt has {len(prompt.ids)} tokens, too many for the model's window")

    def _spelt(self, prompt: Prompt) -> list[tuple[int, ...]]:
        return [one.ids for one in choice_chain(self.tokenizer, prompt.ids, prompt.options).asked()]

    def run(
        self,
        prompts: Sequence[Prompt],
        decoding: Decoding,
        *,
        missing: Sequence[bool] | None = None,
        around: str = "",
    ) -> dict[int, Completion]:
        """Completions by place; of a prompt with options the text is the likeliest. Batches without a ``missing`` place
        are left out; the others are run whole, as an uninterrupted run has them."""
        lengths = [len(one.ids) + (16 if one.options else decoding.max_new_tokens) for one in prompts]
        batches = plan_batches(lengths, self.batch_size)
        wanted = [batch for batch in batches if missing is None or any(missing[place] for place in batch)]
        work = _Work(
            list(prompts), wanted, decoding.max_new_tokens, decoding.temperature, decoding.top_p, list(decoding.stop),
            decoding.seed, around,
        )  # fmt: skip
        if not wanted:
            return {}
        self._tell(work)
        return self._do(work)

    def dismiss(self) -> None:
        """Let the other ranks go: nothing more is to be done."""
        self._tell(None)

    def _tell(self, work: _Work | None) -> None:
        from toolbox.training.processes import broadcast_bytes

        if self.accelerator.num_processes > 1:
            broadcast_bytes(self.accelerator, msgspec.json.encode(work))

    # -- other ranks --------------------------------------------------------------------------------------------------
    def serve(self) -> None:
        """Do what rank 0 tells until it dismisses."""
        from toolbox.training.processes import broadcast_bytes

        while True:
            said = broadcast_bytes(self.accelerator, None)
            work = msgspec.json.decode(said, type=_Work | None)
            if work is None:
                return
            self._do(work)

    # -- every rank ---------------------------------------------------------------------------------------------------
    def _do(self, work: _Work) -> dict[int, Completion]:
        from toolbox.training.processes import gather_bytes

        mine: list[_Result] = []
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        wrapped = self.around[work.around]() if work.around else contextlib.nullcontext()
        with wrapped:
            for batch in work.batches[rank::ranks]:
                mine += self._batch(work, batch)
        parts = gather_bytes(self.accelerator, msgspec.json.encode(mine))
        found = [one for part in parts for one in msgspec.json.decode(part, type=list[_Result])]
        return {
            one.place: Completion(one.text, one.finish_reason, one.n_prompt_tokens, one.n_completion_tokens, None)
            for one in found
        }

    def _batch(self, work: _Work, batch: Sequence[int]) -> list[_Result]:
        prompts = [work.prompts[place] for place in batch]
        if prompts[0].options:
            return self._choose(batch, prompts)
        decoding = Decoding(work.max_new_tokens, work.temperature, work.top_p, tuple(work.stop), work.seed)
        requests = [Request(one.key, tuple(one.ids), self._rule(one)) for one in prompts]
        done = self.backend.complete(requests, decoding)
        return [
            _Result(place, one.text, one.finish_reason, one.n_prompt_tokens or 0, one.n_completion_tokens or 0)
            for place, one in zip(batch, done, strict=True)
        ]

    def _rule(self, prompt: Prompt) -> StopRule | None:
        if prompt.cap is None:
            return None
        assert self.rule is not None
        return self.rule(prompt.cap)

    def _choose(self, batch: Sequence[int], prompts: Sequence[Prompt]) -> list[_Result]:
        chains = [choice_chain(self.tokenizer, one.ids, one.options) for one in prompts]
        scores = mean_logprobs(self.model, chains)
        return [
            _Result(place, one.options[likeliest(values)], "stop", len(one.ids), 0)
            for place, one, values in zip(batch, prompts, scores, strict=True)
        ]
