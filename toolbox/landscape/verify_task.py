"""Rows and features of the same paths, brought together and checked: what landscape-verify learns from and judges."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.data import Paths
from toolbox.landscape.features import Features, check_same
from toolbox.landscape.judge import Polls
from toolbox.landscape.method import Floats, Integers
from toolbox.landscape.verifier import Recipe, Verifier, path_features, scored_alike
from toolbox.landscape.verify_rows import groups_of, polls_of
from toolbox.landscape.wording import Wording
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import display_name

if TYPE_CHECKING:
    from toolbox.landscape.verify import Options

_ADVICE = "give the paths that the features were made from"


def read_paths(options: Options, features: Features, call: Invocation) -> Paths:
    """All rows, cut into thoughts as those of the features were."""
    rejected: list[bytes] = []
    reader = RecordReader(
        PATH_SHAPES,
        renames=parse_map(options.map_fields),
        on_bad=options.on_bad,
        rejects=(lambda raw, _: rejected.append(raw)) if options.rejects is not None else None,
    )
    told = features.scoring
    drop = bool(told.options.get("drop_answer_thought"))
    paths = Paths(Wording(told.template, told.context, told.separator, told.split, drop), scored=False)  # type: ignore[arg-type]
    for record in read_records(options.file, call.streams, reader):
        try:
            paths.add(record)
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
    if not paths.paths:
        raise BadData("is empty: no paths", _ADVICE, file=display_name(options.file))
    if options.on_bad == "skip":  # as those that were too long for the model are, where it scored with --on-bad skip
        known = frozenset(features.path_ids)
        strange = [path for path in paths.paths if path.id not in known]
        for path in strange:
            problem = path.record.bad(f"{options.features} has no path {path.id!r}", None, "$.path_id")
            reader.bad(problem, msgspec.json.encode(path.record.data))
        paths.leave_out(strange)
    if reader.skipped:
        call.reporter.warn(f"{reader.skipped} bad rows left out")
    if options.rejects is not None and not call.dry_run:
        write_rejects(options.rejects, rejected)
    return paths


@dataclass(frozen=True, eq=False, slots=True)
class Task:
    """P rows in input order, and what is known of them.

    ``at`` (P,): the path of each row in ``features``. ``x`` (P, F): what describes it, NaN without thoughts.
    ``scorable`` (P,): those with thoughts; ``learnable`` (P,): those of them whose right answer is known.
    ``groups`` (P,): what folds keep together; ``n_groups``: groups that have a learnable path.
    """

    paths: Paths
    features: Features
    recipe: Recipe
    at: Integers
    x: Floats
    polls: Polls
    scorable: NDArray[np.bool_]
    learnable: NDArray[np.bool_]
    groups: list[Hashable]
    n_groups: int


def task_of(paths: Paths, features: Features, loaded: Verifier | None, options: Options) -> Task:
    """Raises: BadData where features, rows and a loaded verifier do not belong together, telling the difference."""
    ids, counts = [path.id for path in paths.paths], [len(path.thoughts) for path in paths.paths]
    check_same(features, options.features, asked={}, path_ids=ids, n_steps=counts)
    made_from = features.scoring.options.get("paths")
    if made_from is not None and made_from != paths.texts_digest():
        what = "was made from other thoughts or choices than these, under the same path ids"
        raise BadData(what, _ADVICE, file=options.features)
    places = {path_id: number for number, path_id in enumerate(features.path_ids)}
    at = np.array([places[path_id] for path_id in ids])
    _check_questions(paths, features, at, options)
    groups = groups_of(paths, options.group)
    recipe = _recipe(features, options) if loaded is None else _recipe_loaded(features, loaded, options)
    pred = np.array([path.pred for path in paths.paths])
    gold = np.array([paths.questions[path.question].gold for path in paths.paths])
    own = np.empty_like(pred)
    own[at] = pred
    correct = np.where(gold < 0, -1, pred == gold).astype(np.int8)
    question = np.array([path.question for path in paths.paths])
    scorable = features.n_steps[at] > 0
    learnable = scorable & (correct >= 0)
    return Task(
        paths=paths,
        features=features,
        recipe=recipe,
        at=at,
        x=path_features(features, own, recipe.feature_set, recipe.points)[at],
        polls=Polls(_numbered(polls_of(paths)), question, pred, correct),
        scorable=scorable,
        learnable=learnable,
        groups=groups,
        n_groups=len({groups[row] for row in np.flatnonzero(learnable)}),
    )


def _numbered(names: Iterable[Hashable]) -> Integers:
    """(P,) each name's place among the distinct ones, in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def _check_questions(paths: Paths, features: Features, at: Integers, options: Options) -> None:
    """Whether both mean the same questions: ids, numbers of choices, right answers."""
    for path, number in zip(paths.paths, at.tolist(), strict=True):
        of, question = int(features.question[number]), paths.questions[path.question]
        labels, gold = question.choices.labels, int(features.gold[of])
        if features.question_ids[of] != question.id:
            what = f"path {path.id!r} answers question {features.question_ids[of]!r} there and {question.id!r} here"
        elif int(features.k[of]) != len(labels):
            what = f"question {question.id!r} has {features.k[of]} choices there and {len(labels)} here"
        elif min(gold, question.gold) >= 0 and gold != question.gold:
            what = f"question {question.id!r} has the answer {labels[gold]} there and {labels[question.gold]} here"
        else:
            continue
        raise BadData(what, _ADVICE, file=options.features)


def _recipe(features: Features, options: Options) -> Recipe:
    k = int(features.k[features.question[0]]) if options.feature_set == "states" else None
    return Recipe(options.verifier, options.feature_set, options.points, k)


def _recipe_loaded(features: Features, loaded: Verifier, options: Options) -> Recipe:
    """That of the verifier, if it knows features of this kind; BadData if not."""
    for name, wanted in scored_alike(loaded.scoring).items():
        found = scored_alike(features.scoring)[name]
        if found != wanted:
            what = f"was scored with {name} {found!r}, what --load {options.load} learned from with {wanted!r}"
            advice = "a verifier judges features that were scored like those it was fitted to"
            raise BadData(what, advice, file=options.features)
    sizes = np.unique(features.k[features.question]).tolist()
    if loaded.recipe.k is not None and sizes != [loaded.recipe.k]:
        what = (
            f"has questions of {' and '.join(map(str, sizes))} choices, --load {options.load} is for {loaded.recipe.k}"
        )
        raise BadData(what, "--feature-set summary makes a verifier for any number of choices", file=options.features)
    return loaded.recipe


def check_outcomes(task: Task, options: Options) -> None:
    """Whether there is anything to learn from, and to judge by where a report was asked for."""
    file = display_name(options.file)
    if not (task.polls.correct >= 0).any() and (options.load is None or options.report is not None):
        raise BadData("needs answers: no row has an `answer`", "only --load scores paths without them", file=file)
    if options.load is not None:
        return
    if task.n_groups < 2:
        what = "question" if options.group == "id" else f"{options.group} (--group)"
        what = f"{task.n_groups or 'no'} {what} with an answer and thoughts, at least two are needed"
        raise BadData(what, "scores are of models that learned from other questions", file=file)
    correct = task.polls.correct[task.learnable] == 1
    if correct.all() or not correct.any():
        what = f"all {len(correct)} paths are {'right' if correct.all() else 'wrong'}: there is nothing to tell apart"
        raise BadData(what, "give more questions, or paths sampled at a higher temperature", file=file)
