"""landscape-plot on the tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.landscape.runs import (
    FAST,
    ROWS,
    in_process,
    lines,
)
from tests.server import Result


@pytest.fixture
def plot(tiny: Path, tmp_path: Path):
    """Run landscape-plot on the tiny model into ``tmp_path / out``, quickly unless told otherwise."""

    def run(*more: object, rows: Any = ROWS, out: str = "out", model: Path | None = tiny, fast: bool = True) -> Result:
        words = [] if model is None else ["--model", model]
        stdin = rows if isinstance(rows, str) else lines(rows)
        return in_process([*words, *(FAST if fast else ()), "--out", tmp_path / out, *more], stdin)

    return run


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One scored directory for many tests; its lines."""
    out = tmp_path_factory.mktemp("made") / "out"
    done = in_process(["--model", tiny, *FAST, "--out", out], lines(ROWS))
    assert done.code == 0, done.err
    return SimpleNamespace(out=out, features=out / "features.safetensors", done=done)
