"""The benches run, and what they write has one shape."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from bench.common import ENVIRONMENT, ROOT, Figure, Skip, alternate, in_child
from bench.run import BENCHES, main

KEYS = {
    *("bench", "name", "value", "unit", "ratio_of", "target", "met", "spread", "repeats", "note", "skipped"),
    *("quick", "at", "commit", "machine", "versions"),
}


def bench(*words):
    return subprocess.run([sys.executable, ROOT / "bench/run.py", *words], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["help", "records", "filter"])
def test_a_quick_run_appends_whole_figures_and_shows_them(name, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"earlier": true}\n')
    ended = bench("--quick", "--only", name, "--out", results)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    earlier, *lines = results.read_text().splitlines()
    assert earlier == '{"earlier": true}'
    assert lines
    for line in lines:
        figure = json.loads(line)
        assert set(figure) == KEYS
        assert figure["skipped"] is None
        assert figure["value"] > 0
        assert figure["name"] in ended.stderr
        assert figure["unit"] != "×" or figure["ratio_of"]
        assert (figure["met"] is None) == (figure["target"] is None)
        assert figure["machine"]["cores"] >= 1
        assert figure["versions"]["python"]
        if figure["spread"]:
            assert figure["spread"][0] <= figure["spread"][1]
        assert str(ROOT) not in line
        assert socket.gethostname() not in line


@pytest.mark.slow
def test_help_is_measured_for_every_command_there_is(tmp_path):
    results = tmp_path / "results.jsonl"
    assert bench("--quick", "--only", "help", "--out", results).returncode == 0
    names = {json.loads(line)["name"] for line in results.read_text().splitlines()}
    for path in (ROOT / "bin").iterdir():
        assert {f"help: {path.name} --help", f"help: {path.name} usage error"} <= names


def test_an_unknown_bench_is_a_usage_error():
    ended = bench("--only", "nothing")
    assert ended.returncode == 2
    assert "token-loss" in ended.stderr


def test_a_figure_is_the_median_with_its_spread_and_knows_whether_it_is_good_enough():
    speed = Figure.of("speed", [3.0, 1.0, 1.5], "×", ratio_of="a / b", target=">= 1.5")
    assert (speed.value, speed.spread, speed.repeats, speed.met) == (1.5, (1.0, 3.0), 3, True)
    assert Figure.of("speed", [1.49], "×", target=">= 1.5").met is False
    assert Figure("time", 1.0, "s", target="< 1").met is False
    assert Figure("time", 1.0, "s").met is None


def skips(_):
    raise Skip("no such device")


def fails(_):
    raise ValueError("broken")


@pytest.mark.parametrize(("broken", "code"), [(skips, 0), (fails, 1)])
def test_what_cannot_run_says_why_and_what_breaks_fails_but_not_the_others(monkeypatch, tmp_path, broken, code):
    for name, value in ENVIRONMENT.items():  # as main does; undone behind the test
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(BENCHES, "first", broken)
    monkeypatch.setitem(BENCHES, "second", lambda _: iter([Figure("fine", 2.0, "s")]))
    results = tmp_path / "results.jsonl"
    assert main(["--only", "first", "--only", "second", "--out", str(results)]) == code
    figures = [json.loads(line) for line in results.read_text().splitlines()]
    assert figures[-1]["name"] == "fine"
    skipped = [(figure["name"], figure["value"], figure["skipped"]) for figure in figures[:-1]]
    assert skipped == ([("first", None, "no such device")] if broken is skips else [])


def test_functions_take_turns_after_one_untimed_call_each():
    calls = []
    seconds = alternate(2, {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls == [*"ab", *"ab", *"ba"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def doubles(number, text):
    return {"number": 2 * number, "text": text, "read": len(sys.stdin.read())}


def test_a_child_gives_back_a_value_a_reason_or_a_failure():
    assert in_child(doubles, 2, "é", feed=[b"ab", b"c"]) == {"number": 4, "text": "é", "read": 3}
    with pytest.raises(Skip, match="no such device"):
        in_child(skips, 0)
    with pytest.raises(RuntimeError, match="fails ended with 1"):
        in_child(fails, 0)
