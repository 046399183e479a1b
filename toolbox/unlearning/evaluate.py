"""unlearn-eval: the job. Models or stored logs in, one line of metrics each out.

Everything that can be wrong with the call and its rows is found before torch is imported; stored logs need no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolbox.plots import plot_format
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.lists import comma_list
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.language import needs_folder
from toolbox.unlearning.logs import METRICS, SETS, Log, check_same_questions, keep_metrics, write_log
from toolbox.unlearning.score_tables import compare_table, score_table, short_names, survival
from toolbox.unlearning.stored_logs import read_log
from toolbox.unlearning.suites import suite_files
from toolbox.unlearning.summary import Score, summarise

DERIVED = {"model_utility": ("prob", "rouge_l", "truth_ratio"), "forget_quality": ("truth_ratio",)}
"""Metrics that follow from others."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """unlearn-eval's options; ``given`` are the names of those that were typed or set by a recipe."""

    model: tuple[str, ...] = ()
    from_log: tuple[str, ...] = ()
    forget: str | None = None
    retain: str | None = None
    authors: str | None = None
    facts: str | None = None
    suite: str | None = None
    split: str | None = None
    limit: int | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    reference: str | None = None
    allow_different_items: bool = False
    log: tuple[str, ...] = ()
    log_text: bool = False
    uwc: str | None = None
    keep: float = 0.9
    quantize: str | None = None
    relearn: int = 0
    relearn_steps: int = 20
    non_members: str | None = None
    plot: tuple[str, ...] = ()
    metrics: str | None = None
    utility_truth_ratio: str = "arithmetic"
    template: str | None = None
    system: str | None = None
    trust_remote_code: bool = False
    dtype: str = "fp32"
    max_new_tokens: int = 200
    batch_size: int | str = "auto"
    batch_tokens: int | str = "auto"
    seed: int = 0
    threads: int | None = None
    given: frozenset[str] = frozenset()

    @property
    def files(self) -> dict[str, str]:
        """The rows' files by set: the suite's, and those that are named."""
        named = {name: getattr(self, name) for name in SETS if getattr(self, name) is not None}
        if self.suite is None:
            if self.split is not None:
                raise UsageProblem("--split belongs to --suite tofu:DIR", "or name the file with --forget")
            return named
        return suite_files(self.suite, self.split) | named

    @property
    def wanted(self) -> tuple[str, ...]:
        """The metrics to take numbers for, in the order of ``METRICS``."""
        if self.metrics is None:
            return tuple(METRICS)
        known = {**{name: (name,) for name in METRICS}, **DERIVED}
        needed = {part for name in comma_list("metrics", self.metrics, tuple(known)) for part in known[name]}
        return tuple(name for name in METRICS if name in needed)


ASKING = frozenset({"limit", "map_fields", "on_bad", "rejects", "template", "system", "max_new_tokens"})
"""Options about rows and how a model is asked, which a stored log has settled."""


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    subjects = options.from_log or options.model
    if options.from_log:
        for name in sorted(options.given & ASKING):
            flag = {"map_fields": "map"}.get(name, name).replace("_", "-")
            raise UsageProblem(f"--{flag} means nothing to --from-log", "the log's items were asked and answered")
    if options.from_log and options.model:
        raise UsageProblem("--from-log and --model exclude one another", "run the command once for each")
    if options.from_log and (options.suite or options.split or any(getattr(options, name) for name in SETS)):
        raise UsageProblem("--from-log takes no rows: a log holds the numbers", "leave the files out")
    if not options.from_log and options.suite is None and all(getattr(options, name) is None for name in SETS):
        raise UsageProblem(
            "no rows to judge on", "--forget FILE --retain FILE, or --suite people, or --suite tofu:DIR"
        )  # fmt: skip
    files = {} if options.from_log else options.files  # raises for a suite that is not there
    if options.reference is not None and not options.from_log and "forget" not in files:
        raise UsageProblem("--reference compares truth ratios of the forget set", "add --forget")
    if options.reference is not None and "truth_ratio" not in options.wanted:
        raise UsageProblem("--reference compares truth ratios", "add forget_quality to --metrics")
    if options.log and len(options.log) != len(subjects):
        raise UsageProblem(
            f"{len(options.log)} --log for {len(subjects)} models", "give one --log a model, in the order of the models"
        )
    if len(set(options.log)) < len(options.log):
        raise UsageProblem("two --log have the same name", "each model needs a file of its own")
    if options.log_text and not options.log:
        raise UsageProblem("--log-text needs --log", "it keeps questions, answers and generations in that file")
    for path in options.log:
        if not Path(path).absolute().parent.is_dir():
            raise CannotCreate(f"--log {path}: no such directory", "make it first")
    _check_trials(options, files)
    if (
        options.plot
        and not options.from_log
        and (not {"forget", "retain"} <= files.keys() or "es" not in options.wanted)
    ):
        raise UsageProblem("--plot draws ES forget against ES retain", "give both sets, and es among --metrics")
    for path in options.plot:
        plot_format(path)
        needs_folder(path, "--plot")
    assert options.wanted  # raises for a name that is not known


