"""Small runs of landscape-plot: rows, the command in this process, what it wrote read back."""

from __future__ import annotations

import io
import json
import random
import tempfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from tests.server import Result
from toolbox.commands.landscape_plot import main as command
from toolbox.landscape.data import Paths
from toolbox.landscape.features import read_features
from toolbox.landscape.output import make_result
from toolbox.landscape.run import Options
from toolbox.landscape.wording import Wording
from toolbox.shell.command import Invocation
from toolbox.shell.errors import ToolboxError, from_os_error
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.progress import Reporter
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

FAST = ("--draw", "none", "--project", "pca")
FILES = {"features.safetensors", "coords.jsonl", "paths.jsonl", "metrics.jsonl", "run.json"}


def make_rows(questions: int = 3, samples: int = 4, longest: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """Paths of questions with three choices; every other one is right."""
    draw, rows = random.Random(seed), []
    for q in range(questions):
        gold = "ABC"[q % 3]
        for s in range(samples):
            thoughts = [f"Step {i} is {draw.randint(0, 99)}." for i in range(draw.randint(1, longest - 1))]
            said = gold if s % 2 else "ABC"[(q + 1) % 3]
            rows.append({
                "id": f"q{q}", "question": f"Which is {q}?", "choices": [f"thing {q}", f"other {q}", "none"],
                "answer": gold, "variant": ("cot", "lot2")[s // 2 % 2],
                "completion": "\n".join([*thoughts, f"Answer: {said}"]),
            })  # fmt: skip
    return rows


ROWS = make_rows()


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_process(words: list[object], stdin: str) -> Result:
    """Run the command with these words in this process, where torch is imported once for all tests."""
    parsed = command.make_context("landscape-plot", [str(word) for word in words])
    values = {name: value for name, value in parsed.params.items() if name not in ("debug", "print_recipe", "quiet")}
    dry_run = values.pop("dry_run")
    assert values.pop("num_processes") is None
    assert values.pop("accelerate") is None
    said, code = io.StringIO(), 0
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink, parsed, redirect_stderr(said):
        source.write(stdin.encode())
        source.seek(0)
        streams = Streams(source.fileno(), sink.fileno())
        call = Invocation("landscape-plot", streams, Reporter("landscape-plot"), dict(parsed.params), dry_run)
        try:
            command.callback(call, **values)
        except ToolboxError as error:
            code = error.exit_code
            said.write(f"landscape-plot: {error.what}\n  {error.advice}\n")
        except FileNotFoundError as error:
            code = from_os_error(error).exit_code
        sink.seek(0)
        return Result(code, sink.read(), said.getvalue())


def figures_of(out: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    """The names of the figures that would be drawn of the features in ``out``."""
    features = read_features(out / "features.safetensors")
    result = make_result(Options(out="x", project="pca", **options), features, read(rows), lambda note: None)
    return result.done["figures"]


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the path ids that they have in ``ROWS``."""
    names = [path.id for path in read(ROWS).paths]
    return [{**row, "path_id": names[ROWS.index(row)]} for row in rows]


def read(rows: list[dict[str, Any]], wording: Wording | None = None) -> Paths:
    paths = Paths(Wording() if wording is None else wording)
    for record in RecordReader(PATH_SHAPES)(io.BufferedReader(io.BytesIO(lines(rows).encode())), "x"):
        paths.add(record)
    return paths


def same_files(one: Path, two: Path) -> None:
    for name in FILES - {"run.json"}:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
