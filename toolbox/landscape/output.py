"""What landscape-plot makes of features: maps, lines for stdout, files and pictures in the output directory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.data import MOST_SINGLE, Path, Paths
from toolbox.landscape.features import Features, write_features
from toolbox.landscape.metrics import Cell, Facet, facet_masks, facet_name, path_records, tables
from toolbox.landscape.project import (
    LandscapeMap,
    coordinate_records,
    many_states_advice,
    map_rows,
    project,
    question_groups,
)
from toolbox.weights.provenance import header

if TYPE_CHECKING:
    from toolbox.landscape.settings import Options

FEATURES_FILE = "features.safetensors"
LINES_FILE = "metrics.jsonl"
"""A copy of what went to stdout, from which a finished run is told again."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_LONGEST_NAME = 60  # characters of a facet or an id in a file's name


@dataclass(frozen=True, eq=False, slots=True)
class Figure:
    """One picture: a map and the paths of one facet on it. ``name`` is its file's, without the suffix."""

    name: str
    landscape: LandscapeMap
    facet: Facet
    paths: NDArray[np.bool_]
    labels: tuple[str, ...] | None


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """Everything that is known once paths are scored and mapped. ``paths`` are the rows in the features' order."""

    options: Options
    features: Features
    paths: Sequence[Path]
    questions: Mapping[str, Any]
    maps: Sequence[LandscapeMap]
    cells: Sequence[Cell]
    figures: Sequence[Figure]

    @property
    def done(self) -> dict[str, Any]:
        """The last line."""
        features, thoughts = self.features, self.features.n_steps
        return {
            "event": "done",
            "questions": len(features.question_ids),
            "paths": len(features.path_ids),
            "states": len(features.path),
            "k": sorted({one.rows.k for one in self.maps}),
            "without_thoughts": int(np.sum(thoughts == 0)),
            "single_thought": int(np.sum(thoughts == 1)),
            "read": int(np.sum(features.pred >= 0)),
            "judged": int(np.sum(features.correct >= 0)),
            "correct": int(np.sum(features.correct == 1)),
            "figures": [name for name, _ in self.pictures()],
        }

    def lines(self) -> list[dict[str, Any]]:
        """What goes to stdout."""
        return [*(cell.as_record() for cell in self.cells), self.done]

    def pictures(self) -> Iterator[tuple[str, Callable[[FilePath], Any]]]:
        """The files to draw, each with what draws it."""
        from toolbox.landscape.picture import draw_landscape, draw_metrics

        options = self.options
        for one in self.figures:
            for kind in options.formats:

                def draw(path: FilePath, one: Figure = one) -> Any:
                    return draw_landscape(
                        one.landscape, self.features, facet=one.facet, paths=one.paths, bins=options.bins,
                        compat=options.reference, density=options.density, labels=one.labels, path=path,
                    )  # type: ignore[arg-type] # fmt: skip

                yield f"{one.name}.{kind}", draw
        sizes = list(dict.fromkeys(cell.k for cell in self.cells))
        for k in sizes:
            cells = [cell for cell in self.cells if cell.k == k]
            stem = "metrics" if len(sizes) == 1 else f"metrics_k{k}"
            for kind in options.formats:
                yield f"{stem}.{kind}", lambda path, cells=cells: draw_metrics(cells, path)


def make_result(options: Options, features: Features, rows: Paths, note: Callable[[str], None]) -> Result:
    """Map and measure. ``note`` takes lines for people.

    Raises: UsageProblem for a facet that no path has, or questions that cannot share a map.
    """
    by_id = {path.id: path for path in rows.paths}
    maps = _maps(options, features, note)
    cells = tables(features, by=options.facets, bins=options.bins, compat=options.reference, seed=options.seed)
    questions = {question.id: question for question in rows.questions}
    labels = [questions[one].choices.labels for one in features.question_ids]
    return Result(
        options, features, [by_id[one] for one in features.path_ids], questions, maps, cells,
        list(_figures(options, features, maps, labels)),
    )  # fmt: skip


def _maps(options: Options, features: Features, note: Callable[[str], None]) -> list[LandscapeMap]:
    landmarks = options.landmark_kind
    rows = [map_rows(features, group, landmarks) for group in question_groups(features, options.per_question)]
    if (advice := many_states_advice(rows, options.project)) is not None:  # type: ignore[arg-type]
        note(advice)
    maps = []
    for one in rows:
        maps.append(project(one, options.project, perplexity=options.perplexity, seed=options.seed))  # type: ignore[arg-type]
        if maps[-1].note is not None:
            note(f"{_map_name(maps[-1], features, options)}: {maps[-1].note}")
    return maps


def _map_name(one: LandscapeMap, features: Features, options: Options) -> str:
    name = f"landscape_k{one.rows.k}"
    return f"{name}_{_safe(features.question_ids[one.rows.question[0]])}" if options.per_question else name


def _safe(text: str) -> str:
    return _UNSAFE.sub("-", text)[:_LONGEST_NAME].strip("-.") or "none"


def _figures(
    options: Options, features: Features, maps: Sequence[LandscapeMap], labels: Sequence[tuple[str, ...]]
) -> Iterator[Figure]:
    """A figure a map and facet that has states on it; no two files have one name, not even where case is ignored."""
    taken: set[str] = set()
    for one in maps:
        asked = np.unique(one.rows.question[one.rows.question >= 0])
        own = labels[asked[0]] if len(asked) == 1 else None
        for facet, members in facet_masks(features, options.facets):
            paths = members & np.isin(features.question, asked)
            if not np.any(features.n_steps[paths]):
                continue
            stem = name = "_".join(
                [_map_name(one, features, options), *([_safe(facet_name(facet))] if options.facets else [])]
            )
            number = 1
            while name.casefold() in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
            yield Figure(name, one, facet, paths, own)


