"""Scoring paths with a model, in rounds that are journalled as they are done, by one process or several.

Batches are cut from the chains alone, so neither the number of processes nor what was finished before shows in a
result. Rank 0 keeps the journal; after every round all ranks agree to go on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from toolbox.landscape.data import Paths
from toolbox.landscape.features import Features, PathScores, QuestionScores, Scoring, assemble
from toolbox.landscape.journal import Journal, Scored
from toolbox.landscape.settings import Options, said_once
from toolbox.models.chain_plan import Batch
from toolbox.models.chains import Chain, ChainScores, NotFinite, Processes, score_chains
from toolbox.models.device import find_device
from toolbox.models.load import ModelSource, load_model, prepare
from toolbox.shell.command import Invocation
from toolbox.shell.errors import ToolboxError, TryAgain
from toolbox.shell.interrupts import Interrupts

if TYPE_CHECKING:
    from accelerate import Accelerator


class ScoreNotFinite(ToolboxError):
    """A log-probability that is no number."""

    exit_code = 1


@dataclass(frozen=True)
class Job:
    """What rank 0 gives to score: the ``chains``, those ``done`` before, the ``names`` of their paths.

    ``begin(device, dtype, processes)`` is called once these are known and gives the journal that goes on from ``done``.
    """

    chains: Sequence[Chain]
    done: Mapping[int, Scored]
    names: Sequence[str]
    begin: Callable[[str, str, int], Journal]


class _Work(msgspec.Struct):
    """What rank 0 tells the others."""

    chains: list[Chain]
    done: list[int]


class _Problem(msgspec.Struct, array_like=True):
    """Why a rank cannot go on. With a ``chain`` its numbers are not finite, at ``cut`` or among its own tokens."""

    code: int
    what: str
    advice: str | None = None
    chain: int | None = None
    cut: int | None = None


class _Part(msgspec.Struct, array_like=True):
    """What a rank brings to the end of a round."""

    found: dict[int, Scored]
    problem: _Problem | None
    stop: bool


def distil(chain: Chain, scores: ChainScores) -> Scored:
    """What is kept of a chain's scores. The tokens between two states, separator included, are the thought's."""
    thoughts = [scores.between(start, stop) for start, stop in pairwise(chain.cuts)]
    return Scored(
        [values.tolist() for values in scores.logprob],
        [values.tolist() for values in scores.n_tokens],
        [logprob for logprob, _ in thoughts],
        [tokens for _, tokens in thoughts],
        scores.method,
    )


def round_sizes(batches: Sequence[Batch], done: Container[int], budget: int) -> list[int]:
    """How many of a rank's ``batches`` it runs in each round: as many as reach ``budget`` tokens, at least one."""
    sizes: list[int] = []
    tokens = budget
    for batch in batches:
        if all(number in done for number in batch.chains):
            continue
        if tokens >= budget:
            sizes.append(0)
            tokens = 0
        sizes[-1] += 1
        tokens += batch.tokens
    return sizes


def score_paths(options: Options, call: Invocation, source: ModelSource, job: Job | None) -> dict[int, Scored] | None:
    """Score the chains of ``job``, which rank 0 has; the result, by number, is rank 0's as well.

    All processes call this together; without a job on rank 0 the others are sent home.

    Raises: ScoreNotFinite (1), TryAgain (75: interrupted, out of memory) with all finished rounds in the journal.
    """
    from toolbox.training.processes import broadcast_bytes, start_processes

    accelerator = start_processes()
    leader = accelerator.is_main_process
    told = None
    if leader:
        told = msgspec.msgpack.encode(None if job is None else _Work(list(job.chains), list(job.done)))
    work = msgspec.msgpack.decode(broadcast_bytes(accelerator, told), type=_Work | None)
    if work is None:
        return None
    with said_once(leader):
        return _Rounds(options, call, accelerator, work, job).run(source)


