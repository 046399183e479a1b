"""What a run says of every sample, and, where clean labels are known, how right it is. Clean labels stop here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from toolbox.dull.data import UNKNOWN, Corpus
from toolbox.dull.epoch import Doubts, EpochEnd, doubts, predict_shared
from toolbox.dull.labels import given_losses
from toolbox.dull.metrics import detection, transition_error
from toolbox.dull.objective import DullObjective
from toolbox.dull.options import Options

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray

Groups = Mapping[str, Sequence[int]]
_BRIEF = ("noise_before", "noise_after", "auc", "auc_by_class", "flag_precision", "flag_recall")


def training_figures(
    objective: DullObjective, found: Doubts | None, corpus: Corpus, groups: Groups, options: Options
) -> dict[str, Any]:
    """The detection figures of an epoch event, over training rows with a clean label."""
    q, given = objective.table.get(slice(None)), objective.given
    if found is None:
        found = doubts(q, given, objective.labels.prior, corpus.counts, options.ifpu_scope)
    assert corpus.clean is not None
    figures = _detect(q, found, given, corpus.clean[corpus.train], groups)
    return {name: figures[name] for name in _BRIEF} if figures else {}


def _detect(
    q: NDArray[np.float64],
    found: Doubts,
    given: NDArray[np.int64],
    clean: NDArray[np.int64],
    groups: Groups,
) -> dict[str, Any]:
    known = clean != UNKNOWN
    if not known.any():
        return {}
    doubt = given_losses(q, given)
    return detection(doubt[known], found.flagged[known], found.right[known], given[known], clean[known], groups)


def posteriors(accelerator: Accelerator, objective: DullObjective) -> NDArray[np.float64]:
    """q of every row of the corpus: the table's where one was kept, else the averaged network's predictions."""
    corpus = objective.corpus
    whole = np.zeros((len(corpus.ids), len(corpus.labels)))
    rest = corpus.holdout if objective.watches else np.arange(len(corpus.ids))
    if objective.watches:
        objective.table.exchange(accelerator)
        whole[corpus.train] = objective.table.get(slice(None))
    if len(rest):
        images = corpus.pixels[rest]
        logits = predict_shared(accelerator, objective.average, images, objective.pixels)
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        whole[rest] = shifted / shifted.sum(1, keepdims=True)
    return whole


def final_rows(
    accelerator: Accelerator,
    objective: DullObjective,
    end: EpochEnd,
    corpus: Corpus,
    groups: Groups,
    options: Options,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a sample, in input order, the hold-out included; and the detection figures where labels are known."""
    q = posteriors(accelerator, objective)
    found = doubts(q, corpus.given, objective.labels.prior, corpus.counts, options.ifpu_scope)
    acted = np.zeros(len(corpus.ids), dtype=bool)
    acted[corpus.train[end.acted]] = True
    held = np.zeros(len(corpus.ids), dtype=bool)
    held[corpus.holdout] = True
    names = corpus.labels
    rows = []
    for n, identifier in enumerate(corpus.ids):
        given = int(corpus.given[n])
        suggested = int(found.right[n]) if found.flagged[n] else given
        rows.append({
            "id": identifier,
            "label": names[given],
            "dull": {
                "suggested": names[suggested],
                "labels": [names[c] for c in np.flatnonzero(found.sets[n])],
                "p_clean": round(float(found.clean[n]), 6),
                "q_given": round(float(q[n, given]), 6),
                "q_top": round(float(q[n].max()), 6),
                "flagged": bool(found.flagged[n]),
                "acted": bool(acted[n]),
                "held_out": bool(held[n]),
            },
        })  # fmt: skip
    if corpus.clean is None:
        return rows, {}
    figures = _detect(q, found, corpus.given, corpus.clean, groups)
    known = corpus.clean != UNKNOWN
    figures["transition_l1"] = transition_error(found.transition, corpus.given[known], corpus.clean[known])
    return rows, figures
