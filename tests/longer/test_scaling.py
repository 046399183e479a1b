"""The power-law fit finds what made the points, and refuses too few; the table reads finished runs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from toolbox.longer.scaling import fit_power_law
from toolbox.longer.table import main, markdown, read_runs


@pytest.mark.parametrize(("a", "b", "c"), [(-0.3, -0.4, 0.9), (2.0, 0.5, 1.0), (1e-6, 1.0, 0.1)])
def test_exact_points_give_the_law_back(a, b, c):
    x = np.asarray([1e3, 3e3, 1e4, 5e4, 2e5, 9e5])
    found = fit_power_law(x, a * x**b + c, draws=5)
    assert (found.a, found.b, found.c) == (
        pytest.approx(a, rel=1e-3),
        pytest.approx(b, abs=1e-4),
        pytest.approx(c, rel=1e-3),
    )
    assert found.r2 == pytest.approx(1)
    assert found(2e4) == pytest.approx(a * 2e4**b + c, rel=1e-4)


def test_noise_widens_the_interval_of_the_exponent():
    x = np.geomspace(1, 1e4, 12)
    y = 3 * x**0.3 + np.random.default_rng(0).normal(0, 0.3, 12)
    found = fit_power_law(x, y, draws=60)
    assert found.b_interval[0] <= 0.3 <= found.b_interval[1]
    assert found.b_interval[1] - found.b_interval[0] > 0.01
    assert 0.9 < found.r2 < 1


def test_too_few_points_are_refused():
    for x in ([1, 2, 3], [1, 1, 2, 3], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="power law needs"):
            fit_power_law(x, [1.0] * len(x))


def test_the_table_shows_means_over_seeds_and_only_finished_runs(tmp_path, capsys):
    for name, seed, value in (("din.100", 0, 0.70), ("din.100", 1, 0.72), ("longer.100", 0, 0.71)):
        run = tmp_path / f"{name}.{seed}"
        run.mkdir()
        done = {"test": {"auc": value, "logloss": 0.6, "gauc": 0.6}, "labels": 128, "seconds": 3.0,
                "params": {"dense": 10, "tables": 20}, "flops_per_label": None if "din" in name else 2e6}  # fmt: skip
        (run / "run.json").write_text(json.dumps({"done": done}))
    (tmp_path / "longer.100.1").mkdir()
    text = markdown(read_runs(tmp_path))
    assert "| din | 128 | 2 | .7100 ± .0141 |" in text
    assert "| longer | 128 | 1 | .7100 |" in text
    assert main([str(tmp_path), "--figure", str(tmp_path / "t.svg")]) == 0
    assert capsys.readouterr().out == text
    assert (tmp_path / "t.svg").stat().st_size > 1000
    assert main([str(tmp_path / "none")]) == 66
