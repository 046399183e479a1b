"""The endpoint backend against a real server on this machine: forms, order, patience, and a key that is nowhere."""

from __future__ import annotations

import itertools
import json
import random
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from tests.loopback import KEY, Answer, Loopback, echo, said
from toolbox.models import endpoint as module
from toolbox.models.endpoint import AccessDenied, Endpoint, Service
from toolbox.models.endpoint_key import find_key, hide
from toolbox.models.endpoint_reply import error_message, read_reply, retry_after
from toolbox.models.generate import Decoding, TextRequest
from toolbox.shell.errors import BadData, Unavailable, UsageProblem

USER = {"role": "user", "content": "Hello"}
GREEDY = Decoding(16)


def ask(text, place=0):
    return TextRequest(f"r{place}", None, 0, text)


def service(server, **more):
    return Service(server.url, "tiny-chat", **{"backoff": 0.01, "timeout": 20, **more})


def complete(server, requests, decoding=GREEDY, **more):
    with Endpoint(service(server, **more)) as endpoint:
        return endpoint.complete(requests, decoding)


def first(answer, then=echo):
    """A server's behaviour: ``answer`` to the first request, ``then`` to all others."""
    return lambda seen: answer if seen.index == 0 else then(seen)


# what is sent


def test_turns_go_to_the_chat_endpoint_and_raw_text_to_the_other():
    own = {"role": "system", "content": "Own."}
    forms = [
        ({}, "Hello", [USER]),
        ({}, [USER], [USER]),
        ({"system": "Be brief."}, "Hello", [{"role": "system", "content": "Be brief."}, USER]),
        ({"system": "Be brief."}, [own, USER], [own, USER]),
    ]
    for more, content, messages in forms:
        with Loopback() as server:
            (done,) = complete(server, [ask(content)], **more)
        (seen,) = server.seen
        assert (seen.path, seen.body["messages"]) == ("/v1/chat/completions", messages)
        assert "prompt" not in seen.body
        assert (done.text, done.finish_reason, done.n_prompt_tokens) == ("Hello! ", "stop", 5)
    plain = [
        ({}, "Hello", "Hello"),
        ({"system": "Be brief. "}, "Hello", "Be brief. Hello"),
        ({"system": "Be brief. "}, [own, USER], "Own.Hello"),
    ]
    for more, content, prompt in plain:
        with Loopback() as server:
            complete(server, [ask(content)], raw=True, **more)
        (seen,) = server.seen
        assert (seen.path, seen.body["prompt"]) == ("/v1/completions", prompt)
        assert "messages" not in seen.body


def test_an_answer_cannot_be_continued_as_raw_text():
    turns = [USER, {"role": "assistant", "content": "Hi."}, USER]
    with Loopback() as server, Endpoint(service(server, raw=True)) as endpoint:
        with pytest.raises(BadData, match="end with a token"):
            endpoint.submit(ask(turns), GREEDY)
        assert server.seen == []


def test_decoding_is_sent_and_what_decides_nothing_is_not():
    with Loopback() as server:
        complete(server, [ask("a")], Decoding(7, stop=("\n", "Q:"), seed=3))
        complete(server, [ask("a")], Decoding(7, 0.5, 0.9, seed=3))
    greedy, sampled = (seen.body for seen in server.seen)
    assert greedy == {
        "model": "tiny-chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 7, "temperature": 0.0,
        "stop": ["\n", "Q:"],
    }  # fmt: skip
    assert (sampled["temperature"], sampled["top_p"]) == (0.5, 0.9)
    assert 0 <= sampled["seed"] < 2**31


def test_each_path_has_a_seed_of_its_own_which_the_order_does_not_change():
    requests = [TextRequest(id, variant, k, "Say") for id in "ab" for variant in (None, "v") for k in range(3)]
    seeds = []
    for order in (requests, requests[::-1]):
        with Loopback() as server:
            done = complete(server, order, Decoding(9, 1.0, seed=4))
        seeds.append({request.key: one.text for request, one in zip(order, done, strict=True)})
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0].values())) == len(requests)
    with Loopback() as server:
        assert complete(server, requests[:1], Decoding(9, 1.0, seed=5))[0].text != seeds[0][requests[0].key]


