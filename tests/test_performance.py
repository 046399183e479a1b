"""docs/performance.md is what has been measured, whatever is missing."""

from __future__ import annotations

import re

from bench import performance
from bench.common import ROOT, Figure
from bench.run import BENCHES


def row(bench, figure, at="2026-01-01T00:00:00Z", quick=False):
    return {
        "bench": bench, **figure.record(), "quick": quick, "at": at, "commit": "abc",
        "machine": {"cpu": "A_B", "cores": 2, "load": 0.5}, "versions": {"python": "3.11", "none": None},
    }  # fmt: skip


FAST = Figure.of("tune: speed", [3.0, 2.0, 2.5], "×", ratio_of="a | b", target=">= 2")
SLOW = Figure("tune: other", 5.0, "CPU-s", target="< 4")


def test_the_page_is_that_of_the_kept_measurements():
    rows = performance.read(performance.MEASURED)
    assert rows == performance.latest(rows)
    assert (ROOT / "docs/performance.md").read_text(encoding="utf-8") == performance.page(rows), "run `make docs`"


def test_the_last_whole_run_of_a_bench_stands_and_quick_runs_do_not():
    old, new, quick = row("tune", FAST), row("tune", SLOW, at="2026-01-02T00:00:00Z"), row("tune", FAST, quick=True)
    skipped = row("tune", Figure("tune", None, "", skipped="no data"), at="2026-01-03T00:00:00Z")
    gone = row("no-such-bench", FAST)
    unnamed = {key: value for key, value in old.items() if key != "bench"}
    assert performance.latest([new, old, quick, skipped, gone, unnamed]) == [new]
    assert performance.latest([skipped]) == [skipped]
    other = row("help", SLOW)
    assert performance.latest([old, other]) == [other, old]  # in the order of the benches


def test_met_missed_and_not_measured_are_told_apart():
    skipped = row("score", Figure("score", None, "", skipped="no data"))
    text = performance.page([row("tune", FAST), row("tune", SLOW), skipped])
    assert "**1 of 2 targets are met, 1 missed.**" in text
    assert "| tune: speed<br><sub>a \\| b</sub> | `tune` | 2.5 × | 2 … 3 | 3 | ≥ 2 | met |" in text
    assert "| `tune` | 5 CPU-s |  | 1 | < 4 | **missed** |" in text
    assert text.index("tune: other") < text.index("tune: speed")
    assert re.search(r"^\| `score` \|.*\| no data \|$", text, re.MULTILINE)
    assert text.count("| not measured |") == len(BENCHES) - 2
    assert "A\\_B, 2 cores; python 3.11" in text


def test_nothing_measured_is_a_page_too():
    text = performance.page([])
    assert "**0 of 0 targets are met, 0 missed.**" in text
    assert text.count("| not measured |") == len(BENCHES)


def test_of_all_commands_the_slowest_is_shown():
    times = [
        row("help", Figure(f"help: {name} --help", t, "CPU-ms", target="< 150")) for name, t in (("a", 9), ("b", 200))
    ]
    (shown,) = performance.slowest(times)
    assert (shown["name"], shown["note"], shown["met"]) == (
        "help: the slowest --help of 2 commands", "b --help", False,
    )  # fmt: skip


def test_the_chart_is_drawn(tmp_path):
    performance.chart([row("tune", FAST), row("tune", SLOW)], tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_the_readme_of_the_benches_has_each_once():
    assert set(performance.targets()) == set(BENCHES)
