"""Completions for bash, zsh and fish, as plain scripts: nothing of Python runs when the TAB key is pressed.

(click can complete by itself, by calling the command at each key: a tenth of a second, and no help texts in bash.)
"""

from __future__ import annotations

from collections.abc import Callable

from toolbox.shell.described import Described, DescribedCommand


def bash(command: DescribedCommand) -> str:
    """A script for bash-completion, which loads it by the command's name; works without it when sourced."""
    function = "_toolbox_" + command.name.replace("-", "_")
    flags = " ".join(name for one in command.options for name in (*one.names, *one.off))
    cases = []
    for one in command.options:
        if one.takes != "nothing":
            cases.append(f"        {'|'.join(one.names)}) {_bash_value(one)}; return ;;")
    first = command.arguments[0] if command.arguments else None
    words = "" if first is None else " ".join(first.words)
    return "\n".join([
        f"# bash completion for {command.name}: generated from its options.",
        f"{function}() {{",
        '    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}',
        "    # --name=value comes as three words where = breaks words",
        '    if [[ $cur == "=" ]]; then cur=""',
        '    elif [[ $prev == "=" ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi',
        "    COMPREPLY=()",
        '    case "$prev" in',
        *cases,
        "    esac",
        '    if [[ $cur == -* ]]; then',
        f'        COMPREPLY=($(compgen -W "{flags}" -- "$cur"))',
        "    else",
        f'        COMPREPLY=($(compgen -W "{words}" -- "$cur"))',
        "        compopt -o default 2> /dev/null",
        "    fi",
        "}",
        f"complete -F {function} {command.name}",
        "",
    ])  # fmt: skip


def _bash_value(one: Described) -> str:
    words = f'COMPREPLY=($(compgen -W "{" ".join(one.words)}" -- "$cur"))' if one.words else ""
    paths = {"file": "compopt -o default 2> /dev/null", "directory": "compopt -o dirnames 2> /dev/null"}
    return "; ".join(part for part in (words, paths.get(one.takes, "")) if part) or ":"


def zsh(command: DescribedCommand) -> str:
    """A function for a folder of ``fpath``, in a file named ``_NAME``."""
    specs = [_zsh_option(one, name) for one in command.options for name in (*one.names, *one.off)]
    for place, one in enumerate(command.arguments, 1):
        where = "*" if one.repeats else str(place)
        specs.append(_single(f"{where}:{_zsh_word(one.metavar)}:{_zsh_action(one)}"))
    body = " \\\n    ".join(["_arguments -s -S", *specs])
    return f"#compdef {command.name}\n# Generated from the options of {command.name}.\n\n{body}\n"


def _zsh_option(one: Described, name: str) -> str:
    others = [other for other in (*one.names, *one.off) if other != name]
    mark = "*" if one.repeats else f"({' '.join([name, *others])})"
    said = one.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    if one.takes == "nothing":
        return _single(f"{mark}{name}[{said}]")
    form = "=" if name.startswith("--") else "+"  # --name=value, -mvalue; or with a blank
    return _single(f"{mark}{name}{form}[{said}]:{_zsh_word(one.metavar)}:{_zsh_action(one)}")


def _zsh_word(metavar: str) -> str:
    return metavar.replace("[", "").replace("]", "").replace(":", " ") or "value"


def _zsh_action(one: Described) -> str:
    words = f"({' '.join(one.words)})" if one.words else ""
    paths = {"file": "_files", "directory": "_files -/"}.get(one.takes, "")
    if words and paths:
        return f"_alternative 'words:word:{words}' 'files:file:{paths}'"
    return words or paths or " "


def _single(text: str) -> str:
    """In single quotes, for zsh and for bash."""
    return "'" + text.replace("'", "'\\''") + "'"


def fish(command: DescribedCommand) -> str:
    """A script for fish's folder of completions."""
    lines = [f"# Completions for {command.name}: generated from its options."]
    for one in command.options:
        for names in (one.names, one.off) if one.off else (one.names,):
            words = [f"complete -c {command.name}"]
            words += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names]
            if one.takes != "nothing":
                words.append({"file": "-r -F", "directory": "-x"}.get(one.takes, "-x"))
                offered = " ".join(one.words)
                if one.takes == "directory":
                    offered = f"{offered} (__fish_complete_directories)".strip()
                if offered:
                    words.append(f"-a {_fish(offered)}")
            words.append(f"-d {_fish(one.help)}")
            lines.append(" ".join(words))
    if command.arguments and command.arguments[0].words:
        lines.append(f"complete -c {command.name} -a {_fish(' '.join(command.arguments[0].words))}")
    return "\n".join(lines) + "\n"


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, tuple[str, Callable[[DescribedCommand], str]]] = {
    "bash": ("{}", bash),
    "zsh": ("_{}", zsh),
    "fish": ("{}.fish", fish),
}
"""The name of a command's file and what writes it, by shell."""
