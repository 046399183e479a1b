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
    for seed, acc in enumerate((0.41, 0.43, 0.45)):
        put(tmp_path, f"la.{seed}", acc=acc, many=0.3, medium=0.4, few=0.5, predicted=[5, 6 - seed], detection=None)
    put(tmp_path, "ce.1", acc=0.2, many=0.6, medium=0.1, few=0.0, predicted=[9, 0],
        detection={"flag_precision": 0.7, "auc": 0.8})  # fmt: skip
    runs = read_runs(tmp_path)
    mean, half = mean_interval([0.41, 0.43, 0.45])
    low, high = stats.t.interval(0.95, 2, loc=0.43, scale=stats.sem([0.41, 0.43, 0.45]))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    lines = markdown(runs).splitlines()
    assert lines[2] == "| la | 3 | 0.430 ± 0.050 | 0.300 ± 0.000 | 0.400 ± 0.000 | 0.500 ± 0.000 | 4 |  |  |"
    assert lines[3] == "| ce | 1 | 0.200 | 0.600 | 0.100 | 0.000 | 0 | 0.70 | 0.80 |"


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(MissingInput):
        read_runs(tmp_path)
    put(tmp_path, "la.1", acc=0.4)
    with pytest.raises(BadData, match=r"la\.1"):
        read_runs(tmp_path)
