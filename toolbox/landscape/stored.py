"""Stored features and the rows they belong to: compared with what is asked for, and brought together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from toolbox.landscape.data import Paths
from toolbox.landscape.features import Features, Scoring, check, read_features
from toolbox.landscape.method import Integers
from toolbox.landscape.reading import PathReader
from toolbox.landscape.settings import Options, unescaped
from toolbox.landscape.wording import Wording
from toolbox.models.load import find_model, prepare
from toolbox.shell.errors import BadData

_ADVICE = "give the paths that the file was made from"


def digest_of(text: str | None) -> str | None:
    """sha256 of a text that is not to be kept itself."""
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def wording_of(scoring: Scoring) -> Wording:
    """How rows became the texts that were scored so."""
    told = scoring.options
    return Wording(
        scoring.template, scoring.context, scoring.separator, scoring.split,  # type: ignore[arg-type]
        bool(told.get("drop_answer_thought")), told.get("compat") == "reference",
    )  # fmt: skip


# --- for both commands ------------------------------------------------------------------------------------------------


def read_stored(reader: PathReader, features: Features, file: str, by: tuple[str, ...] = ()) -> tuple[Paths, Integers]:
    """The rows of ``reader`` cut into thoughts as those of the features were, and (P,) the path of each in them.

    Raises: BadData (65) for a bad row, and where the file was made from other paths: other ids, questions, thoughts or
    choices. With ``--on-bad skip`` rows that the file does not have are left out.
    """
    paths = reader.read(Paths(wording_of(features.scoring), by, scored=False))
    reader.leave_strangers(paths, frozenset(features.path_ids), file)
    return paths, match(features, paths, file)


def match(features: Features, paths: Paths, file: str) -> Integers:
    """(P,) the path of each row in ``features``; BadData (65), telling the difference, where these are other paths."""
    there = {path_id: number for number, path_id in enumerate(features.path_ids)}
    here = dict.fromkeys(path.id for path in paths.paths)
    for what, missing in (
        ("has no path", here.keys() - there.keys()),
        ("has a path that did not come in:", there.keys() - here.keys()),
    ):
        if missing:
            raise BadData(f"{what} {min(missing)!r} ({len(missing)} in all)", _ADVICE, file=file)
    at = np.array([there[path.id] for path in paths.paths], dtype=np.int64)
    for path, number in zip(paths.paths, at.tolist(), strict=True):
        asked, of = paths.questions[path.question], int(features.question[number])
        found, k = int(features.n_steps[number]), int(features.k[of])
        if found != len(path.thoughts):
            what = f"path {path.id!r} has {found} thoughts there and {len(path.thoughts)} here"
            raise BadData(what, f"the file was made with --split {features.scoring.split}", file=file)
        if features.question_ids[of] != asked.id:
            what = f"path {path.id!r} answers question {features.question_ids[of]!r} there and {asked.id!r} here"
            raise BadData(what, _ADVICE, file=file)
        if k != len(asked.answers):
            what = f"question {asked.id!r} has {k} choices there and {len(asked.answers)} here"
            raise BadData(what, _ADVICE, file=file)
    made_from = features.scoring.options.get("paths")
    if made_from is not None and made_from != paths.texts_digest():
        raise BadData(
            "was made from other thoughts or choices than these, under the same path ids",
            "give the paths that the file was made from, or score these anew with landscape-plot",
            file=file,
        )
    return at


# --- for landscape-plot -----------------------------------------------------------------------------------------------


def stored_features(options: Options, reader: PathReader) -> tuple[Features, Paths]:
    """The features of ``options.features`` with the rows of ``reader``.

    Scores come from the file; what is known of a path beside them (its answer, the right one, facets) from its row, and
    what is not asked for otherwise is as it was when the file was made.

    Raises: BadData (65) for a file that was made otherwise than asked for, or from other paths.
    """
    file = str(options.features)
    features = read_features(file)
    check_asked(features.scoring, asked_for(options), file)
    _check_model(options, features.scoring, file)
    paths, at = read_stored(reader, features, file, options.facets)
    return _joined(features, paths, at, file), paths


def asked_for(options: Options) -> dict[str, Any]:
    """What was typed of the options that decide scores, by the names that ``Scoring`` or its options have for them."""
    wanted: dict[str, tuple[str, Any]] = {
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


def check_asked(scoring: Scoring, asked: Mapping[str, object], file: str) -> None:
    """Whether states were scored as asked: names of ``Scoring`` or keys of its options with values, None for any."""
    told = {field.name: getattr(scoring, field.name) for field in fields(Scoring)}
    told = {**told.pop("options"), **told}
    for name, wanted in asked.items():
        if wanted is not None and told.get(name) != wanted:
            raise BadData(
                f"was scored with {name} {told.get(name)!r}, asked for is {wanted!r}",
                "leave the option out, or score the paths anew without --features",
                file=file,
            )


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


def _joined(features: Features, paths: Paths, at: Integers, file: str) -> Features:
    """The features with answers, right answers and facets as the rows have them."""
    ordered = [paths.paths[row] for row in np.argsort(at)]
    gold_of = {question.id: question.gold for question in paths.questions}
    gold = np.array([gold_of[one] for one in features.question_ids], dtype=np.int8)
    pred = np.array([path.pred for path in ordered], dtype=np.int8)
    right = gold[features.question]
    names = dict.fromkeys(name for path in ordered for name in path.facets)
    facets = {name: tuple(path.facets.get(name) for path in ordered) for name in names}
    correct = np.where(right < 0, -1, pred == right).astype(np.int8)
    joined = replace(features, gold=gold, pred=pred, correct=correct, facets=facets)
    check(joined, file)
    return joined
