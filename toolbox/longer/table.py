"""The same-budget table: runs of several architectures side by side, mean and spread over seeds, and its picture.

Reads run directories ``NAME.LABELS.SEED`` below a folder, as recipes/longer/table.sh makes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolbox.shell.files import RUN_FILE


def read_runs(folder: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """``{name: {label budget: the last events of its runs}}``; unfinished runs are not there."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for record in sorted(folder.glob(f"*/{RUN_FILE}")):
        name, _, rest = record.parent.name.partition(".")
        budget, _, seed = rest.partition(".")
        if budget.isdigit() and seed.isdigit():
            done = json.loads(record.read_bytes())["done"]
            found.setdefault(name, {}).setdefault(int(budget), []).append(done)
    return found


def markdown(runs: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    """One row a model and budget: AUC, LogLoss, GAUC on test, what it is made of and what a label costs."""
    lines = [
        "| model | labels | runs | AUC | LogLoss | GAUC | dense | tables | MFLOPs a label | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, budgets in runs.items():
        for _, dones in sorted(budgets.items()):
            one = dones[0]
            figures = [_spread([done["test"][key] for done in dones]) for key in ("auc", "logloss", "gauc")]
            flops = one["flops_per_label"]
            cost = "–" if flops is None else f"{flops / 1e6:.2f}"
            seconds = statistics.mean(done["seconds"] for done in dones)
            cells = [name, f"{one['labels']:,}", str(len(dones)), *figures, f"{one['params']['dense']:,}",
                     f"{one['params']['tables']:,}", cost, f"{seconds:.0f}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}".replace("0.", ".", 1)
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}".replace("± 0.", "± .")


def draw(runs: dict[str, dict[int, list[dict[str, Any]]]], path: str) -> None:
    """Test AUC against labels, with the range over seeds; their number where it is the same at every budget."""
    from toolbox.plots import Panel, Series, curves

    series = []
    for name, budgets in runs.items():
        ordered = sorted(budgets.items())
        values = [[done["test"]["auc"] for done in dones] for _, dones in ordered]
        series.append(
            Series(
                name,
                [dones[0]["labels"] / 1000 for _, dones in ordered],
                [statistics.mean(v) for v in values],
                [min(v) for v in values],
                [max(v) for v in values],
                n=len(values[0]) if len({len(v) for v in values}) == 1 else None,
            )
        )
    curves([Panel("Same labels", "test AUC", series)], xlabel="thousand labels", band="range over seeds", path=path)


def main(words: Sequence[str]) -> int:
    """``FOLDER [--figure FILE]``: Markdown on stdout."""
    parser = argparse.ArgumentParser("toolbox.longer.table", description="The same-budget table of finished runs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure")
    asked = parser.parse_args(words)
    runs = read_runs(asked.folder)
    if not runs:
        print(f"{asked.folder}: no finished runs", file=sys.stderr)
        return 66
    sys.stdout.write(markdown(runs))
    if asked.figure:
        draw(runs, asked.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
