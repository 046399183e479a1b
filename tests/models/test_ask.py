"""A few questions, by an endpoint, by its log, or by stored responses."""

from __future__ import annotations

import os

import pytest

from tests.loopback import Answer, Loopback, said
from toolbox.models.ask import Asker, Asking
from toolbox.models.generate import Decoding, TextRequest
from toolbox.shell.errors import BadData, Unavailable, UsageProblem
from toolbox.shell.streams import Streams

STREAMS = Streams(os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY))
QUESTIONS = [TextRequest("q", None, sample, "What?") for sample in range(3)]


def asking(url: str, **more) -> Asking:
    return Asking(backend="openai", model="m", base_url=url, retries=0, decoding=Decoding(8, 1.0), **more)


def test_what_is_in_the_log_is_not_asked_again_and_replays(tmp_path):
    log = str(tmp_path / "log.jsonl")
    with Loopback(lambda seen: Answer(said(seen, f"answer {seen.index}"))) as server:
        with Asker(asking(server.url, log=log), STREAMS) as asker:
            first = [one.text for one in asker.ask(QUESTIONS[:2])]
        with Asker(asking(server.url, log=log, resume=True), STREAMS) as asker:
            second = [one.text for one in asker.ask(QUESTIONS)]
        assert len(server.seen) == 3
        assert {seen.body["seed"] for seen in server.seen}.__len__() == 3
    assert second == [*first, "answer 2"]
    with Asker(Asking(backend="replay", replay=log), STREAMS) as asker:
        assert [one.text for one in asker.ask(QUESTIONS)] == second
        with pytest.raises(BadData, match="no response for id q"):
            asker.ask([TextRequest("q", None, 3, "What?")])


def test_a_server_that_is_down_is_unavailable_each_time():
    with Loopback() as server:
        url = server.url
    with Asker(asking(url), STREAMS) as asker:
        for _ in range(2):
            with pytest.raises(Unavailable):
                asker.ask(QUESTIONS[:1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Asking(backend="openai"), "needs an address"),
        (Asking(backend="replay"), "needs --replay"),
        (Asking(backend="replay", replay="x", log="y"), "--log has no use"),
        (Asking(backend="telepathy"), "not known"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_opened(options, says):
    with pytest.raises(UsageProblem, match=says):
        options.check()
