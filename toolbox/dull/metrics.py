"""How DULL is judged: accuracy by shot group, macro-F1, and how well doubts find wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolbox.stats import auc, wilson

Labels = NDArray[np.int64]
FLAGGED_ENOUGH, BETTER = 0.02, 1.2
"""A warning is due when more than 2 % is flagged with a precision below 1.2 times the base rate."""


def judged(predicted: Labels, truth: Labels, groups: Mapping[str, Sequence[int]], classes: int) -> dict[str, Any]:
    """``acc`` with its 95 % interval, ``n``, accuracy of each shot group (over its classes' images; None without any),
    ``macro_f1`` and ``recall`` of every class that occurs. ValueError: no images."""
    right = predicted == truth
    table = np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hits, there, said = np.diag(table), table.sum(1), table.sum(0)
    interval = wilson(int(right.sum()), len(truth))
    shots = {}
    for name, members in groups.items():
        inside = np.isin(truth, list(members))
        shots[name] = float(right[inside].mean()) if inside.any() else None
    either = there + said
    f1 = np.divide(2 * hits, either, out=np.zeros(classes), where=either > 0)
    occurs = there > 0
    recall = [float(hits[n] / there[n]) if occurs[n] else None for n in range(classes)]
    return {"acc": float(right.mean()), "n": len(truth), "acc_ci": [interval.low, interval.high], **shots,
            "macro_f1": float(f1[occurs].mean()), "recall": recall, "predicted": said.tolist()}  # fmt: skip


def detection(
    doubt: NDArray[np.float64],
    flagged: NDArray[np.bool_],
    suggested: Labels,
    given: Labels,
    clean: Labels,
    groups: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """How well ``doubt`` (higher: rather wrong) and ``flagged`` find the labels that differ from ``clean``.

    AUC pooled, and by given class: pooled it misleads where noise runs one way, since tail classes look noisy. None
    where a class has no wrong or no right label. Precision, recall and base rate over all and by shot group of the
    given class; ``noise_after`` if every suggestion were taken.
    """
    wrong = given != clean
    repaired = np.where(flagged, suggested, given)
    found = {
        "noise_before": float(wrong.mean()),
        "noise_after": float((repaired != clean).mean()),
        "flagged": int(flagged.sum()),
        "flagged_share": float(flagged.mean()),
        "auc": _auc(doubt, wrong),
        "auc_by_class": [_auc(doubt[given == n], wrong[given == n]) for n in range(_classes(given, clean, groups))],
        **_flags(flagged, wrong),
        "correction_accuracy": float((suggested == clean)[flagged].mean()) if flagged.any() else None,
    }
    found["by_shot"] = {}
    for name, members in groups.items():
        inside = np.isin(given, list(members))
        if inside.any():
            found["by_shot"][name] = {
                "base_rate": float(wrong[inside].mean()),
                **_flags(flagged[inside], wrong[inside]),
            }
    return found


def _classes(given: Labels, clean: Labels, groups: Mapping[str, Sequence[int]]) -> int:
    named = max((number for members in groups.values() for number in members), default=-1)
    return max(int(given.max()), int(clean.max()), named) + 1


def _auc(doubt: NDArray[np.float64], wrong: NDArray[np.bool_]) -> float | None:
    return float(auc(doubt[wrong], doubt[~wrong])) if wrong.any() and not wrong.all() else None


def _flags(flagged: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> dict[str, float | None]:
    hits = int((flagged & wrong).sum())
    return {
        "flag_precision": hits / int(flagged.sum()) if flagged.any() else None,
        "flag_recall": hits / int(wrong.sum()) if wrong.any() else None,
    }


def warning(found: Mapping[str, Any]) -> str | None:
    """What to say of flags that are hardly better than a draw; None where there is nothing to warn of."""
    precision, base = found["flag_precision"], found["noise_before"]
    if precision is None or found["flagged_share"] <= FLAGGED_ENOUGH or precision >= BETTER * base:
        return None
    return (
        f"{found['flagged_share']:.1%} of the labels are flagged and {precision:.1%} of these are wrong, against "
        f"{base:.1%} of all: the list is hardly better than a random one"
    )


def transition_error(estimate: NDArray[np.float64], given: Labels, clean: Labels) -> float:
    """Mean L1 distance of the rows of T̂ from those of T, as far as T's classes occur."""
    classes = len(estimate)
    table = np.bincount(clean * classes + given, minlength=classes * classes).reshape(classes, classes)
    occurs = table.sum(1) > 0
    true = table[occurs] / table[occurs].sum(1, keepdims=True)
    return float(np.abs(estimate[occurs] - true).sum(1).mean())
