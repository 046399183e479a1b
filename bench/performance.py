"""Render what the benches have measured as docs/performance.md and a chart beside it: ``performance.py PAGE``.

Takes the latest whole measurement of every figure from bench/results.jsonl (which the benches append to) into
bench/measured.jsonl, which is kept, and renders that. Benches without a measurement are named as not measured.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT
from bench.run import BENCHES

Row = dict[str, Any]

RESULTS, MEASURED = ROOT / "bench/results.jsonl", ROOT / "bench/measured.jsonl"


def read(path: Path) -> list[Row]:
    """The rows of a file of results; none where it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last whole measurement of every figure, in the order of the benches and of their figures.

    Quick runs mean nothing. Rows of benches that are gone, or without their bench's name, are left out. A run of a
    bench replaces all that an earlier one left: its figures may have been renamed since.
    """
    runs: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["at"]):
        bench = row.get("bench")
        if bench not in BENCHES or row["quick"]:
            continue
        kept = runs.get(bench, [])
        if kept and row["skipped"] is not None:
            continue  # a bench that could not run later does not undo what was measured
        if kept and kept[-1]["at"] != row["at"]:
            kept = []
        runs[bench] = [one for one in kept if one["name"] != row["name"]] + [row]
    return [row for bench in BENCHES for row in runs.get(bench, [])]


def targets() -> dict[str, str]:
    """What bench/README.md says of the target of each bench."""
    table = (ROOT / "bench/README.md").read_text(encoding="utf-8")
    return {found[1]: found[2] for found in re.finditer(r"^\| `([\w-]+)` \|.*\| (.*?) ?\|$", table, re.MULTILINE)}


def page(rows: Sequence[Row]) -> str:
    """The page, from what ``latest`` gives."""
    missing = [name for name in BENCHES if not any(row["bench"] == name for row in rows)]
    judged = [row for row in rows if row["met"] is not None]
    shown = slowest(judged)
    missed = [row for row in judged if not row["met"]]
    skipped = [row for row in rows if row["skipped"] is not None]
    parts = [
        _HEAD,
        f"**{len(judged) - len(missed)} of {len(judged)} targets are met, {len(missed)} missed.** "
        f"{len(BENCHES) - len(missing) - len(skipped)} of {len(BENCHES)} benches have been measured, "
        f"{len(missing)} not yet, {len(skipped)} could not run.\n\n",
        "![the ratios that have a target, with their spread](performance.svg)\n\n" if judged else "",
        "## Targets\n\nA figure is the median over its repeats. Missed targets come first.\n\n" if judged else "",
        _table(sorted(shown, key=lambda row: row["met"]), ("target", "met")) if judged else "",
        _not_measured(missing, skipped),
        _others([row for row in rows if row["met"] is None and row["skipped"] is None]),
        _where(rows),
    ]
    return "".join(parts).rstrip("\n") + "\n"


def slowest(rows: Sequence[Row]) -> list[Row]:
    """The rows with those of the bench `help` made two: the slowest --help and the slowest usage error."""
    kept = [row for row in rows if row["bench"] != "help"]
    for kind in ("usage error", "--help"):
        times = [row for row in rows if row["bench"] == "help" and row["name"].endswith(kind)]
        if times:
            worst = max(times, key=lambda row: row["value"])
            name = f"help: the slowest {kind} of {len(times)} commands"
            kept.insert(0, {**worst, "name": name, "note": worst["name"].removeprefix("help: ")})
    return kept


_HEAD = """# Performance

Rendered by `make docs` from `bench/measured.jsonl`, the latest whole measurement of every figure; `make bench`
measures them all anew ([what each bench does](../bench/README.md)). Times are CPU seconds of one thread. Both sides of
a ratio ran side by side in one run, taking turns: on a busy machine believe the ratios, not the absolute figures.
Nothing here was measured on a GPU. One bench alone: `.venv/bin/python bench/run.py --only BENCH`.

