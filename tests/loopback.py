"""An OpenAI-compatible endpoint on this machine: a real HTTP server in threads, whose every answer the test decides."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-loopback-5f3a91c2d87e44b0"
"""A key that must be in no output."""


@dataclass(frozen=True)
class Seen:
    """One request as it arrived; ``index`` counts from 0, ``at`` is in monotonic seconds."""

    index: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def asked(self) -> str:
        """The last turn, or the plain text."""
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Answer:
    """What the server does: wait ``delay`` seconds, then send ``body`` (JSON, or bytes as they are), or hang up.

    ``trickle`` is the wait in seconds between one byte and the next.
    """

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False
    cut: bool = False
    trickle: float = 0.0


def said(seen: Seen, text: str, **more: Any) -> dict[str, Any]:
    """The body of a completion in the form that was asked for."""
    choice = {"index": 0, "finish_reason": "stop", **more}
    choice |= {"text": text} if "prompt" in seen.body else {"message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": len(seen.asked), "completion_tokens": len(text)}
    return {"id": "x", "object": "completion", "choices": [choice], "usage": usage}


def echo(seen: Seen) -> Answer:
    """Says what it was asked, and the seed if there is one."""
    return Answer(said(seen, f"{seen.asked}! {seen.body.get('seed', '')}"))


class Loopback:
    """A running endpoint; ``seen`` are its requests, ``most`` how many were answered at a time."""

    def __init__(self, answer: Callable[[Seen], Answer] = echo) -> None:
        self.seen: list[Seen] = []
        self.most = 0
        self._answer = answer
        self._busy = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Loopback:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            seen = Seen(len(self.seen), handler.path, headers, body, time.monotonic())
            self.seen.append(seen)
            self._busy += 1
            self.most = max(self.most, self._busy)
        try:
            answer = self._answer(seen)
            time.sleep(answer.delay)
        finally:
            with self._lock:
                self._busy -= 1
        if answer.hang_up:
            handler.close_connection = True
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
            return
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        with contextlib.suppress(OSError):  # the client may have gone
            handler.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            content = content[: len(content) // 2] if answer.cut else content
            for part in (bytes([byte]) for byte in content) if answer.trickle else (content,):
                handler.wfile.write(part)
                time.sleep(answer.trickle)
            if answer.cut:
                handler.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that has gone is nothing to print about."""
