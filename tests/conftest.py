"""Fixtures that every room uses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.server import Client
from tests.tiny import tiny_model_dir

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tool() -> Iterator[Client]:
    """Run a command: ``tool("lm-tune", "--out", path, stdin=b"...")``."""
    client = Client()
    yield client
    client.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer chat model in a Hugging Face directory."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tofu() -> Path:
    """TOFU's files, where the shared data lies beside the checkout."""
    path = SHARED / "unlearning" / "tofu"
    if not path.is_dir():
        pytest.skip(f"TOFU is not here ({path})")
    return path


@pytest.fixture(scope="session")
def coca_data() -> Path:
    """Safety pairs, prompts and judge gold, where the shared data lies beside the checkout."""
    path = SHARED / "coca"
    if not path.is_dir():
        pytest.skip(f"the safety data is not here ({path})")
    return path


@pytest.fixture
def rows(tmp_path: Path):
    """Write rows as JSON lines: ``rows("forget.jsonl", [{...}])`` gives the path."""

    def write(name: str, content: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    return write
