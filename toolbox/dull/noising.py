"""dull-noise: a labelled manifest made long-tailed, with label noise whose counts are exact."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from toolbox.classify.manifest import Sample, iter_samples, sorted_labels
from toolbox.classify.rows import IMAGE_SHAPES
from toolbox.dull import noise
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.files import atomic_file
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name, process_rank

ORDERS = ("count", "asis", "seed", "confusion")


@dataclass(frozen=True, kw_only=True)
class Options:
    """dull-noise's options."""

    source: str = "-"
    root: str | None = None
    imbalance: float | None = None
    max_per_class: int | None = None
    class_order: str = "count"
    mode: str = "t2h"
    profile: str = "auto"
    rate: float | None = None
    rate_nonhead: float | None = None
    p_max: float = noise.P_MAX
    power: float = 1.0
    min_clean: int = noise.MIN_CLEAN
    own: bool = False
    matrix: str | None = None
    field_: str | None = None
    t2h_only: bool = False
    stochastic: bool = False
    report: str | None = None
    seed: int = 0
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None


@dataclass
class Rows:
    """What was read: ``spool`` holds the rows as JSON, the rest is numbers.

    ``labels`` are classes in their natural order, ``classes`` the class of each row in it, ``noisy`` with
    ``--mode field`` that of its other label.
    """

    spool: BinaryIO
    name: str
    offsets: array = field(default_factory=lambda: array("q", [0]))
    labels: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    noisy: np.ndarray | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.spool.seek(0)
        for start, end in zip(self.offsets, self.offsets[1:], strict=False):
            yield msgspec.json.decode(self.spool.read(end - start))


@dataclass(frozen=True)
class Outcome:
    """``order`` names the classes head first; ``kept`` are rows, ``given`` the labels they get (natural numbers)."""

    order: tuple[int, ...]
    available: np.ndarray
    plan: noise.Plan
    moved: np.ndarray
    kept: np.ndarray
    given: np.ndarray
    profile: str | None


def run(options: Options, call: Invocation) -> None:
    """Read everything, plan, and write the rows that stay in their order."""
    renames = parse_map(options.map_fields)
    if process_rank() != 0:
        return
    _check(options)
    writer = JsonlWriter(call.streams)
    rejected: list[bytes] = []
    reader = RecordReader(
        IMAGE_SHAPES, renames=renames, on_bad=options.on_bad, rejects=lambda raw, _: rejected.append(raw)
    )
    with closing(tempfile.TemporaryFile()) as spool:
        rows = _read(options, call, reader, spool)
        outcome = make(rows, options)
        facts = describe(rows, outcome, options)
        if reader.skipped:
            call.reporter.warn(f"{reader.skipped} bad rows left out")
            if options.rejects is not None and not call.dry_run:
                write_rejects(options.rejects, rejected)
        if call.dry_run:
            writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
        else:
            if options.report is not None:
                with atomic_file(options.report) as handle:
                    handle.write(json.dumps({**facts, "seed": options.seed}, indent=1).encode() + b"\n")
            for row in relabelled(rows, outcome):
                writer.write(row)
        writer.close()
    _tell(call, facts)


def _check(options: Options) -> None:
    if options.rate is not None and options.rate_nonhead is not None:
        raise UsageProblem("--rate and --rate-nonhead exclude one another", "give one of them")
    for name, value, mode in (
        ("--field", options.field_, "field"),
        ("--matrix", options.matrix, "matrix"),
        ("--t2h-only", options.t2h_only, "field"),
        ("--own", options.own, "uniform"),
    ):
        if value and options.mode != mode:
            raise UsageProblem(f"{name} has no use with --mode {options.mode}", f"it goes with --mode {mode}")
    if options.mode == "field" and options.field_ is None:
        raise UsageProblem("--mode field needs --field NAME", "the field with the noisy labels")
    if options.mode == "matrix" and options.matrix is None:
        raise UsageProblem("--mode matrix needs --matrix FILE", "a report of dull-noise is one")
    if options.class_order == "confusion" and options.mode != "field":
        raise UsageProblem("--class-order confusion needs two labels a row", "it goes with --mode field")


