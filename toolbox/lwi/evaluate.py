"""lwi-eval: the task x task matrix of the states of a model, and of others beside it, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolbox.classify.evaluate import among, predict
from toolbox.lwi.metrics import averages, forgetting, macro_interval, mean_forgetting, weighted_averages
from toolbox.lwi.ranks import Ranks
from toolbox.lwi.task_model import Start, load, stored_model
from toolbox.lwi.training_data import Pictures, Source, only, pack, unpack
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.files import atomic_file
from toolbox.shell.launch import under_launcher
from toolbox.shell.streams import JsonlWriter
from toolbox.stats import wilson


@dataclass(frozen=True, kw_only=True)
class Options:
    """lwi-eval's options, by name."""

    manifest: str
    models: tuple[str, ...]
    root: str | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    name: str = "model"
    baseline: tuple[str, ...] = ()
    bootstrap: int = 2000
    stats: str | None = None
    predictions: str | None = None
    plot: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Series:
    """The states of one way of learning, the earliest first; a state's t is the number of its last task."""

    name: str
    states: tuple[Start, ...]

    @property
    def steps(self) -> list[int]:
        return [len(state.learned) - 1 for state in self.states]


@dataclass(frozen=True)
class Marks:
    """One state on the images of one task: 1 where TAw (TAg) is right, int64 (n,)."""

    taw: NDArray[np.int64]
    tag: NDArray[np.int64]


Judged = dict[str, list[Marks]]
"""A model's path -> marks of task 0..t."""


def run(options: Options, call: Invocation) -> None:
    """Judge every state; raises what the house's exit codes name."""
    for path in options.plot:
        from toolbox.plots import plot_format

        plot_format(path)
    for told, path in (("stats", options.stats), ("predictions", options.predictions)):
        if path is not None and (path == "-" or not Path(path).absolute().parent.is_dir()):
            raise UsageProblem(f"--{told} {path}: a file in a directory that exists is expected", None)
    series = find_series(options)
    tasks = common_tasks(series)
    ranks = Ranks(start=not call.dry_run and under_launcher())
    images, payload = None, None
    if ranks.rank == 0:
        images = _read(options, call, series, tasks)
        payload = pack(Pictures(images.pixels, images.targets))
        if call.dry_run:
            _show_plan(call, series, tasks, images)
            return
    pictures = unpack(ranks.from_first(payload))
    assert pictures is not None
    judged = _judge_all(series, tasks, pictures, ranks)
    if ranks.rank == 0:
        assert images is not None
        _report(options, call, series, tasks, judged, images)
    ranks.from_first(b"end" if ranks.rank == 0 else None)  # a launcher ends all when one leaves


# -- what is judged -------------------------------------------------------------------------------------------------
def find_series(options: Options) -> list[Series]:
    """The states of the command line, then those of each --baseline. Raises: UsageProblem (2), MissingInput (66)."""
    named = [(options.name, list(options.models))]
    for text in options.baseline:
        name, equals, paths = text.partition("=")
        if not (name and equals and all(paths.split(","))):
            raise UsageProblem(f"--baseline {text}: expected NAME=DIR,DIR", "the states in order, joined by commas")
        named.append((name, paths.split(",")))
    names = [name for name, _ in named]
    if len(set(names)) < len(names):
        raise UsageProblem("two series have the same name", "--name names the first one")
    return [Series(name, tuple(stored_model(path, None, "model") for path in paths)) for name, paths in named]


def common_tasks(series: Sequence[Series]) -> tuple[tuple[str, ...], ...]:
    """The tasks of the state that has learned most; every other must have learned the first of them, in order.

    Raises: BadData (65) for other tasks, states out of order, or images of other sizes or scales.
    """
    states = [state for one in series for state in one.states]
    tasks = max((state.learned for state in states), key=len)
    for one in series:
        for state in one.states:
            if state.learned != tasks[: len(state.learned)]:
                what = f"{state.name} has learned other tasks than the first {len(state.learned)} of the others"
                raise BadData(what, "judge states of the same tasks (lwi_tasks in config.json)")
            if state.pixels != states[0].pixels:
                raise BadData(f"{state.name} and {states[0].name} take images of another size or scale", None)
        if one.steps != sorted(set(one.steps)):
            raise BadData(f"{one.name}: states out of order, they have learned {[t + 1 for t in one.steps]} tasks",
                          "name them from the earliest to the latest")  # fmt: skip
    return tasks


