"""What commands share that complete prompts by any backend: the options of an endpoint, and which fit together.

Importing this module costs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Protocol
from urllib.parse import urlsplit

from toolbox.models.endpoint import Service
from toolbox.models.endpoint_key import find_key, is_local
from toolbox.models.responses import check_log
from toolbox.shell.errors import UsageProblem
from toolbox.shell.streams import process_rank


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """The options of a command that can ask an endpoint, by their names on the command line."""

    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    rpm: float | None = None
    timeout: float = 600.0
    retries: int = 6

    def service(
        self, model: str, warn: Callable[[str], None], *, system: str | None = None, raw: bool = False
    ) -> Service:
        """The endpoint that is meant, with its key from the environment; ``base_url`` must be there."""
        assert self.base_url is not None
        key = find_key(self.api_key_env, self.base_url)
        chosen = Service(
            self.base_url, model, key, system=system, raw=raw, concurrency=self.concurrency, rpm=self.rpm,
            timeout=self.timeout, retries=self.retries,
        )  # fmt: skip
        parts = urlsplit(self.base_url)
        if key is not None and parts.scheme == "http" and not is_local(parts.hostname or ""):
            warn(f"{parts.hostname}: the key travels unencrypted; https:// would hide it")
        return chosen


THERE = frozenset(item.name for item in fields(EndpointOptions))
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
