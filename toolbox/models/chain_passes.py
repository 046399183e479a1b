"""How a causal language model runs chains and their continuations: the passes behind ``chains.score_chains``.

The keys and values of a chain are kept in buffers with room behind it. The rows of a tree are written into that room
and forgotten by setting the length back. Continuations that run as lines of a batch (the prefix method) share what is
kept; only the layer at hand holds it once a line.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from toolbox.models.chain_plan import Batch
from toolbox.models.chains import Chain, ChainScores
from toolbox.models.chat import Encoded
from toolbox.models.head import Head
from toolbox.models.score import score_rows
from toolbox.models.token_loss import TokenLoss
from toolbox.models.tree import Chunk, Forest, cut_chunks, grow, row_limit, visible
from toolbox.shell.errors import TryAgain, UsageProblem

_LOGIT_NUMBERS = 1 << 24
"""Logits that exist at once."""


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, (chains, heads, columns, width): views of buffers with room behind them.

    Fed more lines than it holds chains, it lends each line what it holds of the one chain and keeps nothing of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.room = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers is not None and len(key_states) > len(self.keys):
            held = (self.keys.expand(len(key_states), -1, -1, -1), self.values.expand(len(key_states), -1, -1, -1))
            return torch.cat([held[0], key_states], dim=2), torch.cat([held[1], value_states], dim=2)
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.buffers is None or end > self.buffers[0].shape[2]:
            self.buffers = (_moved(self.keys, max(end, self.room)), _moved(self.values, max(end, self.room)))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def keep(self, columns: int) -> None:
        """Forget what is behind the first ``columns``."""
        self.keys, self.values = self.keys[:, :, :columns], self.values[:, :, :columns]

    def spread(self, chains: int) -> _RoomyLayer:
        """A layer that begins with the same keys and values for each of so many chains; this one has one."""
        layer = _RoomyLayer()
        layer.room = self.room
        layer.update(self.keys.expand(chains, -1, -1, -1), self.values.expand(chains, -1, -1, -1))
        return layer


def _moved(states: Tensor, columns: int) -> Tensor:
    """``states`` at the beginning of a buffer of so many columns."""
    chains, heads, held, width = states.shape
    buffer = states.new_empty(chains, heads, max(columns, held), width)
    buffer[:, :, :held] = states
    return buffer


class ChainCache(DynamicCache):
    """The cache of a model's attention layers, with room for ``columns`` tokens (more is made when needed)."""

    def __init__(self, config: Any, columns: int) -> None:
        super().__init__(config=config)
        # Sliding layers too keep everything: what a token may see is a matter of the mask.
        self.layers = [_RoomyLayer() if isinstance(layer, DynamicLayer) else layer for layer in self.layers]
        self.reserve(columns)

    def _roomy(self) -> Iterator[_RoomyLayer]:
        return (layer for layer in self.layers if isinstance(layer, _RoomyLayer))

    def reserve(self, columns: int) -> None:
        """Make the next buffers so large."""
        for layer in self._roomy():
            layer.room = columns

    def keep(self, columns: int) -> None:
        """Forget what is behind the first ``columns`` tokens."""
        for layer in self._roomy():
            layer.keep(columns)

    def spread(self, config: Any, chains: int) -> ChainCache:
        """The same beginning for each of so many chains."""
        cache = ChainCache(config, 0)
        cache.layers = [layer.spread(chains) if isinstance(layer, _RoomyLayer) else layer for layer in self.layers]
        return cache


@dataclass(frozen=True)
class _Context:
    """A context that several chains begin with, run once: its keys and values, the last hidden state (1, 1, d), and
    ln p of its tokens (q,)."""

    ids: tuple[int, ...]
    cache: ChainCache
    last: Tensor
    logprob: np.ndarray


