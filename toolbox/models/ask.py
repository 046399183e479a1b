"""Ask a language model a few questions: one way in to a model here, an endpoint, or stored responses.

For rooms that put a handful of prompts and need the answers before they go on, where ``lm-generate`` streams rows.
Nothing is opened or loaded before the first question. Importing this module costs no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolbox.models.backends import EndpointOptions
from toolbox.models.endpoint import Endpoint
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.models.replay import Replay
from toolbox.models.responses import ResponseLog, describe_run, digest
from toolbox.shell.errors import UsageProblem
from toolbox.shell.streams import Streams

BACKENDS = ("local", "openai", "replay")


@dataclass(frozen=True, kw_only=True)
class Asking(EndpointOptions):
    """Who is asked, and how. Names are those of the shared options."""

    backend: str
    model: str = "smollm2"
    trust_remote_code: bool = False
    log: str | None = None
    resume: bool = False
    replay: str | None = None
    system: str | None = None
    template: str = "auto"
    decoding: Decoding = field(default_factory=Decoding)
    device: str = "auto"

    def check(self, *, model_given: bool = True) -> None:
        """UsageProblem (2) for what does not fit together; nothing is opened."""
        if self.backend not in BACKENDS:
            raise UsageProblem(f"--backend {self.backend}: not known", "any of " + ", ".join(BACKENDS))
        if self.backend == "openai" and self.base_url is None:
            raise UsageProblem("--backend openai needs an address", "as in --base-url http://localhost:8000/v1")
        if self.backend == "openai" and not model_given:
            raise UsageProblem("--backend openai needs --model", "name the model as the server knows it")
        if self.backend == "replay" and self.replay is None:
            raise UsageProblem("--backend replay needs --replay FILE", "a log, or rows with completions")
        if self.backend == "replay" and self.log is not None:
            raise UsageProblem("--log has no use with --backend replay", "leave it out")


class Asker:
    """Answers requests with one backend; to be used as a context. Responses in ``--log`` are taken from there.

    Errors are those of the backends: Unavailable (69) for an endpoint that cannot be reached, BadData (65) for a stored
    response that is missing.
    """

    def __init__(self, asking: Asking, streams: Streams, note: Callable[[str], None] | None = None) -> None:
        self.asking, self.streams = asking, streams
        self._note = note or (lambda text: None)
        self._stack = contextlib.ExitStack()
        self._complete: Callable[[Sequence[TextRequest]], list[Completion]] | None = None
        self._log: ResponseLog | None = None

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, requests: Sequence[TextRequest]) -> list[Completion]:
        """One completion a request, in order; each is in the log before this returns."""
        if self._complete is None:
            self._complete = {"local": self._local, "openai": self._openai, "replay": self._replay}[
                self.asking.backend
            ]()
        if self._log is None:
            return self._complete(requests)
        keys = [self._log.key(request) for request in requests]
        found: list[Completion | None] = [self._log.find(key) for key in keys]
        missing = [place for place, one in enumerate(found) if one is None]
        for place, done in zip(missing, self._complete([requests[place] for place in missing]), strict=True):
            found[place] = self._log.add(keys[place], requests[place], done)
        return [one for one in found if one is not None]

    # -- backends -----------------------------------------------------------------------------------------------------
    def _begin(self, run: dict[str, Any]) -> None:
        """Open the log for responses of ``run``."""
        if self.asking.log is not None:
            self._log = self._stack.enter_context(ResponseLog(self.asking.log, resume=self.asking.resume))
            self._log.begin(run, self.asking.model)

    def _openai(self) -> Callable[[Sequence[TextRequest]], list[Completion]]:
        asking = self.asking
        assert asking.base_url is not None
        service = asking.service(asking.model, self._note, system=asking.system)
        self._begin(
            describe_run(
                "openai", asking.model, asking.decoding, system=asking.system, raw=False,
                base_url=asking.base_url.rstrip("/"),
            )
        )  # fmt: skip

        # A connection a question: whatever fails ends its endpoint, and the next question may fare better.
        def complete(requests: Sequence[TextRequest]) -> list[Completion]:
            if not requests:
                return []
            with Endpoint(service, self._note) as endpoint:
                return endpoint.complete(requests, asking.decoding)

        return complete

    def _replay(self) -> Callable[[Sequence[TextRequest]], list[Completion]]:
        assert self.asking.replay is not None
        stored = Replay(self.asking.replay, self.streams)
        self._stack.callback(stored.close)
        return lambda requests: stored.complete(requests, self.asking.decoding)

    def _local(self) -> Callable[[Sequence[TextRequest]], list[Completion]]:
        import torch

        from toolbox.models.chat import Chat
        from toolbox.models.generate import LocalBackend, Request
        from toolbox.models.load import find_model, load_model, load_tokenizer, prepare
        from toolbox.models.responses import model_identity

        asking = self.asking
        trust = asking.trust_remote_code
        source = find_model(asking.model, trust_remote_code=trust)
        prepare(source, self._note)
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
        device = asking.device if asking.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
        model = load_model(source, dtype=dtype, trust_remote_code=trust).to(device)
        chat = Chat(tokenizer, asking.template, asking.system)
        backend = LocalBackend(model, tokenizer, end_ids=chat.end_ids)
        if asking.log is not None:
            identity = model_identity(source, trust_remote_code=trust)
            self._begin(
                describe_run(
                    "local",
                    identity,
                    asking.decoding,
                    system=asking.system,
                    dtype=dtype,
                    template=digest([chat.source, chat.source]),
                )
            )

        def complete(requests: Sequence[TextRequest]) -> list[Completion]:
            turns = [
                [{"role": "user", "content": one.content}] if isinstance(one.content, str) else list(one.content)
                for one in requests
            ]
            prompts = [Request(one.key, tuple(chat.prompt(own))) for one, own in zip(requests, turns, strict=True)]
            return backend.complete(prompts, asking.decoding)

        return complete