def _check_trials(options: Options, files: Mapping[str, str]) -> None:
    """Trials need models, and rows to try them on."""
    for flag, value, sets, metric in (
        ("--uwc", options.uwc, ("forget", "retain"), "es"),
        ("--quantize", options.quantize, (), None),
        ("--relearn", options.relearn, ("forget",), "es"),
        ("--non-members", options.non_members, ("forget",), "es"),
    ):
        if not value:
            continue
        if options.from_log:
            raise UsageProblem(f"{flag} needs a model: a log holds numbers only", "give --model")
        if missing := [name for name in sets if name not in files]:
            raise UsageProblem(f"{flag} needs --{missing[0]} rows", f"add --{missing[0]} FILE")
        if metric is not None and metric not in options.wanted:
            raise UsageProblem(f"{flag} scores answers", f"add {metric} to --metrics")


def run(options: Options, call: Invocation) -> None:
    """Judge every model or log; one JSON line each on stdout, tables on stderr."""
    check(options)
    if options.from_log:
        _from_logs(options, call)
    else:
        from toolbox.unlearning.evaluate_models import evaluate_models

        evaluate_models(options, call)


# -- what both ways share ---------------------------------------------------------------------------------------------
class Report:
    """Where scores go: a line on stdout, a log where one is asked for, tables for people."""

    def __init__(self, options: Options, call: Invocation) -> None:
        self.options, self.call = options, call
        self.writer = JsonlWriter(call.streams)
        self.scores: list[Score] = []

    def score(self, log: Log, reference: Log | None) -> Score:
        """The summary of one log against the reference, after checking that their questions are the same."""
        if reference is not None:
            self._check_reference(log, reference)
        return summarise(log, reference, variant=self.options.utility_truth_ratio, seed=self.options.seed)

    def add(self, log: Log, score: Score) -> None:
        """Write the log, then the line: who reads the line may read the log."""
        if self.options.log:
            write_log(log, self.options.log[len(self.scores)], text=self.options.log_text)
        self.writer.write(score)
        self.writer.flush()
        self.call.reporter.show(score_table(score))
        self.scores.append(score)

    def close(self) -> None:
        """Finish stdout; compare several models in one table."""
        self.writer.close()
        self._draw()
        if len(self.scores) > 1:
            self.call.reporter.show(compare_table(self.scores))
            templates = sorted({score.template for score in self.scores if score.template is not None})
            if len(templates) > 1:
                self.call.reporter.warn(f"the models were asked in different ways (templates {', '.join(templates)})")

    def _draw(self) -> None:
        """``--plot``: the trade-off, and beside it what survives where that was tried."""
        if not self.options.plot:
            return
        from toolbox.unlearning.figures import draw_survival, draw_tradeoff

        names = short_names(self.scores)
        lines = [msgspec.to_builtins(score) | {"model": name} for name, score in zip(names, self.scores, strict=True)]
        trials = {line["model"]: survival(line) for line in lines}
        for path in self.options.plot:
            draw_tradeoff(lines, path, "forgotten against kept")
            if any(len(found) > 1 for found in trials.values()):
                whole = Path(path)
                draw_survival(trials, whole.with_name(f"{whole.stem}-survival{whole.suffix}"), "what comes back")

    def _check_reference(self, log: Log, reference: Log) -> None:
        warn = self.call.reporter.warn
        try:
            check_same_questions(log, reference)
        except BadData as problem:
            if not self.options.allow_different_items:
                raise
            warn(f"{problem.reason}; their forget quality means little")
        missing = [
            one.model
            for one in (log, reference)
            if not any(item.perturbed_losses or item.truth_ratio is not None for item in one.sets.get("forget", ()))
        ]
        if missing:
            warn(f"no forget quality: {missing[0]} has no truth ratios of a forget set")
        if None not in (log.template, reference.template) and log.template != reference.template:
            warn(f"{log.model} was asked with template {log.template}, the reference with {reference.template}")


def _stored(path: str, options: Options, call: Invocation) -> Log:
    log = read_log(path, call.streams)
    if not any(log.sets.values()):
        raise BadData("the log holds no item", "evaluate the model again", file=path)
    return keep_metrics(log, options.wanted) if options.metrics is not None else log


# -- stored logs ------------------------------------------------------------------------------------------------------
def _from_logs(options: Options, call: Invocation) -> None:
    if process_rank() != 0:  # nothing to share: the first process does it all
        return
    logs = [_stored(path, options, call) for path in options.from_log]
    reference = None
    if options.reference is not None:
        if Path(options.reference).is_dir():
            raise UsageProblem("--reference must be a log beside --from-log", "make one with --model and --log")
        reference = read_log(options.reference, call.streams)
    bare = [log.model for log in logs if not all(_has_es(log, name) for name in ("forget", "retain"))]
    if options.plot and bare:
        raise UsageProblem(f"--plot draws ES forget against ES retain, and {bare[0]} has no ES", "leave --plot out")
    report = Report(options, call)
    if call.dry_run:
        counts = [{"model": log.model, "n": {name: len(items) for name, items in log.sets.items()}} for log in logs]
        write_plan(call, {"metrics": options.wanted, "logs": counts})
        return
    for log in logs:
        report.add(log, report.score(log, reference))
    report.close()


def _has_es(log: Log, name: str) -> bool:
    return any(item.es is not None for item in log.sets.get(name, ()))


def write_plan(call: Invocation, plan: Mapping[str, Any]) -> None:
    """The one line of ``--dry-run``."""
    writer = JsonlWriter(call.streams)
    writer.write({"event": "plan", "command": call.command, "settings": call.settings, **plan})
    writer.close()
