"""From rows to lines: every facet and variant judged, and compared with the baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolbox.lot.compare import compare, correct, extra, grid_gain, token_cost
from toolbox.lot.lines import Comparison, Judgement, Row
from toolbox.lot.metrics import (
    Column,
    accuracy_column,
    average_accuracy,
    bbq,
    by_item,
    common_wrong,
    con_column,
    consistency,
    finish_share,
    grid,
    mean_tokens,
    rate,
)
from toolbox.lot.votes import tally, vote_column

if TYPE_CHECKING:
    from toolbox.lot.evaluate import Options
    from toolbox.lot.rows import Answered

METRICS = ("accuracy", "con", "bbq", "grid")


@dataclass(slots=True)
class Table:
    """All rows by facet and variant, in order of appearance."""

    facets: dict[tuple[Any, ...], dict[str, list[Row]]] = field(default_factory=dict)
    n: int = 0
    skipped: int = 0

    def add(self, answered: Answered) -> None:
        # 1 and true are equal, but not the same facet.
        key = tuple((type(part).__name__, part) for part in answered.facet)
        self.facets.setdefault(key, {}).setdefault(answered.row.variant, []).append(answered.row)
        self.n += 1

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], str, list[Row]]]:
        for facet, variants in self.facets.items():
            for variant, rows in variants.items():
                yield facet, variant, rows

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for _, variant, _ in self))

    def any(self, holds: Callable[[Row], bool]) -> bool:
        return any(holds(row) for _, _, rows in self for row in rows)


def several_models(table: Table) -> int:
    """How many questions have, under one variant, answers of more than one model."""
    return sum(
        len({row.model for row in answers}) > 1
        for _, _, rows in table
        for answers in by_item(rows).values()
    )  # fmt: skip


def judge(table: Table, options: Options) -> list[Judgement]:
    """A line a facet and variant."""
    return [_judged(_named(facet, options), variant, rows, options) for facet, variant, rows in table]


def _named(facet: Iterable[tuple[str, Any]], options: Options) -> dict[str, Any]:
    return {name: value for name, (_, value) in zip(options.facets, facet, strict=True)}


def _judged(by: dict[str, Any], variant: str, rows: Sequence[Row], options: Options) -> Judgement:
    how, wants = options.how, _wants(rows, options)
    labelled = [row for row in rows if row.correct is not None]
    sources: dict[str, int] = defaultdict(int)
    for row in rows:
        sources[row.source] += 1
    items = by_item(rows)
    kinds = options.votes
    if not kinds and not labelled and len(rows) > len(items):
        kinds = ("plurality",)  # agreement is what can be said of answers whose gold nobody knows
    blank = options.blank == "count"
    return Judgement(
        by=by,
        variant=variant,
        items=len(items),
        rows=len(rows),
        correct=sum(bool(row.correct) for row in labelled) if labelled else None,
        unlabelled=len(rows) - len(labelled),
        extraction_rate=sum(row.answer is not None for row in rows) / len(rows),
        sources=dict(sorted(sources.items())),
        accuracy=rate(accuracy_column(rows), how) if "accuracy" in wants else None,
        accuracy_read=rate(accuracy_column(rows, read_only=True), how) if "accuracy" in wants else None,
        completion_tokens=mean_tokens(rows),
        cut_off=finish_share(rows, "length"),
        failed=finish_share(rows, "error"),
        common_wrong=common_wrong(rows, how) if "accuracy" in wants else None,
        con=consistency(rows, how) if "con" in wants else None,
        bbq=bbq(rows, how) if "bbq" in wants else None,
        grid=grid(rows, how) if "grid" in wants else None,
        votes={kind: tally(kind, rows, how, blank=blank) for kind in kinds} or None,
        average_accuracy=average_accuracy(rows) if kinds else None,
    )


def _wants(rows: Sequence[Row], options: Options) -> set[str]:
    """The metrics for these rows: those asked for, or those that their items are made for."""
    here = {
        "accuracy": True,
        "con": any(row.item.side is not None for row in rows),
        "bbq": any(row.item.condition is not None for row in rows),
        "grid": any(row.item.cell is not None for row in rows),
    }
    return {name for name in options.wanted or METRICS if here[name]}


def against_baseline(table: Table, options: Options) -> list[Comparison]:
    """A line a facet, variant and metric, p values corrected over the variants of each facet and metric."""
    found: list[Comparison] = []
    baseline = str(options.baseline)
    for facet, variants in table.facets.items():
        base = variants.get(baseline)
        if base is None:
            continue
        by = _named(facet, options)
        columns = _columns(base, options)
        families: dict[str, list[Comparison]] = {metric: [] for metric in columns}
        for variant, rows in variants.items():
            if variant == baseline:
                continue
            for metric, ours in _columns(rows, options).items():
                if metric in columns:
                    one = compare(
                        ours, columns[metric], options.how, by=by, metric=metric, variant=variant, baseline=baseline
                    )
                    if metric == "accuracy":
                        _add_costs(one, rows, base, options)
                    families[metric].append(one)
        for family in families.values():
            correct(family)
            found += family
    return found


def _columns(rows: Sequence[Row], options: Options) -> Mapping[str, Column]:
    """What variants are compared in: a value an item, by metric; metrics without items are left out."""
    wants = _wants(rows, options)
    found = {}
    if wants & {"accuracy", "grid"}:
        found["accuracy"] = accuracy_column(rows)
    if "con" in wants:
        found["con"] = con_column(rows)
    for kind in options.votes:
        found[f"vote_{kind}"] = vote_column(kind, rows, blank=options.blank == "count")
    return {metric: column for metric, column in found.items() if column.ids}


def _add_costs(one: Comparison, rows: Sequence[Row], base: Sequence[Row], options: Options) -> None:
    """Tokens that the variant takes more; by cell, and against the gain, where there is a grid."""
    one.extra_tokens = extra(mean_tokens(rows), mean_tokens(base))
    if "grid" in _wants(rows, options):
        one.grid = grid_gain(rows, base, options.how)
        one.cost = token_cost(one.grid)
