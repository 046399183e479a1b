"""What many runs say together: means with both deviations, intervals, and strategies paired by seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

METRICS = ("shd", "aushd", "shd_dag", "sid", "bsf", "expected_shd")
PAIRED = ("shd", "aushd")


def summaries(runs: Sequence[dict[str, Any]], seed: int = 0) -> Iterator[dict[str, Any]]:
    """An event a strategy and metric: mean, population and sample deviation, bootstrap interval, every seed's value."""
    from toolbox.stats import bootstrap_mean

    for strategy in dict.fromkeys(run["strategy"] for run in runs):
        own = [run for run in runs if run["strategy"] == strategy]
        for metric in METRICS:
            if metric not in own[0]:
                continue
            values = [float(run[metric]) for run in own]
            interval = bootstrap_mean(values, seed=seed).as_record()
            yield {
                "event": "summary",
                "strategy": strategy,
                "metric": metric,
                "n": len(values),
                "mean": float(np.mean(values)),
                "sd_population": float(np.std(values)),
                "sd_sample": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "ci95": [interval["low"], interval["high"]],
                "values": values,
            }


def pairs(strategies: Sequence[str], baseline: str | None) -> list[tuple[str, str]]:
    """Who is compared with whom: all with the baseline, and each legit+X and plan+X with its X."""
    found = [(one, baseline) for one in strategies if baseline is not None and one != baseline]
    found += [(one, one.partition("+")[2]) for one in strategies if "+" in one]
    known = [(a, b) for a, b in found if b in strategies]
    return list(dict.fromkeys(known))


def paired(runs: Sequence[dict[str, Any]], baseline: str | None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """An event a pair and metric: differences a - b by seed, their mean with interval, and an exact sign-flip p.

    ``p_floor`` = 2^(1 - seeds) is the smallest p that so many seeds can give.
    """
    from toolbox.stats import bootstrap_mean, sign_flip

    strategies = list(dict.fromkeys(run["strategy"] for run in runs))
    by_key = {(run["strategy"], run["seed"]): run for run in runs}
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    for a, b in pairs(strategies, baseline):
        for metric in PAIRED:
            if metric not in by_key[a, seeds[0]]:
                continue
            differences = [float(by_key[a, one][metric] - by_key[b, one][metric]) for one in seeds]
            interval = bootstrap_mean(differences, seed=seed).as_record()
            yield {
                "event": "paired",
                "a": a,
                "b": b,
                "metric": metric,
                "n": len(seeds),
                "differences": differences,
                "mean": float(np.mean(differences)),
                "ci95": [interval["low"], interval["high"]],
                "p": sign_flip(differences, seed=seed),
                "p_floor": 2.0 ** (1 - len(seeds)),
            }
