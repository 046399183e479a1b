"""The blocks of GUIDE.md and of the README's commands: what was typed gives what is shown."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.server import ROOT, environment

GUIDE = (ROOT / "GUIDE.md").read_text(encoding="utf-8")


def shown(kind: str) -> list[tuple[str, list[str]]]:
    """Each line that was typed in the blocks of one kind, with the lines that stand below it."""
    pairs: list[tuple[str, list[str]]] = []
    for block in re.findall(rf"^```{kind}\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if line.startswith("$ "):
                pairs.append((line[2:], []))
            else:
                pairs[-1][1].append(line)
    return pairs


def typed(line: str, folder: Path, **env: str) -> list[str]:
    env = {**environment(), "TOOLBOX": str(ROOT), **env}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.stdout.rstrip("\n").splitlines()


def test_what_needs_no_model_gives_what_is_shown(shims, tmp_path):
    pairs = shown("console")
    assert len(pairs) > 15
    for line, below in pairs:
        assert typed(line, tmp_path, PATH=f"{shims}:{environment()['PATH']}") == below, line


@pytest.mark.slow
def test_what_the_embedded_model_does_gives_what_is_shown_but_for_digits(tmp_path):
    """The same versions on another processor may differ in the last bits, and a sampled hash then altogether."""
    pairs = shown("sh-session")
    assert len(pairs) > 8
    hashes = []
    for line, below in pairs:
        came = typed(line, tmp_path)
        if "sha256sum" in line:
            hashes.append(came)
            continue
        assert [re.sub(r"[\d.e-]+", "#", one) for one in came] == [re.sub(r"[\d.e-]+", "#", one) for one in below], line
    assert hashes[0] == hashes[1]
