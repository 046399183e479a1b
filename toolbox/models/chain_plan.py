"""Which chains are scored together, and by which method: settled by the chains and the model alone.

Neither the number of processes nor what has been scored before enters here, so that neither shows in a result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from toolbox.models.tree import grow, row_limit
from toolbox.shell.errors import BadData

if TYPE_CHECKING:
    from toolbox.models.chains import Chain

Method = Literal["tree", "prefix", "naive"]


@dataclass(frozen=True, slots=True)
class Route:
    """How a model can score: by ``method``, and ``reason`` says why that is not the one asked for.

    Chains longer than ``tree_span`` tokens cannot take the tree, those longer than ``cache_span`` no cache at all; None
    where the model sets no such bound.
    """

    method: Method
    reason: str | None = None
    tree_span: int | None = None
    cache_span: int | None = None

    def of(self, longest: int) -> Method:
        """The method for a chain of which so many tokens are fed in a row at most."""
        if self.method == "naive" or (self.cache_span is not None and longest > self.cache_span):
            return "naive"
        if self.tree_span is not None and longest > self.tree_span:
            return "prefix"
        return self.method


@dataclass(frozen=True, slots=True)
class Batch:
    """Chains (their numbers) that run together. Their first ``context`` tokens are the same and run once for all
    batches that share them; 0 where nothing is shared. ``tokens`` are fed, that context not counted."""

    chains: tuple[int, ...]
    method: Method
    context: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every chain in one batch. ``tokens`` are fed by one process in all; ``notes`` are for people: what is scored
    otherwise than asked for, and how many continuations are spelt otherwise than apart."""

    batches: tuple[Batch, ...]
    tokens: int
    notes: tuple[str, ...]

    def share(self, rank: int, ranks: int) -> list[Batch]:
        """The batches of one of several processes: dealt out the most expensive first, kept in the plan's order, in
        which those that share a context follow one another."""
        by_cost = sorted(range(len(self.batches)), key=lambda number: -self.batches[number].tokens)
        return [self.batches[number] for number in sorted(by_cost[rank::ranks])]


def count_tokens(chain: Chain, method: Method, *, merge: bool = True) -> int:
    """Tokens fed for a chain of N tokens and its continuations of m tokens at cuts n_i, on its own.

    - tree: N + Σ_cuts (nodes of the trie of the cut's continuations without its leaves); without ``merge``
      N + Σ (m − 1), since the last token of a continuation is never fed.
    - prefix: N + Σ (m − 1).
    - naive: Σ (n_i + m), one forward pass a pair, and N for the chain's own tokens.

    A context of q tokens shared by r chains saves q (r − 1) of it under tree and prefix (`Plan.tokens`).
    """
    asked = chain.asked()
    if method == "naive":
        return len(chain.ids) + sum(one.at + len(one.ids) for one in asked)
    apart = sum(len(one.ids) for one in asked if one.at == 0)
    return len(chain.ids) + grow(chain.branches(), merge=merge and method == "tree").rows + apart


def plan_chains(
    chains: Sequence[Chain],
    route: Route,
    *,
    batch_tokens: int,
    batch_chains: int,
    window: int | None = None,
) -> Plan:
    """Cut ``chains`` into batches.

    A batch of the tree holds at most ``batch_chains`` chains of like length, padded to at most ``batch_tokens`` tokens;
    one chain may be longer. The other methods run chain by chain.

    Raises: BadData for a chain that is longer with one of its continuations than the model's ``window``.
    """
    methods = []
    for number, chain in enumerate(chains):
        if problem := window_problem(chain, window):
            raise BadData(f"chain {number}: {problem}", "leave it out, or take a model with a longer window")
        methods.append(route.of(chain.longest))
    costs = [count_tokens(chain, method) for chain, method in zip(chains, methods, strict=True)]
    batches: list[Batch] = []
    total = 0
    for members, context in _by_context(chains, methods):
        method, most = methods[members[0]], batch_chains if methods[members[0]] == "tree" else 1
        total += context
        for group in _cut(members, chains, batch_tokens, most):
            batches.append(Batch(tuple(group), method, context, sum(costs[n] - context for n in group)))
            total += batches[-1].tokens
    return Plan(tuple(batches), total, tuple(_notes(chains, route, methods)))


def window_problem(chain: Chain, window: int | None) -> str | None:
    """What is wrong with a chain that does not fit into the model's window; None where it does."""
    if window is None or chain.longest <= window:
        return None
    if len(chain.ids) > window:
        return f"it has {len(chain.ids)} tokens, too many for the model's window of {window}"
    one = next(one for one in chain.asked() if one.at + len(one.ids) > window)
    more = one.at + len(one.ids) - one.start
    return f"{one.start} tokens and a continuation of {more} are too many for the model's window of {window}"


def _by_context(chains: Sequence[Chain], methods: Sequence[Method]) -> list[tuple[list[int], int]]:
    """Chains that can share a run of their context, with its length; those on their own in one group a method."""
    groups: dict[tuple[Method, tuple[int, ...]], list[int]] = {}
    for number, (chain, method) in enumerate(zip(chains, methods, strict=True)):
        context = chain.cuts[0]
        # A continuation that leaves the chain inside the context needs what is not kept of a shared one.
        cached = method != "naive" and all(one.at >= context or one.at == 0 for one in chain.asked())
        groups.setdefault((method, chain.ids[:context] if cached else ()), []).append(number)
    shared = [(members, len(ids)) for (_, ids), members in groups.items() if ids and len(members) > 1]
    alone: dict[Method, list[int]] = {}
    for (method, ids), members in groups.items():
        if not ids or len(members) == 1:
            alone.setdefault(method, []).extend(members)
    return sorted([*shared, *((sorted(members), 0) for members in alone.values())])


def _cut(members: Sequence[int], chains: Sequence[Chain], batch_tokens: int, batch_chains: int) -> list[list[int]]:
    """Chains of one group in batches, those of like length together."""
    if batch_chains == 1:
        return [[number] for number in members]
    trees = {number: grow(chains[number].branches()).largest_tree for number in members}
    batches: list[list[int]] = []
    for number in sorted(members, key=lambda number: (-len(chains[number].ids), number)):
        group = [*batches[-1], number] if batches else [number]
        columns, tree = len(chains[group[0]].ids), max(trees[n] for n in group)
        # A tree is fed in pieces only in a batch of its own.
        small = len(group) * columns <= batch_tokens and tree <= row_limit(columns, len(group), batch_tokens)
        if batches and len(group) <= batch_chains and small:
            batches[-1] = group
        else:
            batches.append([number])
    return batches


def _notes(chains: Sequence[Chain], route: Route, methods: Sequence[Method]) -> list[str]:
    notes = [] if route.reason is None else [f"scored by the {route.method} method: {route.reason}"]
    for method, count in Counter(methods).items():
        if method != route.method:
            span = route.tree_span if method == "prefix" else route.cache_span
            notes.append(
                f"{count} of {len(chains)} chains, longer than {span} tokens, are scored by the {method} method"
            )
    respelt = sum(chain.respelt for chain in chains)
    if respelt:
        asked = sum(len(chain.asked()) for chain in chains)
        notes.append(f"{respelt} of {asked} continuations are spelt otherwise behind their text than apart from it")
    return notes
