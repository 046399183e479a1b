"""lm-generate against a base model, and against a server."""

from __future__ import annotations

import pytest

from tests.lm.asking import ROWS, WITH_KEY, lines
from tests.loopback import KEY
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base model: no chat template."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "plain", chat=False)


@pytest.fixture
def remote(tool):
    """Run lm-generate against a server; the key may be nowhere in what comes out."""

    def run(server, *more, rows=ROWS, env=WITH_KEY):
        text = rows if isinstance(rows, bytes) else lines(*rows)
        words = ("--backend", "openai", "--base-url", server.url, "--model", "tiny-chat", *more)
        done = tool("lm-generate", *words, stdin=text, env=env)
        assert KEY.encode() not in done.out
        assert KEY not in done.err
        return done

    return run