# -- reading ----------------------------------------------------------------------------------------------------------
def _read(options: Options, call: Invocation, reader: RecordReader, spool: BinaryIO) -> Rows:
    samples, _ = iter_samples(options.source, call.streams, reader, root=options.root)
    rows = Rows(spool, display_name(options.source))
    codes: dict[str, int] = {}
    seen, other = array("q"), array("q")
    others: dict[str, Sample] = {}
    encode = msgspec.json.Encoder().encode
    for sample in samples:
        try:
            noisy = None if options.field_ is None else _noisy(sample, options.field_)
            _earlier(sample)
        except BadData as problem:
            reader.bad(problem, encode(sample.data))
            continue
        rows.values.setdefault(sample.label, sample.data["label"])
        seen.append(codes.setdefault(sample.label, len(codes)))
        if noisy is not None:
            others.setdefault(noisy, sample)
            other.append(codes.setdefault(noisy, len(codes)))
        spool.write(line := encode({**sample.data, "id": sample.data.get("id") or sample.id}))
        rows.offsets.append(rows.offsets[-1] + len(line))
    if not seen:
        raise BadData("is empty: holds no images", "one row, or one file, an image is expected", file=rows.name)
    rows.labels = sorted_labels(rows.values)
    if len(rows.labels) < 2:
        what = f"has one class only, {rows.labels[0]!r}"
        raise BadData(what, "two or more are needed to tell apart", file=rows.name)
    for noisy, sample in others.items():
        if noisy not in rows.values:
            raise BadData(
                f"{sample.place}: $.{options.field_}: {noisy[:80]!r} is the label of no row", "check the field"
            )
    place = {label: number for number, label in enumerate(rows.labels)}
    natural = np.array([place.get(label, -1) for label in codes], dtype=np.int64)
    rows.classes = natural[np.asarray(seen)]
    rows.noisy = natural[np.asarray(other)] if options.field_ is not None else None
    return rows


def _noisy(sample: Sample, name: str) -> str:
    value = sample.data.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadData(f"{sample.place}: $.{name}: a label is expected", "name the field with --field")
    return str(value)


def _earlier(sample: Sample) -> None:
    if not isinstance(sample.data.get("dull", {}), dict):
        raise BadData(f"{sample.place}: $.dull: an object is expected", "rename the field with --map")


# -- planning ---------------------------------------------------------------------------------------------------------
def make(rows: Rows, options: Options) -> Outcome:
    """Order the classes, draw the long tail, plan the noise, draw it. Deterministic in the seed."""
    classes = len(rows.labels)
    order = _order(rows, options)
    rank = np.empty(classes, dtype=np.int64)
    rank[list(order)] = np.arange(classes)
    ranked = rank[rows.classes]  # 0 is the head from here on
    eligible = np.ones(len(ranked), dtype=bool)
    if options.t2h_only:
        assert rows.noisy is not None
        eligible = rank[rows.noisy] <= ranked
    available = np.bincount(ranked[eligible], minlength=classes)
    wanted = _wanted(available, options)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([options.seed, 0])))
    chosen = [
        generator.permutation(np.flatnonzero(eligible & (ranked == number)))[:count]
        for number, count in enumerate(wanted.tolist())
    ]
    kept = np.sort(np.concatenate(chosen))
    inside = ranked[kept]
    counts = np.bincount(inside, minlength=classes)
    profile = None
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([options.seed, 1])))
    if options.mode == "field":
        assert rows.noisy is not None
        given = rank[rows.noisy[kept]]
        moved = _tally(inside, given, classes)
        plan = noise.Plan(moved, moved / np.maximum(counts, 1)[:, None])
    else:
        rates, profile = _rates(rows, options, counts, order)
        plan = noise.exact_plan(counts, rates)
        draw = noise.draw_independent if options.stochastic else noise.draw_exact
        given = draw(rates if options.stochastic else plan, inside, generator)  # type: ignore[arg-type]
        moved = _tally(inside, given, classes)
    return Outcome(order, available, plan, moved, kept, np.asarray(order)[given], profile)


