"""A step of the tour, as its file says it: the commands, the figures to read from what they wrote, the picture.

One YAML file a step below ``steps/``; their order is that of the file names. The commands are a bash script that runs
from the root of the checkout with ``$out`` as the step's own folder, and ``$NAME`` as that of each step it needs.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from toolbox.shell.errors import BadRecipe, UsageProblem

STEPS = Path(__file__).resolve().parent / "steps"


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number of a step: where it stands, and where its interval and its n do.

    ``file`` holds JSON lines, or one JSON object; the last one that has the values of ``where`` is read. ``value``,
    ``interval`` ([low, high]) and ``n`` are places in it, as in ``after.forget.es`` or ``avg_taw.-1``. A value that is
    a record of estimate, low, high and n brings its own. With ``of`` the value counts cases among so many, and the
    interval is Wilson's.
    """

    label: str
    file: str
    value: str
    where: dict[str, Any] = {}
    interval: str | None = None
    n: str | None = None
    of: str | None = None


class Picture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The picture of a step (.svg or .png below its folder) and what it shows, for those who do not see it."""

    file: str
    alt: str


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: ``command`` is the main command of the method, ``run`` the script that uses it.

    ``look`` says what to look for, whatever the figures turn out to be; ``outputs`` maps paths below the step's folder
    to what they are; ``limit`` is in seconds, far above what the step takes.
    """

    name: str
    command: str
    title: str
    idea: str
    data: str
    look: str
    run: str
    figures: list[Figure]
    picture: Picture
    outputs: dict[str, str]
    docs: str
    needs: list[str] = []
    method: bool = True
    limit: float = 1800

    @property
    def digest(self) -> str:
        """What the results of this step depend on, in 16 hex digits: finished steps are kept while it is the same."""
        said = "\0".join([self.run, *self.needs])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def preamble(self, root: Path) -> str:
        """The lines that make ``run`` complete for somebody who copies it; ``root`` is the folder of all steps."""
        folders = {"out": root / self.name, **{name: root / name for name in self.needs}}
        lines = [*(f"{name}={shlex.quote(str(path))}" for name, path in folders.items()), 'mkdir -p "$out"']
        return "\n".join(lines) + "\n"


def read_step(path: Path) -> Step:
    """The step of one file. Raises: BadRecipe (78) for what is no step, with the place."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), Step)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise BadRecipe(f"{path}: {error}", "see the docstrings of recipes/demo/step.py") from None


def read_steps(folder: Path = STEPS) -> list[Step]:
    """All steps in order. Raises: BadRecipe for two of one name, or one that needs what does not stand before it."""
    steps = [read_step(path) for path in sorted(folder.glob("*.yaml"))]
    seen: set[str] = set()
    for step in steps:
        missing = [name for name in step.needs if name not in seen]
        if step.name in seen or missing:
            wrong = f"needs {', '.join(missing)}, which stands nowhere before it" if missing else "is there twice"
            raise BadRecipe(f"{folder}: the step {step.name} {wrong}", "steps run in the order of their file names")
        seen.add(step.name)
    return steps


def choose(steps: Sequence[Step], wanted: Sequence[str]) -> list[Step]:
    """The steps that ``wanted`` names, by method or by command, with all they need; all steps where it names none.

    Raises: UsageProblem (2) for a name that is none, with those that are.
    """
    if not wanted:
        return list(steps)
    by_name = {step.name: step for step in steps}
    names = by_name | {step.command: step for step in steps if step.method}
    chosen: set[str] = set()
    for word in wanted:
        if word not in names:
            known = ", ".join(step.name for step in steps)
            raise UsageProblem(f"no step of the tour is called {word}", f"there are {known}")
        _add(names[word], by_name, chosen)
    return [step for step in steps if step.name in chosen]


def _add(step: Step, by_name: dict[str, Step], chosen: set[str]) -> None:
    chosen.add(step.name)
    for name in step.needs:
        _add(by_name[name], by_name, chosen)
