"""Log-probabilities of continuations asked at several places of one token sequence (a *chain*).

A chain is the tokens of a context and of what follows it piece by piece; a cut is the end of the context or of a
piece; at each cut some continuations are asked: how probable is each of these answers here? A question with several
answers is a chain with one cut. ``chain_text`` makes chains of texts, ``score_chains`` has a model score them.

Importing this module costs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from toolbox.models.chain_plan import Batch, Method, Plan, plan_chains
from toolbox.models.facts import context_window
from toolbox.models.tree import Branch
from toolbox.shell.errors import ToolboxError, UsageProblem

if TYPE_CHECKING:
    from toolbox.models.chain_passes import Passes

BATCH_TOKENS = 4096
"""Tokens fed at once, but for a single chain that is longer."""


class NotFinite(ToolboxError):
    """A log-probability of chain number ``chain`` is no number: at its cut number ``cut`` (from 0), or, where that is
    None, among its own tokens."""

    exit_code = 1

    def __init__(self, chain: int, cut: int | None, dtype: str) -> None:
        where = "its own tokens" if cut is None else f"cut {cut}"
        super().__init__(
            f"chain {chain}, {where}: the model's log-probabilities in {dtype} are not numbers",
            "its weights may be damaged, or too large for --dtype",
        )
        self.chain, self.cut, self.dtype = chain, cut, dtype


@dataclass(frozen=True, slots=True)
class Asked:
    """A continuation at its cut: the whole is the chain's first ``at`` tokens, then ``ids``; the whole's tokens from
    ``start`` on are the continuation's. As a rule ``at`` and ``start`` are where the cut is."""

    at: int
    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Chain:
    """Token ids (N,), cuts 1 ≤ n_0 ≤ ... ≤ n_T = N, and for each cut the continuations asked there.

    A continuation is its token ids; or an ``Asked``, where text and continuation share a token or where the text before
    it is spelt otherwise than in the chain.

    Raises: ValueError for numbers that do not fit together.
    """

    ids: tuple[int, ...]
    cuts: tuple[int, ...]
    continuations: tuple[tuple[tuple[int, ...] | Asked, ...], ...]

    def __post_init__(self) -> None:
        if len(self.continuations) != len(self.cuts):
            raise ValueError(f"{len(self.cuts)} cuts and continuations at {len(self.continuations)}")
        if not self.cuts or self.cuts[0] < 1 or self.cuts[-1] != len(self.ids) or list(self.cuts) != sorted(self.cuts):
            raise ValueError(f"cuts must ascend from 1 or more to the chain's {len(self.ids)} tokens, not {self.cuts}")
        for one in self.asked():
            if not one.ids or not 1 <= one.start < one.at + len(one.ids) or not 0 <= one.at <= len(self.ids):
                raise ValueError(f"a continuation needs a token, and one before it: {one}")

    def asked(self) -> list[Asked]:
        """All continuations, cut by cut."""
        return [
            one if isinstance(one, Asked) else Asked(cut, one, cut)
            for cut, here in zip(self.cuts, self.continuations, strict=True)
            for one in here
        ]

    def branches(self) -> list[Branch]:
        """The continuations as branches of the chain, cut by cut; without those that share no token with it."""
        return [Branch(one.at, one.ids) for one in self.asked() if one.at]

    def whole(self, one: Asked) -> tuple[int, ...]:
        """The chain up to a continuation, and the continuation."""
        return self.ids[: one.at] + one.ids

    @property
    def longest(self) -> int:
        """Tokens of the chain, or of its longest piece with a continuation behind it."""
        return max(len(self.ids), *(one.at + len(one.ids) for one in self.asked()), 0)

    @property
    def respelt(self) -> int:
        """How many continuations are not simply tokens behind the tokens of their cut."""
        return sum(isinstance(one, Asked) for here in self.continuations for one in here)


@dataclass(frozen=True, slots=True, eq=False)
class ChainScores:
    """What a model says of a chain, in nats; sums are float64 over fp32 (or float64) log-softmax values.

    One array a cut, in the order asked: ``logprob`` (k,) float64 ln p of each continuation given the chain up to the
    cut, ``n_tokens`` (k,) int64 its tokens. ``chain_logprob`` (N,) float64: ln p of each of the chain's tokens given
    those before it; NaN for the first, which nothing predicts.
    """

    logprob: tuple[np.ndarray, ...]
    n_tokens: tuple[np.ndarray, ...]
    chain_logprob: np.ndarray
    method: Method

    @staticmethod
    def of(chain: Chain, own: np.ndarray, continuations: Sequence[np.ndarray], method: Method) -> ChainScores:
        """Put together from ``own``, the ``chain_logprob``, and ln p of the tokens of each of ``chain.asked()``."""
        edges = np.cumsum([len(here) for here in chain.continuations])[:-1]
        logprob = np.array([math.fsum(values.tolist()) for values in continuations], dtype=np.float64)
        n_tokens = np.array([len(values) for values in continuations], dtype=np.int64)
        return ChainScores(tuple(np.split(logprob, edges)), tuple(np.split(n_tokens, edges)), own, method)

    def between(self, start: int, stop: int) -> tuple[float, int]:
        """ln p of the chain's tokens ``start`` ... ``stop`` − 1 given what is before them, and their number; the first
        token of all does not count."""
        part = self.chain_logprob[max(1, start) : stop]
        return math.fsum(part.tolist()), len(part)


