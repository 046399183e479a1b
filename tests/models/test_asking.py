"""What a dialogue with a model needs of generation: answers begun for it, rules that end a row, beginnings run once,
choices by log-probability, schemas, batch files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tests.loopback import Answer, Loopback, said
from tests.tiny import tiny_model, tiny_tokenizer
from toolbox.models.chat import Chat
from toolbox.models.choose import choice_chain, likeliest, mean_logprobs
from toolbox.models.endpoint import Endpoint, Service, batch_line
from toolbox.models.generate import Decoding, LocalBackend, Request, TextRequest
from toolbox.models.replay import Replay
from toolbox.models.responses import describe_run
from toolbox.shell.errors import BadData
from toolbox.shell.streams import Streams

TURNS = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model():
    return tiny_model(window=1024)


def backend(model, **more) -> LocalBackend:
    return LocalBackend(model, tiny_tokenizer(), end_ids=[258], **more)


def test_an_answer_that_is_begun_is_text_and_no_control_token():
    tokenizer = tiny_tokenizer()
    chat = Chat(tokenizer)
    begun = chat.continued(TURNS, "<think> <|im_end|>")
    prompt = chat.prompt(TURNS)
    assert begun[: len(prompt)] == prompt
    assert tokenizer.decode(begun[len(prompt) :]) == "<think> <|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in begun[len(prompt) :]


def test_a_rule_ends_its_own_row_alone(model):
    asked = []

    def rule(count, text):
        asked.append((count, len(text())))
        return count >= 4

    ids = tuple(range(60, 70))
    free, ruled = Request("a", ids), Request("a", ids, rule)
    done = backend(model).complete([free, ruled], Decoding(9))
    assert [one.n_completion_tokens for one in done] == [9, 4]
    assert [one.finish_reason for one in done] == ["length", "length"]
    assert [count for count, _ in asked] == [1, 2, 3, 4]
    assert done[0].text.startswith(done[1].text)
    assert free == ruled  # equal requests: the rule is no part of what is asked


def test_beginnings_that_are_run_once_change_nothing(model):
    """Prompts that begin alike, in batches with other beginnings between them, against each one on its own."""
    decoding = Decoding(12, logprobs=True)
    task, other = tuple(range(90)), tuple(range(40, 160))
    prompts = [task + tuple(100 + k for k in range(3 * n + 1)) for n in range(4)]
    prompts += [(*task, 5, 6), (*other, 1), (*other, 2, 3), (*task[:50], 7, 8, 9), (1, 2, 3)]
    requests = [Request(str(n), prompt) for n, prompt in enumerate(prompts)]
    plain, sharing = backend(model, batch_size=1), backend(model, batch_size=2, share_beginnings=True)
    fed = []
    handle = model.register_forward_pre_hook(
        lambda _, __, named: fed.append(named["input_ids"].numel()), with_kwargs=True
    )
    expected = plain.complete(requests, decoding)
    alone = sum(fed)
    fed.clear()
    found = sharing.complete(requests, decoding)
    handle.remove()
    for one, two in zip(found, expected, strict=True):
        assert one.text == two.text
        assert np.allclose(one.logprobs, two.logprobs, atol=2e-5)
    assert sum(fed) < 0.8 * alone
    again = sharing.complete(requests[:4], decoding)
    assert [one.text for one in again] == [one.text for one in expected[:4]]


def test_the_likeliest_option_is_that_of_a_plain_forward_pass(model):
    tokenizer = tiny_tokenizer()
    context, options = list(range(70, 90)), ["none", "a, b", "burglary"]
    chain = choice_chain(tokenizer, context, options)
    scores = mean_logprobs(model, [chain, choice_chain(tokenizer, context, ["x"])])
    for option, score in zip(options, scores[0], strict=True):
        ids = tokenizer(f" {option}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
        own = [float(logits[len(context) - 1 + place, token]) for place, token in enumerate(ids)]
        assert score == pytest.approx(math.fsum(own) / len(own), abs=1e-5)
    assert len(scores[1]) == 1
    assert likeliest([0.5, 1.0, 1.0]) == 1
    with pytest.raises(BadData):
        choice_chain(tokenizer, context, [""], "")


SCHEMA = json.dumps({"type": "object"})


def test_a_schema_is_asked_for_and_is_part_of_the_key():
    with Loopback(lambda seen: Answer(said(seen, "{}"))) as server:
        request = TextRequest("a", None, 0, "Hello")
        with Endpoint(Service(server.url, "m")) as endpoint:
            endpoint.complete([request], Decoding(5, json_schema=SCHEMA))
            endpoint.complete([request], Decoding(5))
    form = server.seen[0].body["response_format"]
    assert (form["type"], form["json_schema"]["schema"]) == ("json_schema", {"type": "object"})
    assert "response_format" not in server.seen[1].body
    with_schema, without = (describe_run("openai", "m", Decoding(5, json_schema=one)) for one in (SCHEMA, None))
    assert with_schema != without
    assert "json_schema" not in without["decoding"]  # keys of logs that are there stay what they were


def test_a_batch_line_and_its_answer_meet_again(tmp_path):
    requests = [
        TextRequest("a/b", "annotate", 1, TURNS),
        TextRequest("c", None, 0, "Hi"),
        TextRequest("d", "x", 0, "Hi"),
    ]
    service = Service("http://localhost/v1", "m")
    batch = [batch_line(service, request, Decoding(7, stop=("</x>",))) for request in requests]
    assert [line["custom_id"] for line in batch] == ["a/b/annotate/1", "c/0", "d/x/0"]
    assert batch[0]["body"] == {
        "model": "m", "temperature": 0.0, "stop": ["</x>"], "messages": TURNS, "max_tokens": 7,
    }  # fmt: skip

    def answer(line, text, status=200):
        body = {
            "choices": [{"message": {"content": text}, "finish_reason": "length"}],
            "usage": {"completion_tokens": 3},
        }
        return {
            "id": "1",
            "custom_id": line["custom_id"],
            "response": {"status_code": status, "body": body},
            "error": None,
        }

    stored = tmp_path / "answers.jsonl"
    lines = [answer(batch[0], "one"), answer(batch[1], "two"), answer(batch[2], "three", 500)]
    stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay = Replay(str(stored), Streams(0, 1))
    first, second, third = (replay.find(request) for request in requests)
    assert (first.text, first.finish_reason, first.n_completion_tokens) == ("one", "length", 3)
    assert second.text == "two"
    assert third is None
    assert replay.failed == 1
    stored.write_text(json.dumps({"custom_id": "a/0", "response": {"body": {"choices": []}}}) + "\n")
    with pytest.raises(BadData, match=r"answers\.jsonl:1"):
        Replay(str(stored), Streams(0, 1))