def test_the_newer_name_of_the_limit_is_found_out_once():
    def picky(seen):
        if "max_tokens" in seen.body:
            what = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Answer({"error": {"message": what}}, 400)
        return echo(seen)

    with Loopback(picky) as server:
        done = complete(server, [ask(f"{n}", n) for n in range(5)], concurrency=1, retries=0)
    assert [one.text for one in done] == [f"{n}! " for n in range(5)]
    assert ["max_tokens" in seen.body for seen in server.seen] == [True] + [False] * 5
    assert all(seen.body["max_completion_tokens"] == 16 for seen in server.seen[1:])


# what comes back


@pytest.mark.parametrize(
    ("told", "expected"),
    [("stop", "stop"), (None, "stop"), ("eos", "stop"), ("length", "length"), ("content_filter", "error")],
)
def test_finish_reasons_are_the_houses(told, expected):
    with Loopback(lambda seen: Answer(said(seen, "x", finish_reason=told))) as server:
        assert complete(server, [ask("a")])[0].finish_reason == expected


def test_stop_strings_are_cut_where_the_server_leaves_them_in():
    with Loopback(lambda seen: Answer(said(seen, "one. Two\nthree", finish_reason="length"))) as server:
        (done,) = complete(server, [ask("a")], Decoding(16, stop=("\n", ". ")))
    assert (done.text, done.finish_reason) == ("one", "stop")


def test_log_probabilities_of_both_endpoints():
    chat = {"content": [{"token": "a", "logprob": -0.25}, {"token": "b", "logprob": -1.5}]}
    plain = {"tokens": ["a", "b"], "token_logprobs": [-0.25, -1.5]}
    for raw, given in ((False, chat), (True, plain)):
        with Loopback(lambda seen, given=given: Answer(said(seen, "ab", logprobs=given))) as server:
            (done,) = complete(server, [ask("x")], Decoding(4, logprobs=True), raw=raw)
        assert done.logprobs == (-0.25, -1.5)
        assert server.seen[0].body["logprobs"] == (0 if raw else True)
        with Loopback(lambda seen, given=given: Answer(said(seen, "ab", logprobs=given))) as server:
            assert complete(server, [ask("x")], raw=raw)[0].logprobs is None
        assert "logprobs" not in server.seen[0].body
    with Loopback() as server, pytest.raises(Unavailable, match="no log-probabilities"):
        complete(server, [ask("x")], Decoding(4, logprobs=True))


def test_a_reply_is_read_without_trust():
    def read(choice, **more):
        return read_reply(json.dumps({"choices": [choice], **more}).encode(), GREEDY)

    done = read({"message": {"content": None}, "finish_reason": "length"})  # reasoning used all tokens up
    assert (done.text, done.finish_reason, done.n_prompt_tokens, done.n_completion_tokens) == ("", "length", None, None)
    assert read_reply(b'{"choices": [{"text": "a\\ud800b"}]}', GREEDY).text == "a\ufffdb"
    wrong = [
        b"", b"<html>", b"{", b"[]", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"text": 3}]}', b"\xff",
        b'{"error": "overloaded"}', b"[" * 100_000,
    ]  # fmt: skip
    for content in wrong:
        with pytest.raises(ValueError, match=r".+"):
            read_reply(content, GREEDY)
    bad = b'{"choices": [{"text": "", "logprobs": {"token_logprobs": [NaN]}}]}'
    with pytest.raises(ValueError, match="no number"):
        read_reply(bad, Decoding(1, logprobs=True))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"error": {"message": "too long", "type": "x"}}', "too long"),
        (b'{"error": "too long"}', "too long"),
        (b'{"message": "too long"}', "too long"),
        (b'{"detail": [{"msg": "too long"}]}', '[{"msg": "too long"}]'),
        (b"<html>no</html>\n", "<html>no</html>"),
        (b"", ""),
    ],
)
def test_what_a_refusal_says(content, said):
    assert error_message(content) == said


