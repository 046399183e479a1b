"""Tables of judgements: on stderr for people who watch, in Markdown for people who read later.

Figures are percent with their 95 % interval. Only differences that stand after Holm's correction are marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from toolbox.lot.compare import FLIPS
from toolbox.lot.lines import CELLS, SIGNIFICANT, BbqPart, Comparison, Difference, Judgement, Rate, Score
from toolbox.shell.errors import clean

if TYPE_CHECKING:
    from toolbox.lot.evaluate import Options

MARK = "*"
_NARROWEST = 14
"""Characters that a column of names keeps however little room there is."""

_MOST_ROWS = 60
"""Rows of a table on stderr; stdout and the report have all."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$])")


@dataclass(frozen=True)
class TextTable:
    """A table in words: ``left`` columns of names, then figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int


class Compared:
    """Comparisons by line and metric."""

    def __init__(self, comparisons: Iterable[Comparison]) -> None:
        self._found = {(_key(one.by), one.variant, one.metric): one for one in comparisons}

    def __call__(self, line: Judgement, metric: str) -> Comparison | None:
        return self._found.get((_key(line.by), line.variant, metric))

    def cells(self, line: Judgement, metric: str) -> tuple[str, str]:
        """Difference and corrected p; the difference is marked where it stands."""
        one = self(line, metric)
        if one is None:
            return "", ""
        return points(one.difference) + (MARK if one.significant else ""), p_value(one.p_holm)


def _key(by: dict[str, Any]) -> str:
    return json.dumps(by, sort_keys=True)


# -- figures in words -------------------------------------------------------------------------------------------------
def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def interval(rate: Rate | None) -> str:
    """``78.8 [74.5, 82.5]``: the groups' interval where several items share a group."""
    if rate is None:
        return ""
    bounds = rate.shown
    return percent(rate.estimate) + ("" if bounds is None else f" [{percent(bounds[0])}, {percent(bounds[1])}]")


def points(difference: Difference | None) -> str:
    """``+5.1 [+1.0, +9.3]``, in percentage points."""
    if difference is None:
        return ""
    text = _signed(difference.estimate)
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if float(text) == 0 else text


def p_value(p: float | None) -> str:
    if p is None:
        return ""
    return "<.001" if p < 0.001 else f"{p:.3f}".replace("0.", ".", 1)


def _score(score: Score | None) -> str:
    if score is None or score.estimate is None:
        return ""
    if score.low is None or score.high is None:
        return _signed(score.estimate)
    return f"{_signed(score.estimate)} [{_signed(score.low)}, {_signed(score.high)}]"


