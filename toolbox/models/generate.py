"""Completions of prompts: the interface every backend keeps, and the ``local`` backend on transformers models.

The other backends are ``endpoint`` (any OpenAI-compatible server) and ``replay`` (stored responses).

The local backend decodes by itself, one token a step for a batch of left-padded rows:

- attention masks and position ids are explicit, so that padding changes nothing;
- the prompt is run once, for the last position's logits only, and rows with the same prompt share that run; prompts
  that begin alike (a task and its examples) may share the run of that beginning;
- a row leaves the batch in the step in which it ends, so that finished rows cost nothing;
- the sampling noise of a token depends on (seed, request key, position, token id) alone, so that neither the batch
  nor the order of the rows nor the number of processes shows in the samples.

In float32, greedy and sampled completions are the same for every batch size up to ties within the rounding of a
matrix product. In bfloat16 the logits can differ in the last bit with the shape of the batch, and near-ties may flip.

Importing this module costs no torch: backends that need none share the interface.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from toolbox.models.cache import new_cache, takes_gaps
from toolbox.models.facts import context_window
from toolbox.models.sampling import choose_tokens
from toolbox.shell.errors import BadData, TryAgain, UsageProblem

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


FinishReason = Literal["stop", "length", "error"]
Content = str | Sequence[Mapping[str, Any]]
"""What is to be completed: plain text, or turns with ``role`` and ``content``: a text, or, for an endpoint that sees,
a list of OpenAI's parts."""


def path_id(id: str, variant: str | None, sample: int) -> str:
    """The name of one completion: id/sample, or id/variant/sample."""
    return f"{id}/{sample}" if variant is None else f"{id}/{variant}/{sample}"


StopRule = Callable[[int, Callable[[], str]], bool]
"""Whether a row has had enough: given how many tokens it has and, if it asks, the text they make."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids. ``key`` names the path (`path_id`): the sampling noise is a function of it.

    ``rule`` may end this row before its limit; it is asked once a token, in order, and may keep a state of its own.
    """

    key: str
    prompt_ids: tuple[int, ...]
    rule: StopRule | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A prompt as its row has it, for backends without a tokenizer: sample ``sample`` of the row ``id``/``variant``."""

    id: str
    variant: str | None
    sample: int
    content: Content

    @property
    def key(self) -> str:
        return path_id(self.id, self.variant, self.sample)


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to choose tokens and when to end.

    ``temperature`` 0 is greedy (ties go to the lowest id). Otherwise the logits are divided by it, then cut to the
    nucleus of mass ``top_p``, then sampled. ``stop`` strings end a row where the first of them begins. ``json_schema``
    (its text) is asked of an endpoint, which may refuse it; a local model has no use for it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False
    json_schema: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UsageProblem(f"the number of new tokens must not be negative, and {self.max_new_tokens} is")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageProblem(f"the temperature must be 0 or more, not {self.temperature}", "0 decodes greedily")
        if not 0 < self.top_p <= 1:
            raise UsageProblem(f"top-p must lie in (0, 1], not {self.top_p}", "1 samples from all tokens")
        if "" in self.stop:
            raise UsageProblem("a stop string is empty", "an empty string would end every completion at once")


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model wrote after a prompt; the prompt itself is not part of it.

    ``text`` is the decoded tokens as they are: no space is stripped, and control tokens other than the end token
    stay visible (``<|im_start|>`` in the middle of an answer is worth seeing). The end token and the stop string with
    all that follows it are not part of it. A character cut off by the length limit appears as U+FFFD.

    ``finish_reason`` is "stop" for an end token or a stop string, "length" for the limit (the one asked for, a rule of
    the row, or the model's window), "error" where a server withheld the text. ``n_completion_tokens`` counts every
    generated token: the end token and those the stop string cut off too. ``logprobs`` has one entry for each of these:
    ln p of the token under the model's own distribution, before temperature and top-p; None if not asked for. Token
    counts are None where a server does not tell them; ``model`` is the name that a stored response bears.
    """

    text: str
    finish_reason: FinishReason
    n_prompt_tokens: int | None
    n_completion_tokens: int | None
    logprobs: tuple[float, ...] | None
    model: str | None = None


R_contra = TypeVar("R_contra", contravariant=True)


class Backend(Protocol[R_contra]):
    """Anything that completes prompts: ``LocalBackend`` takes ``Request``s, the others ``TextRequest``s."""

    def complete(self, requests: Sequence[R_contra], decoding: Decoding) -> list[Completion]:
        """One completion a request, in the order of the requests."""
        ...


