"""Manual pages, completions and option tables: whole, valid, and those of the commands as they are now."""

from __future__ import annotations

import shutil
import subprocess

import click
import pytest

from tests.server import ROOT
from toolbox.shell import pages
from toolbox.shell.completion import SHELLS
from toolbox.shell.described import all_commands, describe
from toolbox.shell.manual import man_page


@pytest.fixture(scope="module")
def commands():
    return [describe(command) for command in all_commands()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder with all pages and scripts."""
    folder = tmp_path_factory.mktemp("pages")
    pages.write_man(folder / "man")
    pages.write_completions(folder / "completions")
    return folder


def test_every_executable_is_described_with_all_its_options(commands):
    assert [one.name for one in commands] == sorted(path.name for path in (ROOT / "bin").iterdir())
    for command, known in zip(all_commands(), commands, strict=True):
        options = [
            p
            for p in command.get_params(click.Context(command, **command.context_settings))
            if isinstance(p, click.Option)
        ]
        names = {name for p in options for name in (*p.opts, *p.secondary_opts)}
        assert {name for one in known.options for name in (*one.names, *one.off)} == names
        assert {"-h", "--help"} <= names
        assert all(one.help for one in known.options)


def test_what_stands_behind_an_option_is_told_from_its_type(commands):
    by_name = {one.name: {name: option for option in one.options for name in option.names} for one in commands}
    tune = by_name["lm-tune"]
    assert (tune["--model"].takes, tune["--model"].words) == ("file", ("smollm2",))
    assert (tune["--out"].takes, tune["--out"].required) == ("directory", True)
    assert (tune["--loss-on"].takes, tune["--loss-on"].words) == ("word", ("assistant", "last", "all"))
    assert (tune["--save-every"].takes, tune["--save-every"].words) == ("word", ("auto",))
    assert (tune["--epochs"].takes, tune["--epochs"].default) == ("text", "5")
    assert (tune["--resume"].takes, tune["--resume"].metavar, tune["--resume"].variable) == ("nothing", "", None)
    assert (tune["--seed"].variable, tune["--map"].repeats) == ("TOOLBOX_SEED", True)
    assert by_name["gru-unlearn"]["--rectify"].off == ("--no-rectify",)


def test_a_manual_page_has_every_option_and_example(commands, written):
    for one in commands:
        page = (written / "man" / f"{one.name}.1").read_text()
        shown = page.replace("\\-", "-")
        for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "OPTIONS", "ENVIRONMENT", "EXIT STATUS"):
            assert f".SH {section}\n" in page, one.name
        for option in one.options:
            for name in (*option.names, *option.off):
                assert f"\\fB{name}\\fR" in shown, (one.name, name)
        for code in (65, 66, 69, 73, 74, 75, 78):
            assert f".B {code}\n" in page


def test_roff_takes_text_as_it_is():
    @click.command("toy-do")
    def toy() -> None:
        """.Start with a dot; then a \\ backslash, 'quotes' and "more"."""

    toy.examples = (".toy-do 'x' | tr ^ '~'",)
    page = man_page(describe(toy), "1")
    assert "\n\\&.Start with a dot; then a \\e backslash" in page
    assert "\n\\&.toy\\-do \\(aqx\\(aq | tr \\(ha \\(aq\\(ti\\(aq\n" in page


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_has_nothing_to_say_about_the_manual_pages(written):
    pages_ = sorted((written / "man").glob("*.1"))
    words = ["groff", "-k", "-man", "-Tutf8", "-ww", "-rHY=0", *map(str, pages_)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "LM-TUNE(1)" in done.stdout


@pytest.mark.parametrize(("shell", "words"), [("bash", ["-n"]), ("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_the_shells_can_read_their_completions(written, commands, shell, words):
    files = sorted((written / "completions" / shell).iterdir())
    assert [path.name for path in files] == sorted(SHELLS[shell][0].format(one.name) for one in commands)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for path in files:  # bash -n reads its first file only
        done = subprocess.run([shell, *words, str(path)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), path.name


def completed(script, *typed: str) -> list[str]:
    """What bash offers for the last of the words ``typed``."""
    line = " ".join(typed)
    ask = (
        f'source "{script}"; COMP_WORDS=({line.replace("=", " = ")} {"" if typed[-1] else chr(39) * 2});'
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "
        f'_toolbox_{typed[0].replace("-", "_")}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_offers_options_words_and_the_values_of_an_option(written):
    script = written / "completions/bash/lm-tune"
    assert completed(script, "lm-tune", "--lora") == ["--lora-r", "--lora-alpha", "--lora-targets"]
    assert completed(script, "lm-tune", "--loss-on", "a") == ["assistant", "all"]
    assert completed(script, "lm-tune", "--loss-on=a") == ["assistant", "all"]
    assert completed(script, "lm-tune", "-m", "smo") == ["smollm2"]
    assert completed(script, "lm-tune", "--epochs", "") == []
    assert completed(written / "completions/bash/lot-data", "lot-data", "wino") == ["winobias", "winocontrol"]


def test_the_page_of_options_is_that_of_the_commands():
    page = (ROOT / "docs/OPTIONS.md").read_text(encoding="utf-8")
    assert page == pages.options_page(), "run `make docs`"
