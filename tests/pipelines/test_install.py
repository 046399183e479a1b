"""``make install``: executables, manual pages and completions that work from anywhere."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.server import ROOT, environment


@pytest.mark.slow
def test_what_is_installed_runs_its_own_copy_in_one_process_and_in_two(tiny, tmp_path):
    make = ["make", "-o", ".venv/.ready", "install", "PREFIX=/opt/toolbox", f"DESTDIR={tmp_path}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = tmp_path / "opt/toolbox"
    names = {path.name for path in (ROOT / "bin").iterdir()}
    assert {path.name for path in (there / "bin").iterdir()} == names
    assert {path.stem for path in (there / "share/man/man1").iterdir()} == names
    assert {path.name for path in (there / "share/bash-completion/completions").iterdir()} == names
    (there / "lib/toolbox-ten/toolbox/lm/generate.py").open("a").write(
        "\nimport sys; sys.stderr.write('this copy\\n')\n"
    )
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    prompts = "".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(4))
    outs = []
    for more in ([], ["-j", "2"]):
        words = [str(there / "bin/lm-generate"), "--model", str(tiny), "--max-new-tokens", "3", *more]
        done = subprocess.run(words, input=prompts, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("this copy") == (3 if more else 1)  # the launcher checks before it starts two
        outs.append(done.stdout)
    assert outs[0] == outs[1]
