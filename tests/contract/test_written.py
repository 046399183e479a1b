"""What README, guide and docs say of the code is so: command lines, links, targets, files, pasted help."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.contract.commands import CASES
from tests.server import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")])
SCRIPTS = sorted((ROOT / "recipes").rglob("*.sh"))
FENCED = re.compile(r"^```(?P<kind>[\w-]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def every_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=names(PAGES))(function)


# -- the command lines


def blocks(text: str) -> Iterator[str]:
    """The code of a page: fenced blocks, and lines that are indented by four."""
    for found in FENCED.finditer(text):
        yield found["text"]
    for found in re.finditer(r"(?:^    .*\n?)+", FENCED.sub("", text), re.MULTILINE):
        yield re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


def typed(block: str) -> str:
    """What is typed in a block: where lines begin with ``$ `` these and what continues them, otherwise all of it."""
    if not re.search(r"^\$ ", block, re.MULTILINE):
        return block
    lines, more = [], False
    for line in block.splitlines():
        if more or line.startswith("$ "):
            lines.append(line.removeprefix("$ ").removeprefix("> "))
            more = line.rstrip().endswith(("\\", "|"))
    return "\n".join(lines)


def calls(script: str) -> Iterator[list[str]]:
    """The words of each call of one of our commands in a shell script, redirections left out."""
    script = re.sub(r" 2>(?:&1| ?[^ \n;|]+)", "", script)
    script = re.sub(r"\$\(command -v ([\w-]+)\)", r"\1", script)  # as a launcher is told where a command is
    for line in re.sub(r"\\\n|(?<=\|)\n", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        lexer.commenters = ""
        try:
            tokens = list(lexer)
        except ValueError:  # prose with an apostrophe, or a string over several lines
            continue
        call: list[str] | None = None
        skip = False
        for token in [*tokens, ";"]:
            if skip:  # the file behind < or >
                skip = False
            elif set(token) <= set("<>&") and set(token) & set("<>"):
                skip = True
            elif set(token) <= set("|&;()") or token.startswith("#"):
                if call:
                    yield call
                call = None
                if token.startswith("#"):
                    break
            elif call is not None:
                call.append(token)
            elif token in CASES:
                call = [token]


def problem(call: list[str], whole: bool = True) -> str | None:
    """Why click would refuse this call; None when it would not. A script may add to what is not ``whole``."""
    name, *arguments = call
    if any("..." in word or word.startswith("[") for word in arguments):
        return None  # an outline, not a command line
    if any(re.search(r"\$[({\w@]", word) for word in arguments):  # what the shell fills in may be any number of words
        known = {text for one in command(name).params for text in (*one.opts, *one.secondary_opts)}
        options = [word.partition("=")[0] for word in arguments if re.match(r"--[a-z]", word)]
        unknown = [option for option in options if option not in known | {"--help"}]
        return f"no such option: {unknown[0]}" if unknown else None
    if "--recipe" in arguments and not (ROOT / arguments[arguments.index("--recipe") + 1]).exists():
        del arguments[(place := arguments.index("--recipe")) : place + 2]  # one that the page makes
    try:
        command(name).make_context(name, arguments)
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return error.format_message() if whole or not isinstance(error, click.MissingParameter) else None
    return None


def command(name: str) -> click.Command:
    return importlib.import_module(f"toolbox.commands.{name.replace('-', '_')}").main


@every_page
def test_every_command_line_on_a_page_is_one_that_the_command_takes(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page.read_text(encoding="utf-8")):
        for call in calls(typed(block)):
            assert problem(call) is None, call


@pytest.mark.parametrize("script", SCRIPTS, ids=names(SCRIPTS))
def test_every_command_line_of_a_script_is_one_that_the_command_takes(script, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for call in calls(script.read_text(encoding="utf-8")):
        assert problem(call, whole=False) is None, call


def test_calls_are_found_and_wrong_ones_refused(capsys):
    found = list(calls("cat x | lm-tune --out 'a b' \\\n  --epochs 3 2> log; lot-data |\n lot-prompt < y # lot-eval"))
    assert found == [["lm-tune", "--out", "a b", "--epochs", "3"], ["lot-data"], ["lot-prompt"]]
    assert problem(["lot-prompt", "--variant", "cot"]) is None
    assert "No such option" in str(problem(["lot-prompt", "--variants", "cot"]))
    assert "no such option" in str(problem(["lot-prompt", "--variants", "$X"]))
    assert "Missing" in str(problem(["lm-tune"]))
    assert "not an integer" in str(problem(["lm-tune", "--out", "x", "--batch-size", "1.5"]))


# -- what pages point at


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
    return found


@every_page
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{target}: no such file"
        assert there.is_relative_to(ROOT), f"{target}: outside the project"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


@every_page
def test_every_target_and_recipe_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:`|^)make ([a-z][a-z0-9-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}: no such target"
    text = re.sub(r"\S*(?:distinct|ROOM|NAME)\S*", "", text)  # placeholders, and the method that a reader adds
    for path in re.findall(r"\b(?:recipes|toolbox|tests|bench)/[\w./-]*[\w/](?![\w{*<])", text):
        assert (ROOT / path).exists() or path in MADE, f"{path}: no such file"


MADE = {"bench/results.jsonl", "bench/.venv-cleanlab", "bench/.venv-forgetium", "bench/.venv-lm-eval"}
"""Files that the project makes and does not hold."""


# -- help


@every_page
def test_help_that_is_pasted_is_the_help_of_now(page):
    for block in blocks(page.read_text(encoding="utf-8")):
        found = re.search(r"^Usage: (\S+)", block, re.MULTILINE)
        if found and found[1] in CASES:
            shown = re.sub(r"\A\$ .*\n", "", block).strip()
            assert shown == help_of(found[1]).strip()


def help_of(name: str) -> str:
    more = command(name).context_settings | {"terminal_width": 78}  # of 80 columns
    with click.Context(command(name), info_name=name, **more) as context:
        return command(name).get_help(context)


def test_pasted_help_is_looked_at():
    assert "\nUsage: legit-score " in (ROOT / "GUIDE.md").read_text(encoding="utf-8")


# -- citing


def test_the_papers_to_cite_are_the_same_in_both_places_and_each_method_has_one():
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    page = (ROOT / "docs/CITING.md").read_text(encoding="utf-8")
    entries = dict(re.findall(r"^@\w+\{(\w+),\n  title = \{(.*)\},$", page, re.MULTILINE))
    titles = {re.sub(r"[{}]", "", title) for title in entries.values()}
    assert titles == {one["title"] for one in cited["references"]}
    assert len(titles) == 10
    rows = re.findall(r"^\| `([\w*-]+)` \| `(\w+)` \| \[arXiv ([\d.]+)\]", page, re.MULTILINE)
    assert {key for _, key, _ in rows} == set(entries)
    assert [one["url"].rpartition("/")[2] for one in cited["references"]] == [number for _, _, number in rows]
    methods = {name.partition("*")[0] for name, _, _ in rows}
    for name in CASES:
        assert name.startswith(tuple(methods)) or name in {"lm-tune", "lm-generate", "unlearn-eval"}, name
    assert cited["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