def _tally(true: np.ndarray, given: np.ndarray, classes: int) -> np.ndarray:
    return np.bincount(true * classes + given, minlength=classes * classes).reshape(classes, classes)


def _order(rows: Rows, options: Options) -> tuple[int, ...]:
    classes = len(rows.labels)
    name = options.class_order
    counts = np.bincount(rows.classes, minlength=classes)
    if name == "count":
        return tuple(int(number) for number in np.argsort(-counts, kind="stable"))
    if name == "asis":
        return tuple(range(classes))
    if name == "seed":
        words = np.random.SeedSequence([options.seed, 2])
        return tuple(int(number) for number in np.random.Generator(np.random.PCG64(words)).permutation(classes))
    if name == "confusion":
        assert rows.noisy is not None
        if classes > 15:
            what = f"--class-order confusion looks at all subsets, which {classes} classes have too many of"
            raise UsageProblem(what, "15 at most; name the order in a file")
        return noise.confusion_order(_tally(rows.classes, rows.noisy, classes))
    path = Path(name)
    if not path.is_file():
        raise MissingInput(f"--class-order {name}: no such file", f"a file with a class a line, or {', '.join(ORDERS)}")
    listed = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if sorted(listed) != sorted(rows.labels):
        off = sorted(set(listed) ^ set(rows.labels))
        what = f"{off[0][:80]!r} stands in one of order and data" if off else "a class stands there twice"
        raise BadData(what, "every class once, a line each, the largest first", file=name)
    return tuple(rows.labels.index(label) for label in listed)


def _wanted(available: np.ndarray, options: Options) -> np.ndarray:
    most = int(available.max()) if options.max_per_class is None else options.max_per_class
    if options.imbalance is None:
        return np.minimum(available, most)
    factor = options.imbalance if options.imbalance <= 1 else 1 / options.imbalance
    return np.minimum(available, noise.long_tail(most, factor, len(available)))


def _rates(rows: Rows, options: Options, counts: np.ndarray, order: tuple[int, ...]) -> tuple[np.ndarray, str | None]:
    """The matrix of the mode, classes head first; and the profile in force."""
    classes = len(counts)
    rate = options.rate if options.rate is not None else 0.2
    if options.rate_nonhead is not None:
        rate = options.rate_nonhead * float(counts[counts < counts.max()].sum() / counts.sum())
    if options.mode == "none":
        return np.eye(classes), None
    if options.mode == "t2h":
        profile = options.profile
        if profile == "auto":
            profile = "rank" if counts.min() >= noise.RANK_FLOOR * counts.max() else "flat"
        flips = noise.flip_rates(counts, rate, profile, p_max=options.p_max, min_clean=options.min_clean)
        return noise.tail_to_head(counts, flips, options.power), profile
    if options.mode == "uniform":
        return noise.uniform(classes, rate, own=options.own), None
    if options.mode == "pair":
        return noise.pairs(classes, rate, order), None
    if options.mode == "cifar-asym":
        return noise.cifar_asymmetric([rows.labels[number] for number in order], rate), None
    if options.mode == "imb":
        return noise.by_size(counts, rate), None
    assert options.matrix is not None
    return _matrix(Path(options.matrix), [rows.labels[number] for number in order], rows.labels), None


