"""Virtual environments for packages that a bench compares with: made once, they see our packages behind their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from bench.common import ROOT, Skip

_INSTALL_SECONDS = 180


def guest(name: str, version: str, *further: str) -> Path:
    """The Python of an environment that has ``name`` in that version, without what it depends on, and ``further``
    requirements with theirs; made where it is missing. Skip where it cannot be had."""
    home = ROOT / "bench" / f".venv-{name}"
    python = home / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    if not (packages / f"{name.replace('-', '_')}-{version}.dist-info" / "RECORD").is_file():
        shutil.rmtree(home, ignore_errors=True)
        try:
            venv.create(home, with_pip=False, symlinks=True)
            _share(packages)
            _install(python, "--no-deps", f"{name}=={version}")
            for one in further:
                _install(python, one)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
    _share(packages)
    return python


def _share(packages: Path) -> None:
    """Let that environment see the packages of this one, behind its own."""
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")


def _install(python: Path, *what: str) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *what]
    try:
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=_INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise Skip(f"pip install {what[-1]}: {type(problem).__name__}") from None
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise Skip(f"pip install {what[-1]}: {said[-1].removeprefix('ERROR: ')}")