class Passes:
    """A model ready to run batches of chains. ``model`` is a transformers causal language model, or a peft model.

    Raises: UsageProblem for a model whose logits cannot be had position by position, and for an encoder-decoder, which
    gives a text's own tokens no probability.
    """

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config
        if getattr(self.config, "is_encoder_decoder", False):
            name = type(self.model).__name__
            raise UsageProblem(f"{name} is an encoder-decoder", "chains are scored by a causal language model")
        self._token_loss = TokenLoss(model)
        self._batch_tokens = batch_tokens
        self.accepts = frozenset(inspect.signature(self.model.base_model.forward).parameters)
        self._context: _Context | None = None
        self.tokens = 0
        """Tokens fed so far by ``run``, padding not counted."""

    @property
    def device(self) -> torch.device:
        return self.model.get_output_embeddings().weight.device

    @property
    def dtype(self) -> str:
        return str(self.model.get_output_embeddings().weight.dtype).removeprefix("torch.")

    def run(self, batch: Batch, chains: Sequence[Chain]) -> list[ChainScores]:
        """Score the chains of a batch."""
        with self.evaluating():
            if batch.method == "naive":
                return [self._naive(chain) for chain in chains]
            forests = [grow(chain.branches(), merge=batch.method == "tree") for chain in chains]
            columns = max(len(chain.ids) for chain in chains)
            limit = row_limit(columns, len(chains), self._batch_tokens)
            room = columns + min(limit, max(forest.rows for forest in forests))
            cache, own, slots = self._chains(chains, forests, batch.context, room)
            if batch.method == "tree":
                self._branches(cache, forests, columns, limit, slots)
            else:
                self._lines(cache, forests[0], slots[0])
            return [
                ChainScores.of(chain, mine, self._values(chain, mine, found), batch.method)
                for chain, mine, found in zip(chains, own, slots, strict=True)
            ]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and dropout; a model in training goes back to training."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        except torch.OutOfMemoryError as error:
            raise TryAgain("out of memory while scoring", "try a smaller --batch-tokens") from error
        finally:
            self.model.train(training)

    # -- the passes -----------------------------------------------------------------------------------------------
    def forward(self, ids: Tensor, positions: Tensor, cache: ChainCache, mask: Tensor | None = None) -> Tensor:
        """Hidden states (chains, n, d) of tokens (chains, n) behind what the cache holds, which takes them up.

        ``mask`` bool (chains, n, all columns) says what each sees; without one all that is before it.
        """
        optional: dict[str, Tensor] = {"position_ids": positions}
        if mask is not None:
            optional["attention_mask"] = self._mask(mask[:, None])
        given = {name: value for name, value in optional.items() if name in self.accepts}
        return self.model.base_model(
            input_ids=ids, past_key_values=cache, use_cache=True, **given
        ).last_hidden_state  # fmt: skip

    def _mask(self, mask: Tensor) -> Tensor:
        if getattr(self.config, "_attn_implementation", None) == "sdpa":
            return mask
        dtype = self.model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def _chains(
        self, chains: Sequence[Chain], forests: Sequence[Forest], first: int, room: int
    ) -> tuple[ChainCache, list[np.ndarray], list[np.ndarray]]:
        """Run the chains, of which the first ``first`` tokens are one context run before; padded on the right.

        Returns the cache, each chain's own ln p, and an array of the ln p of its slots, of which those read at the
        chain are filled in.
        """
        columns = max(len(chain.ids) for chain in chains)
        context = self._run_context(chains[0].ids[:first]) if first else None
        if context is None:
            cache = ChainCache(self.config, room)
        else:
            context.cache.keep(first)
            context.cache.reserve(room)
            cache = context.cache if len(chains) == 1 else context.cache.spread(self.config, len(chains))
        parts = [] if context is None else [context.last.expand(len(chains), -1, -1)]
        if columns > first:
            ids = [[*chain.ids[first:], *[0] * (columns - len(chain.ids))] for chain in chains]
            positions = torch.arange(first, columns, device=self.device).expand(len(chains), -1)
            parts.append(self.forward(torch.tensor(ids, device=self.device), positions, cache))
            self.tokens += sum(len(chain.ids) - first for chain in chains)
        hidden = torch.cat(parts, dim=1)
        # The first hidden state is that of token first - 1 behind a context, else that of token 0.
        begin, known = max(1, first), max(0, first - 1)
        where, labels = [], []
        for number, (chain, forest) in enumerate(zip(chains, forests, strict=True)):
            places = np.concatenate([np.arange(begin - 1, len(chain.ids) - 1), forest.first_place])
            where.append(places - known + number * hidden.shape[1])
            labels.append(np.concatenate([np.array(chain.ids[begin:], dtype=np.int64), forest.first_label]))
        values = self.read(hidden.flatten(0, 1), np.concatenate(where), np.concatenate(labels))
        before = np.array([np.nan]) if context is None else context.logprob
        own, slots = [], []
        for chain, forest, found in zip(
            chains, forests, np.split(values, np.cumsum([len(one) for one in where])[:-1]), strict=True
        ):
            own.append(np.concatenate([before, found[: len(chain.ids) - begin]]))
            slots.append(np.full(forest.slots, np.nan))
            slots[-1][forest.first_slot] = found[len(chain.ids) - begin :]
        return cache, own, slots

    def _run_context(self, ids: tuple[int, ...]) -> _Context:
        """A shared context, run once as long as the batches that share it follow one another."""
        if self._context is None or self._context.ids != ids:
            self._context = None  # frees the other one's cache before this one's is made
            cache = ChainCache(self.config, 0)
            tokens = torch.tensor([ids], device=self.device)
            hidden = self.forward(tokens, torch.arange(len(ids), device=self.device)[None], cache)
            self.tokens += len(ids)
            own = self.read(hidden[0], np.arange(len(ids) - 1), np.array(ids[1:], dtype=np.int64))
            self._context = _Context(ids, cache, hidden[:, -1:].clone(), np.concatenate([[np.nan], own]))
        return self._context

    def _branches(
        self, cache: ChainCache, forests: Sequence[Forest], columns: int, limit: int, slots: Sequence[np.ndarray]
    ) -> None:
        """Run all rows of the forests behind their chains, chunk by chunk, and fill in the slots read at them."""
        for chunks in zip_longest(*(cut_chunks(forest, columns, limit) for forest in forests)):
            packed = pack(forests, chunks)
            tokens, positions, at, row, other, end = (torch.from_numpy(part).to(self.device) for part in packed)
            cache.keep(columns + other.shape[1] - row.shape[1])
            hidden = self.forward(tokens, positions, cache, visible(columns, at, row, other, end))
            self._read_rows(hidden, forests, chunks, slots)
        cache.keep(columns)

    def _lines(self, cache: ChainCache, forest: Forest, slots: np.ndarray) -> None:
        """Run the trees of a forest without branches, lines, behind the beginning of the chain that they continue.

        Those of one cut together, as long as they and what they share would fit a batch; the last cut first, because a
        single line overwrites what is behind its cut.
        """
        trees = [*zip(forest.trees[:-1].tolist(), forest.trees[1:].tolist(), strict=True)]
        while trees:
            at = int(forest.at[trees[-1][0]])
            lines = [trees.pop()]
            longest = lines[0][1] - lines[0][0]
            while trees and int(forest.at[trees[-1][0]]) == at:
                longest = max(longest, trees[-1][1] - trees[-1][0])
                if (len(lines) + 1) * (at + longest) > self._batch_tokens:
                    break
                lines.append(trees.pop())
            self._run_lines(cache, at, lines, forest, slots)

    def _run_lines(
        self, cache: ChainCache, at: int, lines: Sequence[tuple[int, int]], forest: Forest, slots: np.ndarray
    ) -> None:
        """Run the rows ``start`` ... ``stop`` − 1 of each of ``lines`` behind the chain's first ``at`` tokens."""
        longest = max(stop - start for start, stop in lines)
        ids = np.zeros((len(lines), longest), dtype=np.int64)
        for line, (start, stop) in enumerate(lines):
            ids[line, : stop - start] = forest.tokens[start:stop]
        cache.keep(at)
        positions = torch.arange(at, at + longest, device=self.device).expand(len(lines), -1)
        hidden = self.forward(torch.from_numpy(ids).to(self.device), positions, cache)
        # Without branches one token is read at every row.
        rows = np.concatenate([np.arange(start, stop) for start, stop in lines])
        where = [line * longest + np.arange(stop - start) for line, (start, stop) in enumerate(lines)]
        self.tokens += len(rows)
        slots[forest.later_slot[rows]] = self.read(
            hidden.flatten(0, 1), np.concatenate(where), forest.later_label[rows]
        )

    def _read_rows(
        self, hidden: Tensor, forests: Sequence[Forest], chunks: Sequence[Chunk | None], slots: Sequence[np.ndarray]
    ) -> None:
        """Fill in the slots that are read at the rows just run."""
        for number, (forest, chunk, filled) in enumerate(zip(forests, chunks, slots, strict=True)):
            if chunk is None:
                continue
            self.tokens += chunk.stop - chunk.start
            reads = np.nonzero((forest.later_row >= chunk.start) & (forest.later_row < chunk.stop))[0]
            where = forest.later_row[reads] - chunk.start
            filled[forest.later_slot[reads]] = self.read(hidden[number], where, forest.later_label[reads])

    def read(self, hidden: Tensor, where: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """ln p (n,) float64 of ``labels`` (n,) under the logits at ``where`` (n,) in ``hidden`` (places, d); logits are
        made once a place, and for places that are read alone."""
        head = Head.of(self.model)
        places, line = np.unique(where, return_inverse=True)
        order = np.argsort(line, kind="stable")
        values = np.empty(len(where))
        chunk = max(1, _LOGIT_NUMBERS // head.weight.shape[0])
        for start in range(0, len(places), chunk):
            logits = head.logits(hidden[torch.from_numpy(places[start : start + chunk]).to(hidden.device)])
            reads = order[slice(*np.searchsorted(line[order], [start, start + chunk]))]
            here, ids = (torch.from_numpy(part).to(hidden.device) for part in (line[reads] - start, labels[reads]))
            values[reads] = (logits[here, ids] - logits.logsumexp(dim=-1)[here]).cpu().numpy()
        return values

    # -- putting together -------------------------------------------------------------------------------------------
    def _values(self, chain: Chain, own: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
        """ln p of each continuation's tokens."""
        asked = chain.asked()
        apart = iter(self._score([_row(one.ids, one.start) for one in asked if one.at == 0]))
        edges = np.cumsum([len(one.ids) for one in asked if one.at])[:-1]
        found = iter(np.split(slots, edges))
        values = []
        for one in asked:
            if one.at == 0:
                values.append(next(apart))
            else:
                values.append(np.concatenate([own[one.start : one.at], next(found)[max(0, one.start - one.at) :]]))
        return values

    def _naive(self, chain: Chain) -> ChainScores:
        """Every continuation in a forward pass of its own, the chain's own tokens in another one."""
        rows = [_row(chain.ids, 1), *(_row(chain.whole(one), one.start) for one in chain.asked())]
        own, *values = self._score(rows)
        return ChainScores.of(chain, np.concatenate([[np.nan], own]), values, "naive")

    def _score(self, rows: Sequence[Encoded]) -> list[np.ndarray]:
        """ln p of the labelled tokens of each row; on a CPU row by row, elsewhere rows of like length together."""
        together = 1 if self.device.type == "cpu" else self._batch_tokens
        self.tokens += sum(len(row.ids) for row in rows)
        found = score_rows(self._token_loss, rows, device=self.device, max_tokens=together)
        return [-one.nll.astype(np.float64) for one in found]


def _row(ids: Sequence[int], start: int) -> Encoded:
    """A row whose tokens from ``start`` on are scored."""
    labelled = (False,) * start + (True,) * (len(ids) - start)
    return Encoded(tuple(ids), labelled, (False,) * len(ids))


def pack(forests: Sequence[Forest], chunks: Sequence[Chunk | None]) -> tuple[np.ndarray, ...]:
    """A chunk of each chain's rows side by side, (chains, R) or, with rows still cached, (chains, C): the arguments
    ``tokens``, ``positions``, ``at``, ``row``, ``other``, ``end`` of a forward pass and its mask (`tree.visible`).

    Chains with fewer rows are filled up with rows that see themselves alone, at position 0.
    """
    rows = max(chunk.stop - chunk.start for chunk in chunks if chunk is not None)
    kept = max(chunk.start - chunk.base for chunk in chunks if chunk is not None)
    tokens, positions, at = (np.zeros((len(forests), rows), dtype=np.int64) for _ in range(3))
    row = np.empty((len(forests), rows), dtype=np.int64)
    other, end = (np.empty((len(forests), kept + rows), dtype=np.int64) for _ in range(2))
    for number, (forest, chunk) in enumerate(zip(forests, chunks, strict=True)):
        base, start, stop = (chunk.base, chunk.start, chunk.stop) if chunk is not None else (0, 0, 0)
        row[number] = np.arange(start, start + rows)
        other[number] = np.arange(base, base + kept + rows)
        end[number] = other[number] + 1
        end[number, : stop - base] = forest.end[base:stop]
        for target, source in ((tokens, forest.tokens), (positions, forest.positions), (at, forest.at)):
            target[number, : stop - start] = source[start:stop]
    return tokens, positions, at, row, other, end
