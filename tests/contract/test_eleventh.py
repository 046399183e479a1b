"""An eleventh method, added by the steps of docs/CONTRIBUTING.md to a copy of the tree, keeps all promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, environment

PAGE = (ROOT / "docs/CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = re.compile(
    r"^`(?P<path>[\w./-]+)`\n\n(?:```python\n(?P<code>.*?)^```|(?P<page>(?:    [^\n]*\n|\n)+))", re.M | re.S
)


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what the tests need, with the steps of the page done in it."""
    copied = ("toolbox", "tests", "bin", "docs", "recipes", "bench", "setup.cfg", "pyproject.toml", "Makefile",
              "README.md", "CHANGELOG.md", "LICENSE")  # fmt: skip
    subprocess.run(["cp", "-R", *(ROOT / name for name in copied), tmp_path], check=True)
    for written in ROOT.glob("*.md"):
        (tmp_path / written.name).write_bytes(written.read_bytes())
    section = PAGE[PAGE.index("## An eleventh method") :]
    step = re.search(r"^```\n(mkdir .*?)^```", section, re.M | re.S)
    assert step is not None
    subprocess.run(["bash", "-euc", step[1]], cwd=tmp_path, check=True)
    for found in FILES.finditer(section):
        path = tmp_path / found["path"]
        assert not path.exists()
        path.write_text(found["code"] or re.sub(r"^    ", "", found["page"], flags=re.M).strip() + "\n")
    case = re.search(r"^`tests/contract/commands.py`, behind `(.*?)`\n\n```\n(.*?)^```", section, re.M | re.S)
    assert case is not None
    suite = tmp_path / "tests/contract/commands.py"
    before = suite.read_text()
    assert before.count(case[1] + "\n") == 1
    suite.write_text(before.replace(case[1] + "\n", f"{case[1]}\n{case[2]}"))
    return tmp_path


@pytest.mark.slow
def test_a_method_added_by_the_steps_of_the_page_passes_the_contract_suite(tree):
    def ran(*words: str) -> str:
        env = {**environment(), "PYTHONPATH": str(tree)}
        done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = sys.executable
    ran(python, "-m", "toolbox.shell.pages", "options", "docs/OPTIONS.md")
    suites = (
        "contract",
        "faults/test_table.py",
        "pipelines/test_docs.py",
        "parity/test_distinct.py",
        "shell/test_pages.py",
    )
    chosen = "distinct or test_bin_console_scripts or test_pages"
    places = [f"tests/{one}" for one in suites]
    said = ran(python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "", "-k", chosen, *places)
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) > 40
    assert "failed" not in said
    ran(python, "-m", "ruff", "check", "--no-cache", "toolbox/distinct", "toolbox/commands", "tests/parity")
    ran(str(Path(python).with_name("lint-imports")), "--no-cache")
