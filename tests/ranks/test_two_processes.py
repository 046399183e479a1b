"""One process and two, and any micro-batch, give the same model: through the installed executables, by SGD."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.server import ROOT, environment

BIN = Path(sys.executable).parent
UNEQUAL = [
    {"question": "Q" * (3 * i % 11 + 1), "answer": f"{'long ' * (i * i % 13)}answer {i}"} for i in range(10)
]  # answers of 8 to 68 tokens
RETAIN = [{"prompt": f"Keep {i}", "completion": "yes " * (i % 5 + 1)} for i in range(7)]
LAUNCHER = [
    "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def run(words: list[str | Path], out: Path) -> tuple[dict, list[dict]]:
    """Run to the end; the weights and the events."""
    env = {**environment(), "ACCELERATE_USE_CPU": "true"} if "launch" in words else environment()
    done = subprocess.run(
        [*words, "--out", out], env=env, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors"), [json.loads(line) for line in done.stdout.splitlines()]


def difference(one: dict, two: dict) -> float:
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.fixture
def jobs(rows, tiny) -> dict[str, list[str | Path]]:
    """Four SGD steps of each trainer: two epochs of 10 rows in windows of 6 and 4."""
    forget, retain = rows("forget.jsonl", UNEQUAL), rows("retain.jsonl", RETAIN)
    common = ["--model", tiny, "--optimizer", "sgd", "--lr", "0.3", "--epochs", "2", "--batch-size", "6"]
    return {
        "lm-tune": ["lm-tune", *common, forget],
        "satimp-unlearn": ["satimp-unlearn", *common, "--forget", forget, "--retain", retain, "--retain-batch", "5"],
        "gru-unlearn": [
            "gru-unlearn",
            *common,
            "--forget",
            forget,
            "--retain",
            retain,
            "--weight-decay",
            "0",
            "--lr",
            "0.03",
        ],
    }


@pytest.mark.slow  # the contract suite runs one trainer by two processes each time
@pytest.mark.parametrize("name", ["lm-tune", "satimp-unlearn", "gru-unlearn"])
def test_processes_and_micro_batches_do_not_show(jobs, name, tmp_path, tiny, tool):
    command, *rest = jobs[name]
    script = BIN / command

    def fast(out, *more):
        done = tool(command, *rest, *more, "--out", out)
        assert done.code == 0, done.err
        return load_file(out / "model.safetensors"), done.rows

    alone, events = fast(tmp_path / "one")
    assert (events[0]["steps"], events[0]["processes"]) == (4, 1)
    start = load_file(tiny / "model.safetensors")
    assert difference(start, alone) > 1e-3  # the four steps did something

    two, launched = run([BIN / "accelerate", *LAUNCHER, script, *rest], tmp_path / "launched")
    assert launched[0]["processes"] == 2
    assert difference(alone, two) <= 1e-6

    ours, flagged = run([script, *rest, "-j", "2", "--micro-batch", "1"], tmp_path / "flagged")
    assert flagged[0]["processes"] == 2
    assert difference(alone, ours) <= 1e-6

    for size in ("1", "3"):
        split, _ = fast(tmp_path / f"micro{size}", "--micro-batch", size)
        assert difference(alone, split) <= 1e-6
    losses = [[e["loss"] for e in run_events if e["event"] == "step"] for run_events in (events, launched, flagged)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6, rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6, rel=1e-5)


def test_a_worker_exit_code_survives_j_and_is_said_once(tmp_path, tiny):
    done = subprocess.run(
        [BIN / "lm-tune", "--model", tiny, "--out", tmp_path / "o", "-j", "2"],
        input="{}\n", env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 65
    assert done.stderr.count("stdin:1") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["lm-tune", "gru-unlearn"])
def test_more_ranks_than_rows_still_agree(rows, tiny, tmp_path, command):
    one_row = rows("one.jsonl", UNEQUAL[:1])
    data = [one_row] if command == "lm-tune" else ["--forget", one_row, "--retain", rows("keep.jsonl", RETAIN[:1])]
    words = [BIN / command, "--model", tiny, "--optimizer", "sgd", "--lr", "0.03", "--epochs", "2", *data]
    alone, _ = run(words, tmp_path / "a")
    config = ROOT / "recipes/accelerate/cpu2.yaml"
    two, events = run([*words, "--accelerate", config], tmp_path / "b")
    assert events[0]["processes"] == 2
    assert difference(alone, two) <= 1e-6


def test_workers_die_with_their_launcher(rows, tiny, tmp_path):
    import os
    import signal

    many = rows("many.jsonl", UNEQUAL)
    running = subprocess.Popen(
        [BIN / "lm-tune", "--model", tiny, "--epochs", "100000", "--batch-size", "2", "--save-every", "0", "-j", "2",
         "--out", tmp_path / "o", many],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for line in running.stdout:
        if b'"step"' in line:
            break
    mine = f"{tmp_path}/o".encode()
    workers = [
        int(p.name) for p in Path("/proc").iterdir()
        if p.name.isdigit() and int(p.name) != running.pid and mine in _command_line(p)
    ]  # fmt: skip
    assert len(workers) == 2
    running.send_signal(signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [pid for pid in workers if _alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert alive == []


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _workers(mark: str) -> list[int]:
    """Processes with ``mark`` in their command line, launchers left out."""
    lines = {int(p.name): _command_line(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    return [pid for pid, line in lines.items() if mark.encode() in line and b"toolbox.shell.worker" in line]


def test_completions_and_their_log_are_those_of_one_process_killed_and_resumed_too(rows, tiny, tmp_path, tool):
    """Sampled with log-probabilities, whose last bit would show another batch; windows of 3 rows, batches of 2."""
    prompts = rows("prompts.jsonl", [{"id": f"r{i}", "prompt": "word " * (i * 3 % 5 + 1)} for i in range(11)])
    words = ["--model", tiny, "--n", "2", "--temperature", "1", "--seed", "3", "--max-new-tokens", "6", "--logprobs",
             "--window", "3", "--batch-size", "2"]  # fmt: skip
    one_log, log = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    alone = tool("lm-generate", *words, "--log", one_log, prompts)
    assert alone.code == 0, alone.err

    # The input comes through a pipe that stays open: after two windows both workers are there, waiting for the third.
    given = prompts.read_bytes().splitlines(keepends=True)
    two = [BIN / "lm-generate", *words, "--log", log, "-j", "2"]
    running = subprocess.Popen(
        two, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    running.stdin.write(b"".join(given[:7]))
    running.stdin.flush()
    written = [running.stdout.readline() for _ in range(12)]
    assert b"".join(written) == b"".join(alone.out.splitlines(keepends=True)[:12])
    workers = _workers(str(log))
    assert len(workers) == 2
    running.kill()
    running.communicate()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in workers if _alive(pid)] == []
    kept = log.read_bytes().count(b"\n")
    assert kept in (12, 14)  # the seventh row too, where its worker saw the input end before the launcher's death
    with log.open("ab") as torn:
        torn.write(one_log.read_bytes().splitlines()[kept + 1][:50])

    resumed = subprocess.run([*two, "--resume", prompts], env=environment(), capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == alone.out
    assert log.read_bytes() == one_log.read_bytes()  # in the same order, too
    again = tool("lm-generate", *words, "--log", log, "--resume", prompts)
    assert again.out == alone.out
