"""lm-generate's rows, servers and processes for tests."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from tests.loopback import KEY, Answer, echo
from tests.server import ROOT, environment

SHORT = ("--max-new-tokens", "4")
USER = {"role": "user", "content": "Hello"}


ROWS = [{"id": f"q{i}", "prompt": f"Say {i}", "extra": {"big": 2**70, "x": [i, None]}} for i in range(7)]
WITH_KEY = {"OPENAI_API_KEY": KEY}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refusing(status, *asked, message="no"):
    """Refuses these prompts, answers the others."""

    def answer(seen):
        if seen.asked in asked:
            return Answer({"error": {"message": f"{message} {seen.headers.get('authorization')}"}}, status)
        return echo(seen)

    return answer


def start(*words, **more):
    """A true process, so that what is imported and how it ends is its own."""
    script = "import sys; sys.argv[0] = 'lm-generate'; from toolbox.commands.lm_generate import main; "
    check = "import atexit; atexit.register(lambda: 'torch' in sys.modules and print('TORCH', file=sys.stderr)); "
    return subprocess.Popen(
        [sys.executable, "-c", check + script + "main()", *map(str, words)],
        cwd=ROOT,
        env={**environment(), **WITH_KEY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def of(server, *more):
    return ("--backend", "openai", "--base-url", server.url, "--model", "m", *more)
