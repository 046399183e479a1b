"""Recipes that are traps: each is refused with its line before anything is built from it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import click

from tests.contract.commands import Case
from tests.faults.bench import Bench, complaint
from toolbox.shell.errors import ToolboxError

_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))

TRAPS = (
    ("sede: 3\n", "r.yaml:1: `sede` is not an option"),
    ("seed: 1\nseed: 2\n", "r.yaml:2: `seed` stands on line 1 already"),
    ("seed: 1\n'seed': 2\n", "r.yaml:2: `seed` stands on line 1 already"),
    ("seed: one\n", "`seed`: expected integer"),
    ("seed: yes\n", "`seed`: expected integer"),
    ("seed: true\n", "`seed`: expected integer"),
    ("seed: 1.5\n", "`seed`: 1.5 is not an integer"),
    ("seed: '3'\n", "`seed`: expected integer"),
    ("seed: [1, 2]\n", "`seed`: one value is expected"),
    ("seed: .inf\n", "`seed`: expected integer"),
    ("seed: " + "9" * 5000 + "\n", "`seed`: expected integer"),
    ("seed:\n", "`seed`: no value"),
    ("seed: -1\n", "`seed`: -1 is below 0"),
    ("seed: !!int 3\n", "tags are not allowed"),
    ("seed: !!python/object/apply:os.system ['touch trapped']\n", "tags are not allowed"),
    ("!!python/name:os.system : 3\n", "tags are not allowed"),
    ("!include other.yaml\n", "tags are not allowed"),
    ("seed: &a 3\n", "anchors and aliases"),
    ("seed: *a\n", "anchors and aliases"),
    (_BOMB, "anchors and aliases"),
    ("<<: {seed: 3}\n", "a value is a scalar"),
    ("seed: {a: 1}\n", "a value is a scalar"),
    ("seed: " + "[" * 2_000 + "\n", "a value is a scalar"),
    ("{" * 500, "r.yaml"),
    ("- seed\n", "a recipe is a list of"),
    ("seed\n", "a recipe is a list of"),
    ("seed: [\n", "not valid YAML"),
    ("\tseed: 3\n", "r.yaml:1: not valid YAML"),
    ("seed: 3\n\tepochs: 3\n", "r.yaml:2: not valid YAML"),
    ("seed: 3\n---\nseed: 4\n", "more than one YAML document"),
    ("seed: 3\x00\n", "not valid YAML"),
    ('seed: "\\ud800"\n', "r.yaml:1"),
    ("? [seed]\n: 3\n", "a key must be an option name"),
    ("seed: 3\nse-ed: 4\n", "`se-ed` is not an option"),
    ("trust-remote-code: true\n", "`trust-remote-code` is not an option"),
    ("overwrite: true\n", "`overwrite` is not an option"),
    ("resume: true\n", "`resume` is not an option"),
    ("recipe: other.yaml\n", "`recipe` is not an option"),
    ("debug: true\n", "`debug` is not an option"),
    ("quiet: maybe\n", "`quiet`: expected true or false"),
    ("quiet: 1\n", "`quiet`: expected true or false"),
    ("# " + "x" * (1 << 20) + "\n", "larger than"),
    ("seed: 3\xff\n".encode("latin-1"), "not valid YAML"),
)
"""Text and what is said of it, the same for every command."""


def traps(bench: Bench, case: Case) -> Iterator[str]:
    """Every trap in this process, where it costs a millisecond; the first through the command itself."""
    path = bench.root / "r.yaml"
    for text, says in TRAPS:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        told = refusal(case.name, path)
        assert says in told.what + (told.advice or ""), (text[:60], told.what)
        assert told.exit_code == 78, text[:60]
        yield says
    path.write_bytes(TRAPS[0][0].encode())
    done = bench.run(case, "--recipe", path)
    assert TRAPS[0][1] in complaint(case, done.code, done.out, done.err)
    assert done.code == 78


def refusal(name: str, path: Path) -> ToolboxError:
    """The error by which the command ``name`` refuses the recipe ``path``."""
    command = importlib.import_module("toolbox.commands." + name.replace("-", "_")).main
    try:
        command.make_context(name, ["--recipe", str(path)])
    except ToolboxError as error:
        return error
    except click.ClickException as error:
        raise AssertionError(f"the recipe was taken: {error.format_message()}") from None
    raise AssertionError("the recipe was taken")
