"""landscape-verify: the job. Paths in, the same paths out with a score; a judgement of the scores for people.

All paths are read before one leaves, since a score is that of a model fitted to the paths of other questions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolbox.landscape.features import read_features
from toolbox.landscape.judge import (
    Control,
    Evaluation,
    controls,
    evaluate,
    grouped_folds,
    out_of_fold,
    relabelled,
)
from toolbox.landscape.method import Floats
from toolbox.landscape.reading import PathReader
from toolbox.landscape.stored import read_stored
from toolbox.landscape.verifier import (
    FeatureSet,
    Kind,
    Model,
    Verifier,
    fit,
    read_verifier,
    training_free_scores,
    write_verifier,
)
from toolbox.landscape.verify_report import Setup, about, counts, markdown, renderables, verdict
from toolbox.landscape.verify_task import Task, check_outcomes, digests, task_of
from toolbox.shell.command import Invocation
from toolbox.shell.errors import CannotCreate, UsageProblem
from toolbox.shell.files import atomic_file, sha256_file
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.weights.provenance import canonical, header

CONTROL_TREES = 50
"""Trees of a forest that learns shuffled labels: enough to see how far chance reaches, at a sixth of the time."""

_FITTING = ("verifier", "feature_set", "points", "folds", "group", "save", "overwrite")
"""Options that a loaded verifier has no use for."""

_PACKAGES = ("toolbox-ten", "scikit-learn", "numpy")


@dataclass(frozen=True, kw_only=True)
class Options:
    """landscape-verify's options; ``given`` names those that were typed or set by a recipe."""

    features: str
    file: str = "-"
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    verifier: Kind = "rf"
    feature_set: FeatureSet = "states"
    points: int = 10
    folds: int = 5
    group: str = "id"
    shuffles: int = 20
    seed: int = 0
    save: str | None = None
    overwrite: bool = False
    load: str | None = None
    report: str | None = None
    given: frozenset[str] = frozenset()


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    if options.load is not None:
        for name in _FITTING:
            if name in options.given:
                flag = "--" + name.replace("_", "-")
                raise UsageProblem(f"{flag} has no use with --load, which fits nothing", "leave one of them out")
    for name, path in (("features", options.features), ("load", options.load)):
        if path == "-":
            raise UsageProblem(f"--{name} -: stdin has the paths", "name a file")
    inputs = (("--features", options.features), ("--load", options.load), ("the input", options.file))
    taken = {Path(path).absolute(): name for name, path in inputs if path is not None}
    outputs = (("--save", options.save), ("--report", options.report), ("--rejects", options.rejects))
    for name, path in outputs:
        if path is None:
            continue
        if path == "-":
            raise UsageProblem(f"{name} -: stdout has the paths already", "name a file")
        place = Path(path).absolute()
        if not place.parent.is_dir():
            raise CannotCreate(f"{name} {path}: no such directory", "make it first")
        if (other := taken.setdefault(place, name)) != name:
            raise UsageProblem(f"{name} {path}: is {other} as well", "name another file")
    if options.save is not None and Path(options.save).is_file() and not options.overwrite:
        raise CannotCreate(f"{options.save}: exists already", "pass --overwrite to replace it, or choose another name")


def run(options: Options, call: Invocation) -> None:
    """Score every path of ``options.file``: rows on stdout, tables and sentences on stderr, files if asked for."""
    check(options)
    if process_rank() != 0:  # nothing to share: the first process does it all
        return
    features = read_features(options.features)
    loaded = read_verifier(options.load) if options.load is not None else None
    reader = PathReader(options, call)
    paths, at = read_stored(reader, features, options.features)
    reader.tell()
    task = task_of(paths, at, features, loaded, options)
    check_outcomes(task, options)
    if call.dry_run:
        _dry_run(task, options, call)
        return
    result = _fitted(task, options, call) if loaded is None else _loaded(task, loaded, options)
    setup = _setup(task, loaded, options)
    evaluation = _evaluated(task, result, options) if (task.polls.correct >= 0).any() else None
    writer = JsonlWriter(call.streams)
    for path, score in zip(task.paths.paths, result.scores.tolist(), strict=True):
        row, labels = path.record.data, task.paths.questions[path.question].choices.labels
        found = {} if "pred" in row else {"pred": labels[path.pred] if path.pred >= 0 else None}
        writer.write({**row, **found, "score": None if score != score else score})
    writer.close()
    # Only now: where nobody takes the rows, nothing is said either.
    _tell(task, setup, evaluation, options, call)
    if options.save is not None and result.model is not None:
        _save(task, result.model, options)


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Result:
    """(P,) scores, NaN for none; the control; the model of all learnable paths, where one was needed."""

    scores: Floats
    control: Control | None
    model: Model | None = None


