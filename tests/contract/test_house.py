"""The house: one name everywhere, light imports, instant help, recipes and docs that fit the options."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.commands import ABOUT_ALL, CASES, METHODS
from tests.server import ROOT, environment

COMMANDS = sorted(CASES)
HEAVY = ("torch", "transformers", "numpy", "yaml", "matplotlib", "scipy", "safetensors", "rich", "accelerate", "peft")


def module(name: str) -> str:
    return "toolbox.commands." + name.replace("-", "_")


def load(name: str):
    return importlib.import_module(module(name)).main


def test_bin_console_scripts_command_files_docs_and_contract_cases_are_the_same_set():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = dict(
        re.split(r"\s*=\s*", line) for line in config["options.entry_points"]["console_scripts"].strip().splitlines()
    )
    files = {p.stem.replace("_", "-") for p in (ROOT / "toolbox/commands").glob("*.py")} - {"--init--"}
    pages = {p.stem for p in (ROOT / "docs").glob("*.md") if p.stem == p.stem.lower()} - METHODS - ABOUT_ALL
    assert set(COMMANDS) == {p.name for p in (ROOT / "bin").iterdir()} == set(scripts) == files == pages
    for name, target in scripts.items():
        assert target == f"{module(name)}:main"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_executable_is_eight_plain_lines(name):
    path = ROOT / "bin" / name
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert len(text.splitlines()) == 8
    assert f"from {module(name)} import main" in text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--schema"], ["--no-such-option"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_usage_errors_import_nothing_heavy(name, arguments):
    code = (
        f"import sys, {module(name)} as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print([x for x in {HEAVY} if x in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_in_a_known_section(name):
    from toolbox.shell.command import GROUPS

    for parameter in load(name).params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name
            assert getattr(parameter, "group", "General") in GROUPS


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docs_page_speaks_of_every_method_option_and_of_none_that_is_not_there(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    known = {text for one in load(name).params for text in (*one.opts, *one.secondary_opts)}
    others = {text for other in COMMANDS for parameter in load(other).params for text in parameter.opts}
    for text in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page)):
        assert text in known | others | {"--help", "--multi_gpu", "--no-deps"}, f"{text} is on the page, not in --help"
    for parameter in load(name).params:
        if getattr(parameter, "group", "") == "Method":
            assert parameter.opts[0] in page, f"{parameter.opts[0]} is not on the page"


@pytest.mark.parametrize("name", [name for name in COMMANDS if CASES[name].trainer])
def test_the_page_of_a_trainer_says_which_engines_carry_it(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert "FSDP" in page
    assert "DeepSpeed" in page


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_fits_its_command(path: Path):
    if path.parent.name == "accelerate":
        import yaml
        from accelerate.commands.config.config_args import ClusterConfig

        ClusterConfig.from_yaml_file(yaml_file=str(path))
        assert yaml.safe_load(path.read_text())["num_processes"] >= 2
        return
    first = path.read_text().splitlines()[0]
    name = re.match(r"# (\S+) ", first)
    assert name is not None, f"{path}: the first line is the command that runs it"
    command = load(name[1])
    required = [one for one in command.params if one.required]
    needed = [text for one in required for text in ((one.opts[0], "x") if one.param_type_name == "option" else ("x",))]
    with command.make_context(name[1], needed) as context:
        command.load_recipe(context, str(path))
