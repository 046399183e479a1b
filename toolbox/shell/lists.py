"""Options that take a comma list."""

from __future__ import annotations

from collections.abc import Sequence

from toolbox.shell.errors import UsageProblem


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of a comma list, trimmed; none where there is no text."""
    return tuple(name for part in (text or "").split(",") if (name := part.strip()))


def comma_list(option: str, text: str, known: Sequence[str], *, besides: str = "") -> tuple[str, ...]:
    """The names in ``text``, in its order, each one of ``known`` (any name will do where that is empty).

    ``besides`` is a value of ``--option`` that is no list, for the advice alone. Raises: UsageProblem (2) for a list
    without names, a name that is not known, and one that is there twice.
    """
    names = names_in(text)
    advice = f"any of {', '.join(known)}" + (f", or {besides}" if besides else "") if known else "as in model,dataset"
    if not names:
        raise UsageProblem(f"--{option} names nothing", advice)
    for name in names:
        if known and name not in known:
            raise UsageProblem(f"--{option} {name}: not known", advice)
        if names.count(name) > 1:
            raise UsageProblem(f"--{option} {text}: {name} is there twice", "name each once")
    return names
