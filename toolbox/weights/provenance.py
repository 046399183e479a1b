"""Where weights come from, in the file itself: one header key ``toolbox`` with canonical JSON.

No time, host or absolute path goes in, so equal runs give equal bytes; times are told in run.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from toolbox.shell.errors import BadData

KEY = "toolbox"
PACKAGES = ("toolbox-ten", "torch", "transformers")


def canonical(value: object) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def header(
    command: str,
    options: Mapping[str, Any],
    seed: int | None,
    inputs: Mapping[str, str],
    versions: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of a weight file: {"format": "pt", "toolbox": …}.

    ``options``: those that decide the result (not, say, the output's name). None is dropped; of a path only the last
    part stays: of every path object, and of text that starts with ``/``, ``./``, ``../`` or ``~/`` (other text with
    a slash may be a hub id). ``inputs``: label -> SHA-256. ``versions``: by default those of the installed packages.
    """
    content = {
        "command": command,
        "inputs": dict(inputs),
        "options": _plain(options),
        "seed": seed,
        "versions": dict(versions) if versions is not None else installed_versions(),
    }
    return {"format": "pt", KEY: canonical(content)}


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a result, as installed, without importing them."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_provenance(metadata: Mapping[str, str], file: str | None = None) -> dict[str, Any] | None:
    """The parsed ``toolbox`` entry of a header, None where there is none.

    Raises: BadData (65) where it is not a JSON object.
    """
    if KEY not in metadata:
        return None
    try:
        content = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise BadData("is not a JSON object", "was the header edited?", file=file, field=f"__metadata__.{KEY}")
    return content


def with_input(metadata: Mapping[str, str], label: str, sha256: str) -> dict[str, str]:
    """``metadata`` with one more entry under ``inputs``."""
    content = read_provenance(metadata) or {}
    content["inputs"] = {**content.get("inputs", {}), label: sha256}
    return {**metadata, KEY: canonical(content)}


def _plain(value: object) -> Any:
    """``value`` as JSON, without None entries and without directories."""
    if isinstance(value, os.PathLike):
        return _last_part(os.fspath(value))
    if isinstance(value, str):
        return _last_part(value) if value.startswith(("/", "./", "../", "~/")) else value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=canonical)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _last_part(path: str | bytes) -> str:
    # Names that are not UTF-8 come as lone surrogates, which JSON escapes but readers refuse.
    return PurePath(os.fsdecode(path)).name.encode("utf-8", "replace").decode() or "."