# -- scoring --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those that share the work, each of which has the whole model and all chains.

    ``gather`` takes each one's bytes and gives all of them to each.
    """

    rank: int
    ranks: int
    gather: Callable[[bytes], list[bytes]]


def score_chains(
    model: Any,
    chains: Sequence[Chain],
    method: Method = "tree",
    *,
    batch_tokens: int = BATCH_TOKENS,
    batch_chains: int | None = None,
    processes: Processes | None = None,
) -> Scoring:
    """Score chains with a transformers causal language model (or a peft model around one), on the device it is on.

    ========= ==========================================================================================
    method
    ========= ==========================================================================================
    tree      the chain once, then the tokens of all continuations side by side under a mask (``tree``)
    prefix    the chain once, then the continuations of one cut after another on its keys and values
    naive     a forward pass of its own for every continuation
    ========= ==========================================================================================

    All give the same numbers. A model that cannot take the tree is scored by what it can take; ``Scoring.notes`` says
    why. ``batch_chains`` chains at most run together: by default one on a CPU, 32 elsewhere.

    Nothing is scored yet when this returns. Raises: BadData for a chain too long for the model's window; UsageProblem
    for a model whose logits cannot be had, or an encoder-decoder.
    """
    from toolbox.models.chain_passes import Passes
    from toolbox.models.chain_route import find_route

    if batch_tokens < 1 or (batch_chains is not None and batch_chains < 1):
        raise UsageProblem("a batch needs room for at least one chain and one token")
    passes = Passes(model, batch_tokens)
    route = find_route(passes, method)
    most = batch_chains or (1 if passes.device.type == "cpu" else 32)
    window = context_window(passes.config)
    plan = plan_chains(chains, route, batch_tokens=batch_tokens, batch_chains=most, window=window)
    return Scoring(chains, plan, passes, processes)


class Scoring:
    """Chains about to be scored. Iterating gives a ``ChainScores`` a chain, in order, on every process.

    ``plan`` says what it costs. Results are the same for any number of processes, and whatever ``batches`` leaves out.
    """

    def __init__(self, chains: Sequence[Chain], plan: Plan, passes: Passes, processes: Processes | None) -> None:
        self.chains, self.plan = chains, plan
        self._passes, self._processes = passes, processes

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know before: one line each."""
        return self.plan.notes

    @property
    def fed(self) -> int:
        """Tokens fed to the model so far by this process, padding not counted."""
        return self._passes.tokens

    @property
    def mine(self) -> list[Batch]:
        """The batches of this process."""
        if self._processes is None:
            return list(self.plan.batches)
        return self.plan.share(self._processes.rank, self._processes.ranks)

    def batches(self, done: Container[int] = ()) -> Iterator[dict[int, ChainScores]]:
        """This process's results by chain number, batch by batch as they are ready, without the batches of which all
        chains are ``done``.

        Raises: NotFinite; TryAgain when memory runs out.
        """
        for batch in self.mine:
            if all(number in done for number in batch.chains):
                continue
            results = self._passes.run(batch, [self.chains[number] for number in batch.chains])
            found = dict(zip(batch.chains, results, strict=True))
            for number, scores in found.items():
                _check(number, scores, self._passes.dtype)
            yield found

    def __iter__(self) -> Iterator[ChainScores]:
        ready: dict[int, ChainScores] = {}
        following = 0
        for found in self._gathered():
            ready.update(found)
            while following in ready:
                yield ready.pop(following)
                following += 1

    def _gathered(self) -> Iterator[dict[int, ChainScores]]:
        if self._processes is None or self._processes.ranks == 1:
            yield from self.batches()
            return
        mine = {number: scores for found in self.batches() for number, scores in found.items()}
        for part in self._processes.gather(pack_scores(mine)):
            yield unpack_scores(part)


def _check(number: int, scores: ChainScores, dtype: str) -> None:
    for cut, values in enumerate(scores.logprob):
        if not np.isfinite(values).all():
            raise NotFinite(number, cut, dtype)
    if not np.isfinite(scores.chain_logprob[1:]).all():
        raise NotFinite(number, None, dtype)


class _Packed(msgspec.Struct, array_like=True):
    logprob: list[list[float]]
    n_tokens: list[list[int]]
    chain_logprob: list[float]
    method: Method


def pack_scores(scores: Mapping[int, ChainScores]) -> bytes:
    """Scores by chain number as bytes (msgpack), exactly."""
    packed = {
        number: _Packed(
            [values.tolist() for values in one.logprob],
            [values.tolist() for values in one.n_tokens],
            one.chain_logprob.tolist(),
            one.method,
        )
        for number, one in scores.items()
    }
    return msgspec.msgpack.encode(packed)


def unpack_scores(data: bytes) -> dict[int, ChainScores]:
    """What ``pack_scores`` made bytes of."""
    return {
        number: ChainScores(
            tuple(np.array(values, dtype=np.float64) for values in one.logprob),
            tuple(np.array(values, dtype=np.int64) for values in one.n_tokens),
            np.array(one.chain_logprob, dtype=np.float64),
            one.method,
        )
        for number, one in msgspec.msgpack.decode(data, type=dict[int, _Packed]).items()
    }