# order, concurrency, pace


def test_order_at_concurrency_8_whatever_each_answer_takes():
    draw = random.Random(0)
    delays = [0.15, *(draw.uniform(0, 0.03) for _ in range(39))]  # the first one is the last to come
    together = threading.Barrier(8)

    def slow(seen):
        if seen.index < 8:
            together.wait(20)  # fails unless eight are here at a time
        return Answer(said(seen, f"<{seen.asked}>"), delay=delays[int(seen.asked)])

    with Loopback(slow) as server:
        done = complete(server, [ask(str(n), n) for n in range(40)])
    assert [one.text for one in done] == [f"<{n}>" for n in range(40)]
    assert server.most == 8
    starts = [int(seen.asked) for seen in server.seen]
    assert sorted(starts[:8]) == list(range(8))  # started in order
    assert sorted(starts) == list(range(40))


def test_rpm_spaces_the_attempts():
    with Loopback() as server:
        complete(server, [ask(str(n), n) for n in range(6)], rpm=900)  # one in 67 ms
    times = sorted(seen.at for seen in server.seen)
    assert times[-1] - times[0] >= 5 * 60 / 900 - 0.03


# patience


@pytest.mark.parametrize(
    "fault",
    [
        Answer({"error": "boom"}, 500),
        Answer(b"upstream", 503),
        Answer({}, 408),
        Answer({"error": {"message": "slow down"}}, 429),
        Answer(hang_up=True),
        Answer(b'{"choices": [{"mess'),
        Answer({"choices": []}),
        Answer({"choices": [{"text": "x" * 4000}]}, cut=True),
        Answer(b"", headers={"Content-Encoding": "gzip"}, status=200),
    ],
    ids=["500", "503", "408", "429", "dropped", "malformed", "empty", "cut off", "bad gzip"],
)
def test_what_may_pass_is_tried_again(fault):
    with Loopback(first(fault)) as server:
        (done,) = complete(server, [ask("a")], retries=1)
    assert done.text == "a! "
    assert len(server.seen) == 2
    assert server.seen[0].body == server.seen[1].body


def test_a_slow_answer_is_given_up_and_asked_for_again():
    with Loopback(first(Answer({}, delay=30))) as server:
        began = time.monotonic()
        (done,) = complete(server, [ask("a")], timeout=2)
    assert done.text == "a! "
    assert len(server.seen) >= 2
    assert 2 <= time.monotonic() - began < 25
    with (
        Loopback(lambda seen: Answer({}, delay=3)) as server,
        pytest.raises(Unavailable, match=r"no answer within 0.5 s"),
    ):
        complete(server, [ask("a")], timeout=0.5, retries=0)


def test_retry_after_is_obeyed_by_every_request():
    busy = Answer({"error": "slow down"}, 429, {"Retry-After": "1"})
    with Loopback(first(busy, lambda seen: Answer(said(seen, seen.asked), delay=0.3))) as server:
        done = complete(server, [ask(str(n), n) for n in range(8)], concurrency=2)
    assert [one.text for one in done] == [str(n) for n in range(8)]
    early = [seen for seen in server.seen if seen.at < server.seen[0].at + 0.95]
    assert len(early) <= 2  # those under way when it was said, and none that follows
    assert len(server.seen) == 9


def test_retry_after_as_a_date_is_taken_by_the_servers_clock():
    now = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=40), usegmt=True)
    assert retry_after({"retry-after": later, "date": format_datetime(now, usegmt=True)}) == 40
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert 25 < retry_after({"retry-after": format_datetime(soon, usegmt=True)}) <= 30
    assert retry_after({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}) == 0
    assert retry_after({"retry-after": "2.5"}) == 2.5
    for nothing in ({}, {"retry-after": ""}, {"retry-after": "soon"}, {"retry-after": "-1"}, {"retry-after": "1e9"}):
        assert retry_after(nothing) is None


