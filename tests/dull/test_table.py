"""The table of runs: means over seeds, Student's intervals, what is no run named."""

from __future__ import annotations

import json

import pytest
from scipy import stats

from toolbox.dull.table_of_runs import markdown, mean_interval, read_runs
from toolbox.shell.errors import BadData, MissingInput


def put(folder, name, **done):
    (folder / name).mkdir()
    (folder / name / "run.json").write_text(json.dumps({"done": done}))


def test_means_and_intervals_over_seeds(tmp_path):
    rest = {"many": 0.3, "medium": 0.4, "few": 0.5}
    for seed, acc in enumerate((0.41, 0.43, 0.45)):
        put(tmp_path, f"la.{seed}", acc=acc, seed=seed, predicted=[5, 6 - seed], detection=None, **rest)
    found = {"flag_precision": 0.7, "flag_recall": None, "auc": 0.8, "auc_by_class": [0.6, None, 0.9]}
    put(tmp_path, "ce.1", acc=0.2, seed=1, predicted=[9, 0], detection=found, **rest)
    for seed, acc in enumerate((0.42, 0.45)):
        put(tmp_path, f"dull.{seed}", acc=acc, seed=seed, predicted=[7, 7], **rest)
    runs = read_runs(tmp_path)
    mean, half = mean_interval([0.41, 0.43, 0.45])
    low, high = stats.t.interval(0.95, 2, loc=0.43, scale=stats.sem([0.41, 0.43, 0.45]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    shots = "0.300 | 0.400 | 0.500"
    _, _, dull, la, ce = markdown(runs).splitlines()
    assert la == f"| la | 3 | 0.430 ± 0.050 |  | {shots.replace(' |', ' ± 0.000 |')} ± 0.000 | 4 |  |  |  |  |"
    assert ce == f"| ce | 1 | 0.200 | -0.230 | {shots} | 0 | 0.70 |  | 0.80 | 0.75 |"
    spread = stats.t.ppf(0.975, 1) * stats.sem([0.01, 0.02])
    assert f"| +0.015 ± {spread:.3f} |" in dull


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(MissingInput):
        read_runs(tmp_path)
    put(tmp_path, "la.1", acc=0.4)
    with pytest.raises(BadData, match=r"la\.1"):
        read_runs(tmp_path)
