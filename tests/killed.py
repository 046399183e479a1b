"""A trainer cut off by kill -9 behind a saved state, and what it ends with when it goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from tests.server import Client

TIMES = frozenset({"seconds", "labels_per_s", "tokens_per_s", "peak_mem_mb", "model", "settings"})
"""Fields of events that differ between equal runs."""


def killed_and_resumed(
    tool: Client, words: Sequence[object], folder: Path, *, states: str, same: Collection[str]
) -> None:
    """Train undisturbed to ``folder/whole``, and killed and resumed to ``folder/out``: the files ``same`` are equal.

    ``words``: the command and its options without ``--out``; ``states``: names of the states behind which it is killed.
    """
    whole, out = folder / "whole", folder / "out"
    assert tool(*words, "--out", whole).code == 0
    with (folder / "log").open("wb") as sink, open(os.devnull, "rb") as nothing:
        running = tool.start(*words, "--out", out, fds=(nothing.fileno(), sink.fileno(), sink.fileno()))
        deadline = time.monotonic() + 60
        while not any((folder / "out.partial").glob(states)) and not out.exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert not out.exists()
    resumed = tool(*words, "--out", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.rows[0]["event"] == "resume"
    assert 0 < resumed.rows[0]["step"] < resumed.rows[-1]["steps"]
    for name in same:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def told(run: Path) -> list[dict]:
    """What a run told of itself, times left out."""
    rows = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
