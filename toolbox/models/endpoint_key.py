"""The address of an endpoint and the key to it: found, checked, and kept out of everything that people see."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from urllib.parse import urlsplit

from toolbox.shell.errors import UsageProblem

AS_IN = "as in --base-url http://localhost:8000/v1"

_PIECE = 8
"""Characters: so long a part of a key is already a secret."""


def check_address(base_url: str) -> str:
    """The host of a base URL; UsageProblem where it is none. The URL may hold a secret: it is not repeated."""
    host = None
    with contextlib.suppress(ValueError):
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    if not host or not base_url.isprintable() or " " in base_url or parts.scheme not in ("http", "https"):
        raise UsageProblem("--base-url is not the address of a server", AS_IN)
    if parts.username is not None or parts.query or parts.fragment:
        raise UsageProblem("--base-url carries more than an address", f"keys come from --api-key-env; {AS_IN}")
    return host


def is_local(host: str) -> bool:
    """Whether ``host`` is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return False


def find_key(variable: str, base_url: str) -> str | None:
    """The key in the environment ``variable``; None where there is none and the server is on this machine.

    Raises: UsageProblem (2) for a missing key, or one that cannot stand in a header. Neither the name nor the value is
    repeated: a key given in place of the name is a common slip.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise UsageProblem(
            "--api-key-env takes the name of an environment variable", "never put a key on the command line"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        if is_local(check_address(base_url)):
            return None
        raise UsageProblem(
            "the environment variable of --api-key-env is not set",
            "export it; a server without keys takes any word",
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageProblem("the key in the environment variable of --api-key-env is not one line of plain characters")
    return key


def hide(text: str, key: str | None) -> str:
    """``text`` without ``key`` or any part of 8 characters of it; a shorter key, a mere word, as a whole only."""
    if not key:
        return text
    if len(key) < _PIECE:
        return re.sub(rf"(?<!\w){re.escape(key)}(?!\w)", "[key]", text)
    pieces = {key[start : start + _PIECE] for start in range(len(key) - _PIECE + 1)}
    shown: list[str] = []
    hidden_to = 0
    for place, character in enumerate(text):
        if text[place : place + _PIECE] in pieces:
            if place >= hidden_to:
                shown.append("[key]")
            hidden_to = place + _PIECE
        if place >= hidden_to:
            shown.append(character)
    return "".join(shown)
