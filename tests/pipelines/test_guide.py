"""The blocks of GUIDE.md and README.md: what was typed gives what is shown."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.server import ROOT, environment


def shown(name: str, kind: str) -> list[tuple[str, list[str]]]:
    """Each line that was typed in the blocks of one kind, with the lines that stand below it."""
    pairs: list[tuple[str, list[str]]] = []
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                pairs.append((line[2:], []))
            else:
                pairs[-1][1].append(line)
    return pairs


def typed(line: str, folder: Path, **env: str) -> list[str]:
    env = {**environment(), "TOOLBOX": str(ROOT), "COLUMNS": "80", **env}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.stdout.rstrip("\n").splitlines()


def test_what_needs_no_model_gives_what_is_shown(shims, tmp_path):
    pairs = [*shown("GUIDE.md", "console"), *shown("README.md", "console")]
    assert len(pairs) > 16
    for line, below in pairs:
        assert typed(line, tmp_path, PATH=f"{shims}:{environment()['PATH']}") == below, line


@pytest.mark.slow
def test_what_the_embedded_model_does_gives_what_is_shown_but_for_digits(tmp_path):
    pairs = shown("GUIDE.md", "sh-session")
    assert len(pairs) >= 3
    for line, below in pairs:
        came = typed(line, tmp_path)
        assert [re.sub(r"[\d.e-]+", "#", one) for one in came] == [re.sub(r"[\d.e-]+", "#", one) for one in below], line