_SHARED = 32
"""Tokens that all prompts of a batch must begin with for that beginning to be run apart, once for all of them."""


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, the last of the shortest left out."""
    first, last = min(prompts), max(prompts)  # whatever these two share, those between them share
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)


def plan_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Cut rows into batches: sorted by length (stable), then at most ``batch_size`` rows to a batch.

    ``lengths`` are the tokens a row may come to hold, prompt and new ones. ``batch_tokens`` bounds rows x longest row
    of a batch; a row that is longer on its own gets a batch of its own. Returns the rows' indices. Planning one of
    the returned batches again leaves it whole, so batches may be planned first and shared among processes then.
    """
    if batch_size < 1:
        raise UsageProblem(f"a batch needs at least one row, not {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageProblem(f"a batch needs room for at least one token, not {batch_tokens}")
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        rows = len(batches[-1]) + 1 if batches else math.inf
        if rows > batch_size or (batch_tokens is not None and rows * lengths[row] > batch_tokens):
            batches.append([])
        batches[-1].append(row)
    return batches


class _Text:
    """The text of one row's tokens, and whether a stop string has appeared in it.

    Tokens are decoded behind the prompt's last few, because some tokenizers drop the space in front of the first
    token they are given. The search decodes only the tokens a stop string can reach back to, from a place where the
    text was last known to hold whole characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._context = list(prompt_ids[-4:])
        self._before = self._decode(self._context)
        if self._before.endswith("\ufffd"):  # the prompt ends inside a character: what follows stands alone
            self._context, self._before = [], ""
        self._reach = max((len(text.encode("utf-8", "surrogatepass")) for text in stop), default=0) + 1
        self._whole = [0]  # counts of tokens after which no character was unfinished

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def full(self, ids: list[int]) -> str:
        """The text of all generated tokens."""
        text = self._decode(self._context + ids)
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(ids)

    def cut(self, text: str) -> int | None:
        """Where the first stop string begins in ``text``; None if there is none."""
        found = [text.find(stop) for stop in self._stop]
        return min((at for at in found if at >= 0), default=None)

    def stopped(self, ids: list[int]) -> bool:
        """Whether the last token completed a stop string; to be called once a token."""
        if not self._stop:
            return False
        # a token is at least one byte, so a stop string that ends here began within `reach` tokens
        while len(self._whole) > 1 and self._whole[1] <= len(ids) - self._reach:
            self._whole.pop(0)
        tail = self._decode(ids[self._whole[0] :]) if self._whole[0] else self.full(ids)
        if not tail.endswith("\ufffd"):
            self._whole.append(len(ids))
        return self.cut(tail) is not None and self.cut(self.full(ids)) is not None


class _Row:
    """One request while it is being completed."""

    def __init__(self, request: Request, limit: int, text: _Text) -> None:
        self.request, self.limit, self.text = request, limit, text
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.ended = False  # by an end token

    def accept(self, token: int, end_ids: Collection[int]) -> bool:
        """Take the next token; whether another one is wanted."""
        self.ids.append(token)
        self.ended = token in end_ids
        return not (self.ended or self.text.stopped(self.ids) or len(self.ids) >= self.limit or self._enough())

    def _enough(self) -> bool:
        rule = self.request.rule
        return rule is not None and rule(len(self.ids), lambda: self.text.full(self.ids))

    def completion(self, logprobs: bool) -> Completion:
        text = self.text.full(self.ids[:-1] if self.ended else self.ids)
        cut = self.text.cut(text)
        return Completion(
            text=text[:cut],
            finish_reason="stop" if self.ended or cut is not None else "length",
            n_prompt_tokens=len(self.request.prompt_ids),
            n_completion_tokens=len(self.ids),
            logprobs=tuple(self.logprobs) if logprobs else None,
        )


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients and dropout; a model in training goes back to training. Out of memory names the remedy."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise TryAgain("out of memory while generating", "try a smaller --batch-size or --batch-tokens") from error
    finally:
        model.train(training)


class LocalBackend:
    """Completes prompts with a causal language model of transformers, on the device the model is on.

    ``end_ids`` are the tokens that end a completion. ``batch_size`` and ``batch_tokens`` bound a batch
    (`plan_batches`, with prompt + ``max_new_tokens`` as the length of a row). ``share_beginnings`` runs what all
    prompts of a batch begin with apart, once for all; a prompt is then run in two passes, so not where something hooked
    into the model has to see it whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Collection[int],
        batch_size: int = 8,
        batch_tokens: int | None = None,
        share_beginnings: bool = False,
    ) -> None:
        plan_batches([], batch_size, batch_tokens)  # refuses impossible sizes before any work
        self._model, self._tokenizer, self._end_ids = model, tokenizer, frozenset(end_ids)
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._share = share_beginnings
        self._kept: tuple[tuple[int, ...], Any] = ((), None)
        # an adapter's wrapper takes **kwargs: the model inside says what they may be
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepts = frozenset(inspect.signature(inner.forward).parameters)
        if "past_key_values" not in self._accepts:
            raise UsageProblem(f"{type(inner).__name__} keeps no key-value cache", "choose another model to generate")
        self.window: int | None = context_window(model.config)

    def room(self, request: Request, decoding: Decoding) -> int:
        """How many new tokens ``request`` may get: as many as asked for, or as fit into the model's window.

        An empty prompt, or one that leaves no room at all, is BadData: it is never cut, and never silently left
        without an answer. Callers who know the file and the line of a row may ask here before they `complete`.
        """
        held, wanted = len(request.prompt_ids), decoding.max_new_tokens
        if held == 0:
            raise BadData("the prompt is empty", "a model needs at least one token to go on from")
        if self.window is None:
            return wanted
        if held + min(wanted, 1) > self.window:
            raise BadData(
                f"the prompt has {held} tokens, too many for the model's window of {self.window}",
                "prompt and completion share the window: shorten the prompt, or take a model with a longer window",
            )
        return min(wanted, self.window - held)

    def complete(self, requests: Sequence[Request], decoding: Decoding) -> list[Completion]:
        """One completion a request, in order; errors as in `room`. Equal requests get equal completions."""
        rows = [
            _Row(request, self.room(request, decoding), _Text(self._tokenizer, request.prompt_ids, decoding.stop))
            for request in requests
        ]
        lengths = [len(request.prompt_ids) + decoding.max_new_tokens for request in requests]
        with _evaluating(self._model):
            for batch in plan_batches(lengths, self._batch_size, self._batch_tokens):
                if decoding.max_new_tokens > 0:
                    self._generate([rows[index] for index in batch], decoding)
        return [row.completion(decoding.logprobs) for row in rows]

    def _generate(self, rows: list[_Row], decoding: Decoding) -> None:
        """Decode one batch until its last row has ended."""
        import torch

        room = max(row.limit for row in rows)
        logits, cache, mask, positions = self._prefill(rows, room)
        columns = mask.shape[1] - room
        for step in itertools.count():
            ids, logprobs = choose_tokens(logits, decoding, [row.request.key for row in rows], step)
            if logprobs is not None:
                for row, value in zip(rows, logprobs.tolist(), strict=True):
                    row.logprobs.append(value)
            keep = [n for n, token in enumerate(ids.tolist()) if rows[n].accept(token, self._end_ids)]
            if not keep:
                return
            if len(keep) < len(rows):
                rows = [rows[n] for n in keep]
                index = torch.tensor(keep, device=ids.device)
                cache.reorder_cache(index)  # unlike batch_select_indices, recurrent layers have it too
                ids, mask, positions = ids[index], mask[index], positions[index]
            positions = positions + 1
            logits = self._forward(ids[:, None], mask[:, : columns + step + 1], positions, cache)

    def _prefill(self, rows: list[_Row], room: int) -> tuple[torch.Tensor, Cache, torch.Tensor, torch.Tensor]:
        """Run the prompts: logits [R, V], cache, mask [R, W + room] (new columns are 1), last positions [R, 1]."""
        import torch

        prompts = list(dict.fromkeys(row.request.prompt_ids for row in rows))
        shared, cache = self._beginning(prompts)
        longest = max(map(len, prompts)) - shared
        padded = [[0] * (longest - len(prompt) + shared) + list(prompt[shared:]) for prompt in prompts]
        gaps = [[0] * (longest - len(prompt) + shared) + [1] * (len(prompt) - shared + room) for prompt in prompts]
        ids = torch.tensor(padded, device=self._model.device)
        mask = torch.tensor([[1] * shared + gap for gap in gaps], device=self._model.device)
        columns = shared + longest
        positions = (mask[:, :columns].cumsum(-1) - 1).clamp_(min=0)[:, shared:]
        logits = self._forward(ids, mask[:, :columns], positions, cache)
        positions = positions[:, -1:]
        if len(prompts) < len(rows):  # several samples of one prompt
            place = {prompt: n for n, prompt in enumerate(prompts)}
            index = torch.tensor([place[row.request.prompt_ids] for row in rows], device=ids.device)
            cache.reorder_cache(index)
            logits, mask, positions = logits[index], mask[index], positions[index]
        return logits, cache, mask, positions

    def _beginning(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, Cache]:
        """How many tokens all prompts begin with that are run already, and a cache that holds them, a row a prompt.

        The last beginning is kept: the next batch as a rule has the same task and examples. Where it has not, what the
        two have in common is run and kept, so that a few batches find what all have.
        """
        import torch

        cache = new_cache(self._model.config)
        if not self._share or not takes_gaps(cache):
            return 0, cache
        head, held = self._kept
        together = _common([*prompts, (*head, -1)])
        if together < _SHARED:
            together = _common(prompts)
        if together < _SHARED:
            return 0, cache
        if head != prompts[0][:together]:
            head, held = prompts[0][:together], new_cache(self._model.config)
            ids = torch.tensor([head], device=self._model.device)
            self._forward(ids, torch.ones_like(ids), torch.arange(together, device=ids.device)[None], held)
            self._kept = head, held
        for layer, before in zip(cache.layers, held.layers, strict=True):
            layer.update(*(states.expand(len(prompts), -1, -1, -1) for states in (before.keys, before.values)))
        return len(head), cache

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits of the last column, float32 [R, V]; the cache takes up the tokens."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )
        return output.logits[:, -1].float()
