"""The options of an endpoint, and what they come to."""

from __future__ import annotations

import pytest

from toolbox.models.backends import THERE, EndpointOptions

KEY = "sk-not-to-be-seen"


@pytest.mark.parametrize(
    ("address", "key", "warned"),
    [
        ("http://models.example/v1", KEY, True),
        ("http://localhost:8000/v1", None, False),
        ("https://models.example/v1", KEY, False),
        ("http://localhost:8000/v1", KEY, False),
        ("http://127.0.0.1:8000/v1", KEY, False),
    ],
)
def test_a_key_that_travels_unencrypted_is_said_and_not_shown(monkeypatch, address, key, warned):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    said: list[str] = []
    service = EndpointOptions(base_url=address).service("m", said.append)
    assert service.api_key == key
    assert [("unencrypted" in text, KEY in text) for text in said] == [(True, False)] * warned


def test_every_option_reaches_the_service():
    wanted = {"base_url": "http://localhost/v1", "concurrency": 3, "rpm": 5.0, "timeout": 7.0, "retries": 2}
    service = EndpointOptions(**wanted).service("m", print, system="be kind", raw=True)
    assert {name: getattr(service, name) for name in wanted} == wanted
    assert (service.model, service.system, service.raw) == ("m", "be kind", True)
    assert {*wanted, "api_key_env"} == THERE
