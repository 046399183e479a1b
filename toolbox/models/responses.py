"""The key of a request, and the log of responses that a run appends to and goes on from.

A key is a hash of all that decides a response and of nothing else, so that a stored response stands for the request it
answers and for no other. The log is one JSON object a line and can be joined with others by ``cat``. It holds the
completions, never the prompts.

Importing this module costs no torch.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from toolbox.models.generate import Completion, Decoding, FinishReason, TextRequest
from toolbox.models.load import ModelSource, base_model
from toolbox.shell.atomic import try_lock, unlock
from toolbox.shell.errors import BadData, CannotCreate, InternalError, UsageProblem
from toolbox.shell.streams import MAX_LINE

_BEGINNING = b'{"key":"'
"""How every line of a log begins: what does not is not ours, and is never cut."""

_KEY = re.compile(r"[0-9a-f]{64}")
_DECIDING = (
    "config.json", "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges*", "*.model", "*.tiktoken", "chat_template*", "*processor_config.json", "*.py",
)  # fmt: skip
"""Files of a model directory, beside its weights, that the text of a completion depends on."""


# -- keys -----------------------------------------------------------------------------------------------------------
def digest(value: Any) -> str:
    """SHA-256 over the canonical JSON of ``value``: sorted names, no spaces, ASCII; 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def key_bytes(key: Any) -> bytes | None:
    """A key as the 32 bytes that indices hold; None for what is none."""
    return bytes.fromhex(key) if isinstance(key, str) and _KEY.fullmatch(key) else None


def describe_run(
    backend: str, model: str, decoding: Decoding, *, system: str | None = None, **more: Any
) -> dict[str, Any]:
    """What a run has in common for all its responses and what decides them, as JSON; the system turn as a hash.

    ``model`` identifies the model (`model_identity`, or what an endpoint calls it), ``more`` is what this backend adds
    (number type and template, or address and form). Greedy decoding draws nothing: seed and top-p are no part of it.
    """
    chosen: dict[str, Any] = {
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": float(decoding.temperature),
        "stop": list(decoding.stop),
        "logprobs": decoding.logprobs,
    }
    if decoding.json_schema is not None:
        chosen["json_schema"] = digest(decoding.json_schema)
    if decoding.temperature > 0:
        chosen |= {"top_p": float(decoding.top_p), "seed": decoding.seed}
    return {
        "backend": backend,
        "model": model,
        **more,
        "system": None if system is None else digest(system),
        "decoding": chosen,
    }


class Keys:
    """Makes the keys of one run's requests."""

    def __init__(self, run: Mapping[str, Any]) -> None:
        self._run = digest(run)
        chosen = run.get("decoding")
        self._sampled = isinstance(chosen, Mapping) and chosen.get("temperature") != 0

    def __call__(self, request: TextRequest) -> str:
        """SHA-256, 64 hexadecimal digits, over the canonical JSON of run, content and sample.

        And of the path where tokens are drawn, because its name is what the noise comes from.
        """
        content = request.content
        asked: Any = content if isinstance(content, str) else [[turn["role"], turn["content"]] for turn in content]
        path = request.key if self._sampled else None
        return digest([self._run, asked, request.sample, path])


