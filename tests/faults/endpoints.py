"""Servers that are busy, slow, broken, or no such servers at all, for every command that asks one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.contract.commands import ASIA, CASES, SHORT, SHORT_TEMPLATE, Case, lines
from tests.faults.bench import Bench
from tests.loopback import KEY, Answer, Loopback, Seen, said
from tests.server import Result

LEGIT = [*SHORT, "--self-consistency", "3", "--backend", "openai", "--model", "m"]
ANSWERED = [
    {"id": f"e{i}", "prompt": f"Do thing {i}.", "label": "harmful", "completion": f"Sure, thing {i}."} for i in range(3)
]


def _variables(folder: Path) -> list[str]:
    path = folder / "variables.jsonl"
    rows = [{"name": name, "description": f"about {name}", "states": ["yes", "no"]} for name in ASIA]
    path.write_bytes(lines(rows))
    return ["--variables", str(path)]


def _refactor(folder: Path) -> list[str]:
    path = folder / "short.yaml"
    path.write_text(SHORT_TEMPLATE)
    return ["--template", str(path), "--verify", "off", "--backend", "openai", "--model", "m"]


def _target(folder: Path) -> list[str]:
    return [*LEGIT, "--strategy", "legit+random", "--stateless", *_variables(folder)]


def _loop(folder: Path) -> list[str]:
    return [*LEGIT, "--strategies", "legit+random", "--network", "asia", "--observations", "-", "--seeds", "1",
            "--rounds", "2", *_variables(folder)]  # fmt: skip


ANNOTATED = (
    "<think> why </think>\n<concept> what </concept>\n<check> none </check>\n"
    "<erase unsafe concepts> There are no unsafe concepts, so I help. </erase unsafe concepts>"
)
ASKING: dict[str, tuple[list[dict], Callable[[Path], list[str]], str]] = {
    "coca-eval": (ANSWERED, lambda folder: ["--judge", "llm", "--judge-model", "m", "--bootstrap", "50"],
                  '{"refused": 0, "convincing": 5, "specific": 3}'),
    "coca-refactor": (CASES["coca-refactor"].good, _refactor, ANNOTATED),
    "legit-loop": (CASES["legit-loop"].good, _loop, "<Answer>smoke, asia, tub</Answer>"),
    "legit-target": (CASES["legit-target"].good, _target, "<Answer>smoke, asia, tub</Answer>"),
    "lit-generate": (CASES["lit-generate"].good, lambda folder: ["--backend", "openai", "--model", "m"], "A dog."),
    "lm-generate": (CASES["lm-generate"].good, lambda folder: ["--backend", "openai", "--model", "m"], "Well."),
}  # fmt: skip
"""Of each command that asks a server: rows, arguments, and what a good server says."""


def asks(case: Case) -> bool:
    return case.name in ASKING


def ask(bench: Bench, case: Case, url: str, *more: object, folder: str) -> Result:
    """The command with its rows against the server at ``url``; the key is in the environment and nowhere else."""
    rows, arguments, _ = ASKING[case.name]
    words = [*arguments(bench.folder(folder)), "--base-url", url, "--concurrency", "2", *more]
    done = bench.tool(case.name, *words, stdin=lines(rows), env={"OPENAI_API_KEY": KEY})
    for place in (done.out.decode(), done.err):
        assert KEY not in place
        assert "Traceback" not in place
    return done


def good(case: Case) -> Callable[[Seen], Answer]:
    text = ASKING[case.name][2]
    return lambda seen: Answer(said(seen, text))


_HTML = b"<html><body>It works!</body></html>"
PASSING: dict[str, Callable[[Seen], Answer]] = {
    "429 with Retry-After: 1": lambda seen: Answer({"error": "busy"}, 429, {"Retry-After": "1"}),
    "429 with a date": lambda seen: Answer({"error": "busy"}, 429, {"Retry-After": "Mon, 01 Jan 2024 00:00:00 GMT"}),
    "429 with nonsense": lambda seen: Answer({"error": "busy"}, 429, {"Retry-After": "soon"}),
    "500": lambda seen: Answer({"error": {"message": "oops"}}, 500),
    "503 without a word": lambda seen: Answer(b"", 503),
    "a hang-up": lambda seen: Answer(hang_up=True),
    "a body cut off": lambda seen: Answer(said(seen, "x" * 500), cut=True),
    "half a JSON": lambda seen: Answer(json.dumps(said(seen, "x")).encode()[:-20]),
    "an empty body": lambda seen: Answer(b""),
    "a page": lambda seen: Answer(_HTML, headers={"Content-Type": "text/html"}),
    "no choices": lambda seen: Answer({"choices": []}),
    "a list": lambda seen: Answer([said(seen, "x")]),
    "content of another type": lambda seen: Answer({"choices": [{"message": {"content": 7}}]}),
    "half a gzip": lambda seen: Answer(b"\x1f\x8b\x08\x00abc", headers={"Content-Encoding": "gzip"}),
    "no UTF-8": lambda seen: Answer(b'{"choices": [{"message": {"content": "\xff"}}]}'),
    "deep": lambda seen: Answer(b"[" * 100_000),
    "slow": lambda seen: Answer(said(seen, "late"), trickle=0.05),
}
"""What the first request gets; the next ones are answered well."""


def passing(bench: Bench, case: Case) -> Iterator[str]:
    """Faults that pass: the answer is that of a run without them."""
    answer = good(case)
    with Loopback(answer) as server:
        whole = ask(bench, case, server.url, folder="whole")
    assert whole.code == 0, whole.err
    assert whole.out
    assert server.seen
    for name, fault in PASSING.items():
        with Loopback(lambda seen, fault=fault: fault(seen) if seen.index == 0 else answer(seen)) as server:
            done = ask(bench, case, server.url, "--timeout", "2", folder="faulty")
        assert done.code == 0, (name, done.err)
        assert done.out == whole.out, name
        yield name


LASTING: dict[str, tuple[Callable[[Seen], Answer], set[int]]] = {
    "500 for ever": (lambda seen: Answer({"error": "oops"}, 500), {69}),
    "a wait of hours": (lambda seen: Answer({"error": "busy"}, 429, {"Retry-After": "7200"}), {69}),
    "no completion": (lambda seen: Answer({"answer": 42}), {69}),
    "a hang-up": (lambda seen: Answer(hang_up=True), {69}),
    "slow": (lambda seen: Answer(said(seen, "late"), trickle=0.05), {69}),
    "401": (lambda seen: Answer({"error": f"the key {KEY} is wrong"}, 401), {69}),
    "403": (lambda seen: Answer({"error": "not for you"}, 403), {69}),
    "400": (lambda seen: Answer({"error": "\x1b[31mtoo long\x1b[0m"}, 400), {65}),
    "404": (lambda seen: Answer({"error": "no such model"}, 404), {65}),
    "an endless body": (lambda seen: Answer(b"[" + b"1," * (33 << 20)), {69}),
}
"""What every request gets, and how that ends."""


def lasting(bench: Bench, case: Case) -> Iterator[str]:
    """Faults that stay: one line, its code, no row that is not whole, no key anywhere, soon."""
    for name, (fault, codes) in LASTING.items():
        with Loopback(fault) as server:
            done = ask(bench, case, server.url, "--retries", "0", "--timeout", "5", *_strict(case), folder="faulty")
        assert done.code in codes, (name, done.code, done.err)
        _said_once(case, done, name)
        yield name
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        done = ask(bench, case, f"http://127.0.0.1:{one.getsockname()[1]}/v1", "--retries", "0", *_strict(case),
                   folder="faulty")  # fmt: skip
        assert done.code == 69, done.err
        yield "nobody there"
    with Loopback(good(case)) as elsewhere:
        away = {"Location": f"{elsewhere.url}/chat/completions"}
        with Loopback(lambda seen: Answer(b"", 307, away)) as server:
            done = ask(bench, case, server.url, "--retries", "0", *_strict(case), folder="faulty")
    assert done.code == 69, done.err
    assert elsewhere.seen == []
    yield "a redirect"
    for greeting in (b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"):
        with stranger(greeting) as url:
            done = ask(bench, case, url, "--retries", "0", "--timeout", "5", *_strict(case), folder="faulty")
        assert done.code == 69, (greeting, done.err)
        yield f"{greeting[:8]!r}"


def _strict(case: Case) -> list[str]:
    """legit's commands go on by numbers where a model fails; here they are told not to."""
    return ["--on-llm-error", "fail"] if case.name.startswith("legit-") else []


def _said_once(case: Case, done: Result, name: str) -> None:
    told = [line for line in done.err.splitlines() if line.startswith(f"{case.name}: ")]
    assert told, (name, done.err)
    assert len(done.err.splitlines()) <= 6, (name, done.err)
    assert "\x1b" not in done.err
    for line in done.out.splitlines():
        json.loads(line)


@contextmanager
def stranger(greeting: bytes) -> Iterator[str]:
    """A server of another trade: says its greeting to whoever comes, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def greet() -> None:
            while True:
                try:
                    one, _ = listener.accept()
                except OSError:
                    return
                held.append(one)
                one.sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for one in held:
                one.close()