def test_waits_double_and_differ_between_requests():
    with Loopback(lambda seen: Answer({}, 500)) as server, pytest.raises(Unavailable, match=r"500.*tried 4 times"):
        complete(server, [ask("a")], retries=3, backoff=0.2)
    gaps = [later.at - before.at for before, later in itertools.pairwise(server.seen)]
    assert len(gaps) == 3
    for gap, longest in zip(gaps, (0.2, 0.4, 0.8), strict=True):
        assert longest / 2 - 0.02 <= gap <= longest + 5


def test_a_wait_of_hours_is_a_failure_and_said():
    tomorrow = Answer({}, 429, {"Retry-After": "86400"})
    with Loopback(lambda seen: tomorrow) as server, pytest.raises(Unavailable, match="86400 s"):
        complete(server, [ask("a")])
    assert len(server.seen) == 1


def test_nobody_there_is_unavailable_after_the_retries():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    told = []
    there = Endpoint(Service(address, "m", retries=2, backoff=0.01), told.append)
    with there as endpoint, pytest.raises(Unavailable, match=r"connection failed.*tried 3 times"):
        endpoint.complete([ask("a")], GREEDY)
    assert len(told) == 1
    assert "trying again" in told[0]


def test_a_redirect_is_not_followed_and_an_endless_answer_not_read(monkeypatch):
    with Loopback() as other:
        elsewhere = Answer({}, 307, {"Location": other.url})
        with Loopback(lambda seen: elsewhere) as server, pytest.raises(Unavailable, match="307"):
            complete(server, [ask("a")], api_key=KEY)
        assert other.seen == []
    monkeypatch.setattr(module, "_LARGEST_REPLY", 10_000)
    with (
        Loopback(lambda seen: Answer(said(seen, "x" * 20_000))) as server,
        pytest.raises(Unavailable, match="more than"),
    ):
        complete(server, [ask("a")], retries=0)


# refusals


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_it_at_once(status):
    def refuse(seen):
        return Answer({"error": {"message": f"Incorrect API key provided: {seen.headers['authorization']}"}}, status)

    with Loopback(refuse) as server, pytest.raises(AccessDenied, match=f"{status}: Incorrect API key") as problem:
        complete(server, [ask(str(n), n) for n in range(30)], concurrency=1, api_key=KEY)
    assert len(server.seen) == 1
    assert problem.value.exit_code == 69
    assert KEY not in f"{problem.value} {problem.value.advice}"
    assert "Bearer [key]" in str(problem.value)


def test_a_refused_key_is_the_reason_although_others_were_cut_off_first():
    def refuse(seen):
        return Answer({}, 401, delay=0.2) if seen.asked == "1" else Answer(said(seen, "x"), delay=30)

    began = time.monotonic()
    with Loopback(refuse) as server, pytest.raises(AccessDenied):
        complete(server, [ask(str(n), n) for n in range(4)], concurrency=4)
    assert time.monotonic() - began < 20


def test_any_other_refusal_is_the_rows_own():
    def refuse(seen):
        long = {"error": {"message": f"\x1b[31mtoo\nlong\x1b[0m by 3 tokens ({KEY})"}}
        return Answer(long, 400) if seen.asked == "long" else echo(seen)

    with Loopback(refuse) as server, Endpoint(service(server, api_key=KEY)) as endpoint:
        good, bad = (endpoint.submit(ask(text), GREEDY) for text in ("a", "long"))
        assert good.result().text == "a! "
        with pytest.raises(BadData, match=r"refuses this row: 400: too long by 3 tokens \(\[key\]\)"):
            bad.result()
        assert endpoint.submit(ask("b"), GREEDY).result().text == "b! "  # and it goes on
    assert len(server.seen) == 3


def test_stop_lets_what_is_under_way_finish_or_not():
    for at_once in (False, True):
        started = threading.Semaphore(0)

        def slow(seen, started=started):
            started.release()
            return Answer(said(seen, "done"), delay=0.3)

        with Loopback(slow) as server, Endpoint(service(server, concurrency=2)) as endpoint:
            futures = [endpoint.submit(ask(str(n), n), GREEDY) for n in range(9)]
            assert all(started.acquire(timeout=20) for _ in range(2))
            endpoint.stop(at_once=at_once)
            ended = ["cancelled" if _cancelled(future) else future.result().text for future in futures]
        assert ended == (["cancelled"] * 9 if at_once else ["done"] * 2 + ["cancelled"] * 7)
        assert len(server.seen) == 2


