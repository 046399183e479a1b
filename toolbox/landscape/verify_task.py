"""Rows and features of the same paths, brought together and checked: what landscape-verify learns from and judges."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.data import Path, Paths
from toolbox.landscape.features import Features
from toolbox.landscape.judge import Polls
from toolbox.landscape.method import Floats, Integers
from toolbox.landscape.verifier import Recipe, Verifier, path_features, scored_alike
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.streams import display_name
from toolbox.weights.provenance import canonical

if TYPE_CHECKING:
    from toolbox.landscape.verify import Options


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


def task_of(paths: Paths, at: Integers, features: Features, loaded: Verifier | None, options: Options) -> Task:
    """``at`` (P,): the path of each row in ``features``, as ``stored.match`` gives it.

    Raises: BadData where right answers differ, or where a loaded verifier is of other features than these.
    """
    _check_gold(paths, features, at, options.features)
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


def _check_gold(paths: Paths, features: Features, at: Integers, file: str) -> None:
    for path, of in zip(paths.paths, features.question[at].tolist(), strict=True):
        question, gold = paths.questions[path.question], int(features.gold[of])
        if min(gold, question.gold) >= 0 and gold != question.gold:
            labels = question.choices.labels
            what = f"question {question.id!r} has the answer {labels[gold]} there and {labels[question.gold]} here"
            raise BadData(what, "give the paths that the features were made from", file=file)


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


# --- what rows say beyond what a map needs ----------------------------------------------------------------------------


def polls_of(paths: Paths) -> Iterator[Hashable]:
    """The poll that each path votes in: its question, model and variant."""
    for path in paths.paths:
        yield path.question, path.record.value.model, path.record.value.variant


def groups_of(paths: Paths, name: str) -> list[Hashable]:
    """What folds keep together, a path each: the value of the field ``name`` of the row or of its ``meta``; a row that
    has none goes by its question, as all do for ``id``.

    Raises: UsageProblem where no row has the field, BadData for values that are no scalars and for a question whose
    paths are in several groups: folds would divide it.
    """
    groups = [_group(path, name) for path in paths.paths]
    if name != "id" and not any(isinstance(group, tuple) for group in groups):
        raise UsageProblem(f"--group {name}: no row has such a field", "the default is id")
    known: dict[int, Hashable] = {}
    for path, group in zip(paths.paths, groups, strict=True):
        if known.setdefault(path.question, group) != group:
            what = f"another {name} than earlier rows of the id {path.record.id}, which folds would divide"
            raise path.record.bad(what, "--group needs a field that is the same for all paths of a question")
    return groups


def _group(path: Path, name: str) -> Hashable:
    """The question's index, or the field's value in a tuple."""
    for where, found in (("$", path.record.data), ("$.meta", path.record.value.meta)):
        if name != "id" and found.get(name) is not None:
            if isinstance(found[name], dict | list):
                raise path.record.bad("neither text nor number, so no group", "see --group", f"{where}.{name}")
            return (found[name],)
    return path.question


def digests(paths: Paths) -> list[bytes]:
    """Eight bytes a question, of its id, its words and its choices: what tells it again without naming it."""
    words = {path.question: path.record.value.question for path in reversed(paths.paths)}
    told = [
        (one.id, words.get(number), one.choices.labels, one.choices.texts) for number, one in enumerate(paths.questions)
    ]
    return [hashlib.sha256(canonical(one).encode()).digest()[:8] for one in told]
