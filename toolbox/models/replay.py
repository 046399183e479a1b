"""Stored responses instead of a model: a log, the output of an earlier run, or anybody's rows with completions.

Importing this module costs no torch.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import BinaryIO

import msgspec

from toolbox.models.endpoint_reply import read_reply
from toolbox.models.generate import Completion, Content, Decoding, FinishReason, TextRequest
from toolbox.models.responses import Keys, digest, key_bytes, pack, span
from toolbox.shell.errors import BadData
from toolbox.shell.records import Identifier
from toolbox.shell.streams import Streams, damaged_is_bad_data, display_name, iter_lines, open_source

_FINISHED: tuple[FinishReason, ...] = ("stop", "length", "error")
_BOM = b"\xef\xbb\xbf"


class _Batched(msgspec.Struct, kw_only=True):
    """A line of a batch's output, by OpenAI or ``vllm run-batch``: an endpoint's answer under ``response.body``."""

    custom_id: str
    response: _Answered | None = None


class _Answered(msgspec.Struct, kw_only=True):
    status_code: int = 200
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Stored(msgspec.Struct, kw_only=True):
    """What is read of a stored response: of our log, of our output, or of anybody's rows with a completion."""

    completion: str
    key: str | None = None
    id: Identifier = None
    variant: str | None = None
    sample: int | None = None
    model: str | None = None
    finish_reason: str | None = None
    n_prompt_tokens: int | None = None
    n_completion_tokens: int | None = None
    logprobs: list[float] | None = None
    run: msgspec.Raw = msgspec.Raw(b"null")

    def done(self) -> Completion:
        reason = next((one for one in _FINISHED if one == self.finish_reason), "stop")
        return Completion(
            self.completion, reason, self.n_prompt_tokens, self.n_completion_tokens,
            None if self.logprobs is None else tuple(self.logprobs), self.model,
        )  # fmt: skip


