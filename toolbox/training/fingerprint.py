"""What an interrupted run and its continuation must share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

import msgspec

from toolbox.shell.errors import UsageProblem


def deciding(options: Any, but: Collection[str]) -> dict[str, Any]:
    """The options of a dataclass that decide the result, by name: all ``but`` those."""
    return {item.name.rstrip("_"): getattr(options, item.name) for item in fields(options) if item.name not in but}


def option_marks(options: Any, but: Collection[str]) -> dict[str, Any]:
    """The same as marks of a fingerprint, by what messages can call them: ``--batch-size``."""
    return {f"--{name.replace('_', '-')}": value for name, value in deciding(options, but).items()}


def check_fingerprint(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageProblem naming the first difference between the interrupted run and this one."""
    # Through JSON, so that tuples and lists compare equal.
    now = msgspec.json.decode(msgspec.json.encode(now))
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise UsageProblem(
                f"--resume with another {key}: was {saved.get(key)}, now {now.get(key)}",
                "repeat the interrupted command, or start anew with --overwrite",
            )