def _cancelled(future):
    try:
        return future.exception(20) is None and future.cancelled()
    except BaseException:
        return True


def test_what_comes_of_a_response_comes_before_its_future():
    kept = []

    def keep(one):
        if one.text == "b! ":
            raise OSError(28, "No space left on device")
        kept.append(one.text)

    with Loopback() as server, Endpoint(service(server)) as endpoint:
        good, bad = (endpoint.submit(ask(text), GREEDY, keep) for text in "ab")
        assert good.result().text == "a! "
        assert kept == ["a! "]
        with pytest.raises(OSError, match="No space"):
            bad.result()


# the key


def test_the_key_is_sent_and_without_one_nothing_is(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with Loopback() as server:
        complete(server, [ask("a")], api_key=find_key("SOME_KEY", server.url))
        complete(server, [ask("a")], api_key=find_key("NO_SUCH_KEY", server.url))
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in server.seen[1].headers
    for local in ("http://localhost:1/v1", "http://[::1]:1/v1", "http://a.localhost/v1", "http://0.0.0.0:1/v1"):
        assert find_key("NO_SUCH_KEY", local) is None
    with pytest.raises(UsageProblem, match="is not set"):
        find_key("NO_SUCH_KEY", "https://models.example.org/v1")


@pytest.mark.parametrize("value", ["two\nlines", "spaces in it", "schlüssel", "\x00"])
def test_a_key_that_cannot_be_one_is_refused_unseen(monkeypatch, value):
    if "\0" in value:
        with pytest.raises(UsageProblem, match="name of an environment") as problem:
            find_key(KEY, "http://localhost/v1")  # the key in place of the name
    else:
        monkeypatch.setenv("SOME_KEY", value)
        with pytest.raises(UsageProblem, match="plain characters") as problem:
            find_key("SOME_KEY", "http://localhost/v1")
    assert value not in f"{problem.value} {problem.value.advice}"
    assert KEY not in f"{problem.value} {problem.value.advice}"


@pytest.mark.parametrize(
    "address",
    ["", "localhost:8000", "ftp://x/v1", "http://", "http://x:y/v1", f"http://me:{KEY}@x/v1", f"http://x/v1?key={KEY}",
     f"http://x/v1#{KEY}", "http://a b/v1"],
)  # fmt: skip
def test_an_address_that_is_none_or_carries_a_secret_is_refused_unseen(address):
    with pytest.raises(UsageProblem) as problem:
        Endpoint(Service(address, "m")).__enter__()
    assert KEY not in f"{problem.value} {problem.value.advice}"


@pytest.mark.parametrize("seed", range(50))
def test_no_piece_of_a_key_stays_in_a_text(seed):
    draw = random.Random(seed)
    key = "".join(draw.choices("abc-", k=draw.randint(8, 20)))
    text = "".join(draw.choice([key, key[draw.randint(0, 3) :], "a", "bc", " "]) for _ in range(12))
    shown = hide(text, key).replace("[key]", "\0")
    assert not any(key[start : start + 8] in shown for start in range(len(key) - 7))
    assert hide("a text without any", key) == "a text without any"


def test_a_short_key_is_a_word_and_only_that_word_goes():
    assert hide("EMPTY: the EMPTYING of x", "EMPTY") == "[key]: the EMPTYING of x"
    assert hide("text", None) == "text"


def test_a_service_shows_no_key():
    assert KEY not in repr(Service("http://localhost/v1", "m", KEY))


def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with Loopback() as server:
        assert complete(server, [ask("a")], retries=0)[0].text == "a! "


def test_the_module_costs_no_torch_and_no_httpx():
    heavy = "{'torch', 'numpy', 'transformers', 'httpx2', 'httpx'}"
    code = f"import sys, toolbox.models.endpoint, toolbox.models.replay\nsys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
