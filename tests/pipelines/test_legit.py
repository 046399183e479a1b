"""Designs by hand and by loop, with a language model, interrupted, shared among processes, on real rows."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import SHARED
from tests.loopback import Answer, Loopback, said
from tests.server import ROOT, environment

SHORT = ["--obs-iters", "20", "--model-iters", "4", "--graph-iters", "6", "--hidden", "8", "--num-graphs", "20"]
QUICK = [*SHORT, "--imagined-graphs", "3", "--imagined-rows", "8"]
CANCER = ["Cancer", "Dyspnoea", "Pollution", "Smoker", "Xray"]


def shell(script: str, folder: Path) -> None:
    """A script with the executables of this checkout."""
    env = {**environment(), "PATH": f"{ROOT / 'bin'}:{environment()['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_three_rounds_by_hand_are_the_first_three_of_the_loop(tool, tmp_path):
    data, asked = tool("legit-sim", "--network", "cancer", "-n", "200", "--seed", "1").out, b""
    for _ in range(3):
        target = tool(
            "legit-target", "--network", "cancer", "--state", tmp_path / "s", "--seed", "1", *QUICK, stdin=data
        )
        asked += target.out
        data += tool("legit-sim", "--network", "cancer", "--from", "-", "--seed", "1", stdin=target.out).out
    (tmp_path / "t.jsonl").write_bytes(asked)
    loop = tool(
        "legit-loop", "--network", "cancer", "--strategies", "git", "--seeds", "1", "--seed", "1", "--rounds", "4",
        "--n-obs", "200", *QUICK, "--state", "designs", cwd=tmp_path,
    )  # fmt: skip
    assert loop.code == 0, loop.err
    by_hand = lines(tmp_path / "t.jsonl")
    keys = ("round", "target", "stage", "score")
    by_loop = [{key: row[key] for key in keys} for row in loop.rows if row["event"] == "round"]
    assert [{key: row[key] for key in keys} for row in by_hand] == by_loop[:3]
    fitted = tool("legit-fit", "--state", tmp_path / "s", stdin=data)
    assert fitted.rows[0] == {**fitted.rows[0], "record": "graph", "nodes": CANCER, "rows": 296}
    files = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    assert files.keys() == {"state.json", "state-000003.safetensors", ".lock"}
    stateless = tool(
        "legit-target",
        "--network",
        "cancer",
        "--stateless",
        "--seed",
        "1",
        *QUICK,
        "--top-k",
        "2",
        "--explain",
        stdin=data,
    )
    assert stateless.rows[0]["target"] == by_loop[3]["target"]
    assert stateless.rows[0]["score"] == by_loop[3]["score"]
    assert [row["rank"] for row in stateless.rows] == [1, 2]
    assert sorted(stateless.rows[0]["scores"]) == CANCER
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == files
    _a_state_knows_what_it_has_seen(tool, tmp_path, data, by_hand)


@pytest.mark.slow
def test_the_shell_line_of_a_round_may_be_run_again_and_again(tmp_path):
    quick = " ".join(QUICK)
    one_round = (
        f"legit-target --network asia --state s --strategy git {quick} < d.jsonl | tee -a t.jsonl |"
        " legit-sim --network asia -n 32 --from - --seed 1 >> d.jsonl\n"
    )
    last = "legit-fit --state s < d.jsonl | legit-score --truth asia > score.jsonl"
    shell("legit-sim --network asia -n 5000 --seed 1 > d.jsonl\n" + 3 * one_round + last, tmp_path)
    assert [row["round"] for row in lines(tmp_path / "t.jsonl")] == [1, 2, 3]
    assert len(lines(tmp_path / "d.jsonl")) == 5096
    assert lines(tmp_path / "score.jsonl")[0]["shd_empty"] == 8


def _a_state_knows_what_it_has_seen(tool, folder: Path, data: bytes, by_hand: list[dict]) -> None:
    base = ["--state", folder / "s", "--seed", "1", *QUICK]
    rows = data.splitlines(keepends=True)

    def call(*more, stdin=data):
        before = (folder / "s" / "state.json").read_bytes()
        done = tool("legit-target", *base, *more, stdin=stdin)
        return done, (folder / "s" / "state.json").read_bytes() == before

    done, same = call(stdin=b"".join(rows[:-32]))
    assert (done.code, same, done.rows) == (0, True, by_hand[-1:])  # nothing new: the pending target, again
    changed = b"".join([*rows[:6], rows[6].replace(b'"low"', b'"high"') if b'"low"' in rows[6] else
                        rows[6].replace(b'"high"', b'"low"'), *rows[7:]])  # fmt: skip
    for more, stdin, says in [
        ((), changed, "stdin:7: not the row that the state has seen here"),
        ((), b"".join(rows[:100]), "100 rows, and the state has seen 264"),
        (("--hidden", "9"), data, "--hidden was 8"),
        (("--network", "asia"), data, "other variables"),
        (("--strategy", "ait"), data, "--strategy was git"),
    ]:
        done, same = call(*more, stdin=stdin)
        assert (done.code, done.out, same) == (65, b"", True), done.err
        assert says in done.err
    other = rows[-1].replace(f'"targets":["{json.loads(rows[-1])["targets"][0]}"]'.encode(), b'"targets":["Xray"]')
    if json.loads(rows[-1])["targets"] == ["Xray"]:
        other = rows[-1].replace(b'"targets":["Xray"]', b'"targets":["Smoker"]')
    done, _ = call(stdin=b"".join([*rows[:-32], other]))
    assert done.code == 0
    assert "was to be the target" in done.err
    assert done.rows[0]["round"] == 4


ROW = '{"values": {"Cancer": "True", "Dyspnoea": "True", "Pollution": "low", "Smoker": "True", "Xray": "positive"}}\n'


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "says"),
    [
        ([], ROW.replace("low", "medium"), 65, "stdin:1: $.values.Pollution: Pollution has no state 'medium'"),
        ([], ROW.replace('"low"', "null"), 65, "no value for Pollution"),
        ([], ROW.replace('"low"', "0.5"), 65, "is a number"),
        ([], ROW.replace("Smoker", "Smokes"), 65, "no value for Smoker"),
        ([], ROW.replace("}}", '}, "targets": ["Xray", "Cancer"]}'), 65, "two targets in a row"),
        ([], ROW.replace("}}", '}, "targets": ["Nobody"]}'), 65, "is no variable"),
        ([], ROW.replace("}}", '}, "targets": ["Xray"]}'), 65, "no observed rows"),
        (["--forbid", ",".join(CANCER)], ROW, 65, "no variable can be a target"),
        (["--forbid", "Nobody"], ROW, 2, "no such variable"),
        (["--strategy", "legit+git"], ROW, 2, "needs a language model"),
        (["--strategy", "git-privileged"], ROW, 2, "needs a simulator"),
        (["--strategy", "best"], ROW, 2, "not known"),
        (["--network", "cancr"], ROW, 66, "no such network"),
        (["--variables", "x"], ROW, 2, "exclude one another"),
        (["--device", "cuda:99"], ROW, 69, "--device cuda:99"),
    ],
)
def test_bad_input_is_one_line_with_its_code(tool, arguments, stdin, code, says):
    done = tool("legit-target", "--network", "cancer", "--stateless", *QUICK, *arguments, stdin=stdin)
    assert (done.code, done.out) == (code, b""), done.err
    assert says in done.err
    assert "Traceback" not in done.err


def test_bad_input_of_the_other_commands(tool, rows, tmp_path):
    graph = [{"record": "graph", "nodes": CANCER}, {"source": "Smoker", "target": "Cancer"}]
    cyclic = [graph[0], *({"source": a, "target": b} for a, b in (("Xray", "Cancer"), ("Cancer", "Xray")))]
    few = rows("few.jsonl", [{"values": {"a": "x"}, "targets": ["a"]}] * 3)
    twice = rows("twice.jsonl", [{"name": "a"}, {"name": "a"}])
    text = "".join(json.dumps(row) + "\n" for row in graph)
    for words, stdin, code, says in [
        (["legit-fit", "--network", "cancer"], ROW, 65, "no row has a target"),
        (["legit-fit", "--state", tmp_path / "none"], ROW, 66, "no state is here"),
        (["legit-fit", "--variables", twice], ROW, 65, "is there twice"),
        (["legit-fit"], ROW.replace("}}", '}, "targets": ["Xray"]}'), 65, "has 1 state in these rows"),
        (["legit-score", "--truth", "asia"], text, 65, "is of other nodes"),
        (["legit-score", "--truth", rows("t.jsonl", cyclic)], text, 65, "directed cycle"),
        (["legit-score", "--truth", "cancer"], text.splitlines()[1], 65, "without a graph before it"),
        (["legit-score", "--truth", "nowhere.csv"], text, 66, "no such file"),
        (["legit-sim", "--network", "cancer", "--do", "Nobody"], "", 65, "no variable of the network"),
        (["legit-sim", "--network", "cancer", "--do", "Xray=blue"], "", 65, "has no state 'blue'"),
        (
            ["legit-sim", "--pool", few, "--from", "-"],
            '{"target": "a", "n": 2, "occurrence": 1}',
            65,
            "rows by target: a 3",
        ),
        (["legit-sim"], "", 2, "--network or from --pool"),
        (["legit-loop", "--network", "cancer", "--strategies", "git", "--baseline", "ait"], "", 2, "not among"),
        (["legit-loop", "--network", "cancer", "--plot", "x.gif"], "", 2, ".html"),
        (["legit-loop", "--experiment", "true"], "", 2, "needs --observations"),
        (["legit-loop", "--pool", few, "--strategies", "git-privileged"], "", 2, "needs a simulator"),
    ]:
        done = tool(*words, stdin=stdin, cwd=tmp_path)
        assert (done.code, done.out) == (code, b""), (words, done.err)
        assert says in done.err, (words, done.err)
    scored = tool("legit-score", "--truth", "cancer", stdin="".join(json.dumps(row) + "\n" for row in cyclic)).rows[0]
    assert (scored["acyclic"], scored["dropped"], scored["shd"]) == (False, 1, 4)


def test_numbers_are_cut_into_bins_that_the_state_keeps(tool, tmp_path):
    draw = random.Random(0)
    data = [{"values": {"a": draw.gauss(0, 1), "b": draw.random(), "c": draw.choice("xy")}} for _ in range(60)]
    more = [{"values": {"a": 9.0, "b": -3, "c": "x"}, "targets": ["a"]}]

    def call(rows, *words):
        return tool(
            "legit-target",
            "--state",
            tmp_path / "s",
            *QUICK,
            *words,
            stdin="".join(map(json.dumps, rows)).replace("}{", "}\n{"),
        )

    first = call(data, "--bins", "3")
    assert first.code == 0, first.err
    state = json.loads((tmp_path / "s" / "state.json").read_text())
    assert {name: len(edges) for name, edges in state["bins"].items()} == {"a": 2, "b": 2}
    assert [len(one["states"]) for one in state["variables"]] == [3, 3, 2]
    assert call(data + more, "--bins", "3").rows[0]["round"] == 2
    assert json.loads((tmp_path / "s" / "state.json").read_text())["bins"] == state["bins"]


def scripted(seen) -> Answer:
    """A server that names Smoker and Pollution first, then Xray and Dyspnoea, with a little nonsense."""
    names = "Xray, nonsense, Dyspnoea" if "were done on" in seen.asked else "smoker, Pollution, Cancer"
    return Answer(said(seen, f"Let me think. <Answer>{names}</Answer>"))


def with_descriptions(rows) -> Path:
    from toolbox.legit.network import read_network

    own = dict(zip(CANCER, read_network("cancer").states, strict=True))
    return rows("v.jsonl", [{"name": name, "description": f"about {name}", "domain": "lungs", "states": own[name]}
                            for name in CANCER])  # fmt: skip


def test_a_language_model_plans_ten_rounds_its_log_replays_them_and_a_server_that_is_down_costs_nothing(
    tool, rows, tmp_path
):
    variables = with_descriptions(rows)
    common = ["--network", "cancer", "--variables", variables, "--strategies", "legit+random", "--seeds", "1",
              "--rounds", "11", "--n-obs", "60", "-n", "4", *QUICK]  # fmt: skip
    with Loopback(scripted) as server:
        ask = ["--backend", "openai", "--base-url", server.url, "--model", "m", "--log", tmp_path / "log.jsonl"]
        live = tool("legit-loop", *common, *ask)
        assert live.code == 0, live.err
        assert len(server.seen) == 10
        assert all("about Smoker" in one.asked and "True" not in one.asked for one in server.seen)
        url = server.url
    rounds = [row for row in live.rows if row["event"] == "round"]
    names = ["Smoker", "Pollution", "Cancer", "Xray", "Dyspnoea"]
    assert [row["target"] for row in rounds[:10]] == names * 2
    assert [row["stage"] for row in rounds] == ["warmup"] * 3 + ["bootstrap"] * 2 + ["resample"] * 5 + ["numeric"]
    again = tool("legit-loop", *common, "--backend", "replay", "--replay", tmp_path / "log.jsonl")
    assert again.out == live.out
    data = tool("legit-sim", "--network", "cancer", "-n", "60").out
    target = ["legit-target", "--variables", variables, "--state", tmp_path / "s", "--strategy", "legit+random", *QUICK]
    down = ["--backend", "openai", "--base-url", url, "--model", "m", "--retries", "0"]
    failed = tool(*target, *down, stdin=data)
    assert (failed.code, failed.out) == (69, b"")
    assert not (tmp_path / "s" / "state.json").exists()
    numeric = tool(*target, *down, "--on-llm-error", "numeric", stdin=data)
    assert (numeric.rows[0]["stage"], numeric.rows[0]["fallback"]) == ("numeric", "endpoint")


def test_a_small_model_here_proves_the_plumbing_by_falling_back(tool, tiny, rows, tmp_path):
    (tmp_path / "short.txt").write_text("Choose {ask} of\n{variables}\n")  # the tiny model's window is short
    loop = tool(
        "legit-loop", "--network", "cancer", "--variables", with_descriptions(rows), "--strategies", "legit+random",
        "--seeds", "1", "--rounds", "6", "--n-obs", "60", "-n", "4", *QUICK, "--backend", "local", "--model", tiny,
        "--max-new-tokens", "4", "--self-consistency", "2", "--redraws", "0",
        "--prompt-warmup", tmp_path / "short.txt", "--prompt-bootstrap", tmp_path / "short.txt",
    )  # fmt: skip
    assert loop.code == 0, loop.err
    run = next(row for row in loop.rows if row["event"] == "run")
    assert run["stages"] == {"numeric": 6}
    assert run["fallbacks"] == {"no-valid-name": 5}
    assert run["answers_without_names"] == run["answers"] == 4


def test_a_command_does_the_experiments_and_its_failure_keeps_what_was_done(tool, rows, tmp_path):
    measure = f"exec {sys.executable} {ROOT}/bin/legit-sim --network cancer --from - --seed 5"
    (tmp_path / "lab.sh").write_text(f"#!/bin/bash\n[ -e {tmp_path}/broken ] && exit 3\n{measure}\n")
    (tmp_path / "lab.sh").chmod(0o755)
    (tmp_path / "o.jsonl").write_bytes(tool("legit-sim", "--network", "cancer", "-n", "60").out)
    words = ["legit-loop", "--experiment", tmp_path / "lab.sh", "--observations", tmp_path / "o.jsonl", "--strategies",
             "round-robin", "--seeds", "1", "-n", "4", *QUICK, "--state", tmp_path / "s", "--rounds", "2",
             "--variables", with_descriptions(rows)]  # fmt: skip
    (tmp_path / "broken").touch()
    failed = tool(*words)
    assert failed.code == 75
    assert "left with 3" in failed.err
    (tmp_path / "broken").unlink()
    assert tool(*words).code == 73
    done = tool(*words, "--resume")
    assert done.code == 0, done.err
    first = next(row for row in done.rows if row["event"] == "round")
    assert "shd" not in first
    assert first["rows"] == 4


def test_a_pool_is_asked_only_for_what_it_has(tool, rows, tmp_path):
    draw = random.Random(1)
    pool = [
        {"values": {name: draw.choice("xyz") for name in "abc"}, "targets": targets}
        for targets in [[]] * 30 + [["a"]] * 8 + [["b"]] * 5 for _ in range(1)
    ]  # fmt: skip
    words = [
        "legit-loop",
        "--pool",
        rows("p.jsonl", pool),
        "--strategies",
        "random,git",
        "--seeds",
        "2",
        "-n",
        "4",
        *QUICK,
    ]
    done = tool(*words, "--rounds", "3", "--plot", tmp_path / "x.html", "--plot", tmp_path / "x.svg")
    assert done.code == 0, done.err
    picks = [row["picks"] for row in done.rows if row["event"] == "run"]
    assert picks == [{"a": 2, "b": 1}] * 4
    page = (tmp_path / "x.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")
    short = tool(*words, "--rounds", "4")
    assert short.code == 65
    assert "no variable can be a target" in short.err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    words = [sys.executable, ROOT / "bin/legit-loop", "--network", "cancer", "--strategies", "round-robin,git",
             "--seeds", "2", "--rounds", "3", "--n-obs", "60", *QUICK]  # fmt: skip
    done = [
        subprocess.run([*map(str, words), *more], env=environment(), capture_output=True) for more in ([], ["-j", "2"])
    ]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    assert done[0].stdout == done[1].stdout
    assert done[0].stdout.count(b"\n") > 12


@pytest.mark.slow
def test_killed_at_random_moments_ten_times_rows_and_state_are_the_same(tmp_path):
    words = [sys.executable, str(ROOT / "bin/legit-loop"), "--network", "cancer", "--strategies", "git", "--seeds", "1",
             "--rounds", "10", "--n-obs", "100", "--obs-iters", "300", "--model-iters", "60", "--graph-iters", "60",
             "--hidden", "16"]  # fmt: skip

    def go(folder: str, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*words, "--state", str(tmp_path / folder), *more], env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    whole = go("whole").communicate()[0]
    draw = random.Random(4)
    kills, seconds = 0, 8.0
    while kills < 10:
        running = go("cut", "--resume")
        try:
            running.wait(draw.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            kills += 1
            running.communicate()
        else:  # it got to its end between two kills: begin anew
            assert running.returncode == 0, running.communicate()[1]
            shutil.rmtree(tmp_path / "cut")
            seconds *= 0.7
    last = go("cut", "--resume")
    assert last.communicate()[0] == whole
    names = sorted(os.listdir(tmp_path / "whole/git-seed-0"))
    assert names == sorted(os.listdir(tmp_path / "cut/git-seed-0"))
    for name in names:
        assert (tmp_path / "whole/git-seed-0" / name).read_bytes() == (tmp_path / "cut/git-seed-0" / name).read_bytes()


def test_a_state_in_use_is_73(tool, tmp_path):
    from toolbox.legit.state import StateDirectory

    began = time.monotonic()
    with StateDirectory(tmp_path / "s"):
        done = tool("legit-target", "--network", "cancer", "--state", tmp_path / "s", *QUICK, stdin=ROW)
    assert done.code == 73
    assert time.monotonic() - began < 60


@pytest.fixture
def sachs() -> Path:
    path = SHARED / "legit"
    if not (path / "sachs.discrete.jsonl.gz").is_file():
        pytest.skip(f"the measured proteins are not here ({path})")
    return path


def test_the_measured_proteins_are_asked_for_what_was_perturbed(tool, sachs):
    done = tool(
        "legit-loop", "--pool", sachs / "sachs.discrete.jsonl.gz", "--variables", sachs / "sachs.variables.jsonl",
        "--truth", "sachs", "--strategies", "random", "--seeds", "1", "--rounds", "8", "-n", "200", *SHORT,
    )  # fmt: skip
    assert done.code == 0, done.err
    rounds = [row for row in done.rows if row["event"] == "round"]
    assert {row["target"] for row in rounds} <= {"Mek", "PIP2", "Akt", "PKA", "PKC"}
    assert {row["shd_empty"] for row in rounds} == {17}
    assert max(next(row for row in done.rows if row["event"] == "run")["picks"].values()) <= 6
