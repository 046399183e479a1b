"""What commands share that complete prompts by any backend: which options fit together, and the endpoint they name.

Importing this module costs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Protocol
from urllib.parse import urlsplit

from toolbox.models.endpoint import Service
from toolbox.models.endpoint_key import find_key, is_local
from toolbox.models.responses import check_log
from toolbox.shell.errors import UsageProblem
from toolbox.shell.streams import process_rank

THERE = frozenset({"base_url", "api_key_env", "concurrency", "rpm", "timeout", "retries"})
"""Options of an endpoint."""


class Chosen(Protocol):
    """Options of such a command; ``given`` names those that were typed or set by a recipe."""

    @property
    def backend(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def log(self) -> str | None: ...
    @property
    def resume(self) -> bool: ...
    @property
    def replay(self) -> str | None: ...
    @property
    def base_url(self) -> str | None: ...
    @property
    def api_key_env(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def rpm(self) -> float | None: ...
    @property
    def timeout(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def given(self) -> frozenset[str]: ...


def check_backend(options: Chosen, default_model: str, *, here: Collection[str], asking: Collection[str]) -> None:
    """What does not fit together: UsageProblem (2), CannotCreate (73) for a log that must not be written.

    ``here`` names the options that only a model in this process has a use for, ``asking`` those that stored responses
    have none for. An endpoint has no use for ``default_model``, which is a model here.
    """
    backend = options.backend
    unused = {"local": THERE | {"replay"}, "openai": {*here, "replay"}, "replay": {*here, *THERE, *asking}}[backend]
    for name in sorted(options.given & unused):
        flag = "-j" if name == "num_processes" else "--" + name.replace("_", "-")
        advice = "leave it out"
        if name in ("num_processes", "accelerate") and backend == "openai":
            advice += ": --concurrency is how many requests are under way at a time"
        raise UsageProblem(f"{flag} has no use with --backend {backend}", advice)
    if options.resume and options.log is None:
        raise UsageProblem("--resume goes on with a log, and there is none", "name it with --log FILE")
    if backend == "openai" and options.base_url is None:
        raise UsageProblem("--backend openai needs an address", "as in --base-url http://localhost:8000/v1")
    if backend == "openai" and options.model == default_model and "model" not in options.given:
        raise UsageProblem("--backend openai needs --model", "name the model as the server knows it")
    if backend == "replay" and options.replay is None:
        raise UsageProblem("--backend replay needs --replay FILE", "a log, or rows with completions")
    if options.replay == options.file == "-":
        raise UsageProblem("the input and --replay cannot both be read from stdin", "name a file for one of them")
    if backend != "local" and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ:
        raise UsageProblem(f"--backend {backend} takes one process", "start it without a launcher")
    if options.log is not None and process_rank() == 0:
        check_log(options.log, resume=options.resume)


def service_of(
    options: Chosen, warn: Callable[[str], None], *, system: str | None = None, raw: bool = False
) -> Service:
    """The endpoint that the options name, with its key from the environment."""
    assert options.base_url is not None
    key = find_key(options.api_key_env, options.base_url)
    chosen = Service(
        options.base_url, options.model, key, system=system, raw=raw, concurrency=options.concurrency,
        rpm=options.rpm, timeout=options.timeout, retries=options.retries,
    )  # fmt: skip
    parts = urlsplit(options.base_url)
    if key is not None and parts.scheme == "http" and not is_local(parts.hostname or ""):
        warn(f"{parts.hostname}: the key travels unencrypted; https:// would hide it")
    return chosen
