"""Killed and resumed, a run ends with the same bytes as if nothing had happened: at chosen moments, and what it says of
itself meanwhile. Random moments, for every command: the table."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.server import Client

SLOW = ("satimp-unlearn", "gru-unlearn")  # the loop and its states are the same code
ROWS = [{"question": f"Who is number {i}?", "answer": f"Number {i} is {'a ' * (i % 4)}thing."} for i in range(8)]


def timeless(events: list[dict]) -> list[dict]:
    return [{k: v for k, v in event.items() if k not in ("seconds", "settings", "model")} for event in events]


def logged(out: Path) -> list[dict]:
    return timeless([json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()])


class Job:
    """One trainer on the tiny model: 12 steps, a state behind each."""

    def __init__(self, tool: Client, command: str, tiny: Path, data: Path) -> None:
        self.tool, self.command = tool, command
        self.words = ["--model", tiny, "--epochs", "6", "--batch-size", "4", "--lr", "1e-2", "--save-every", "1"]
        if command == "lm-tune":
            self.words += [data, "--watch", f"seen={data}"]
        else:
            self.words += ["--forget", data, "--retain", data.with_name("retain.jsonl")]

    def start(self, out: Path, *more: object):
        """Start with stdout and stderr in files beside ``out``."""
        with (
            open(os.devnull, "rb") as source,
            out.with_suffix(".stdout").open("ab") as sink,
            out.with_suffix(".stderr").open("ab") as err,
        ):
            fds = (source.fileno(), sink.fileno(), err.fileno())
            return self.tool.start(self.command, *self.words, *more, "--out", out, fds=fds)

    def __call__(self, out: Path, *more: object):
        return self.tool(self.command, *self.words, *more, "--out", out)


@pytest.fixture(params=["lm-tune", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def job(request, tool, tiny, rows) -> Job:
    data = rows("data.jsonl", ROWS)
    rows("retain.jsonl", [{"text": f"Keep this sentence number {i}."} for i in range(5)])
    return Job(tool, request.param, tiny, data)


def wait_for(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.0005)


def kill(running) -> None:
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == 137


def same(one: Path, two: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert logged(one) == logged(two)


def test_killed_in_mid_run_twice(job, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert job(whole).code == 0
    running = job.start(out)
    wait_for((tmp_path / "out.partial" / "step-000003").is_dir)
    kill(running)
    assert not out.exists()
    running = job.start(out, "--resume")
    wait_for(lambda: any((tmp_path / "out.partial").glob("step-00000[89]")) or out.exists())
    if not out.exists():
        kill(running)
    else:
        running.wait()
    last = job(out, "--resume")
    assert last.code == 0, last.err
    same(whole, out)
    assert not (tmp_path / "out.partial").exists()
    # What went to stdout joins as well: later lines replace earlier ones of the same step.
    heard = [json.loads(x) for x in out.with_suffix(".stdout").read_text().splitlines()] + last.rows
    assert any(event["event"] == "resume" for event in heard)
    joined = {(e["event"], e.get("step")): e for e in heard if e["event"] not in ("resume", "done")}
    expected = {(e["event"], e.get("step")): e for e in logged(whole) if e["event"] != "done"}
    assert {k: timeless([e])[0] for k, e in joined.items()} == expected


def test_killed_while_state_is_being_written(job, tmp_path):
    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / "out.partial"
    assert job(whole).code == 0
    caught = 0
    for _ in range(6):
        running = job.start(out, "--resume")
        wait_for(lambda: any(partial.glob("step-*.part")) or out.exists())
        if out.exists():
            assert running.wait() == 0
            break
        kill(running)
        caught += any(partial.glob("step-*.part"))
    assert caught > 0
    assert job(out, "--resume").code == 0
    same(whole, out)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_says_75(job, tmp_path, signum):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert job(whole).code == 0
    running = job.start(out, "--save-every", "1000")
    wait_for(lambda: out.with_suffix(".stdout").read_text().count('"step"') >= 3)
    os.kill(running.pid, signum)
    assert running.wait() == 75
    assert "--resume" in out.with_suffix(".stderr").read_text()
    assert not out.exists()
    assert job(out, "--save-every", "1000", "--resume").code == 0
    same(whole, out)


def test_another_option_or_other_data_is_refused_by_name(job, tmp_path, rows):
    out = tmp_path / "out"
    running = job.start(out)
    wait_for((tmp_path / "out.partial" / "step-000002").is_dir)
    kill(running)
    plain = job(out)
    assert (plain.code, plain.out) == (73, b"")
    assert "--resume" in plain.err
    other = job(out, "--resume", "--weight-decay", "0.5")
    assert (other.code, other.out) == (2, b"")
    assert "--weight-decay" in other.err.splitlines()[0]
    kept = (tmp_path / "data.jsonl").read_bytes()
    rows("data.jsonl", ROWS[1:])
    changed = job(out, "--resume")
    assert changed.code == 2
    assert "data (" in changed.err.splitlines()[0]
    (tmp_path / "data.jsonl").write_bytes(kept)
    assert job(out, "--resume").code == 0


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(job, tmp_path):
    out = tmp_path / "out"
    done = job(out, "--lr", "1e30", "--optimizer", "sgd")
    assert done.code == 75, done.err
    assert "not finite" in done.err
    assert not out.exists()
    (state,) = (tmp_path / "out.partial").glob("step-*")
    from safetensors.torch import load_file

    assert all(bool(v.float().isfinite().all()) for k, v in load_file(state / "rank-0000.safetensors").items())


def test_a_full_disk_at_a_checkpoint_is_74_and_the_last_state_is_intact(tool, tiny, rows, tmp_path):
    words = ["lm-tune", "--model", tiny, "--epochs", "6", "--batch-size", "4", "--lr", "1e-2", rows("data.jsonl", ROWS)]
    saved = [*words, "--out", tmp_path / "out", "--save-every", "3"]
    assert tool(*words, "--out", tmp_path / "whole").code == 0
    with (tmp_path / "said").open("wb") as said:
        first = tool.start(*saved, fds=(said.fileno(),) * 3)
        partial = tmp_path / "out.partial"
        wait_for((partial / "step-000003").is_dir)
        kill(first)
    kept = {p.name: p.read_bytes() for p in next(partial.glob("step-*")).iterdir()}
    full = tool(*saved, "--resume", file_size=200_000)  # weights fit, weights with moments do not
    assert full.code == 74, full.err
    assert "Traceback" not in full.err
    assert {p.name: p.read_bytes() for p in next(partial.glob("step-*")).iterdir()} == kept
    again = tool(*saved, "--resume")
    assert again.code == 0, again.err
    same(tmp_path / "whole", tmp_path / "out")