def model_identity(source: ModelSource, *, trust_remote_code: bool = False) -> str:
    """What tells the model of ``source``, once prepared, from any other, wherever it lies.

    A hash over its weights, its configuration and its tokenizer, an adapter's base included; on the hub its id and
    revision. Reads all weights: some seconds for billions of parameters.
    """
    from toolbox.models.facts import weights_digest, weights_directory

    directory = weights_directory(source)
    if directory is None:
        return f"{source.name}@{_revision(source.name)}"
    parts: dict[str, str | None] = {"weights": weights_digest(source)}
    for file in sorted(directory.iterdir()):
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _DECIDING):
            parts[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    base = base_model(source, trust_remote_code=trust_remote_code)
    if base is not source:
        parts["base"] = model_identity(base, trust_remote_code=trust_remote_code)
    return "sha256:" + digest(parts)


def _revision(name: str) -> str:
    """The commit of a model of the hub that was loaded, from where its configuration lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    if not isinstance(found, str):
        raise UsageProblem(
            f"--log: the revision of {name} is not known, so its responses cannot be told from another's",
            "download the model and name its directory",
        )
    return Path(found).parent.name


# -- the log --------------------------------------------------------------------------------------------------------
class Response(msgspec.Struct, kw_only=True):
    """One line of a log. ``run`` is as ``describe_run`` gives it."""

    key: str
    id: str
    variant: str | None
    sample: int
    model: str
    completion: str
    finish_reason: FinishReason
    n_prompt_tokens: int | None
    n_completion_tokens: int | None
    logprobs: list[float] | None
    run: msgspec.Raw

    def done(self) -> Completion:
        """The completion, as the backend gave it."""
        return Completion(
            self.completion, self.finish_reason, self.n_prompt_tokens, self.n_completion_tokens,
            None if self.logprobs is None else tuple(self.logprobs),
        )  # fmt: skip


class ResponseLog:
    """The log of a run: one response a line, in the hands of the operating system before the next one is made.

    With ``resume`` what is in the file already is found by its key; a last line that a killed run left torn is cut off.
    Of several responses of one key the first stands, in this run and in all later ones. What is held in memory is where
    each response lies, never the response. Safe to use from several threads; ``begin`` comes before all else.
    ``mode`` is that of a file that is made. ``held`` counts the responses that were there, ``found`` and ``added``
    those that this run took and made.

    Raises: CannotCreate (73) for a file that holds something without ``resume``, that another run is writing to, or
    that is none; BadData (65) for lines that are no responses.
    """

    def __init__(self, path: str, *, resume: bool = False, mode: int = 0o666) -> None:
        self.path = path
        self.held = self.found = self.added = 0
        self._places: dict[bytes, int] = {}
        self._runs: dict[bytes, str] = {}
        self._lock = threading.Lock()
        check_log(path, resume=resume)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._descriptor: int | None = os.open(path, flags, mode)
        except (FileNotFoundError, NotADirectoryError):
            raise CannotCreate(f"{path}: its directory does not exist", "make the directory first") from None
        try:
            if not try_lock(self._descriptor):
                raise CannotCreate(
                    f"{path}: another run is writing to it", "wait for that run, or choose another --log"
                )
            check_log(path, resume=resume)  # again: only now nobody else can fill it
            self._end = self._read() if resume else 0
        except BaseException:
            self.close()
            raise

    def begin(self, run: Mapping[str, Any], model: str) -> bool:
        """From now on responses are those of ``run`` (`describe_run`), by a model called ``model``.

        False when the file holds responses, but none of such a run.
        """
        self._keys, self._model = Keys(run), model
        self._run = msgspec.Raw(msgspec.json.encode(run))
        return not self.held or digest(run) in self._runs.values()

    def key(self, request: TextRequest) -> str:
        """The key of a request of this run."""
        return self._keys(request)

    def find(self, key: str) -> Completion | None:
        """The response in the file; None if there is none."""
        with self._lock:
            place = self._places.get(bytes.fromhex(key))
            if place is None:
                return None
            self.found += 1
            return msgspec.json.decode(self._line(place), type=Response).done()

    def add(self, key: str, request: TextRequest, completion: Completion) -> Completion:
        """Append a response, written when this returns; the one that stands for ``key``, an earlier one if there is."""
        response = Response(
            key=key, id=request.id, variant=request.variant, sample=request.sample, model=self._model,
            completion=completion.text, finish_reason=completion.finish_reason,
            n_prompt_tokens=completion.n_prompt_tokens, n_completion_tokens=completion.n_completion_tokens,
            logprobs=None if completion.logprobs is None else list(completion.logprobs), run=self._run,
        )  # fmt: skip
        line = msgspec.json.encode(response) + b"\n"
        with self._lock:
            name = bytes.fromhex(key)
            if name in self._places:
                return msgspec.json.decode(self._line(self._places[name]), type=Response).done()
            if self._descriptor is None:
                raise InternalError(f"{self.path}: written to after it was closed")
            self._write(line)
            self._places[name] = pack(self._end, len(line))
            self._end += len(line)
            self.added += 1
        return completion

    def close(self) -> None:
        """Bring what was written to the disk, and let other runs write."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
            unlock(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> ResponseLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        assert self._descriptor is not None
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            error.filename = error.filename or self.path
            raise

    def _line(self, place: int) -> bytes:
        assert self._descriptor is not None
        return os.pread(self._descriptor, *span(place))

    def _read(self) -> int:
        """Take in what is there, up to a torn last line, which is cut off; returns where it ends."""
        assert self._descriptor is not None
        end = 0
        with os.fdopen(os.dup(self._descriptor), "rb") as handle:
            for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE + 2), b""), 1):
                if not line.endswith(b"\n") and len(line) < MAX_LINE + 2:
                    if not (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                        raise self._alien(number)
                    os.ftruncate(self._descriptor, end)
                    break
                self._take(line, number, end)
                end += len(line)
        return end

    def _take(self, line: bytes, number: int, start: int) -> None:
        try:
            response = msgspec.json.decode(line, type=Response)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise self._alien(number) from None
        key = key_bytes(response.key)
        if key is None:
            raise self._alien(number)
        raw = bytes(response.run)
        if raw not in self._runs:
            self._runs[raw] = digest(json.loads(raw))
        self.held += 1
        self._places.setdefault(key, pack(start, len(line)))

    def _alien(self, number: int) -> BadData:
        return BadData(
            "not a response of an earlier run", "is this the --log of that run? Nothing was changed in it",
            file=self.path, line=number,
        )  # fmt: skip


def check_log(path: str, *, resume: bool) -> None:
    """Refuse a ``--log`` that must not be written: CannotCreate (73). Nothing is made or changed."""
    if path == "-":
        raise UsageProblem("--log - would put the log among the rows of stdout", "name a file")
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(status.st_mode):
        raise CannotCreate(f"{path}: is not a regular file", "a log is read again: name a file of its own")
    if status.st_size and not resume:
        raise CannotCreate(f"{path}: exists already", "--resume goes on with it; or choose another --log")


def pack(offset: int, length: int) -> int:
    """Where a line lies, as one number: a pair for each of a million would cost as much again as their index."""
    return offset << 32 | length


def span(place: int) -> tuple[int, int]:
    """Length and offset, as ``os.pread`` takes them."""
    return place & 0xFFFFFFFF, place >> 32
