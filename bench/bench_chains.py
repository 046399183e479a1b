"""Scoring the answers of a question along a chain of thought: the tree against the prefix and one pass a pair.

Real paths: 50 of Llama-3-8B on five AQuA questions (thoughts/landscape in the shared data), under the embedded model in
fp32, one thread. Five answers of label and text ("Answer is: A) ...") at every state.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

from bench.bench_models import need_smollm2, smollm2
from bench.common import ROOT, Figure, Skip, alternate, in_child, memory_mib, ratios

DEMO = ROOT.parent / "shared" / "data" / "thoughts" / "landscape" / "demo_paths.jsonl.gz"
METHODS = ("tree", "prefix", "naive")


def demo_rows() -> list[dict[str, Any]]:
    """The demo paths in their order; Skip when they are not there."""
    if not DEMO.is_file():
        raise Skip("the demo paths (thoughts/landscape) are not beside the checkout")
    with gzip.open(DEMO, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def demo_chain(tokenizer: Any, row: dict[str, Any], thoughts: int | None = None) -> Any:
    """A path as a chain: question and options, then its first ``thoughts`` thoughts (all by default)."""
    from toolbox.models.chain_text import encode_chain

    options = [f"{label}) {text}" for label, text in zip(row["labels"], row["choices"], strict=True)]
    context = "\n".join([row["question"], *options])
    return encode_chain(
        tokenizer, [context, *row["thoughts"][:thoughts]], [f"Answer is: {option}" for option in options]
    )


def short_chains(tokenizer: Any, quick: bool) -> list[Any]:
    """The shortest paths of five, six and seven thoughts; one question and a thought for ``quick``."""
    rows = sorted(demo_rows(), key=lambda row: sum(map(len, row["thoughts"])))
    found = [next(row for row in rows if len(row["thoughts"]) == count) for count in (5, 6, 7)]
    return [demo_chain(tokenizer, found[0], 1)] if quick else [demo_chain(tokenizer, row) for row in found]


def expected_tokens(chain: Any) -> dict[str, int]:
    """What each method should feed by the formula: N = n_T, cuts n_i, m tokens an answer, tries by brute force."""
    pairs = [(cut, ids) for cut, here in zip(chain.cuts, chain.continuations, strict=True) for ids in here]
    stems = [{ids[:length] for ids in here for length in range(1, len(ids))} for here in chain.continuations]
    last = len(chain.ids)
    return {
        "tree": last + sum(map(len, stems)),
        "prefix": last + sum(len(ids) - 1 for _, ids in pairs),
        "naive": last + sum(cut + len(ids) for cut, ids in pairs),
    }


def methods(quick: bool) -> Iterator[Figure]:
    """The three methods in turns on each of three paths: time, tokens, numbers."""
    import numpy as np

    from toolbox.models.chains import score_chains

    need_smollm2()
    model, chat = smollm2()
    chains = short_chains(chat.tokenizer, quick)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    tokens: dict[str, int] = dict.fromkeys(METHODS, 0)
    off, states, worst = 0, 0, 0.0
    list(score_chains(model, chains[:1]))  # brings the weights into memory
    for chain in chains:
        scored = {name: score_chains(model, [chain], name) for name in METHODS}
        found: dict[str, Any] = {}

        def run(name: str, scored: dict[str, Any] = scored, found: dict[str, Any] = found) -> None:
            (found[name],) = scored[name]

        once = alternate(1, {name: lambda name=name: run(name) for name in METHODS}, warm=False)
        for name in METHODS:
            seconds[name] += once[name]
            tokens[name] += scored[name].fed
            off += abs(scored[name].fed - expected_tokens(chain)[name])
            one, other = (np.concatenate(found[method].logprob) for method in (name, "naive"))
            worst = max(worst, float(np.abs(one - other).max()))
        states += len(chain.cuts)
    shape = f"{len(chains)} paths, {states} states, {sum(len(chain.ids) for chain in chains)} tokens, 5 answers"
    yield Figure.of("chains: tree against naive", ratios(seconds["naive"], seconds["tree"]), "×", target=">= 6",
                    ratio_of="CPU of one pass a pair and one a path / of the tree", note=shape)  # fmt: skip
    yield Figure.of("chains: prefix against naive", ratios(seconds["naive"], seconds["prefix"]), "×",
                    ratio_of="the same / CPU of one continuation after the other")  # fmt: skip
    yield Figure.of("chains: tree", seconds["tree"], "CPU-s", note="a path")
    for name in ("prefix", "tree"):
        yield Figure(f"chains: tokens of the {name}", tokens["naive"] / tokens[name], "×",
                     ratio_of=f"tokens of one pass a pair / of the {name}",
                     note=f"{tokens['naive']:,} against {tokens[name]:,}")  # fmt: skip
    yield Figure("chains: tokens off the formula", off, "", target="<= 0", note="all methods")
    yield Figure("chains: largest difference", worst, "nats", target="<= 5e-4", note="of a ln p from one pass a pair")


def score_demo(count: int) -> tuple[float, float, int, int]:
    """CPU seconds, peak MiB, tokens and states of scoring so many paths by the tree. Run in a fresh process."""
    from toolbox.models.chains import score_chains

    model, chat = smollm2()
    began = time.process_time()
    chains = [demo_chain(chat.tokenizer, row) for row in demo_rows()[:count]]
    scoring = score_chains(model, chains)
    for _ in scoring:
        pass
    return time.process_time() - began, memory_mib("VmHWM"), scoring.fed, sum(len(one.cuts) for one in chains)


def whole_demo(quick: bool) -> Iterator[Figure]:
    """All fifty paths by the tree, from texts to numbers."""
    need_smollm2()
    demo_rows()
    seconds, peak, tokens, states = in_child(score_demo, 1 if quick else 50)
    note = f"{states} states, {tokens:,} tokens fed, contexts shared"
    yield Figure("chains: all demo paths", seconds, "CPU-s", target="<= 500", note=note)
    yield Figure("chains: memory", peak / 1000 * 1.048576, "GB", target="<= 2.5", note="resident peak, model included")


BENCHES = {"chains": methods, "chains-demo": whole_demo}
