"""What is harmful and what is not, in the spellings that safety data uses."""

from __future__ import annotations

from typing import Any

HARMFUL, BENIGN = "harmful", "benign"

_SPELLINGS: dict[Any, str] = {
    HARMFUL: HARMFUL, "unsafe": HARMFUL, "harmless": BENIGN, BENIGN: BENIGN, "safe": BENIGN,
}  # fmt: skip


def safety_label(value: Any) -> str | None:
    """``harmful`` or ``benign`` for harmful, unsafe, true, 1 and benign, safe, harmless, false, 0; None for others."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return HARMFUL if value else BENIGN
    return _SPELLINGS.get(value.strip().casefold()) if isinstance(value, str) else None
