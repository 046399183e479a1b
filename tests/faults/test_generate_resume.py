"""lm-generate killed at any moment and resumed from its log: the bytes of an uninterrupted run, and nothing asked twice
that was answered."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.loopback import Answer, Loopback, said

ROWS = [{"id": f"r{i}", "prompt": "word " * (i * 3 % 5 + 1), "keep": i} for i in range(10)]
SAMPLED = ["--n", "2", "--temperature", "1", "--seed", "3", "--logprobs"]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def wait_for(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.0005)


class Job:
    """lm-generate over ``ROWS`` with one backend; stdout and stderr of what is killed go to files."""

    def __init__(self, tool, prompts: Path, words: list) -> None:
        self.tool, self.prompts, self.words = tool, prompts, words

    def __call__(self, *more: object):
        return self.tool("lm-generate", *self.words, *more, self.prompts)

    def start(self, folder: Path, *more: object):
        with (
            open(os.devnull, "rb") as source,
            (folder / "stdout").open("ab") as sink,
            (folder / "stderr").open("ab") as err,
        ):
            fds = (source.fileno(), sink.fileno(), err.fileno())
            return self.tool.start("lm-generate", *self.words, *more, self.prompts, fds=fds)


@pytest.fixture
def local(tool, tiny, rows) -> Job:
    small = ["--model", tiny, *SAMPLED, "--max-new-tokens", "24", "--window", "4", "--batch-size", "3"]
    return Job(tool, rows("prompts.jsonl", ROWS), small)


def answer(seen) -> Answer:
    chosen = {"content": [{"logprob": -0.25 * len(seen.asked)}]}
    return Answer(said(seen, f"{seen.asked}{seen.body['seed']}", logprobs=chosen), delay=0.02 * (seen.index % 5))


@pytest.fixture
def remote(tool, rows):
    with Loopback(answer) as server:
        asked = ["--backend", "openai", "--base-url", server.url, "--model", "m", *SAMPLED, "--window", "4",
                 "--concurrency", "3"]  # fmt: skip
        job = Job(tool, rows("prompts.jsonl", ROWS), asked)
        job.server = server
        yield job


def killed_again_and_again(job: Job, folder: Path, seed: int) -> int:
    """Kill runs at random moments until one gets through; how many were killed."""
    log, chance, killed = folder / "log.jsonl", random.Random(seed), 0
    while True:
        wanted = min(20, len(lines(log)) + chance.randint(1, 6))
        running = job.start(folder, "--log", log, *(["--resume"] if killed else []))
        wait_until(log, wanted, running)
        if len(lines(log)) >= 20 or not alive(running):
            running.wait()
            return killed
        time.sleep(chance.uniform(0, 0.01))
        os.kill(running.pid, signal.SIGKILL)
        killed += running.wait() == 137


def wait_until(log: Path, wanted: int, running) -> None:
    wait_for(lambda: len(lines(log)) >= wanted or not alive(running))


def alive(running) -> bool:
    try:
        return Path(f"/proc/{running.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_model_here_killed_at_random_moments(local, tmp_path, seed):
    whole = local("--log", tmp_path / "whole.jsonl")
    assert whole.code == 0, whole.err
    assert killed_again_and_again(local, tmp_path, seed) >= 2
    resumed = local("--log", tmp_path / "log.jsonl", "--resume")
    assert (resumed.code, resumed.out) == (0, whole.out), resumed.err
    assert lines(tmp_path / "log.jsonl") == lines(tmp_path / "whole.jsonl")
    replayed = local.tool(
        "lm-generate", "--backend", "replay", "--replay", tmp_path / "log.jsonl", "--n", "2", local.prompts
    )
    assert replayed.out == whole.out


def test_what_a_killed_run_had_written_is_the_beginning_of_the_whole(local, tmp_path):
    log = tmp_path / "log.jsonl"
    running = local.start(tmp_path, "--log", log)
    wait_for(lambda: len(lines(tmp_path / "stdout")) >= 8)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    written = (tmp_path / "stdout").read_bytes()
    assert local("--log", log, "--resume").out.startswith(written)


def test_an_endpoint_killed_at_random_moments(remote, tmp_path):
    whole = remote("--log", tmp_path / "whole.jsonl")
    assert whole.code == 0, whole.err
    server = remote.server
    asked = len(server.seen)
    killed = killed_again_and_again(remote, tmp_path, 0)
    assert killed >= 2
    resumed = remote("--log", tmp_path / "log.jsonl", "--resume")
    assert (resumed.code, resumed.out) == (0, whole.out), resumed.err
    assert sorted(lines(tmp_path / "log.jsonl")) == sorted(lines(tmp_path / "whole.jsonl"))
    assert len(server.seen) - asked <= 20 + 3 * killed  # at most what was under way is asked again


def test_a_log_cut_at_any_byte(remote, tmp_path):
    """What a crash of the whole machine leaves."""
    whole = remote("--log", tmp_path / "whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    log, chance = tmp_path / "log.jsonl", random.Random(1)
    ends = [place for place, byte in enumerate(content) if byte == 10]
    for cut in [1, 9, ends[0], ends[0] + 1, ends[5] + 5, len(content) - 1, *chance.choices(range(len(content)), k=5)]:
        log.write_bytes(content[:cut])
        asked = len(remote.server.seen)
        resumed = remote("--log", log, "--resume")
        assert (resumed.code, resumed.out) == (0, whole.out), (cut, resumed.err)
        kept = content[:cut].count(b"\n")
        assert len(remote.server.seen) - asked == 20 - kept
        assert log.read_bytes().startswith(content[: ends[kept - 1] + 1 if kept else 0])
        assert sorted(lines(log)) == sorted(lines(tmp_path / "whole.jsonl"))
    keys = [json.loads(line)["key"] for line in lines(log)]
    assert len(set(keys)) == 20
