"""What an OpenAI-compatible server answers, read without trust."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import msgspec

from toolbox.models.generate import Completion, Decoding, FinishReason

_SURROGATE = re.compile("[\ud800-\udfff]")
_LENGTH = ("length", "max_tokens", "model_length")
_WITHHELD = ("content_filter", "tool_calls", "function_call", "error")


class _Message(msgspec.Struct):
    content: str | None = None


class _Token(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None  # chat
    token_logprobs: list[float] | None = None  # plain text


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Reply(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


def read_reply(content: bytes, decoding: Decoding) -> Completion:
    """The completion in the body of a successful answer; ValueError where there is none.

    Stop strings are cut here too: some servers leave them in. ``finish_reason`` is "length" for the limit, "error"
    where the server withheld the text or called a tool, else "stop". Lone surrogates become U+FFFD.
    """
    try:
        reply = msgspec.convert(json.loads(content), _Reply)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise ValueError("not JSON") from None
    choice = reply.choices[0]
    if choice.message is None and choice.text is None:
        raise ValueError("neither a message nor a text")
    text = choice.text if choice.message is None else choice.message.content
    text = _SURROGATE.sub("\ufffd", text or "")  # a reasoning model that ran out of tokens says null
    cut = min((place for stop in decoding.stop if (place := text.find(stop)) >= 0), default=None)
    reason: FinishReason = "stop"
    if cut is None and choice.finish_reason in _LENGTH:
        reason = "length"
    elif cut is None and choice.finish_reason in _WITHHELD:
        reason = "error"
    usage = reply.usage or _Usage()
    logprobs = _numbers(choice.logprobs) if decoding.logprobs else None
    return Completion(text[:cut], reason, usage.prompt_tokens, usage.completion_tokens, logprobs)


def _numbers(logprobs: _Logprobs | None) -> tuple[float, ...] | None:
    if logprobs is None:
        return None
    if logprobs.content is not None:
        values = tuple(token.logprob for token in logprobs.content)
    elif logprobs.token_logprobs is not None:
        values = tuple(logprobs.token_logprobs)
    else:
        return None
    if not all(map(math.isfinite, values)):
        raise ValueError("a log-probability that is no number")
    return values


def error_message(content: bytes) -> str:
    """What an answer that is no success says, as text; its beginning where it is not JSON of a known shape."""
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        return content[:2000].decode("utf-8", "replace").strip()
    for _ in range(2):  # {"error": {"message": ...}}, {"error": ...}, {"message": ...}, {"detail": ...}
        if isinstance(said, dict):
            said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), said)
    return said if isinstance(said, str) else json.dumps(said) if said else ""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the Retry-After header asks to wait (RFC 9110, section 10.2.3); None without a readable one.

    A date is taken against the server's own clock where it tells the time.
    """
    asked = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", asked):
        return float(asked)
    until = _date(asked)
    if until is None:
        return None
    now = _date(headers.get("date", "")) or datetime.now(UTC)
    return max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