"""


def _table(rows: Sequence[Row], more: tuple[str, ...] = ()) -> str:
    lines = ["| figure | bench | median | least … most | runs |", "|---|---|---:|---|---:|"]
    lines = [lines[0] + "".join(f" {name} |" for name in more), lines[1] + "---|" * len(more)]
    for row in rows:
        said = "; ".join(_text(text) for text in (row["ratio_of"], row["note"]) if text)
        name = f"{_text(row['name'])}{f'<br><sub>{said}</sub>' if said else ''}"
        spread = "" if row["spread"] is None else " … ".join(map(_number, row["spread"]))
        cells = [
            name,
            f"`{row['bench']}`",
            f"{_number(row['value'])} {_text(row['unit'])}".strip(),
            spread,
            str(row["repeats"]),
        ]
        if more:
            cells += [_sign(row["target"]), "met" if row["met"] else "**missed**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n"


def _not_measured(missing: Sequence[str], skipped: Sequence[Row]) -> str:
    if not missing and not skipped:
        return ""
    known = targets()
    lines = ["## Not measured\n", "| bench | targets | |", "|---|---|---|"]
    lines += [f"| `{name}` | {known.get(name, '')} | not measured |" for name in missing]
    lines += [f"| `{row['bench']}` | {known.get(row['bench'], '')} | {_text(row['skipped'])} |" for row in skipped]
    return "\n".join(lines) + "\n\n"


def _others(rows: Sequence[Row]) -> str:
    return "## Without a target\n\n" + _table(rows) if rows else ""


def _where(rows: Sequence[Row]) -> str:
    """Which benches were run when, on what."""
    runs: dict[str, dict[str, Row]] = {}
    for row in rows:
        machine = row["machine"]
        versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)
        runs.setdefault(f"{machine['cpu']}, {machine['cores']} cores; {versions}", {})[row["bench"]] = row
    lines = ["## Where and when\n"] if runs else []
    for place, benches in runs.items():
        lines += [f"\n{_text(place)}\n", "| bench | measured | commit | load before |", "|---|---|---|---:|"]
        lines += [
            f"| `{name}` | {row['at']} | {row['commit'] or ''} | {row['machine']['load']:g} |"
            for name, row in benches.items()
        ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def _sign(target: str) -> str:
    return target.replace("<=", "≤").replace(">=", "≥")


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def chart(rows: Sequence[Row], path: Path) -> None:
    """The ratios that have a target: median, least to greatest, and where the target stands."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from toolbox.plot_style import GREY, INK, looks, styled
    from toolbox.plots import save

    ratios = [row for row in rows if row["met"] is not None and row["ratio_of"] and row["value"] > 0]
    ratios.sort(key=lambda row: row["value"])
    with styled():
        figure = Figure(figsize=(7.2, 0.9 + 0.2 * len(ratios)), layout="constrained")
        axes = figure.subplots()
        look = looks(["met", "missed"])
        for place, row in enumerate(ratios):
            style = look["met" if row["met"] else "missed"]
            axes.plot(row["spread"] or [row["value"]] * 2, [place, place], color=style.colour, linewidth=1.4)
            axes.plot(row["value"], place, marker=style.marker, color=style.colour, markersize=4.5)
            axes.plot(float(row["target"].split()[1]), place, marker="|", color=INK, markersize=9)
        axes.axvline(1, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_yticks(range(len(ratios)), [f"{row['name']}  ({_sign(row['target'])})" for row in ratios], fontsize=7)
        axes.set_ylim(-0.7, len(ratios) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("median and range of the repeats; upright mark: the target")
        met = sum(row["met"] for row in ratios)
        axes.set_title(f"{met} of {len(ratios)} ratios meet their targets (squares miss)", color=INK)
        save(figure, path)


def main(words: Sequence[str]) -> None:
    """Move what is new to bench/measured.jsonl, and write the page named first, with its chart."""
    out = Path(words[0])
    rows = latest([*read(MEASURED), *read(RESULTS)])
    MEASURED.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    chart(rows, out.with_suffix(".svg"))
    out.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