def _matrix(path: Path, order: list[str], natural: tuple[str, ...]) -> np.ndarray:
    """T from JSON: {"classes": [...], "T": [[...]]}, or the bare rows with classes in their natural order."""

    def bad(what: str) -> BadData:
        return BadData(what, 'as in {"classes": ["a", "b"], "T": [[0.9, 0.1], [0, 1]]}', file=str(path))

    if not path.is_file():
        raise MissingInput(f"--matrix {path}: no such file", "a report of dull-noise is one")
    try:
        content = msgspec.json.decode(path.read_bytes())
        names = list(content["classes"]) if isinstance(content, dict) else list(natural)
        matrix = np.array(content["T"] if isinstance(content, dict) else content, dtype=np.float64)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise bad("is no matrix in JSON") from None
    if sorted(map(str, names)) != sorted(natural) or matrix.shape != (len(natural), len(natural)):
        raise bad(f"its classes are not those of the data ({len(natural)})")
    if not (matrix >= 0).all() or not np.allclose(matrix.sum(1), 1, atol=1e-4):
        raise bad("its rows are no probabilities that add up to 1")
    at = [list(map(str, names)).index(label) for label in order]
    matrix = matrix[np.ix_(at, at)]
    return matrix / matrix.sum(1, keepdims=True)


# -- writing ----------------------------------------------------------------------------------------------------------
def relabelled(rows: Rows, outcome: Outcome) -> Iterator[dict[str, Any]]:
    """The rows that stay, in input order: ``label`` is the noisy one; the first clean one is kept."""
    given = dict(zip(outcome.kept.tolist(), outcome.given.tolist(), strict=True))
    for place, row in enumerate(rows):
        if place not in given:
            continue
        earlier = row.get("dull", {})
        label = rows.values[rows.labels[given[place]]]
        clean = earlier.get("label_clean", row["label"])
        yield {**row, "label": label, "dull": {**earlier, "label_clean": clean, "flipped": str(label) != str(clean)}}


def describe(rows: Rows, outcome: Outcome, options: Options) -> dict[str, Any]:
    """The figures of the report: classes head first, counts, T as realised, rates over all and by class."""
    moved, counts = outcome.moved, outcome.moved.sum(1)
    observed, flips = moved.sum(0), moved.sum(1) - np.diag(moved)
    below = counts < counts.max()
    least, most = int(counts.min()), int(counts.max())
    seen_least, seen_most = int(observed.min()), int(observed.max())
    return {
        "classes": [rows.labels[number] for number in outcome.order],
        "n": int(counts.sum()),
        "available": outcome.available.tolist(),
        "counts": counts.tolist(),
        "observed": observed.tolist(),
        "mode": options.mode,
        "profile": outcome.profile,
        "rate": float(flips.sum() / counts.sum()),
        "rate_nonhead": float(flips[below].sum() / counts[below].sum()) if below.any() else 0.0,
        "rate_by_class": (flips / np.maximum(counts, 1)).round(6).tolist(),
        "imbalance": {"min/max": least / most, "max/min": most / least if least else None},
        "observed_imbalance": {
            "min/max": seen_least / seen_most, "max/min": seen_most / seen_least if seen_least else None,
        },
        "moved": moved.tolist(),
        "T": (moved / np.maximum(counts, 1)[:, None] + np.diag(counts == 0)).round(9).tolist(),
        "T_planned": outcome.plan.rates.round(9).tolist(),
    }  # fmt: skip


def _tell(call: Invocation, facts: dict[str, Any]) -> None:
    if call.reporter.silent:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("class", "there", "kept", "moved away", "observed"):
        table.add_column(name, justify="left" if name == "class" else "right")
    columns = (facts[name] for name in ("classes", "available", "counts", "rate_by_class", "observed"))
    for label, there, kept, rate, seen in zip(*columns, strict=True):
        table.add_row(label, str(there), str(kept), f"{rate:.1%}", str(seen))
    call.reporter.show(table)
    before, after = facts["imbalance"], facts["observed_imbalance"]
    shown = [f"{one['min/max']:.3g} (1 to {_ratio(one['max/min'])})" for one in (before, after)]
    call.reporter.note(
        f"{facts['n']} images; {facts['rate']:.2%} of them mislabelled, {facts['rate_nonhead']:.2%} beyond the head; "
        f"imbalance {shown[0]}, as labelled {shown[1]}"
    )


def _ratio(value: float | None) -> str:
    return "none" if value is None else f"{value:.0f}"
