"""Who answers the questions of coca-refactor: a model here, an endpoint, stored responses. Heavy imports come late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from toolbox.coca.dialogues import Driver
from toolbox.coca.refactor_options import Options
from toolbox.coca.teacher import Ask, Sampling
from toolbox.models.load import ModelSource
from toolbox.models.responses import ResponseLog, describe_run, model_identity
from toolbox.shell.command import Invocation

Start = Callable[[ModelSource | None], Driver]


def open_log(options: Options, call: Invocation, stack: contextlib.ExitStack) -> ResponseLog | None:
    path = options.log_file
    if path is None:
        return None
    log = stack.enter_context(ResponseLog(path, resume=options.resume, mode=0o600))

    def tell() -> None:
        if log.found:
            call.reporter.note(f"{log.found} responses from {log.path}, {log.added} new")

    stack.callback(tell)
    return log


def _describe(options: Options, log: ResponseLog | None, identity: str, call: Invocation, **more: Any) -> None:
    """Tell the log what decides answers beside the questions themselves, which hold the template's words."""
    if log is None:
        return
    sampling = Sampling(options.temperature, seed=options.seed)
    run = describe_run(
        options.backend, identity, sampling.decoding(Ask("", 0, (), max_tokens=options.max_tokens)),
        decode=options.decoding, **more,
    )  # fmt: skip
    if not log.begin(run, options.model):
        call.reporter.warn(f"{log.path}: holds no response of this model with these options")


def driver(options: Options, call: Invocation, log: ResponseLog | None, stack: contextlib.ExitStack) -> Start:
    sampling = Sampling(options.temperature, seed=options.seed)
    if options.backend == "replay":
        from toolbox.coca.remote import ReplayTeacher
        from toolbox.models.replay import Replay

        assert options.stored is not None
        replay = Replay(options.stored, call.streams)
        stack.callback(replay.close)
        if replay.torn:
            call.reporter.warn(f"{replay.name}: its last line is cut off, and left out")
        return lambda _: ReplayTeacher(replay)
    if options.backend == "openai":
        return _remote(options, call, log, sampling)

    def start(source: ModelSource | None) -> Driver:
        from toolbox.coca.local import LocalTeacher

        assert source is not None
        workers = start_workers(options, call, source)
        stack.callback(workers.dismiss)
        if log is not None:
            identity = model_identity(source, trust_remote_code=options.trust_remote_code)
            _describe(options, log, identity, call, dtype=workers.dtype)
        closing = options.grammar.closing("check")
        return LocalTeacher(workers, sampling, log, window=options.window, closing=closing)

    return start


def _remote(options: Options, call: Invocation, log: ResponseLog | None, sampling: Sampling) -> Start:
    from toolbox.coca.remote import EndpointTeacher

    service = options.service(options.model, call.reporter.warn)
    _describe(options, log, options.model, call, base_url=service.base_url.rstrip("/"))
    # wide: a row that waits a minute for another try must not hold up the requests of those behind it
    window = max(options.window, 16 * options.concurrency)
    bad = options.on_bad == "fail"
    return lambda _: EndpointTeacher(service, sampling, log, window=window, say=call.reporter.note, stop_at_bad=bad)


def start_workers(options: Options, call: Invocation, source: ModelSource) -> Any:
    from toolbox.coca.workers import Workers

    return Workers(
        source, call.reporter, dtype=options.dtype, device=options.device, batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code, share_beginnings=True,
    )  # fmt: skip
