"""landscape-plot's directory: existing, cut off and gone on with, on a full disk, out of memory."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.landscape.runs import (
    FAST,
    ROWS,
    lines,
    make_rows,
    same_files,
)
from tests.server import Client
from toolbox.landscape.scoring import round_sizes
from toolbox.models.chain_plan import Batch
from toolbox.shell.errors import IoFailure, TryAgain


def test_an_existing_output_is_73_and_survives_until_it_is_overwritten(plot, tmp_path):
    assert plot().code == 0
    before = (tmp_path / "out" / "features.safetensors").read_bytes()
    for rows in (ROWS, make_rows(seed=1)):
        again = plot(rows=rows)
        assert (again.code, again.out) == (73, b"")
        assert "--overwrite" in again.err
    assert (tmp_path / "out" / "features.safetensors").read_bytes() == before
    assert plot("--overwrite", rows=make_rows(seed=1)).code == 0
    assert (tmp_path / "out" / "features.safetensors").read_bytes() != before
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("kept")
    assert plot("--overwrite", out="theirs").code == 73
    assert (tmp_path / "theirs" / "file").read_text() == "kept"


def test_a_finished_directory_is_told_again_and_scores_nothing(plot, tmp_path):
    first = plot()
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = plot("--resume", "--batch-tokens", "64")
    assert (again.code, again.out) == (0, first.out)
    assert "is finished; nothing was scored" in again.err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    for more, rows, says in (
        (["--separator", " "], ROWS, "with another --separator: was \\n, now  "),
        (["--bins", "4"], ROWS, "with another --bins: was 5, now 4"),
        ([], ROWS[1:], "with another data (paths)"),
        ([], [{**row, "pred": "A"} for row in ROWS], "with another data (paths)"),
    ):
        other = plot("--resume", *more, rows=rows)
        assert (other.code, other.out) == (2, b"")
        assert says in other.err


def test_a_dry_run_counts_tokens_by_method_and_writes_nothing(plot, tmp_path):
    done = plot("--dry-run")
    assert done.code == 0, done.err
    (plan,) = done.rows
    tokens = plan["tokens"]
    assert tokens["tree"] < tokens["prefix"] < tokens["naive"]
    assert plan["states"] + 12 == plan["asked"] / 3
    assert plan["flops"] == {method: 2 * plan["parameters"] * count for method, count in tokens.items()}
    assert plan["memory_bytes"] > 4 * plan["parameters"]
    assert (plan["respelt"], plan["window"], plan["k"]) == (0, 512, {"3": 3})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("budget", "sizes"), [(1, [1, 1, 1, 1]), (40, [2, 2]), (31, [2, 2]), (30, [1, 2, 1]),
                                               (1000, [4])])  # fmt: skip
def test_rounds_hold_as_many_batches_as_reach_the_budget(budget, sizes):
    batches = [Batch((n, n + 10), "tree", 0, tokens) for n, tokens in enumerate([30, 5, 10, 25, 30])]
    assert round_sizes(batches, {1, 11, 2}, budget) == sizes
    assert round_sizes(batches, set(range(20)), budget) == []


MANY = make_rows(12, 5, longest=9, seed=3)


class Killable:
    """landscape-plot on ``MANY``, started in the background."""

    def __init__(self, tool: Client, tiny: Path, folder: Path) -> None:
        self.tool, self.folder = tool, folder
        self.words = ["--model", tiny, *FAST, "--out", folder / "out", folder / "many.jsonl"]
        (folder / "many.jsonl").write_text(lines(MANY))
        self.journal = folder / "out.partial" / "step-scores"

    def start(self, *more: object) -> Any:
        with open(os.devnull, "r+b") as null, (self.folder / "stderr").open("ab") as err:
            return self.tool.start("landscape-plot", *self.words, *more,
                                   fds=(null.fileno(), null.fileno(), err.fileno()))  # fmt: skip

    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def wait_for(self, size: int, running: Any) -> None:
        deadline = time.monotonic() + 60
        while self.size() < size and alive(running.pid):
            assert time.monotonic() < deadline, "it did not come so far"
            time.sleep(0.0005)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_killed_while_scoring_again_and_again_and_resumed_it_ends_with_the_same_bytes(tool, tiny, tmp_path):
    job, draw, killed = Killable(tool, tiny, tmp_path), random.Random(0), 0
    whole = tool("landscape-plot", "--model", tiny, *FAST, "--out", tmp_path / "whole", tmp_path / "many.jsonl")
    assert whole.code == 0, whole.err
    for _ in range(2):
        running = job.start(*(["--resume"] if killed else []))
        job.wait_for(job.size() + draw.randint(200, 6000), running)
        os.kill(running.pid, signal.SIGKILL)
        killed += running.wait() == 137
        assert not (tmp_path / "out").exists()
    assert killed == 2
    assert job.size() > 1000
    plain = tool("landscape-plot", *job.words)
    assert plain.code == 73
    assert "--resume" in plain.err
    with job.journal.open("ab") as handle:
        handle.write(b"\x99\x00\x00\x00torn")
    other = tool("landscape-plot", *job.words, "--resume", "--separator", " ")
    assert (other.code, other.out) == (2, b"")
    assert "with another --separator" in other.err
    last = tool("landscape-plot", *job.words, "--resume")
    assert (last.code, last.out) == (0, whole.out), last.err
    assert re.search(r"goes on: [1-9]\d* of 60 paths were scored before", last.err)
    same_files(tmp_path / "whole", tmp_path / "out")
    before = json.loads((tmp_path / "out" / "run.json").read_text())["scored_before"]
    assert f"({60 - before} paths scored, {before} were scored before)" in last.err
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_two_processes_killed_and_resumed_by_one_end_with_the_same_bytes(tool, tiny, tmp_path):
    job = Killable(tool, tiny, tmp_path)
    small = ("--batch-tokens", "300")  # short rounds; what is fed at once decides the last bits
    whole = tool("landscape-plot", "--model", tiny, *FAST, *small, "--out", tmp_path / "whole", tmp_path / "many.jsonl")
    assert whole.code == 0, whole.err
    running = job.start("-j", "2", *small)
    job.wait_for(2000, running)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == 137
    last = tool("landscape-plot", *job.words, *small, "--resume")
    assert (last.code, last.out) == (0, whole.out), last.err
    before = int(re.search(r"goes on: ([1-9]\d*) of 60 paths were scored before", last.err)[1])
    assert before < 60
    same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_a_bad_row_ends_two_processes_with_its_own_code_and_one_message(tool, tiny, tmp_path):
    rows = [*ROWS, {**ROWS[0], "path_id": "x", "answer": "Z"}]
    done = tool("landscape-plot", "--model", tiny, *FAST, "-j", "2", "--out", tmp_path / "out", stdin=lines(rows))
    assert (done.code, done.out) == (65, b""), done.err
    assert done.err.count("is not among the labels") == 1
    assert not (tmp_path / "out").exists()


def test_asked_to_stop_it_keeps_what_is_scored_and_says_75(tool, tiny, tmp_path):
    job = Killable(tool, tiny, tmp_path)
    running = job.start()
    job.wait_for(1000, running)
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait() == 75
    said = (tmp_path / "stderr").read_text()
    assert re.search(r"interrupted; [1-9]\d* of 60 paths are scored", said)
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    assert tool("landscape-plot", *job.words, "--resume").code == 0


def test_scores_outlive_a_full_disk_and_need_no_model_then(plot, made, tmp_path, monkeypatch):
    from toolbox.landscape import output, scoring

    def full(directory: Path, result: Any) -> None:
        (directory / "coords.jsonl").write_text("half")
        raise IoFailure("No space left on device", "free some space")

    with monkeypatch.context() as patched:
        patched.setattr(output, "write_directory", full)
        assert plot().code == 74
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(scoring, "score_paths", None)  # to be called would be an error
    again = plot("--resume")
    assert (again.code, again.out) == (0, made.done.out), again.err
    assert "(0 paths scored, 12 were scored before)" in again.err
    same_files(made.out, tmp_path / "out")


def test_memory_that_runs_out_is_75_and_keeps_what_is_scored(plot, made, tmp_path, monkeypatch):
    from toolbox.models import chain_passes

    run, calls = chain_passes.Passes.run, []

    def short(self: Any, batch: Any, chains: Any) -> Any:
        calls.append(batch)
        if len(calls) == 6:
            raise TryAgain("out of memory while scoring", "try a smaller --batch-tokens")
        return run(self, batch, chains)

    with monkeypatch.context() as patched:
        patched.setattr(chain_passes.Passes, "run", short)
        done = plot()
    assert (done.code, done.out) == (75, b"")
    assert "try a smaller --batch-tokens; --resume goes on" in done.err
    again = plot("--resume", "--batch-tokens", "512")
    assert (again.code, again.out) == (0, made.done.out)
    assert "goes on: 5 of 12 paths were scored before" in again.err
    same_files(made.out, tmp_path / "out")
