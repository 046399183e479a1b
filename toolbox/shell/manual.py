"""Manual pages: a command as roff, for man(1)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from toolbox.shell import errors
from toolbox.shell.described import Described, DescribedCommand

_SPECIAL = {"\\": r"\e", "-": r"\-", "^": r"\(ha", "~": r"\(ti", "`": r"\(ga", '"': r"\(dq", "'": r"\(aq"}


def man_page(command: DescribedCommand, version: str, related: tuple[str, ...] = ()) -> str:
    """The page of one command in section 1. No date: equal sources give equal pages.

    ``related`` are other commands to name at the end.
    """
    name = _text(command.name)
    lines = [
        f'.TH "{_text(command.name.upper())}" "1" "" "{_text("toolbox-ten " + version)}" "Toolbox"',
        *(".SH NAME", rf"{name} \- {_text(_uncapitalised(command.summary))}"),
        *(".SH SYNOPSIS", f".B {name}", _text(command.usage)),
        ".SH DESCRIPTION",
        *_paragraphs(command.paragraphs),
        *(".SH EXAMPLES", ".EX", *(_line(example) for example in command.examples), ".EE"),
        ".SH OPTIONS",
    ]
    for title, members in command.sections:
        lines.append(f".SS {_text(title)}")
        for one in members:
            lines += _entry(one)
    lines += [".SH ENVIRONMENT", *_paragraphs(_ENVIRONMENT), *(".SH EXIT STATUS", *_exit_codes())]
    if related:
        shown = ", ".join(rf"\fB{_text(one)}\fR(1)" for one in related)
        lines += [".SH SEE ALSO", shown]
    return "\n".join(lines) + "\n"


_ENVIRONMENT = (
    "Options other than those that stand alone on a command line (--overwrite, --resume, --dry-run and the like) may "
    "come from TOOLBOX_ and the option's name in capitals, as in TOOLBOX_SEED=3 for --seed 3. A flag wins over the "
    "environment, the environment over --recipe, and a recipe over the default.",
    "TOOLBOX_CACHE is the folder of the embedded model's weights and of other caches.",
)


def _exit_codes() -> Iterator[str]:
    yield from (".TP", ".B 0", "Done.")
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ToolboxError)]
    by_code = {kind.exit_code: kind for kind in kinds if kind not in (errors.ToolboxError, errors.AlreadyReported)}
    for code, kind in sorted(by_code.items()):
        what = inspect.getdoc(kind).partition("\n")[0]  # type: ignore[union-attr]
        yield from (".TP", f".B {code}", _line(what))
    yield from (".TP", r".B 130, 141, 143", "Ended by SIGINT, SIGPIPE, SIGTERM.")


def _entry(one: Described) -> Iterator[str]:
    names = ", ".join(rf"\fB{_text(name)}\fR" for name in one.names)
    if one.off:
        names += " / " + ", ".join(rf"\fB{_text(name)}\fR" for name in one.off)
    yield ".TP"
    yield f"{names} {_italic(one.metavar)}".rstrip()
    more = []
    if one.required:
        more.append("required")
    if one.repeats:
        more.append("repeatable")
    if one.default is not None:
        more.append(f"default: {one.default}")
    yield _line(one.help + (f" [{'; '.join(more)}]" if more else ""))


def _italic(metavar: str) -> str:
    shown = re.sub(r"[A-Za-z][\w.]*", lambda found: rf"\fI{found[0]}\fR", _text(metavar))
    return shown.replace("|", r"|\:")  # a long list of choices may be broken there


def _paragraphs(paragraphs: tuple[str, ...]) -> Iterator[str]:
    for place, paragraph in enumerate(paragraphs):
        if place:
            yield ".PP"
        if paragraph.startswith("\b"):  # click's mark of lines that stay as they are
            yield from (".EX", *(_line(line) for line in paragraph[1:].strip("\n").splitlines()), ".EE")
        else:
            yield _line(" ".join(paragraph.split()))


def _uncapitalised(text: str) -> str:
    first, _, rest = text.partition(" ")
    return f"{first.lower() if first[1:].islower() else first} {rest}"


def _line(text: str) -> str:
    r"""One line of text: roff takes a dot or quote at its beginning for a request."""
    return (r"\&" if text.startswith((".", "'")) else "") + _text(text)


def _text(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
