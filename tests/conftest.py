"""Fixtures that every room uses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.server import Client, environment, real_sh
from tests.shim import write_shims
from tests.tiny import tiny_model_dir

# Ignored where a shell script put us into its background, and then by all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def tool() -> Iterator[Client]:
    """Run a command: ``tool("lm-tune", "--out", path, stdin=b"...")``."""
    client = Client()
    yield client
    client.close()


@pytest.fixture(scope="session")
def shims(tool: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the head of PATH: the commands, run by the fork server. For scripts of several commands."""
    return write_shims(tmp_path_factory.mktemp("shims") / "bin", tool.path)


@pytest.fixture(scope="session")
def sh(shims: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of commands: ``sh("lm-tune ... | tail -n 1", folder, NAME="value")``, pipefail on, stdin empty."""

    def run(script: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
        return real_sh(script, cwd, PATH=f"{shims}:{environment()['PATH']}", **env)

    return run


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
