"""coca-refactor by its executable: what it costs around a teacher that only waits, and memory over many rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench.common import ROOT, Figure, memory_mib, process_seconds

LATENCY = 0.1


def safety_rows(start: int, count: int) -> Iterator[bytes]:
    """Pairs of our own, half of them refused."""
    for place in range(start, start + count):
        harmful = place % 2 == 0
        yield json.dumps({
            "id": f"r{place}", "label": "harmful" if harmful else "benign",
            "prompt": f"How do I {'steal' if harmful else 'repair'} bicycle number {place} of my neighbour?",
            "completion": "I'm sorry, but I can't help with taking what belongs to somebody else." if harmful
            else f"Clean part {place}, look for what is worn, and put a new one in its place.",
        }).encode() + b"\n"  # fmt: skip


class _Teacher(BaseHTTPRequestHandler):
    """Annotates at once, from the words of the request: a stand-in whose own work is not counted."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = body["messages"][-1]["content"].partition("Request: ")[2].partition("\n")[0]
        unsafe = "steal" in request
        text = (
            f"<think> The request says: {request} </think>\n<concept> bicycle, theft </concept>\n"
            f"<check> {'theft' if unsafe else 'none'} </check>\n<erase unsafe concepts> "
            f"{'I refuse completely.' if unsafe else 'No unsafe concept: a complete and helpful answer.'} "
        )
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        content = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 500, "completion_tokens": 80}}).encode()
        time.sleep(LATENCY)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def _run(folder: Path, rows: int, url: str) -> float:
    """CPU seconds of one run over ``rows`` rows; RuntimeError where not all of them were accepted."""
    source, out = folder / f"{rows}.jsonl", folder / "out.jsonl"
    source.write_bytes(b"".join(safety_rows(0, rows)))
    words = [sys.executable, "bin/coca-refactor", "--backend", "openai", "--base-url", url, "-m", "teacher",
             "--concurrency", "50", "--quiet", "-o", str(out), "--overwrite", str(source)]  # fmt: skip
    seconds = process_seconds(words)
    if out.read_bytes().count(b"\n") != rows:
        raise RuntimeError("rows are missing")
    return seconds


def overhead(quick: bool) -> Iterator[Figure]:
    """300 rows around a teacher that takes 0.1 s, 50 at a time: CPU beyond the start, and what 1,000 more rows cost."""
    few, many = (50, 100) if quick else (300, 1300)
    server = _Server(("127.0.0.1", 0), _Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            starts, runs, more = [], [], []
            for _ in range(1 if quick else 3):
                starts.append(_run(folder, 1, url))
                runs.append(_run(folder, few, url))
                more.append(_run(folder, many, url))
    finally:
        server.shutdown()
        server.server_close()
    beyond = [run - start for run, start in zip(runs, starts, strict=True)]
    note = f"teacher answers after {LATENCY} s, 50 at a time; a run of one costs {min(starts):.2f}"
    yield Figure.of(f"refactor: {few} rows beyond a run of one", beyond, "CPU-s", target="<= 2", note=note)
    extra = [1000 * (long - short) / (many - few) for long, short in zip(more, runs, strict=True)]
    yield Figure.of("refactor: 1,000 more rows", extra, "CPU-s")


def memory(quick: bool) -> Iterator[Figure]:
    """The peak of resident memory over many stored answers."""
    rows = 2_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as name:
        source, stored = Path(name, "in.jsonl"), Path(name, "answers.jsonl")
        source.write_bytes(b"".join(safety_rows(0, rows)))
        with source.open("rb") as lines, stored.open("w") as answers:
            for line in lines:
                row = json.loads(line)
                unsafe = row["label"] == "harmful"
                text = (f"<think> The request says: {row['prompt']} </think>\n<concept> bicycle, theft </concept>\n"
                        f"<check> {'theft' if unsafe else 'none'} </check>\n<erase unsafe concepts> "
                        f"{'I refuse completely.' if unsafe else 'No unsafe concept: a helpful answer.'} ")  # fmt: skip
                answers.write(
                    json.dumps({"id": row["id"], "variant": "annotate", "sample": 0, "completion": text}) + "\n"
                )
        words = [sys.executable, "bin/coca-refactor", "--backend", "replay", "--replay", str(stored), "--quiet",
                 str(source)]  # fmt: skip
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        peak, done, status = 0.0, 0, 0
        while not done:
            time.sleep(0.05)
            peak = max(peak, memory_mib("VmHWM", process.pid))
            done, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"coca-refactor left with {process.returncode}")
        yield Figure(f"refactor: resident at {rows:,} rows", peak, "MiB", target="< 300", note="stored answers")
        seconds = used.ru_utime + used.ru_stime
        yield Figure(
            "refactor: rows judged a CPU second", rows / seconds, "rows/CPU-s", note="stored answers, all rules"
        )


BENCHES = {"refactor": overhead, "refactor-memory": memory}
