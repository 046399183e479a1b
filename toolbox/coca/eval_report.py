"""coca-eval's tables: for people who watch, and as JSON, Markdown or CSV for those who read later. Percent throughout;
every figure stands beside its judge, its interval and its n."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.coca.lines import ID, OOD_MEAN, Difference, Rate, RunRates, Seen
from toolbox.coca.metrics import differences, rates
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem

if TYPE_CHECKING:
    from toolbox.coca.evaluate import Options

UPPER_BOUND = (
    "What a string judge does not know as a refusal counts as an answer: its attack success is an upper bound."
)
SIGNIFICANT = 0.05


def conclude(seen: Sequence[Seen], options: Options, call: Invocation) -> None:
    """Rates of every run, differences to the baseline; shown, and written where asked for.

    Raises: BadData (65) for rates that were asked for and have no row; UsageProblem for a baseline that is not there.
    """
    by_run: dict[str, list[Seen]] = {}
    for one in seen:
        by_run.setdefault(one.run, []).append(one)
    if options.rates == "asr" and not any(one.harmful for one in seen):
        raise BadData("no harmful row: there is no attack success to speak of", 'rows need "label": "harmful"')
    judge = options.judge_name
    found = [rates(run, judge, rows, draws=options.bootstrap, seed=options.seed) for run, rows in by_run.items()]
    changes: list[Difference] = []
    if options.baseline is not None:
        if options.baseline not in by_run:
            raise UsageProblem(f"--baseline {options.baseline}: no such run", f"present: {', '.join(by_run)}")
        changes = differences(by_run, options.baseline, judge, draws=options.bootstrap, seed=options.seed)
        lone = sum(one.unpaired for one in changes)
        if lone:
            call.reporter.warn(f"{lone} prompts are in one of two runs alone, and compared with nothing")
    call.reporter.show(_table(found, judge))
    if changes:
        call.reporter.show(_change_table(changes))
    for path in options.report:
        _write(path, found, changes, judge)
    for path in options.plot:
        from toolbox.coca.eval_figure import draw

        draw(found, path)


# -- figures in words -------------------------------------------------------------------------------------------------
def shown(rate: Rate | None) -> str:
    """``43.8 [32.3, 55.9]``; a dash where there is nothing."""
    if rate is None:
        return "–"
    bounds = "" if rate.low is None or rate.high is None else f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{100 * rate.estimate:.1f}{bounds}"


def _rows(found: Sequence[RunRates]) -> tuple[list[str], list[list[str]]]:
    """Header and a row a run: ID, each attack, their mean, then what else there is to know."""
    facets = list(dict.fromkeys(name for one in found for name in one.attacks))
    facets.sort(key=lambda name: name != ID)
    header = ["run"]
    for name in facets:
        counts = {one.attacks[name].asr.n for one in found if name in one.attacks}
        header.append(f"{name} (n={'/'.join(map(str, sorted(counts)))})")
    header += [OOD_MEAN, "over-refusal", "unfinished", "five tags", "disagree"]
    rows = []
    for one in found:
        cells = [shown(one.attacks[name].asr) if name in one.attacks else "–" for name in facets]
        unfinished = sum(attack.unfinished for attack in one.attacks.values()) + one.over_unfinished
        unjudged = sum(attack.unjudged for attack in one.attacks.values())
        left = f"{unfinished} of {one.rows}" + (f", {unjudged} unjudged" if unjudged else "")
        rows.append(
            [one.run, *cells, shown(one.ood_mean), shown(one.over_refusal), left, shown(one.format_ok),
             shown(one.disagree)]
        )  # fmt: skip
    return header, rows


def _changes(changes: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    header = ["run", "what", "n", "difference in points", "only here / only there", "p", "p (Holm)"]
    rows = []
    for one in changes:
        mark = "*" if one.p_holm is not None and one.p_holm < SIGNIFICANT else ""
        bounds = "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
        rows.append([
            f"{one.run} − {one.baseline}", one.what, str(one.n), f"{100 * one.difference:+.1f}{bounds}{mark}",
            f"{one.only_run} / {one.only_baseline}", f"{one.p:.3f}", "" if one.p_holm is None else f"{one.p_holm:.3f}",
        ])  # fmt: skip
    return header, rows


def _grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _table(found: Sequence[RunRates], judge: str) -> Any:
    """Runs down, rates across, for a terminal; where there are many attacks, the other way round."""
    header, rows = _rows(found)
    title = f"attack success, % not refused [95 % interval], by {judge}"
    if len(header) <= 7:
        return _grid(title, header, rows, 1)
    turned = [[name, *(row[place] for row in rows)] for place, name in enumerate(header) if place]
    return _grid(title, ["", *(one.run for one in found)], turned, 1)


def _change_table(changes: Sequence[Difference]) -> Any:
    header, rows = _changes(changes)
    return _grid("on the same prompts (* stands after Holm's correction)", header, rows, 2)


# -- files ------------------------------------------------------------------------------------------------------------
def _write(path: str, found: Sequence[RunRates], changes: Sequence[Difference], judge: str) -> None:
    from toolbox.shell.files import atomic_file

    kind = Path(path).suffix
    text = {".json": _json, ".md": _markdown, ".csv": _csv}[kind](found, changes, judge)
    with atomic_file(path) as handle:
        handle.write(text.encode())


def _json(found: Sequence[RunRates], changes: Sequence[Difference], judge: str) -> str:
    told = {"judge": judge, "runs": found, "differences": changes}
    return json.dumps(msgspec.to_builtins(told), indent=2) + "\n"


def _markdown(found: Sequence[RunRates], changes: Sequence[Difference], judge: str) -> str:
    parts = ["# Attack success and over-refusal", "", f"Judge: `{judge}`. Percent not refused, with 95 % intervals "
             "(Wilson; of the mean a bootstrap inside attacks). Unfinished answers count as neither.", ""]  # fmt: skip
    if not judge.startswith(("strongreject", "refusal3")):
        parts += [UPPER_BOUND, ""]
    parts += _pipes(*_rows(found))
    if changes:
        parts += ["", "## On the same prompts", "", "McNemar's exact test; intervals by a paired bootstrap.", ""]
        parts += _pipes(*_changes(changes))
    return "\n".join(parts) + "\n"


def _pipes(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def _csv(found: Sequence[RunRates], changes: Sequence[Difference], judge: str) -> str:
    """One line a rate and one a difference: run, judge, what, estimate, low, high, n, count, p, p_holm."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "judge", "what", "estimate", "low", "high", "n", "count", "p", "p_holm"])
    for one in found:
        for name, attack in one.attacks.items():
            _rate_line(writer, one.run, judge, f"ASR {name}", attack.asr)
            writer.writerow([one.run, judge, f"unfinished {name}", "", "", "", attack.asr.n, attack.unfinished, "", ""])
        for what, rate in ((OOD_MEAN, one.ood_mean), ("over-refusal", one.over_refusal), ("five tags", one.format_ok),
                           ("disagree", one.disagree)):  # fmt: skip
            if rate is not None:
                _rate_line(writer, one.run, judge, what, rate)
    for change in changes:
        writer.writerow([
            f"{change.run} - {change.baseline}", judge, change.what, change.difference, change.low, change.high,
            change.n, "", change.p, change.p_holm,
        ])  # fmt: skip
    return out.getvalue()


def _rate_line(writer: Any, run: str, judge: str, what: str, rate: Rate) -> None:
    writer.writerow([run, judge, what, rate.estimate, rate.low, rate.high, rate.n, rate.count, "", ""])