# --- files ------------------------------------------------------------------------------------------------------------


def write_directory(directory: FilePath, result: Result) -> None:
    """Everything but run.json: features, coordinates, paths, lines, pictures."""
    features, options = result.features, result.options
    # All of it from what the features file says itself: the same features give the same bytes, whoever writes them.
    scoring = features.scoring
    digests = {"model": scoring.model_digest, "tokenizer": scoring.tokenizer_digest}
    inputs = {**digests, "paths": scoring.options.get("paths", "")}
    told = {"model": scoring.model, "template": scoring.template, "context": scoring.context, "split": scoring.split}
    metadata = header("landscape-plot", told, None, inputs, scoring.versions)
    write_features(directory / FEATURES_FILE, features, metadata)
    _write_lines(directory / "coords.jsonl", _coordinates(result))
    _write_lines(directory / "paths.jsonl", _path_lines(result))
    _write_lines(directory / LINES_FILE, result.lines())
    if options.formats:
        for name, draw in result.pictures():
            draw(directory / name)


def _write_lines(path: FilePath, lines: Iterator[dict[str, Any]] | Sequence[dict[str, Any]]) -> None:
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as handle:
        handle.writelines(encode(line) + b"\n" for line in lines)


def _coordinates(result: Result) -> Iterator[dict[str, Any]]:
    """The points of every map; with a map a question, landmarks name theirs."""
    for one in result.maps:
        owner = result.features.question_ids[one.rows.question[0]] if result.options.per_question else None
        for record in coordinate_records(one, result.features):
            yield {"id": owner, **record} if owner is not None and "landmark" in record else record


def _path_lines(result: Result) -> Iterator[dict[str, Any]]:
    """What is known of each path; answers as labels; the thoughts only where they were asked for."""
    for record, path in zip(path_records(result.features), result.paths, strict=True):
        labels = result.questions[record["id"]].choices.labels
        for name in ("pred", "gold"):
            record[name] = None if record[name] is None else labels[record[name]]
        line = {**record, "pred_source": path.source, "facets": path.facets}
        yield {**line, "thoughts": path.thoughts} if result.options.log_text else line


# --- for people: nothing is left out or taken for something else without a word ---------------------------------------


def warnings(paths: Paths) -> Iterator[str]:
    """What makes a picture say less than it seems to."""
    total = len(paths.paths)
    if without := sum(not path.thoughts for path in paths.paths):
        yield f"{without} of {total} paths have no thoughts: they count as paths, but are not on the map"
    single = sum(len(path.thoughts) == 1 for path in paths.paths)
    cut = sum(len(path.thoughts) == 1 and path.cut for path in paths.paths)
    if cut and single > MOST_SINGLE * total and paths.wording.split == "line":
        yield f"{single} of {total} paths have a single thought: --split sentence cuts them further"
    if paths.strangers:
        yield f"{paths.strangers} rows have a `pred` that is none of the choices: taken for no answer"
    unknown = sum(paths.questions[path.question].gold < 0 for path in paths.paths)
    if unknown:
        yield f"{unknown} of {total} paths have no `answer` to compare with: no right or wrong for them"


def notes(paths: Paths, model: str | None) -> Iterator[str]:
    """What is good to know; ``model`` is the one that scores, None where nothing is scored."""
    sizes = Counter(len(paths.questions[path.question].answers) for path in paths.paths)
    if len(sizes) > 1:
        told = ", ".join(f"{sizes[k]} paths with {k} choices" for k in sorted(sizes))
        yield f"one map for each number of choices: {told}"
    if model is None:
        return
    texts: dict[int, set[object]] = {}
    for path in paths.paths:
        texts.setdefault(path.question, set()).add(path.asking)
    if several := sum(len(found) > 1 for found in texts.values()):
        yield f"{several} questions are asked in several ways: the start drawn is that of the first path of each"
    own = {path.facets["model"] for path in paths.paths} - {None}
    names = {FilePath(name).name for name in own if name is not None}
    if own and names != {FilePath(model).name}:
        told = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        yield f"the paths are of {told}; {FilePath(model).name} scores them as somebody else's"


def summary_table(cells: Sequence[Cell]) -> Any:
    """The figures of whole paths as a rich table, a line a k, facet and outcome."""
    from rich.table import Table

    whole = [cell for cell in cells if cell.bin is None]
    table = Table(box=None, pad_edge=False, title="means over paths with 95 % intervals over questions")
    names = ("paths", "consistency", "uncertainty", "path_perplexity")
    for column in (*(["k"] if len({cell.k for cell in whole}) > 1 else []), "of", *names, "accuracy"):
        table.add_column(column.replace("_", " "), justify="left" if column == "of" else "right", no_wrap=True)
    for cell in whole:
        of = ", ".join(part for part in (facet_name(cell.facet), cell.outcome) if part)
        shown = [str(cell.metrics[name]) if cell.metrics[name] is not None else "" for name in names[1:]]
        accuracy = cell.metrics.get("correct")
        row = [of, str(cell.paths), *shown, "" if accuracy is None else str(accuracy)]
        table.add_row(*([str(cell.k)] if len(table.columns) > len(row) else []), *row)
    return table
