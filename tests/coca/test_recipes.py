"""The shipped recipes: a CPU twin for each way of training, and settings that are the command's own."""

from __future__ import annotations

import re

import pytest

from tests.server import ROOT
from toolbox.coca.train import LR, RANK
from toolbox.shell.recipes import read_recipe

FOLDER = ROOT / "recipes" / "coca"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def settings(path) -> dict:
    return {entry.key: entry.value for entry in read_recipe(str(path))}


def test_every_method_has_a_recipe_and_a_twin_that_trains_the_same_thing():
    for method in ("lofit", "loreft", "lora"):
        large, small = (settings(FOLDER / f"{name}.yaml") for name in (method, f"smollm2-{method}"))
        assert large["method"] == small["method"] == method
        assert large["lr"] == LR[method]
        for shared in ("rank", "heads", "positions", "l1", "heads-lr"):
            assert large.get(shared) == small.get(shared), shared
        if method in RANK:
            assert large["rank"] == RANK[method]
        assert small["precision"] == "fp32"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_the_command_that_runs_it_and_prints_as_it_is(path, tool):
    opening = re.match(rf"# (coca-\w+) --recipe {path.relative_to(ROOT)} .*\w+\.jsonl\n", path.read_text())
    assert opening is not None
    out = ["--out", "o"] if opening[1] == "coca-train" else []
    done = tool(opening[1], "--recipe", path, *out, "--print-recipe")
    assert done.code == 0, done.err
    printed = dict(line.split(": ", 1) for line in done.out.decode().splitlines())
    for key, value in settings(path).items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert printed[key].strip("'\"") == shown or float(printed[key]) == float(value), key
