"""Stored features and the rows they belong to: compared with what is asked for, and brought together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from toolbox.landscape.data import Path, Paths
from toolbox.landscape.features import Features, Scoring, check, check_same, read_features
from toolbox.landscape.settings import Options, unescaped
from toolbox.landscape.wording import Wording
from toolbox.models.load import find_model, prepare
from toolbox.shell.errors import BadData


def stored_features(
    options: Options, read: Callable[[Paths], Paths], refuse: Callable[[BadData, Path], None]
) -> tuple[Features, Paths]:
    """The features of ``options.features`` with the rows that ``read`` gives.

    Scores come from the file; what is known of a path beside them (its answer, the right one, facets) from its row, and
    what is not asked for otherwise is as it was when the file was made. ``refuse`` takes rows that the file does not
    have: it raises, or has them left out.

    Raises: BadData (65) for a file that was made otherwise than asked for, or from other paths.
    """
    file = str(options.features)
    features = read_features(file)
    check_same(features, file, asked=_asked(options, features.scoring), path_ids=features.path_ids)
    _check_model(options, features.scoring, file)
    paths = read(Paths(_wording(features.scoring), options.facets, scored=False))
    known = set(features.path_ids)
    unknown = [path for path in paths.paths if path.id not in known]
    if unknown and options.on_bad == "skip" and len(unknown) < len(paths.paths):
        for path in unknown:
            refuse(path.record.bad(f"the path {path.id} is not in {file}", None, "$.path_id"), path)
        paths.leave_out(unknown)
    ids, counts = [path.id for path in paths.paths], [len(path.thoughts) for path in paths.paths]
    check_same(features, file, asked={}, path_ids=ids, n_steps=counts)
    made_from = features.scoring.options.get("paths")
    if made_from is not None and made_from != paths.texts_digest():
        raise BadData(
            "was made from other thoughts or choices than these, under the same path ids",
            "give the paths that the file was made from, or score these anew without --features",
            file=file,
        )
    return _joined(features, paths, file), paths


def digest_of(text: str | None) -> str | None:
    """sha256 of a text that is not to be kept itself."""
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _asked(options: Options, scoring: Scoring) -> dict[str, Any]:
    """What was typed of the options that decide scores, by the names that the file has for them."""
    wanted: dict[str, Any] = {
        "answer_template": ("template", unescaped(options.answer_template)),
        "context": ("context", options.context),
        "separator": ("separator", unescaped(options.separator)),
        "split": ("split", options.split),
        "method": ("method", options.method),
        "dtype": ("dtype", None if options.dtype == "auto" else options.dtype),
        "drop_answer_thought": ("drop_answer_thought", options.drop_answer_thought),
        "compat": ("compat", options.compat),
        "template": ("chat_template", None if options.template == "auto" else FilePath(options.template).name),
        "system": ("system", digest_of(options.system)),
    }
    return dict(wanted[name] for name in wanted if name in options.given)


def _check_model(options: Options, scoring: Scoring, file: str) -> None:
    """Whether a model that was named is the file's, by its weights."""
    if "model" not in options.given:
        return
    from toolbox.landscape.encode import model_digest

    source = find_model(options.model)
    prepare(source)
    if model_digest(source) != scoring.model_digest:
        raise BadData(
            f"was scored with other weights, of the model {scoring.model}, than {options.model} has",
            "leave --model out, or score the paths anew without --features",
            file=file,
        )


def _wording(scoring: Scoring) -> Wording:
    told = scoring.options
    return Wording(
        scoring.template, scoring.context, scoring.separator, scoring.split,  # type: ignore[arg-type]
        told.get("drop_answer_thought", False), told.get("compat") == "reference",
    )  # fmt: skip


def _joined(features: Features, paths: Paths, file: str) -> Features:
    """The features with answers, right answers and facets as the rows have them."""
    rows = {path.id: path for path in paths.paths}
    ordered = [rows[identifier] for identifier in features.path_ids]
    questions = {question.id: question for question in paths.questions}
    for number, path in enumerate(ordered):
        question, asked = int(features.question[number]), paths.questions[path.question]
        if features.question_ids[question] != asked.id or int(features.k[question]) != len(asked.answers):
            there = f"{features.question_ids[question]} with {features.k[question]} choices"
            raise BadData(
                f"path {path.id!r} answers the question {there} there, {asked.id} with {len(asked.answers)} here",
                "give the paths that the file was made from",
                file=file,
            )
    gold = np.array([questions[one].gold for one in features.question_ids], dtype=np.int8)
    pred = np.array([path.pred for path in ordered], dtype=np.int8)
    right = gold[features.question]
    names = dict.fromkeys(name for path in ordered for name in path.facets)
    facets = {name: tuple(path.facets.get(name) for path in ordered) for name in names}
    correct = np.where(right < 0, -1, pred == right).astype(np.int8)
    joined = replace(features, gold=gold, pred=pred, correct=correct, facets=facets)
    check(joined, file)
    return joined