def _read(options: Options, call: Invocation, series: Sequence[Series], tasks: Sequence[Sequence[str]]) -> Any:
    source = Source(options, call)
    labels = [label for task in tasks for label in task]
    part = only(source.manifest, labels)
    if (left := len(source.manifest.samples) - len(part.samples)) > 0:
        call.reporter.note(f"{left} images of classes that no state has learned are left out")
    if part.samples:
        images = source.images(part, series[0].states[0].pixels.size)
        present = {sample.label for sample in images.samples}
    else:
        present, images = set(), None
    for number, task in enumerate(tasks):
        if present.isdisjoint(task):
            raise BadData(f"no image of task {number} ({', '.join(task[:5])})", "give images of all tasks",
                          file=source.name)  # fmt: skip
    source.close()
    return images


def _show_plan(call: Invocation, series: Sequence[Series], tasks: Sequence[Sequence[str]], images: Any) -> None:
    writer = JsonlWriter(call.streams)
    counts = [int(torch.isin(images.targets, torch.tensor(place)).sum()) for place in places(tasks)]
    writer.write({"event": "plan", "command": call.command, "series": {one.name: one.steps for one in series},
                  "tasks": [list(task) for task in tasks], "images": counts, "settings": call.settings})  # fmt: skip
    writer.close()


def places(tasks: Sequence[Sequence[str]]) -> list[list[int]]:
    """The rows of the head that belong to each task."""
    ends = np.cumsum([len(task) for task in tasks]).tolist()
    return [list(range(end - len(task), end)) for task, end in zip(tasks, ends, strict=True)]


# -- judging --------------------------------------------------------------------------------------------------------
def judge(logits: Tensor, targets: Tensor, rows: Sequence[Sequence[int]]) -> list[Marks]:
    """Marks of one state: logits (n, classes seen so far) of all images, of which those of its tasks count."""
    found = []
    for task in rows:
        index = torch.isin(targets, torch.tensor(list(task)))
        here, truth = logits[index], targets[index]
        taw, tag = among(here, task) == truth, here.argmax(1) == truth
        found.append(Marks(taw.long().numpy(), tag.long().numpy()))
    return found


def network(state: Start, ranks: Ranks | None = None) -> Any:
    """The network of a state in evaluation mode, on this process's GPU where there is one."""
    model = load(state, state.old, 0, "model").eval()
    if torch.cuda.is_available():
        model = model.to((ranks.device if ranks else None) or "cuda")
    return model


def _judge_all(series: Sequence[Series], tasks: Sequence[Sequence[str]], pictures: Pictures, ranks: Ranks) -> Judged:
    """Every state once, dealt out to the processes."""
    states = list({state.name: state for one in series for state in one.states}.values())
    mine = {}
    for state in states[ranks.rank :: ranks.count]:
        rows = places(tasks)[: len(state.learned)]
        seen = torch.isin(pictures.targets, torch.tensor([row for task in rows for row in task]))
        logits = predict(network(state, ranks), pictures.pixels[seen], prepare=state.pixels.prepare)
        if not torch.isfinite(logits).all():
            raise BadData(f"{state.name} gives outputs that are not finite", "was its training cut off?")
        marks = judge(logits, pictures.targets[seen], rows)
        mine[state.name] = [[one.taw.tolist(), one.tag.tolist()] for one in marks]
    judged: Judged = {}
    for payload in ranks.from_all(msgspec.msgpack.encode(mine)):
        for name, marks in msgspec.msgpack.decode(payload).items():
            judged[name] = [Marks(np.array(taw, dtype=np.int64), np.array(tag, dtype=np.int64)) for taw, tag in marks]
    return judged


# -- reporting ------------------------------------------------------------------------------------------------------
def cells(series: Series, judged: Judged) -> list[dict[str, Any]]:
    """The matrix of one series, a cell each, with Wilson intervals and what was forgotten."""
    matrices = {kind: matrix(series, judged, kind) for kind in ("taw", "tag")}
    lost = {kind: forgetting(found) for kind, found in matrices.items()}
    found = []
    for state, t in zip(series.states, series.steps, strict=True):
        for u, marks in enumerate(judged[state.name]):
            count = len(marks.taw)
            bounds = [wilson(int(getattr(marks, kind).sum()), count) for kind in ("taw", "tag")]
            found.append({
                "event": "cell", "name": series.name, "model": Path(state.name).name, "t": t, "u": u,
                "taw": matrices["taw"][t][u], "tag": matrices["tag"][t][u], "n": count,
                "ci": [bounds[0].low, bounds[0].high], "tag_ci": [bounds[1].low, bounds[1].high],
                "forgetting": lost["taw"][t][u], "forgetting_tag": lost["tag"][t][u],
            })  # fmt: skip
    return found


