"""Completions by any OpenAI-compatible server: concurrent, retried with patience, and silent about the key.

Turns go to ``/chat/completions``, plain text to ``/completions``. Requests run on an event loop in a thread of its own,
so that whoever asks may read and write meanwhile. httpx is imported when the first endpoint is opened; torch never.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

from toolbox.models.endpoint_key import AS_IN, check_address, hide, is_local
from toolbox.models.endpoint_reply import error_message, read_reply, retry_after
from toolbox.models.generate import Completion, Content, Decoding, TextRequest
from toolbox.models.sampling import noise_stream
from toolbox.shell.errors import BadData, Unavailable, UsageProblem, clean

T = TypeVar("T")


_LONGEST_WAIT = 60.0
"""Seconds: where doubling ends."""
_LONGEST_RETRY_AFTER = 3600.0
"""Seconds: a server that asks for more is not there today."""
_LARGEST_REPLY = 64 << 20
_BUSY = (408, 429)
_QUOTED = 300
"""Characters of a server's message that are passed on."""


class AccessDenied(Unavailable):
    """The endpoint does not accept the key: no other request will fare better."""


class _Broken(Exception):
    """An attempt failed in a way that may pass. ``wait`` is what the server asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.what, self.wait = what, wait


@dataclass(frozen=True, slots=True)
class Service:
    """Where and how to ask.

    ``base_url`` is what ``/chat/completions`` is put behind; ``timeout`` (seconds) bounds one attempt from connecting
    to the last byte; ``retries`` follow a first attempt; ``rpm`` bounds the attempts a minute. ``system`` opens
    conversations that have no system turn of their own. ``raw`` sends turns as plain text, joined as they are.
    ``backoff`` is the first wait in seconds.

    Raises: UsageProblem (2) for an address that is none, or that would carry a secret.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    system: str | None = None
    raw: bool = False
    concurrency: int = 8
    rpm: float | None = None
    timeout: float = 600.0
    retries: int = 6
    backoff: float = 1.0

    def __post_init__(self) -> None:
        check_address(self.base_url)


