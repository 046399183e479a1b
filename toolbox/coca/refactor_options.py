"""The options of coca-refactor, and what does not fit together among them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from toolbox.coca.ablate import parse_ablation
from toolbox.coca.record import Grammar
from toolbox.coca.words import SCRIPTS
from toolbox.models.backends import THERE, EndpointOptions
from toolbox.models.responses import check_log
from toolbox.shell.errors import CannotCreate, UsageProblem
from toolbox.shell.streams import process_rank

_HERE = frozenset({"trust_remote_code", "dtype", "device", "batch_size", "threads", "num_processes", "accelerate"})
_THERE = THERE | {"emit_requests"}
_ASKING = frozenset({"temperature", "seed", "log", "resume"})
_UNUSED = {
    "local": _THERE | {"replay", "responses"},
    "openai": _HERE | {"replay", "responses"},
    "replay": _HERE | _THERE | _ASKING | {"model"},
}
"""Options that a backend has no use for."""


@dataclass(frozen=True, kw_only=True)
class Options(EndpointOptions):
    """coca-refactor's options; ``given`` names those that were typed or set by a recipe."""

    file: str = "-"
    out: str = "-"
    overwrite: bool = False
    resume: bool = False
    log: str | None = None
    replay: str | None = None
    responses: str | None = None
    rejects: str | None = None
    summary: str | None = None
    log_text: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    limit: int | None = None
    label: str | None = None
    turns: str = "last"
    reprocess: bool = False
    verify_only: bool = False
    fix: bool = False
    emit_requests: bool = False
    meta: bool = True
    keep_vanilla_text: bool = False
    template: str = "coca-v1"
    few_shot: int = 2
    decode: str = "auto"
    response_source: str = "splice"
    label_hint: bool = True
    tag_style: str = "spaced"
    tag_prefix: str = ""
    temperature: float = 0.0
    max_tokens: int = 256
    seed: int = 0
    verify: str = "strict"
    max_attempts: int = 3
    on_reject: str = "drop"
    min_accept: float = 0.0
    unsafe_vanilla: str = "reject"
    tokenizer: str | None = None
    max_length: int | None = None
    think_lang: str | None = None
    ablate: str | None = None
    backend: str = "local"
    model: str = "smollm2"
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | str = "auto"
    window: int = 64
    threads: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def grammar(self) -> Grammar:
        return Grammar(self.tag_style, self.tag_prefix)  # type: ignore[arg-type]

    @property
    def decoding(self) -> str:
        """``--decode``, where ``auto`` is what suits the backend."""
        if self.decode != "auto":
            return self.decode
        return "forced" if self.backend == "local" else "free"

    @property
    def stored(self) -> str | None:
        """The stored responses, by either of the two names."""
        return self.replay if self.replay is not None else self.responses

    @property
    def log_file(self) -> str | None:
        """``--log``; a run into a file has one beside that, which goes when the run has come to its end."""
        if self.log is not None or self.backend == "replay" or self.out == "-" or self.verify_only:
            return self.log
        return None if self.emit_requests else f"{self.out}.log"


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    backend = options.backend
    for name in sorted(options.given & _UNUSED[backend]):
        flag = "-j" if name == "num_processes" else "--" + name.replace("_", "-")
        raise UsageProblem(f"{flag} has no use with --backend {backend}", "leave it out")
    if options.decoding == "forced" and backend == "openai":
        raise UsageProblem("--decode forced needs the model here: a chat endpoint does not go on from a given text",
                           "--decode free or json")  # fmt: skip
    if options.decoding == "json" and (backend == "local" or options.response_source == "teacher"):
        raise UsageProblem("--decode json is for endpoints, with the answer spliced in", "--decode free")
    if backend == "openai" and options.model == "smollm2" and "model" not in options.given:
        raise UsageProblem("--backend openai needs --model", "name the model as the server knows it")
    if backend == "openai" and options.base_url is None and not options.emit_requests and not options.verify_only:
        raise UsageProblem("--backend openai needs an address", "as in --base-url http://localhost:8000/v1")
    if backend == "replay" and options.stored is None:
        raise UsageProblem("--backend replay needs --replay FILE", "a log, or what a batch answered")
    if options.replay is not None and options.responses is not None:
        raise UsageProblem("--replay and --responses are one and the same", "give one of them")
    if options.emit_requests and backend != "openai":
        raise UsageProblem("--emit-requests writes requests to an endpoint", "add --backend openai")
    if options.fix and not options.verify_only:
        raise UsageProblem("--fix mends records that are there", "add --verify-only")
    if options.verify_only and options.reprocess:
        raise UsageProblem("--verify-only and --reprocess exclude one another", "give one of them")
    if options.max_length is not None and options.tokenizer is None:
        raise UsageProblem("--max-length counts tokens, and whose is not said", "add --tokenizer MODEL, the student")
    if options.think_lang is not None and options.think_lang not in SCRIPTS:
        raise UsageProblem(f"--think-lang {options.think_lang}: not known", f"one of {', '.join(SCRIPTS)}")
    if options.resume and options.log_file is None:
        raise UsageProblem("--resume goes on with a log, and there is none", "name it with --log FILE, or -o FILE")
    if options.ablate is not None:
        parse_ablation(options.ablate, options.grammar)
    _ = options.grammar
    _check_files(options)


def _check_files(options: Options) -> None:
    named = {"-o": options.out, "--rejects": options.rejects, "--summary": options.summary, "--log": options.log_file}
    places: dict[str, str] = {}
    for flag, path in named.items():
        if path is None or (flag == "-o" and path == "-"):
            continue
        if path == "-":
            raise UsageProblem(f"{flag} -: stdout has the rows already", "name a file")
        place = os.path.abspath(path)
        if place in places:
            raise UsageProblem(f"{flag} {path}: {places[place]} has the same name", "name another file")
        places[place] = flag
        if not os.path.isdir(os.path.dirname(place)):
            raise CannotCreate(f"{flag} {path}: no such directory", "make it first")
    if options.backend == "replay" and options.stored == options.file == "-":
        raise UsageProblem("the input and the stored responses cannot both be read from stdin", "name a file")
    if options.out != "-" and os.path.exists(options.out) and not (options.overwrite or options.resume):
        raise CannotCreate(f"{options.out}: exists already", "--overwrite replaces it")
    if options.log_file is not None and process_rank() == 0 and not finished(options):
        check_log(options.log_file, resume=options.resume)


def finished(options: Options) -> bool:
    """Whether ``--resume`` found the output of a run that came to its end."""
    return options.resume and not options.overwrite and options.out != "-" and os.path.exists(options.out)