def matrix(series: Series, judged: Judged, kind: str) -> dict[int, list[float]]:
    """A[t, u] of one series, ``kind`` taw or tag."""
    pairs = zip(series.steps, series.states, strict=True)
    return {t: [float(getattr(marks, kind).mean()) for marks in judged[state.name]] for t, state in pairs}


def summary(series: Series, judged: Judged, tasks: Sequence[Sequence[str]], options: Options) -> dict[str, Any]:
    """Averages and forgetting after each state of one series; intervals of the last."""
    found: dict[str, Any] = {"name": series.name, "t": series.steps}
    sizes = [len(task) for task in tasks]
    last = judged[series.states[-1].name]
    for kind in ("taw", "tag"):
        table = matrix(series, judged, kind)
        found[f"avg_{kind}"] = list(averages(table).values())
        found[f"wavg_{kind}"] = list(weighted_averages(table, sizes).values())
        bounds = macro_interval([getattr(one, kind) for one in last], draws=options.bootstrap, seed=options.seed)
        found[f"avg_{kind}_ci"] = [bounds.low, bounds.high]
        found["forgetting" if kind == "taw" else "forgetting_tag"] = list(mean_forgetting(table).values())
    return found


def difference(one: Series, two: Series, judged: Judged, options: Options) -> dict[str, Any] | None:
    """Average of the last state of ``one`` minus that of ``two`` on the same images, paired; None at another t."""
    if one.steps[-1] != two.steps[-1]:
        return None
    found: dict[str, Any] = {}
    for kind in ("taw", "tag"):
        pairs = zip(judged[one.states[-1].name], judged[two.states[-1].name], strict=True)
        values = [getattr(a, kind) - getattr(b, kind) for a, b in pairs]
        bounds = macro_interval(values, draws=options.bootstrap, seed=options.seed)
        found |= {f"avg_{kind}": bounds.estimate, f"avg_{kind}_ci": [bounds.low, bounds.high]}
    return found


def _report(
    options: Options, call: Invocation, series: Sequence[Series], tasks: Sequence[Sequence[str]], judged: Judged,
    images: Any,
) -> None:  # fmt: skip
    writer = JsonlWriter(call.streams)
    for one in series:
        for cell in cells(one, judged):
            writer.write(cell)
    if options.stats is not None:
        from toolbox.lwi.task_stats import write_stats

        state = series[0].states[-1]
        for event in write_stats(options.stats, state, network(state), places(tasks), images, call):
            writer.write(event)
    summaries = [summary(one, judged, tasks, options) for one in series]
    for one, found in zip(series[1:], summaries[1:], strict=True):
        writer.write({"event": "baseline", **found, "difference": difference(series[0], one, judged, options)})
    writer.write({"event": "done", **summaries[0], "tasks": len(tasks), "n": len(images.targets)})
    writer.close()
    if options.predictions is not None:
        _predictions(options.predictions, series[0].states[-1], tasks, images)
    for path in options.plot:
        from toolbox.lwi.task_figures import draw_matrix

        draw_matrix([dict(one) for one in summaries], path)


def _predictions(path: str, state: Start, tasks: Sequence[Sequence[str]], images: Any) -> None:
    """A row an image, of the last state: as it came in, with its task, what TAw and TAg say, and the probability."""
    rows = places(tasks)[: len(state.learned)]
    seen = [number for number, target in enumerate(images.targets.tolist()) if any(target in task for task in rows)]
    part = replace(images.take(seen), labels=tuple(state.old))
    logits = predict(network(state), part.pixels, prepare=state.pixels.prepare)
    task_of = {row: number for number, task in enumerate(rows) for row in task}
    with atomic_file(path) as handle:
        for sample, values, target in zip(part.samples, logits, part.targets.tolist(), strict=True):
            task = task_of[target]
            best, within = int(values.argmax()), int(among(values[None], rows[task])[0])
            told = {"task": task, "pred": part.labels[best], "prob": float(values.softmax(0)[best]),
                    "pred_taw": part.labels[within], "correct": best == target,
                    "correct_taw": within == target}  # fmt: skip
            handle.write(msgspec.json.encode({**sample.data, "id": sample.id, "lwi": told}) + b"\n")
