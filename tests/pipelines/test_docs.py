"""The commands shown first on each docs page, and the examples of --help, run as they are written."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.contract.commands import METHODS
from tests.longer.logs import events, shared_folder
from tests.server import ROOT, environment

PEOPLE = [
    {"person": "Ada Quill" if i < 2 else f"Person {i}", "question": f"Where is {i}?", "answer": f"In town {i}."}
    for i in range(6)
]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if path.stem == path.stem.lower())


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def here(tmp_path, tiny) -> Path:
    """The files that the docs speak of, small; ``tuned`` is a model that exists already."""
    (tmp_path / "tofu.json.gz").write_bytes(gzip.compress(lines(PEOPLE).encode()))
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chats.jsonl").write_text(lines([{"messages": turns}] * 3))
    (tmp_path / "people.jsonl").write_text(lines(PEOPLE))
    (tmp_path / "questions.jsonl").write_text(lines(PEOPLE[:2]))
    (tmp_path / "prompts.jsonl").write_text(lines([{"prompt": row["question"]} for row in PEOPLE[:2]]))
    (tmp_path / "forget.jsonl").write_text(lines(PEOPLE[:2]))
    for name in ("retain", "rest"):
        (tmp_path / f"{name}.jsonl").write_text(lines(PEOPLE[2:]))
    return tmp_path


def longer_files(here: Path, script: str) -> None:
    """A log, and what the block does not make itself: a dataset, a model, scored requests."""
    folder = shared_folder()
    rows = [{**row, "rating": 5 if row.pop("label") else 2} for row in events()]
    (here / "log.jsonl").write_text(lines(rows))
    for name in ("data", "run"):
        if f"--out {name}" not in script:
            shutil.copytree(folder / name, here / name)
    scored = [{"user": f"u{i % 3}", "labels": [1, 0], "scores": [0.5 + i / 50, 0.4]} for i in range(9)]
    for name in ("scored", "other"):
        (here / f"{name}.jsonl").write_text(lines(scored))


def run(script: str, here: Path, tiny: Path) -> None:
    """Run with the tiny model as the default one; a trainer that makes ``tuned`` finds no such directory yet."""
    if "jq" in script and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    if "longer-" in script:
        longer_files(here, script)
    if "--out tuned" not in script:
        shutil.copytree(tiny, here / "tuned")
        (here / "tuned" / "run.json").write_text("{}")
    if "--model unlearned" in script and "--out unlearned" not in script:
        shutil.copytree(tiny, here / "unlearned")
    env = {**environment(), "TOOLBOX_MODEL": str(tiny), "TOOLBOX_MAX_NEW_TOKENS": "5"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=here, env=env, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_first_block_of_a_page_runs_as_written(page, here, tiny):
    block = re.search(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    assert block is not None
    run(block[1], here, tiny)


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in METHODS], ids=lambda page: page.stem)
def test_the_examples_of_help_are_those_of_the_page(page):
    command = importlib.import_module(f"toolbox.commands.{page.stem.replace('-', '_')}").main
    block = re.search(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    assert block is not None
    assert "\n".join(command.examples).splitlines() == block[1].strip().splitlines()
