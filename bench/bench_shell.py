"""The edge: start-up, validation, and a filter's memory. No model."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator

from bench.common import ROOT, Figure, alternate, in_child, memory_mib, process_seconds, question_rows, ratios


def start_up(quick: bool) -> Iterator[Figure]:
    """--help and a usage error of every command as true processes, and Python's own start beside them."""
    repeats = 2 if quick else 15
    calls = {"python -c pass": ([sys.executable, "-c", "pass"], 0)}
    for path in sorted((ROOT / "bin").iterdir()):
        calls[f"{path.name} --help"] = ([sys.executable, str(path), "--help"], 0)
        calls[f"{path.name} usage error"] = ([sys.executable, str(path), "--no-such-option"], 2)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (words, code) in calls.items():
            used = process_seconds(words, code)
            if repeat:  # the first round fills the file cache
                seconds[name].append(1000 * used)
    for name, values in seconds.items():
        target = None if name.startswith("python") else "< 150"
        yield Figure.of(f"help: {name}", values, "CPU-ms", target=target)


def records(quick: bool) -> Iterator[Figure]:
    """Rows read, validated and brought into training form, against json.loads of the same lines."""
    from toolbox.shell.records import TRAINING_SHAPES, RecordReader, read_records, training_row
    from toolbox.shell.streams import Streams

    count = 1_000 if quick else 10_000
    rows, source = question_rows(count)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
        handle.flush()

        def validated() -> None:
            found = read_records(handle.name, Streams(-1, -1), RecordReader(TRAINING_SHAPES))
            assert len([training_row(record) for record in found]) == count

        def plain() -> None:
            with open(handle.name, "rb") as lines:
                assert len([json.loads(line) for line in lines]) == count

        seconds = alternate(1 if quick else 7, {"validated": validated, "plain": plain})
    yield Figure.of(f"records: {count:,} rows validated", seconds["validated"], "CPU-s", target="< 1", note=source)
    yield Figure.of(
        "records: cost of validating", ratios(seconds["validated"], seconds["plain"]), "×",
        ratio_of="CPU of validated rows / json.loads of each line",
    )  # fmt: skip


FILTER_WINDOW = 256


def filter_rows(marks: list[int]) -> dict[str, list[float]]:
    """Prompts from stdin to stdout through the reader and the ordered writer, each window handed in back to front.

    Gives the resident MiB behind each of ``marks`` rows and the CPU seconds of all. Runs in a process of its own.
    """
    import time

    from toolbox.shell.records import PROMPT_SHAPES, RecordReader, read_records
    from toolbox.shell.streams import JsonlWriter, Streams

    streams = Streams(0, 1)
    writer = JsonlWriter(streams)
    resident, window, left = [], [], list(marks)
    for record in read_records("-", streams, RecordReader(PROMPT_SHAPES)):
        window.append(record)
        if len(window) == FILTER_WINDOW or record.index + 1 == marks[-1]:
            for one in reversed(window):
                writer.put(one.index, [{**one.data, "id": one.id, "completion": one.value.prompt}])
            window = []
            if record.index + 1 >= left[0]:
                resident.append(memory_mib("VmRSS"))
                left.pop(0)
    writer.close()
    return {"resident": resident, "seconds": [time.process_time()]}


def _stream(count: int) -> Iterator[bytes]:
    """``count`` prompts as JSON lines, never all in memory."""
    text = question_rows(1)[0][0]["question"]
    for start in range(0, count, 1000):
        yield b"".join(
            json.dumps({"id": f"q{place}", "prompt": text, "kept": {"place": place}}).encode() + b"\n"
            for place in range(start, min(start + 1000, count))
        )


def filter_memory(quick: bool) -> Iterator[Figure]:
    """Resident memory of a filter behind a tenth of a long stream and at its end."""
    count = 50_000 if quick else 1_000_000
    marks = [count // 10 * part for part in range(1, 11)]
    memory_mib("VmRSS")  # a system without /proc is told apart from a child that fails
    child = in_child(filter_rows, marks, feed=_stream(count))
    first, *later = child["resident"]
    yield Figure(f"filter: resident after {marks[0]:,} rows", first, "MiB")
    yield Figure(f"filter: resident after {count:,} rows", later[-1], "MiB")
    yield Figure(
        "filter: growth", later[-1] / first, "×", target="<= 1.02", repeats=len(later),
        ratio_of=f"resident memory after {count:,} rows / after {marks[0]:,}",
        spread=(min(later) / first, max(later) / first), note="spread over nine points of one stream",
    )  # fmt: skip
    yield Figure("filter: rows", count / child["seconds"][0], "rows/CPU-s", note="with the start of Python")


BENCHES = {"help": start_up, "records": records, "filter": filter_memory}
