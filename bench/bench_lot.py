"""Language of Thoughts by its executables: prompts a CPU second, memory of a long stream, judging many answers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.common import ROOT, Figure, memory_mib


def question_items(count: int) -> Iterator[bytes]:
    """``count`` questions with four choices as JSON lines, never all in memory."""
    for place in range(count):
        choices = [f"{place + more} passengers" for more in range(4)]
        yield json.dumps({
            "id": f"q{place}", "choices": choices, "answer": "ABCD"[place % 4],
            "question": f"A train leaves at {place % 24}:00 with {place} people; how many are left after {place % 7}?",
        }).encode() + b"\n"  # fmt: skip


def answered_rows(count: int) -> Iterator[bytes]:
    """``count`` completions of questions under four wordings, in groups of two questions, right three times of four."""
    draw = random.Random(0)
    for place in range(count):
        question, variant = divmod(place, 4)
        name = ("cot", "echo", "expand", "lot2")[variant]
        yield json.dumps({
            "id": f"q{question}", "variant": name, "path_id": f"q{question}/{name}/0", "model": "m",
            "question": "Which?", "choices": ["red", "green", "blue"], "answer": "B", "group": f"g{question // 2}",
            "completion": f"Let me see. Answer: {'B' if draw.random() < .75 else 'C'}", "finish_reason": "stop",
            "n_completion_tokens": 10 + place % 30,
        }).encode() + b"\n"  # fmt: skip


def measured(words: Sequence[str], rows: Path) -> tuple[float, float]:
    """CPU seconds and the peak of resident memory (MiB) of one true process that reads ``rows``.

    The peak is read while the process runs: what ``wait4`` tells of it is at least that of the process it was forked
    from.
    """
    with rows.open("rb") as source:
        process = subprocess.Popen(
            [sys.executable, *words], stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        peak, done = 0.0, 0
        while not done:
            time.sleep(0.05)
            peak = max(peak, memory_mib("VmHWM", process.pid))
            done, status, used = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} left with {process.returncode}")
    return used.ru_utime + used.ru_stime, peak


def render(quick: bool) -> Iterator[Figure]:
    """``lot-prompt``: one wording, all nine, and the memory of a long stream."""
    count, long = (5_000, 10_000) if quick else (100_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "items.jsonl")
        rows.write_bytes(b"".join(question_items(count)))
        for variant, times in (("lot2", 1), ("all", 9)):
            runs = [measured(["bin/lot-prompt", "--variant", variant], rows)[0] for _ in range(1 if quick else 3)]
            yield Figure.of(
                f"render: --variant {variant}", [count * times / seconds for seconds in runs], "prompts/CPU-s",
                target=">= 30000" if times == 1 else None, note=f"{count:,} items, the start of Python included",
            )  # fmt: skip
        with rows.open("ab") as more:
            more.writelines(question_items(long - count))
        _, peak = measured(["bin/lot-prompt"], rows)
        yield Figure(f"render: resident at {long:,} rows", peak, "MiB", target="< 100", note="peak of the process")


def judge(quick: bool) -> Iterator[Figure]:
    """``lot-eval`` with all intervals and comparisons."""
    count = 2_000 if quick else 32_000
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "paths.jsonl")
        rows.write_bytes(b"".join(answered_rows(count)))
        runs = [measured(["bin/lot-eval", "--baseline", "cot"], rows) for _ in range(1 if quick else 3)]
    yield Figure.of(
        f"judge: {count:,} answers", [seconds for seconds, _ in runs], "CPU-s", target="< 20",
        note="four wordings, groups of two questions, 2,000 draws",
    )  # fmt: skip
    yield Figure(f"judge: resident at {count:,} answers", max(peak for _, peak in runs), "MiB")


BENCHES = {"render": render, "judge": judge}
