"""How an estimated graph is judged: SHD, SID, BSF and the usual rates; AUSHD and pick diversity of a whole design.

Graphs are bool arrays [N, N], row = cause. A pair with both directions counts as one wrong pair.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Graph = NDArray[np.bool_]


def shd(true: Graph, guess: Graph) -> int:
    """Structural Hamming distance: unordered pairs whose status (none, ->, <-, both) differs; a reversal is 1."""
    differs = true != guess
    return int(np.triu(differs | differs.T, 1).sum())


def sid(true: Graph, guess: Graph) -> int:
    """Structural intervention distance: ordered pairs (i, j) whose effect is wrong, adjusting for pa(i) of ``guess``.

    Both must be DAGs: ``gadjid`` panics on some cyclic graphs, so ValueError is raised before it is asked. Source:
    Peters and Buhlmann, "Structural intervention distance for evaluating causal graphs" (2015).
    """
    import gadjid

    for graph in (true, guess):
        if not acyclic(graph):
            raise ValueError("SID is not defined for a cyclic graph")
    if len(true) < 2:
        return 0
    _, mistakes = gadjid.sid(true.astype(np.int8), guess.astype(np.int8), edge_direction="from row to column")
    return int(mistakes)


def acyclic(graph: Graph) -> bool:
    """Whether there is no directed cycle, self-loops included: roots are taken away until none is left."""
    left = graph.copy()
    while len(left):
        inner = left.any(0)
        if inner.all():
            return False
        left = left[np.ix_(inner, inner)]
    return True


def bsf(true: Graph, guess: Graph) -> float:
    """Balanced scoring function in [-1, 1]: (TP/a + TN/i - FP/i - FN/a)/2 with a true edges, i pairs without one.

    A reversed edge, and one in both directions, is half a hit and half a miss. 1 is the truth, 0 the empty and the full
    graph, -1 everything wrong. A term without a pair (no edges, or no gaps) is left out with its half.
    """
    upper = np.triu(np.ones_like(true), 1)
    joined, guessed = (true | true.T) & upper, (guess | guess.T) & upper
    a, i = int(joined.sum()), int(upper.sum() - joined.sum())
    exact = int((joined & guessed & (true == guess) & (true.T == guess.T)).sum())
    hits = exact + ((joined & guessed).sum() - exact) / 2
    false = int((guessed & ~joined).sum())
    edges = (hits - (a - hits)) / a if a else 0.0
    gaps = (i - 2 * false) / i if i else 0.0
    return float((edges + gaps) / 2)


def rates(true: Graph, guess: Graph) -> dict[str, float | None]:
    """TPR, FDR and F1 of directed edges, F1 of the skeleton; None where nothing is there to take a share of."""
    hits, found, there = int((true & guess).sum()), int(guess.sum()), int(true.sum())
    one, other = np.triu(true | true.T, 1), np.triu(guess | guess.T, 1)
    shared, total = int((one & other).sum()), int(one.sum() + other.sum())
    return {
        "tpr": hits / there if there else None,
        "fdr": (found - hits) / found if found else None,
        "f1": 2 * hits / (found + there) if found + there else None,
        "skeleton_f1": 2 * shared / total if total else None,
    }


def expected_shd(true: Graph, p: NDArray[np.floating[Any]]) -> float:
    """The mean SHD of graphs with independent edges of probabilities ``p`` [N, N]."""
    agree = np.where(true, p, 1 - p)
    agree = agree * agree.T
    return float(np.triu(1 - agree, 1).sum())


def judge(true: Graph, raw: Graph, dag: Graph) -> dict[str, Any]:
    """The figures of one estimate: ``shd`` of the graph as learned, ``sid`` of its projection ``dag``, and so on."""
    nodes = len(true)
    wrong = sid(true, dag)
    return {
        "shd": shd(true, raw),
        "shd_dag": shd(true, dag),
        "shd_empty": int(true.sum()),
        "sid": wrong,
        "sid_normalised": wrong / (nodes * (nodes - 1)) if nodes > 1 else 0.0,
        "bsf": bsf(true, raw),
        **rates(true, raw),
        "edges": int(raw.sum()),
        "true_edges": int(true.sum()),
    }


def aushd(distances: Sequence[float], rows: Sequence[int]) -> float:
    """Area under the SHD curve: the mean of ``distances`` after rounds 1..T, weighted by the rows of each round.

    ValueError: no round. The final SHD alone hides the rounds that cost money.
    """
    if not distances or len(distances) != len(rows) or sum(rows) <= 0:
        raise ValueError("a curve needs at least one round, and rows for each")
    return float(np.average(np.asarray(distances, dtype=np.float64), weights=np.asarray(rows, dtype=np.float64)))


def diversity(picks: Iterable[Hashable]) -> float:
    """exp(entropy) of the targets chosen: how many equally frequent ones would be as varied; 0 without a pick."""
    counts = Counter(picks)
    total = sum(counts.values())
    if not total:
        return 0.0
    return math.exp(-sum(count / total * math.log(count / total) for count in counts.values()))