class Endpoint:
    """An open connection to a ``Service``; to be used as a context. ``say`` is told of waits before another attempt.

    ``submit`` gives a future, ``complete`` waits for all. Requests start in the order they were submitted, at most
    ``concurrency`` at a time. Their exceptions:

    - AccessDenied (69) for 401 and 403, at once, and with it everything ends;
    - Unavailable (69) when the retries run out, for a redirect, and where asked-for log-probabilities are not given:
      nothing is started any more;
    - BadData (65) for any other 4xx: this request is wrong, others may be right; ``strict`` starts nothing any more.

    429, 408, 5xx, broken connections, time-outs and answers that cannot be read are retried: waits double from
    ``backoff`` seconds and are shortened at random by up to half, so that clients part; Retry-After holds all requests.
    A sampled request carries a seed of its own, made of the run's seed and its path.
    """

    def __init__(self, service: Service, say: Callable[[str], None] | None = None, *, strict: bool = False) -> None:
        self.service, self._strict = service, strict
        self._say = say or (lambda text: None)
        self._url = service.base_url.rstrip("/")
        self._limit_name = "max_tokens"
        self._client: Any = None
        self._slots = asyncio.Semaphore(service.concurrency)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._attempting: set[asyncio.Task[Any]] = set()
        self._not_before = 0.0
        self._last_said = -10.0
        self._stopping = False

    def __enter__(self) -> Endpoint:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        try:
            self._call(self._open())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(at_once=True)
        with contextlib.suppress(Exception):
            self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(
        self, request: TextRequest, decoding: Decoding, then: Callable[[Completion], None] | None = None
    ) -> Future[Completion]:
        """Queue a request. ``then`` gets the completion as soon as it is there, before the future does.

        ``then`` is called in the endpoint's thread; what it raises becomes the future's exception. BadData is raised
        here where the request cannot be sent in this form.
        """
        path, body = self._body(request, decoding)
        return asyncio.run_coroutine_threadsafe(self._work(path, body, decoding, then), self._loop)

    def complete(self, requests: Sequence[TextRequest], decoding: Decoding) -> list[Completion]:
        """One completion a request, in order; the first exception cancels the rest."""
        futures = [self.submit(request, decoding) for request in requests]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                if not future.cancelled():  # one that a failure has cancelled does not say why
                    future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def stop(self, *, at_once: bool) -> None:
        """Start no attempt any more and cancel what waits for one; ``at_once`` the attempts under way too.

        Futures that end so are cancelled; an attempt that then fails is not repeated.
        """
        self._call(self._stop(at_once))

    # -- in the loop --------------------------------------------------------------------------------------------------
    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        import httpx2

        service = self.service
        try:
            httpx2.URL(self._url)
        except httpx2.InvalidURL:
            raise UsageProblem("--base-url is not the address of a server", AS_IN) from None
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "toolbox-ten"}
        if service.api_key is not None:
            headers["Authorization"] = f"Bearer {service.api_key}"
        self._client = httpx2.AsyncClient(
            headers=headers,
            timeout=None,  # one bound for the whole attempt is ours
            verify=not service.base_url.startswith("http:"),  # else certificates are read for nothing, in 70 ms
            limits=httpx2.Limits(max_connections=service.concurrency, max_keepalive_connections=service.concurrency),
            trust_env=not is_local(check_address(service.base_url)),  # a proxy does not know this machine's ports
        )

    async def _close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _stop(self, at_once: bool) -> None:
        self._stopping = True
        for task in self._tasks - {asyncio.current_task()}:
            if at_once or task not in self._attempting:
                task.cancel()

    async def _work(
        self, path: str, body: dict[str, Any], decoding: Decoding, then: Callable[[Completion], None] | None
    ) -> Completion:
        if self._stopping:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            async with self._slots:
                done = await self._patiently(task, path, body, decoding)
                if then is not None:
                    then(done)
                return done
        except Exception as problem:
            # Here and now: the next request must not slip through before anybody hears of it.
            if self._strict or not isinstance(problem, BadData):
                await self._stop(at_once=isinstance(problem, AccessDenied))
            raise
        finally:
            self._tasks.discard(task)

    async def _patiently(
        self, task: asyncio.Task[Any], path: str, body: dict[str, Any], decoding: Decoding
    ) -> Completion:
        failures = 0
        while True:
            await self._turn()
            self._attempting.add(task)
            try:
                return await self._attempt(path, body, decoding)
            except _Broken as problem:
                failures += 1
                if failures > self.service.retries or self._stopping:
                    raise self._gave_up(problem.what, failures) from None
                broken = problem
            finally:
                self._attempting.discard(task)
            await self._pause(broken, failures)

    async def _turn(self) -> None:
        """Wait until an attempt may start; with ``rpm`` the next one may a while later."""
        while (wait := self._not_before - self._loop.time()) > 0:
            await asyncio.sleep(wait)
        if self.service.rpm is not None:
            self._not_before = self._loop.time() + 60 / self.service.rpm

    async def _pause(self, problem: _Broken, failures: int) -> None:
        wait = min(_LONGEST_WAIT, self.service.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1)
        if problem.wait is not None:
            if problem.wait > _LONGEST_RETRY_AFTER:
                raise self._gave_up(f"{problem.what}; it asks to wait {problem.wait:.0f} s", failures)
            self._not_before = max(self._not_before, self._loop.time() + problem.wait)
            wait = max(wait, problem.wait)
        if self._loop.time() - self._last_said >= 5:  # not eight times the same
            self._last_said = self._loop.time()
            self._say(f"{self._url}: {problem.what}; trying again in {wait:.1f} s")
        await asyncio.sleep(wait)

    def _gave_up(self, what: str, failures: int) -> Unavailable:
        times = "" if failures == 1 else f" (tried {failures} times)"
        return Unavailable(
            f"{self._url}: {what}{times}", "check the server and --base-url; --log and --resume keep what was finished"
        )

    async def _attempt(self, path: str, body: dict[str, Any], decoding: Decoding) -> Completion:
        import httpx2

        try:
            limit_name = self._limit_name
            async with asyncio.timeout(self.service.timeout):
                status, headers, content = await self._post(path, {**body, limit_name: decoding.max_new_tokens})
        except TimeoutError:
            raise _Broken(f"no answer within {self.service.timeout:g} s") from None
        except httpx2.HTTPError as error:
            reason = clean(str(error))[:_QUOTED] or type(error).__name__
            raise _Broken(hide(f"the connection failed: {reason}", self.service.api_key)) from None
        if 200 <= status < 300:
            try:
                done = read_reply(content, decoding)
            except ValueError as error:
                raise _Broken(f"an answer that is no completion: {error}") from None
            if decoding.logprobs and done.logprobs is None:
                raise Unavailable(f"{self._url}: gives no log-probabilities", "leave --logprobs out")
            return done
        if status == 400 and limit_name == "max_tokens" and b"max_completion_tokens" in content:
            self._limit_name = "max_completion_tokens"  # what newer models of OpenAI want, and others do not know
            return await self._attempt(path, body, decoding)
        raise self._failure(status, headers, content)

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        async with self._client.stream("POST", self._url + path, content=json.dumps(body).encode()) as response:
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _LARGEST_REPLY:
                    raise _Broken(f"an answer of more than {_LARGEST_REPLY:,} bytes")
            return response.status_code, response.headers, bytes(content)

    def _failure(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        """What an answer that is no success becomes."""
        said = hide(clean(error_message(content))[: 4 * _QUOTED], self.service.api_key)
        what = f"{status}: {said if len(said) <= _QUOTED else said[:_QUOTED] + '…'}" if said else str(status)
        if status in (401, 403):
            return AccessDenied(f"{self._url}: {what}", "check the key in the variable of --api-key-env")
        if status in _BUSY or status >= 500:
            return _Broken(what, retry_after(headers))
        if 400 <= status < 500:
            return BadData(f"the endpoint refuses this row: {what}", "check --model, --base-url and the row")
        return Unavailable(f"{self._url}: {what}", "check --base-url: it has to be the server itself, not a redirect")

    # -- requests -----------------------------------------------------------------------------------------------------
    def _body(self, request: TextRequest, decoding: Decoding) -> tuple[str, dict[str, Any]]:
        """The path below the base URL and the JSON of a request, its length limit left out."""
        body: dict[str, Any] = {"model": self.service.model, "temperature": decoding.temperature}
        if decoding.temperature > 0:
            body["seed"] = noise_stream(decoding.seed, request.key, 0) % 2**31
            if decoding.top_p < 1:
                body["top_p"] = decoding.top_p
        if decoding.stop:
            body["stop"] = list(decoding.stop)
        if decoding.json_schema is not None:
            form = {"name": "answer", "strict": True, "schema": json.loads(decoding.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        turns = self._turns(request.content)
        if self.service.raw:
            logprobs = {"logprobs": 0} if decoding.logprobs else {}
            return "/completions", {**body, "prompt": _joined(turns), **logprobs}
        logprobs = {"logprobs": True} if decoding.logprobs else {}
        return "/chat/completions", {**body, "messages": turns, **logprobs}

    def _turns(self, content: Content) -> list[Mapping[str, str]]:
        turns = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
        if self.service.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.service.system})
        return turns


def batch_line(service: Service, request: TextRequest, decoding: Decoding) -> dict[str, Any]:
    """A request as one line of the batch files that OpenAI and ``vllm run-batch`` take; ``custom_id`` is its path.

    What such a batch answers is read by `replay`.
    """
    path, body = Endpoint(service)._body(request, decoding)
    body = {**body, "max_tokens": decoding.max_new_tokens}
    return {"custom_id": request.key, "method": "POST", "url": "/v1" + path, "body": body}


def _joined(turns: Sequence[Mapping[str, str]]) -> str:
    """Turns as plain text, as the local backend's template ``raw`` has them."""
    if any(turn["role"] == "assistant" for turn in turns):
        raise BadData(
            "turns of an assistant end with a token that only the model knows", "leave --raw out", field="$.messages"
        )
    return "".join(turn["content"] for turn in turns)