@dataclass
class _Rounds:
    """The part of one process."""

    options: Options
    call: Invocation
    accelerator: Accelerator
    work: _Work
    job: Job | None
    results: dict[int, Scored] = field(default_factory=dict)
    interrupts: Interrupts = field(default_factory=Interrupts)

    def run(self, source: ModelSource) -> dict[int, Scored] | None:
        device, dtype = resolve(self.options, self.accelerator)
        options, reporter = self.options, self.call.reporter
        with contextlib.ExitStack() as stack:
            journal = None
            if self.job is not None:
                self.results = dict(self.job.done)
                journal = stack.enter_context(self.job.begin(device.type, dtype, self.accelerator.num_processes))
            prepare(source, reporter.note)
            model = load_model(source, dtype=dtype, trust_remote_code=options.trust_remote_code).to(device)
            processes = Processes(self.accelerator.process_index, self.accelerator.num_processes, self._gather)
            scoring = score_chains(
                model, self.work.chains, options.method, batch_tokens=options.batch_tokens, processes=processes
            )  # type: ignore[arg-type]
            for note in scoring.notes:
                reporter.note(note)
            bar = stack.enter_context(reporter.progress("path", len(self.work.chains)))
            bar.advance(len(self.work.done))
            with self.interrupts.heard():
                self._go(scoring, frozenset(self.work.done), journal, bar)
        return self.results if self.job is not None else None

    def _gather(self, payload: bytes) -> list[bytes]:
        from toolbox.training.processes import gather_bytes

        return gather_bytes(self.accelerator, payload)

    def _go(self, scoring: Any, done: frozenset[int], journal: Journal | None, bar: Any) -> None:
        """Round after round, as many on every rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        # Alone, every batch is kept as it is done; together, waiting for the slowest has to be worth it.
        budget = 1 if ranks == 1 else self.options.batch_tokens
        sizes = [round_sizes(scoring.plan.share(one, ranks), done, budget) for one in range(ranks)]
        batches = scoring.batches(done)
        for number in range(max(map(len, sizes))):
            mine = sizes[rank][number] if number < len(sizes[rank]) else 0
            payload = msgspec.msgpack.encode(self._round(batches, mine))
            parts = [msgspec.msgpack.decode(part, type=_Part) for part in self._gather(payload)]
            found = {number: one for part in parts for number, one in part.found.items() if number not in done}
            if journal is not None and found:
                journal.add(found)
            self.results |= found
            bar.advance(len(found))
            for problem in (part.problem for part in parts if part.problem is not None):
                raise self._error(problem)
            if any(part.stop for part in parts):
                raise TryAgain(
                    f"interrupted; {len(self.results)} of {len(self.work.chains)} paths are scored",
                    "the same command with --resume goes on",
                )

    def _round(self, batches: Iterator[dict[int, ChainScores]], count: int) -> _Part:
        found: dict[int, Scored] = {}
        problem = None
        try:
            for _ in range(count):
                if self.interrupts.asked:
                    break
                for number, scores in next(batches).items():
                    found[number] = distil(self.work.chains[number], scores)
        except NotFinite as error:
            problem = _Problem(ScoreNotFinite.exit_code, error.dtype, error.advice, error.chain, error.cut)
        except TryAgain as error:
            problem = _Problem(error.exit_code, error.what, error.advice)
        return _Part(found, problem, self.interrupts.asked)

    def _error(self, problem: _Problem) -> ToolboxError:
        if problem.chain is None:
            kept = "; --resume goes on" if self.results else ""
            return TryAgain(problem.what, f"{problem.advice}{kept}")
        name = self.job.names[problem.chain] if self.job is not None else str(problem.chain)
        place = f"path {name}" if problem.cut is None else f"path {name}, state {problem.cut}"
        what = f"{place}: the model's log-probabilities in {problem.what} are not finite"
        return ScoreNotFinite(what, problem.advice)


def resolve(options: Options, accelerator: Accelerator) -> tuple[Any, str]:
    """The device and the number type: ``auto`` is the process's own device, and bf16 on a GPU that has it."""
    import torch

    device = accelerator.device
    if options.device != "auto":
        device = find_device(options.device)
    if options.dtype != "auto":
        return device, options.dtype
    return device, "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


# --- what came of it --------------------------------------------------------------------------------------------------


def features_of(paths: Paths, scored: Mapping[int, Scored], scoring: Scoring) -> Features:
    """The features of all paths, from the scores of ``paths.to_score()`` by their place in it.

    A question's start is that of the first of its paths that was scored.
    """
    numbers = paths.to_score()
    by_path = {number: scored[place] for place, number in enumerate(numbers)}
    starts: dict[int, Scored] = {}
    for number in numbers:
        starts.setdefault(paths.paths[number].question, by_path[number])
    questions = [
        QuestionScores(one.id, one.gold, np.array(starts[place].logprob[0]), np.array(starts[place].n_tokens[0]))
        for place, one in enumerate(paths.questions)
    ]
    nothing = Scored([[]], [[]], [], [], "")
    each = []
    for number, path in enumerate(paths.paths):
        one = by_path[number] if path.thoughts else nothing
        each.append(
            PathScores(
                path.id, path.question, path.pred, path.facets, np.array(one.logprob[1:]), np.array(one.n_tokens[1:]),
                np.array(one.thought_logprob), np.array(one.thought_tokens),
            )
        )  # fmt: skip
    methods = sorted({one.method for one in scored.values()})
    return assemble(questions, each, replace(scoring, options={**scoring.options, "scored_by": methods}))