def _fitted(task: Task, options: Options, call: Invocation) -> Result:
    """Learnable paths scored by models that saw no path of their group, all others by one that saw all learnable.

    A path whose right answer is not known takes no part in fitting, so its score is held out either way.
    """
    learn = np.flatnonzero(task.learnable)
    learn = learn[np.argsort(task.at[learn])]  # so that the order of the rows changes no score
    x, polls, rest = task.x[learn], task.polls.only(learn), task.scorable & ~task.learnable
    correct = polls.correct == 1
    fold = grouped_folds([task.groups[row] for row in learn], options.folds, options.seed)
    make = functools.partial(fit, kind=options.verifier, seed=options.seed)
    scores = np.full(len(task.x), np.nan)
    scores[learn] = out_of_fold(x, correct, fold, make)
    model = make(x, correct) if options.save is not None or rest.any() else None
    if model is not None:
        scores[rest] = model.predict(task.x[rest])
    found = []
    with call.reporter.progress("control", options.shuffles) as bar:
        small = functools.partial(make, trees=CONTROL_TREES)
        for one in controls(x, polls, fold, small, options.shuffles, options.seed):
            found.append(one)
            bar.advance()
    return Result(scores, Control.of(found), model)


def _loaded(task: Task, loaded: Verifier, options: Options) -> Result:
    scores = np.full(len(task.x), np.nan)
    scores[task.scorable] = loaded.model.predict(task.x[task.scorable])
    known = task.learnable
    return Result(scores, Control.of(relabelled(scores[known], task.polls.only(known), options.shuffles, options.seed)))


def _evaluated(task: Task, result: Result, options: Options) -> Evaluation:
    free = {name: values[task.at] for name, values in training_free_scores(task.features).items()}
    name = f"verifier ({task.recipe.kind})"
    return evaluate(result.scores, task.polls, free, control=result.control, name=name, seed=options.seed)


def _setup(task: Task, loaded: Verifier | None, options: Options) -> Setup:
    judged = zip(task.paths.questions, digests(task.paths), strict=True)
    forest = loaded is None and task.recipe.kind == "rf"
    return Setup(
        recipe=task.recipe,
        scorer=task.features.scoring.model,
        folds=None if loaded is not None else min(options.folds, task.n_groups),
        group=options.group,
        seed=options.seed,
        seen=sum(loaded.has_seen(digest) for one, digest in judged if one.gold >= 0) if loaded is not None else 0,
        without_thoughts=int((~task.scorable).sum()),
        without_answer=int((task.polls.answer < 0).sum()),
        without_gold=int((task.polls.correct < 0).sum()),
        control_trees=CONTROL_TREES if forest else None,
    )


# --- telling and saving -----------------------------------------------------------------------------------------------


def _dry_run(task: Task, options: Options, call: Invocation) -> None:
    folds = min(options.folds, task.n_groups) if options.load is None else 0
    last = options.save is not None or bool((task.scorable & ~task.learnable).any())
    writer = JsonlWriter(call.streams)
    writer.write({
        "event": "plan", "command": call.command, "paths": len(task.at), "questions": len(task.paths.questions),
        "with_thoughts": int(task.scorable.sum()), "with_pred": int((task.polls.answer >= 0).sum()),
        "labelled": int((task.polls.correct >= 0).sum()), "right": int((task.polls.correct == 1).sum()),
        "numbers": task.recipe.n_features, "folds": folds, "fits": folds * (1 + options.shuffles) + (folds and last),
        "settings": call.settings,
    })  # fmt: skip
    writer.close()


def _tell(task: Task, setup: Setup, evaluation: Evaluation | None, options: Options, call: Invocation) -> None:
    say = call.reporter
    if task.paths.strangers:
        say.warn(f"{task.paths.strangers} rows have a `pred` that is none of the choices: taken for no answer")
    differing = np.count_nonzero(task.features.pred[task.at] != task.polls.answer)
    if differing:
        say.note(f"{differing} paths have another answer in {options.features}: that of the row counts")
    for sentence in counts(setup):
        say.note(sentence)
    if evaluation is None:
        say.note("no row has an `answer`: the paths were scored, the scores not judged")
        return
    say.note(about(evaluation, setup))
    if not say.silent:
        for table in renderables(evaluation, setup):
            say.show(table)
    for sentence in verdict(evaluation, setup):
        say.note(sentence)
    if options.report is not None:
        with atomic_file(options.report) as handle:
            handle.write(markdown(evaluation, setup).encode())


def _save(task: Task, model: Model, options: Options) -> None:
    """The model of all learnable paths, with digests of the questions it has seen; no id and no text."""
    learn, correct = task.learnable, task.polls.correct
    learned_from = [path for path, one in zip(task.paths.paths, learn, strict=True) if one]
    known = digests(task.paths)
    seen = b"".join(known[question] for question in dict.fromkeys(path.question for path in learned_from))
    verifier = Verifier(
        task.recipe,
        model,
        task.features.scoring,
        len(learned_from),
        int((correct[learn] == 1).sum()),
        np.frombuffer(seen, np.uint8).reshape(-1, 8),
    )
    learned = hashlib.sha256()
    for path in learned_from:  # all that comes from the rows: which paths, what they answer, whether that is right
        told = [path.id, path.pred, task.paths.questions[path.question].gold]
        learned.update(canonical(told).encode() + b"\n")
    metadata = header(
        "landscape-verify",
        {name: getattr(options, name) for name in ("verifier", "feature_set", "points")},
        options.seed,
        {"features": sha256_file(options.features), "labels": learned.hexdigest()},
        {package: importlib.metadata.version(package) for package in _PACKAGES},
    )
    assert options.save is not None
    write_verifier(options.save, verifier, metadata, overwrite=options.overwrite)
