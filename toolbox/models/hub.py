"""The hub of models: whether it can be asked, and where its client keeps what it has downloaded. No torch."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

from toolbox.shell.errors import CannotCreate, Unavailable

_DNS_SECONDS = 5.0
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def check_hub(name: str) -> None:
    """Without a network only cached models can be had: say so at once, where the hub's client retries for a minute."""
    if not _offline():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # read from the environment at import
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    if not (_hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").is_dir():
        raise Unavailable(
            f"--model {name}: no such directory, and the hub cannot be reached",
            "check the id and the network, or name a local directory, or smollm2",
        )


def _offline() -> bool:
    """Whether the user asked for no network, or the hub's host has no address."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_VARIABLES):
        return True
    if any(os.environ.get(name) for name in _PROXY_VARIABLES):
        return False  # the proxy resolves names
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    found: list[object] = []

    def look_up() -> None:
        with contextlib.suppress(OSError):
            found.append(socket.getaddrinfo(url.hostname, url.port or 443))

    # In a thread because a resolver without a route can take half a minute to give up.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_DNS_SECONDS)
    return not found


def _hub_cache() -> Path:
    """Where the hub's client keeps what it has downloaded, by its own rules."""
    home = os.environ.get("HF_HOME") or str(user_cache() / "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(cache)))


def user_cache() -> Path:
    """$XDG_CACHE_HOME or ~/.cache. Raises: CannotCreate (73) for a user without a home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    try:
        return Path("~/.cache").expanduser()
    except RuntimeError:  # a user without HOME and without an entry in the password file, as in some containers
        raise CannotCreate("no home directory to keep a cache in", "set TOOLBOX_CACHE to a directory") from None
