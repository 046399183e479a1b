"""Run the benches: a table on stderr, one JSON object a figure appended to bench/results.jsonl.

Run by `make bench`; `--only NAME` for some, `--quick` for a smoke run whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import (
    bench_chains,
    bench_coca,
    bench_coca_probe,
    bench_dull,
    bench_dull_peer,
    bench_forgetium,
    bench_landscape,
    bench_legit,
    bench_lit,
    bench_longer,
    bench_lot,
    bench_lwi,
    bench_models,
    bench_shell,
    bench_training,
    bench_unlearn_steps,
    bench_unlearning,
)
from bench.common import ENVIRONMENT, ROOT, Figure, Skip

Bench = Callable[[bool], Iterable[Figure]]

ROOMS = (
    bench_shell,
    bench_models,
    bench_training,
    bench_unlearning,
    bench_unlearn_steps,
    bench_forgetium,
    bench_lot,
    bench_legit,
    bench_lit,
    bench_lwi,
    bench_dull,
    bench_dull_peer,
    bench_longer,
    bench_chains,
    bench_landscape,
    bench_coca,
    bench_coca_probe,
)
BENCHES: dict[str, Bench] = {name: bench for room in ROOMS for name, bench in room.BENCHES.items()}
PACKAGES = ("toolbox-ten", "torch", "transformers", "accelerate", "numpy", "msgspec", "click")


def run_bench(name: str, bench: Bench, quick: bool) -> Iterator[Figure]:
    """The figures of one bench; one that skips gives a figure without a value, and the reason."""
    try:
        yield from bench(quick)
    except Skip as reason:
        yield Figure(name, None, "", repeats=0, skipped=str(reason))


def surroundings(quick: bool) -> dict[str, Any]:
    """What every line of the results says about where it was measured; no host name, no path."""
    return {
        "quick": quick,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "machine": {"cpu": _cpu_model(), "cores": _cores(), "load": round(os.getloadavg()[0], 2)},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _commit() -> str | None:
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(figures: Sequence[Figure], title: str) -> Any:
    """All figures as a rich table."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name, justify in (("figure", "left"), ("value", "right"), ("unit", "left"), ("least … most", "right"),
                          ("target", "left"), ("met", "left"), ("what it is", "left")):  # fmt: skip
        grid.add_column(name, justify=justify, overflow="fold")
    for one in figures:
        if one.skipped is not None:
            grid.add_row(one.name, "–", "", "", "", "skipped", one.skipped, style="yellow")
            continue
        met = {True: "yes", False: "NO", None: ""}[one.met]
        spread = "" if one.spread is None else " … ".join(map(_shown, one.spread))
        said = "; ".join(text for text in (one.ratio_of, one.note) if text)
        style = "red" if one.met is False else None
        grid.add_row(one.name, _shown(one.value), one.unit, spread, one.target or "", met, said, style=style)
    return grid


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench/run.py", description="Speed and memory of the commands, as ratios.")
    parser.add_argument("--only", action="append", choices=list(BENCHES), metavar="NAME",
                        help=f"run only this bench (repeatable): {', '.join(BENCHES)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one repeat on few rows: does it run at all?")
    parser.add_argument("--out", default=str(ROOT / "bench/results.jsonl"), help="append to this file (- is stdout)")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Run what was asked for; 1 when a bench failed (a target that is missed is a figure, not a failure)."""
    from rich.console import Console

    asked = arguments(words)
    os.environ.update(ENVIRONMENT)
    console = Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else 180)
    figures: list[Figure] = []
    failed = []
    facts = surroundings(asked.quick)
    with open(1, "a", closefd=False) if asked.out == "-" else open(asked.out, "a", encoding="utf-8") as sink:
        for name in asked.only or BENCHES:
            began = time.monotonic()
            try:
                for figure in run_bench(name, BENCHES[name], asked.quick):
                    figures.append(figure)
                    line = {"bench": name, **figure.record(), **facts}
                    print(json.dumps(line, ensure_ascii=False), file=sink, flush=True)
            except Exception:
                console.print_exception()
                failed.append(name)
            console.print(f"bench: {name}: {time.monotonic() - began:.0f} s")
    machine = facts["machine"]
    kind = "quick run, its figures mean nothing" if asked.quick else "medians, CPU seconds, one thread"
    console.print(table(figures, f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} before; {kind}"))
    if failed:
        console.print(f"bench: failed: {', '.join(failed)}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
