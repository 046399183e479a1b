"""The tour: the main command of each method, run once on data that is here; then a page of what came out.

Run by `make demo`; `make demo METHOD=lwi` runs one, `make demo FRESH=1` everything anew. By hand:
`python -m recipes.demo [METHOD...] [--fresh] [--out DIR]` from the root of the checkout, the commands in PATH.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from recipes.demo import page, screen
from recipes.demo.runner import Outcome, kept, run_steps
from recipes.demo.step import Step, choose, read_steps
from toolbox.shell.atomic import try_lock
from toolbox.shell.errors import CannotCreate, top_level

NAME = "demo"
PAGE = "index.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tour. Returns 0, or 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m recipes.demo", description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="*", help="run these alone (a method or its command) and what they need")
    parser.add_argument("--fresh", action="store_true", help="run again what is there already")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), metavar="DIR", help="where to (default: out/demo)"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    options = parser.parse_args(argv)
    with top_level(NAME):
        steps = read_steps()
        chosen = choose(steps, options.method)
        if options.list:
            for step in steps:
                print(f"{step.name:<12}{step.command:<18}{step.title}")
            return 0
        signal.signal(signal.SIGTERM, _interrupt)
        return tour(steps, chosen, options.out, fresh=options.fresh)


def tour(steps: Sequence[Step], chosen: Sequence[Step], root: Path, *, fresh: bool = False) -> int:
    """Run the chosen steps below ``root``, then write the page of all that is there. Returns the exit status.

    Raises: CannotCreate (73) where another tour runs below ``root``.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("a") as handle:
        if not try_lock(handle.fileno()):
            raise CannotCreate(f"{root}: another tour is running there", "wait for it, or choose another --out")
        return _tour(steps, chosen, root, fresh)


def _tour(steps: Sequence[Step], chosen: Sequence[Step], root: Path, fresh: bool) -> int:
    began = time.monotonic()
    ended: dict[str, Outcome] = {}
    with screen.Checklist(chosen, screen.console(sys.stderr)) as checklist:
        for outcome in run_steps(chosen, root, fresh=fresh, watch=checklist.running):
            ended[outcome.step.name] = outcome
            checklist.ended(outcome)
    # Of the steps that were not asked for, what an earlier run left is shown too.
    shown = [found for step in steps if (found := ended.get(step.name) or kept(step, root)) is not None]
    page.write(root / PAGE, shown, [step for step in steps if step.name not in {one.step.name for one in shown}], root)
    screen.console(sys.stdout).print(screen.figures_table(list(ended.values()), root))
    failed = [name for name, outcome in ended.items() if outcome.status == "failed"]
    done = sum(outcome.status == "done" for outcome in ended.values())
    seconds = time.monotonic() - began
    screen.say(f"{done} of {len(ended)} steps done, {screen.took(seconds)}; page: {root / PAGE}")
    if failed:
        screen.say(f"failed: {', '.join(failed)} (what they said is in {root}/NAME/stderr.txt)")
    return 1 if failed else 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM ends the tour as ^C does: the running step is stopped, with all its processes."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