def _tokens(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


# -- which tables -----------------------------------------------------------------------------------------------------
def tables(lines: Sequence[Judgement], comparisons: Sequence[Comparison], baseline: str | None) -> Iterator[TextTable]:
    """All tables that the lines have figures for; empty columns are left out."""
    compared = Compared(comparisons)
    against = (f"vs {baseline}", "p") if comparisons else ()

    def gain(line: Judgement, metric: str) -> tuple[str, ...]:
        return compared.cells(line, metric) if comparisons else ()

    several = any(line.rows != line.items for line in lines)
    yield _table(
        "Answers, and accuracy with unread ones as wrong",
        ("items", "rows", "read %", "tokens", "cut %", "failed %", "accuracy %", "of read", *against,
         "common wrong %"),
        lines,
        lambda line: (
            str(line.items), str(line.rows) if several else "", percent(line.extraction_rate),
            _tokens(line.completion_tokens), percent(line.cut_off), percent(line.failed) if line.failed else "",
            interval(line.accuracy), percent(line.accuracy_read and line.accuracy_read.estimate),
            *gain(line, "accuracy"), percent(line.common_wrong and line.common_wrong.estimate),
        ),
    )  # fmt: skip
    if any(line.con for line in lines):
        yield _table(
            "WinoBias: accuracy a side, their distance, and consistency within pairs",
            ("pairs", "Pro %", "Anti %", "Delta", "Con %", "of read", *against),
            [line for line in lines if line.con],
            lambda line: (
                str(line.con.con.n if line.con.con else 0), interval(line.con.pro), interval(line.con.anti),
                percent(line.con.delta), interval(line.con.con),
                percent(line.con.con_read and line.con.con_read.estimate), *gain(line, "con"),
            ),
        )  # fmt: skip
    yield from _bbq_tables(lines)
    yield from _grid_tables(lines, compared)
    for kind in dict.fromkeys(kind for line in lines for kind in line.votes or ()):
        yield _table(
            f"Vote: {kind}",
            ("votes", "accuracy %", "agreement %", "ties %", "decided %", *against),
            [line for line in lines if kind in (line.votes or ())],
            lambda line, kind=kind: (
                str(line.votes[kind].n), interval(line.votes[kind].accuracy), percent(line.votes[kind].agreement),
                percent(line.votes[kind].ties), percent(line.votes[kind].decided), *gain(line, f"vote_{kind}"),
            ),
        )  # fmt: skip


def _table(
    title: str, header: tuple[str, ...], lines: Sequence[Judgement], cells: Callable[[Judgement], tuple[str, ...]]
) -> TextTable:
    names = tuple(dict.fromkeys(name for line in lines for name in line.by))
    rows = [(*(_name(line.by.get(name)) for name in names), line.variant, *cells(line)) for line in lines]
    header = (*names, "variant", *header)
    kept = [place for place in range(len(header)) if place <= len(names) or any(row[place] for row in rows)]
    return TextTable(
        title,
        tuple(header[place] for place in kept),
        tuple(tuple(row[place] for place in kept) for row in rows),
        len(names) + 1,
    )


def _name(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _bbq_tables(lines: Sequence[Judgement]) -> Iterator[TextTable]:
    categories = list(dict.fromkeys(name for line in lines if line.bbq for name in line.bbq.categories))
    for category in ([None] if len(categories) != 1 else []) + categories:

        def part(line: Judgement, category: str | None = category) -> BbqPart | None:
            if line.bbq is None:
                return None
            return line.bbq.all if category is None else line.bbq.categories.get(category)

        here = [line for line in lines if part(line) is not None]
        if here:
            yield _table(
                f"BBQ: {category or 'all categories'}",
                ("accuracy %", "ambiguous %", "disambiguated %", "s_DIS", "s_AMB"),
                here,
                lambda line, part=part: (
                    interval(part(line).accuracy), interval(part(line).ambig),
                    interval(part(line).disambig), _score(part(line).s_dis), _score(part(line).s_amb),
                ),
            )  # fmt: skip


def _grid_tables(lines: Sequence[Judgement], compared: Compared) -> Iterator[TextTable]:
    here = [line for line in lines if line.grid]
    if not here:
        return
    cells = [cell for cell in CELLS if any(cell in line.grid for line in here)]
    yield _table(
        "WinoControl: accuracy %",
        tuple(cells),
        here,
        lambda line: tuple(
            percent(line.grid[cell].accuracy and line.grid[cell].accuracy.estimate) if cell in line.grid else ""
            for cell in cells
        ),
    )
    pairs = [(line, one) for line in here if (one := compared(line, "accuracy")) is not None and one.grid]
    if not pairs:
        return
    grids = {id(line): one for line, one in pairs}

    def gains(line: Judgement) -> tuple[str, ...]:
        one = grids[id(line)]
        found = [one.grid[cell].accuracy if cell in one.grid else None for cell in cells]  # type: ignore[index]
        cost = "" if one.cost is None else f"{one.cost.r:+.3f} (p {p_value(one.cost.p)}, n {one.cost.n})"
        return (*("" if gain is None else _signed(gain.estimate) for gain in found), cost)

    yield _table(
        f"WinoControl: gain over {pairs[0][1].baseline} in points, and its correlation with extra tokens",
        (*cells, "r with tokens"),
        [line for line, _ in pairs],
        gains,
    )


# -- where they go ----------------------------------------------------------------------------------------------------
def summary_tables(
    lines: Sequence[Judgement], comparisons: Sequence[Comparison], baseline: str | None
) -> Iterator[Any]:
    """The tables for stderr, as rich renderables."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    for table in tables(lines, comparisons, baseline):
        parts: list[Any] = [Text(table.title, style="bold")]
        for heading, header, rows in _parts(table):
            parts += [Text(heading)] if heading else []
            drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
            names = len(header) - (len(table.header) - table.left)
            for place, name in enumerate(header):
                if place < names:  # figures may break at a blank, names only where nothing else helps
                    longest = max(len(row[place]) for row in rows)
                    drawn.add_column(Text(name), overflow="fold", min_width=min(longest, _NARROWEST))
                else:
                    drawn.add_column(Text(name), justify="right")
            for row in rows:
                drawn.add_row(*map(Text, row))
            parts.append(drawn)
        if len(table.rows) > _MOST_ROWS:
            parts.append(Text(f"... and {len(table.rows) - _MOST_ROWS} more"))
        yield Group(*parts)
    if comparisons:
        yield Text(_marked(baseline))


def _parts(table: TextTable) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """``(heading, header, rows)``: facet by facet where one has several variants, so that names need no columns."""
    facets = table.left - 1
    shown = table.rows[:_MOST_ROWS]
    groups = [(facet, list(rows)) for facet, rows in groupby(shown, key=lambda row: row[:facets])]
    if not facets or all(len(rows) == 1 for _, rows in groups):
        yield "", table.header, list(shown)
        return
    for facet, rows in groups:
        heading = ", ".join(f"{name} {value}" for name, value in zip(table.header, facet, strict=False))
        yield heading, table.header[facets:], [row[facets:] for row in rows]


def _marked(baseline: str | None) -> str:
    return f"{MARK} differs from {baseline}: Holm-corrected p < {SIGNIFICANT:g}".replace("0.05", ".05")


def markdown(lines: Sequence[Judgement], comparisons: Sequence[Comparison], options: Options) -> str:
    """The report: every table, and how its figures came about."""
    parts = ["# lot-eval"]
    for table in tables(lines, comparisons, options.baseline):
        head = f"| {' | '.join(map(_escaped, table.header))} |"
        rule = "|" + "|".join("---" if place < table.left else "--:" for place in range(len(table.header))) + "|"
        body = [f"| {' | '.join(map(_escaped, row))} |" for row in table.rows]
        parts.append("\n".join([f"## {_escaped(table.title)}", "", head, rule, *body]))
    parts.append("\n".join(f"- {note}" for note in _notes(lines, comparisons, options)))
    return "\n\n".join(parts) + "\n"


def _notes(lines: Sequence[Judgement], comparisons: Sequence[Comparison], options: Options) -> Iterator[str]:
    yield (
        "Percent, with 95 % intervals: Wilson's where each item has one answer and no group is shared, else those of "
        f"a bootstrap over groups or items ({options.bootstrap:,} draws, seed {options.seed})."
    )
    yield (
        "An answer that could not be read counts as wrong in accuracy and as inconsistent in Con; `of read` leaves it "
        "out. Tokens are the mean of a completion; cut off is the share that ran into the length limit."
    )
    if options.extract != "never" and any(set(line.sources) - {"pred", "none"} for line in lines):
        yield f"Where a text states several answers, the {options.pick} one was taken."
    if comparisons:
        tests = sorted({one.test for one in comparisons if one.test is not None})
        told = {"mcnemar": "McNemar's exact test", "sign-flip": f"sign flips of groups ({FLIPS:,} draws, or all)"}
        yield (
            f"{_escaped(_marked(options.baseline))}, corrected over the variants of a table's metric. Differences are "
            f"taken on the items that both have; p from {' or '.join(told[test] for test in tests) or 'no test'}. "
            "A difference without a mark may well be noise."
        )
        left_out = sum(sum(one.unpaired.values()) for one in comparisons if one.metric == "accuracy")
        if left_out:
            yield f"{left_out} items stand on one side of a comparison only and are left out of it."
    if any(line.votes for line in lines):
        yield (
            f"In votes, blanks {'count as an answer' if options.blank == 'count' else 'do not vote'}; ties go to the "
            "answer that was seen first."
        )


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", clean(text))
