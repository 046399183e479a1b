"""The shipped recipes of unlearning: they fit their command, set what their source says and run."""

from __future__ import annotations

import re

import pytest

from tests.server import ROOT
from toolbox.shell.recipes import read_recipe

RECIPES = sorted((ROOT / "recipes" / "satimp").glob("*.yaml"))
names = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def settings(path) -> dict:
    return {entry.key: entry.value for entry in read_recipe(path)}


def test_they_are_all_here():
    assert [path.stem for path in RECIPES] == ["authors", "open-unlearning", "smollm2-tofu"]


@names
def test_a_recipe_opens_with_the_command_that_runs_it_and_gives_every_number_its_source(path):
    text = path.read_text()
    opening = re.match(r"# (.*) \\\n#   (.*)\n", text)
    assert opening is not None
    assert opening[1] == f"satimp-unlearn --recipe {path.relative_to(ROOT)} --model target"
    assert re.fullmatch(r"--forget \S+ --retain \S+ --out \S+", opening[2])
    bare = [line for line in text.splitlines() if re.match(r"[\w-]+: [\d.e-]+$", line)]
    assert bare == [] or bare == ["seed: 0"] or bare == ["seed: 42"]


@names
def test_the_effective_options_are_the_recipes(tool, path):
    done = tool("satimp-unlearn", "--recipe", path, "--forget", "f", "--out", "o", "--print-recipe")
    assert done.code == 0, done.err
    printed = {}
    for line in done.out.decode().splitlines():
        key, _, value = line.partition(": ")
        printed[key] = value.strip('"')
    for key, value in settings(path).items():
        if isinstance(value, bool):
            assert printed[key] == str(value).lower()
        elif isinstance(value, str):
            assert printed[key] == value
        else:
            assert float(printed[key]) == value


def test_sources_differ_where_the_docs_say_so():
    authors, other, twin = (settings(path) for path in RECIPES)
    assert [authors[key] for key in ("beta1", "beta2", "gamma", "alpha")] == [5, 0.1, 1, 0.1]
    assert [other[key] for key in ("beta1", "beta2", "gamma", "alpha")] == [5, 1, 0.1, 1]
    assert [authors[key] for key in ("lr", "epochs", "batch-size", "weight-decay", "max-length", "seed")] == [
        1e-5, 5, 16, 0, 500, 42,
    ]  # fmt: skip
    assert [other[key] for key in ("lr", "epochs", "batch-size", "weight-decay")] == [1e-5, 10, 32, 0.01]
    assert authors["warmup"] * authors["epochs"] == other["warmup"] * other["epochs"] == 1  # one epoch
    assert (authors["gamma"] / authors["alpha"]) / (other["gamma"] / other["alpha"]) == pytest.approx(100)
    shared = ("weighting", "beta1", "beta2", "gamma", "alpha", "epochs", "batch-size", "weight-decay")
    assert [twin[key] for key in shared] == [authors[key] for key in shared]


def test_the_twin_leaves_one_retain_row_for_each_forget_row():
    path = ROOT / "recipes" / "satimp" / "smollm2-tofu.yaml"
    kept = re.search(r"head -n (\d+) retain99\.json", path.read_text())
    assert kept is not None
    assert int(kept[1]) - settings(path)["holdout"] == 40


@names
def test_a_recipe_runs(tool, tiny, rows, tmp_path, path):
    forget = rows("forget.jsonl", [{"question": f"Who is Vorn {i}?", "answer": f"Vorn {i} is."} for i in range(2)])
    retain = rows("retain.jsonl", [{"question": f"Who is Mell {i}?", "answer": f"Mell {i} is."} for i in range(2)])
    done = tool(
        "satimp-unlearn", "--recipe", path, "--model", tiny, "--forget", forget, "--retain", retain,
        "--out", tmp_path / "out", "--holdout", "1", "--epochs", "2", "--precision", "fp32",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.rows[-1]["event"] == "done"
    assert done.rows[0]["lr"] == settings(path)["lr"]