class Replay:
    """Stored responses, found by their key, else by (id, variant, sample). Of several that fit the first stands.

    ``name`` is a file of JSON lines, ``-`` for stdin, plain or compressed: a log, what lm-generate wrote to stdout, or
    any rows with ``completion`` and ``id``. Rows without ``sample`` are the samples of their (id, variant) in the order
    of the file. ``model`` leaves out the responses of other models. A torn last line is left out; ``torn`` tells.

    The output of a batch (OpenAI's, ``vllm run-batch``) is read too, by the ``custom_id`` that `endpoint.batch_line`
    gave; ``failed`` counts its requests that were not answered.

    ``changed`` counts responses that were found by their name although their key, which they have, is another: the
    prompt or the options are not what they were.

    Raises: MissingInput (66), BadData (65) for a line that is no response, or where none is of ``model``.
    """

    def __init__(self, name: str, streams: Streams, *, model: str | None = None) -> None:
        self.name = display_name(name)
        self.changed = self.failed = 0
        self.torn = False
        self._model = model
        self._keys: dict[bytes, Keys | None] = {}
        self._by_key: dict[bytes, int] = {}
        self._by_name: dict[bytes, int] = {}
        self._next_sample: Counter[bytes] = Counter()
        self._handle = _seekable(open_source(name, streams, "--replay"), self.name)
        models = self._index()
        if model is not None and models and model not in models:
            known = ", ".join(sorted(str(one) for one in models)[:8])
            raise BadData(f"no response is of the model {model}", f"it has those of: {known}", file=self.name)

    def find(self, request: TextRequest, *others: Content) -> Completion | None:
        """The stored response of a request; ``others`` are further forms of its content that may have been used."""
        for keys in self._keys.values():
            for content in (request.content, *others):
                if keys is None:
                    continue
                same = TextRequest(request.id, request.variant, request.sample, content)
                place = self._by_key.get(bytes.fromhex(keys(same)))
                if place is not None:
                    return self._read(place).done()
        place = self._by_name.get(_name(request.id, request.variant, request.sample))
        if place is None:
            return None
        stored = self._read(place)
        self.changed += stored.key is not None
        return stored.done()

    def complete(self, requests: Sequence[TextRequest], decoding: Decoding) -> list[Completion]:
        """The stored responses, in order; ``decoding`` changes nothing. BadData (65) where one is missing."""
        return [self._must(request) for request in requests]

    def close(self) -> None:
        self._handle.close()

    def missing(self, request: TextRequest) -> BadData:
        """The complaint about a request without a response."""
        named = "" if request.variant is None else f" and variant {request.variant}"
        return BadData(
            f"{self.name} has no response for id {request.id}{named}, sample {request.sample}",
            "--on-bad skip leaves such rows out",
        )

    def _must(self, request: TextRequest) -> Completion:
        found = self.find(request)
        if found is None:
            raise self.missing(request)
        return found

    def _read(self, place: int) -> _Stored:
        stored = _decode(os.pread(self._handle.fileno(), *span(place)).removeprefix(_BOM))
        assert stored is not None  # only those that are there were noted
        return stored

    def _index(self) -> set[str | None]:
        """Note where each response lies; the models there are."""
        models: set[str | None] = set()
        start = self._handle.tell()
        for number, line in iter_lines(self._handle, self.name):
            end = self._handle.tell()
            try:
                stored = _decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                if self._is_torn(end):
                    self.torn = True
                    break
                raise self._bad(error, number) from None
            if stored is None:
                self.failed += 1
                start = end
                continue
            models.add(stored.model)
            if self._model is None or stored.model == self._model:
                self._note(stored, number, pack(start, end - start))
            start = end
        return models

    def _note(self, stored: _Stored, number: int, place: int) -> None:
        id = str(number if stored.id is None else stored.id)
        sample = stored.sample
        if sample is None:
            row = _name(id, stored.variant, -1)
            sample = self._next_sample[row]
            self._next_sample[row] += 1
        self._by_name.setdefault(_name(id, stored.variant, sample), place)
        key = key_bytes(stored.key)
        if key is None:
            return
        raw = bytes(stored.run)
        if raw not in self._keys:
            run = json.loads(raw)
            self._keys[raw] = Keys(run) if isinstance(run, dict) else None
        self._by_key.setdefault(key, place)

    def _is_torn(self, end: int) -> bool:
        """Whether the line that ends at ``end`` is the file's last and has no line end."""
        last = os.pread(self._handle.fileno(), 2, end - 1)
        return len(last) == 1 and last != b"\n"

    def _bad(self, error: Exception, number: int) -> BadData:
        what, _, field = str(error).partition(" - at `")
        if isinstance(error, msgspec.ValidationError):
            advice = "a stored response has `completion`, and `id` or `key`"
            return BadData(what, advice, file=self.name, line=number, field=field.rstrip("`") or None)
        return BadData(f"not valid JSON: {what}", "one JSON object a line", file=self.name, line=number)


def _decode(line: bytes) -> _Stored | None:
    """A stored response; None for a batch's request that failed. Raises what msgspec raises, ValueError included."""
    if b'"custom_id"' not in line:
        return msgspec.json.decode(line, type=_Stored)
    batched = msgspec.json.decode(line, type=_Batched)
    if batched.response is None or batched.response.status_code != 200:
        return None
    try:
        done = read_reply(bytes(batched.response.body), Decoding())
    except ValueError as error:
        raise msgspec.ValidationError(f"{error} - at `$.response.body`") from None
    id, variant, sample = _path(batched.custom_id)
    return _Stored(
        completion=done.text, id=id, variant=variant, sample=sample, finish_reason=done.finish_reason,
        n_prompt_tokens=done.n_prompt_tokens, n_completion_tokens=done.n_completion_tokens,
    )  # fmt: skip


def _path(custom_id: str) -> tuple[str, str | None, int | None]:
    """``id/variant/sample`` or ``id/sample`` apart; an id of another form is an id."""
    head, _, last = custom_id.rpartition("/")
    if not head or not last.isdecimal():
        return custom_id, None, None
    id, slash, variant = head.rpartition("/")
    return (id, variant, int(last)) if slash else (head, None, int(last))


def _name(id: str, variant: str | None, sample: int) -> bytes:
    return bytes.fromhex(digest([id, variant, sample]))


def _seekable(handle: BinaryIO, name: str) -> BinaryIO:
    """``handle`` itself if it is a plain file, else its content in a temporary one: lines are read where they lie."""
    raw = getattr(handle, "raw", None)
    if isinstance(raw, io.FileIO) and stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return handle
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    with handle, damaged_is_bad_data(name):
        shutil.copyfileobj(handle, spool, 1 << 20)
    spool.flush()
    spool.seek(0)
    return spool  # type: ignore[return-value]
