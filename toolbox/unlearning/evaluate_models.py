"""unlearn-eval on models: which ones and how they are asked, loaded one after another, judged by all processes."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.models.facts import run_record
from toolbox.models.load import ModelSource, find_model
from toolbox.shell.command import Invocation
from toolbox.shell.errors import AlreadyReported, BadData, MissingInput, UsageProblem
from toolbox.shell.params import TemplateType
from toolbox.shell.records import parse_map, write_rejects
from toolbox.shell.streams import process_rank
from toolbox.training.language import NOT_DECIDING
from toolbox.unlearning.evaluate import Options, Report, write_plan
from toolbox.unlearning.logs import Item, Log, check_same_questions
from toolbox.unlearning.stored_logs import read_log
from toolbox.unlearning.suites import Question, digest, read_questions

if TYPE_CHECKING:
    from toolbox.models.chat import Chat
    from toolbox.models.token_loss import TokenLoss
    from toolbox.unlearning.judge import Judge

Trial = dict[str, dict[str, Any] | None]

_NOT_DECIDING = {*NOT_DECIDING, "model"}

OTHERS = "non-members"
"""The set of rows that no model was trained on: judged by membership scores alone."""


@dataclass(frozen=True)
class Subject:
    """A model to be judged: where it is, how it is to be asked, and what it was made by (its run.json)."""

    source: ModelSource
    template: str
    system: str | None
    run: dict[str, Any] | None


def find_subject(name: str, options: Options) -> Subject:
    """Check a model without loading it. Template and system are those of its run, unless they are given."""
    source = find_model(name, trust_remote_code=options.trust_remote_code)
    record = run_record(source) or {}
    template, system = options.template, options.system
    if template is None:
        made_with = record.get("template")
        # A template from a file travels as the tokenizer's own chat template, which `auto` takes.
        template = made_with if made_with in TemplateType.words else "auto"
        system = record.get("system") if system is None else system
    return Subject(source, template, system, _made_by(record))


def _made_by(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the line says of the run that made a model: its command, method, steps and deciding options."""
    if not isinstance(record.get("command"), str):
        return None
    settings = record.get("settings")
    options = {k: v for k, v in (settings or {}).items() if k not in _NOT_DECIDING and v not in (None, [], "")}
    done = record.get("done") or {}
    return {
        "command": record["command"],
        "method": options.get("objective") or options.get("weighting"),
        "steps": done.get("steps"),
        "base": record.get("base"),
        "options": options,
    }


def evaluate_models(options: Options, call: Invocation) -> None:
    """Judge every model of ``options`` on its rows; called after ``evaluate.check``."""
    subjects = [find_subject(name, options) for name in options.model]
    stored, reference = _reference(options)
    if options.uwc is not None:
        find_model(options.uwc, trust_remote_code=options.trust_remote_code)
    sets: dict[str, tuple[Question, ...]] = {}
    log = None
    if process_rank() == 0:
        renames = parse_map(options.map_fields)
        strangers = {} if options.non_members is None else {OTHERS: options.non_members}
        sets, rejected = read_questions(
            call, options.files | strangers, renames=renames, on_bad=options.on_bad, limit=options.limit
        )  # fmt: skip
        if options.relearn >= len(sets.get("forget", ())) > 0:
            raise UsageProblem(
                f"--relearn {options.relearn} of {len(sets['forget'])} forget rows leaves none to score",
                "learn fewer of them again",
            )
        log = read_log(stored, call.streams) if stored is not None else None
        if log is not None and not options.allow_different_items:
            check_same_questions(_asked(sets["forget"], options.model[0]), log)
        if options.rejects and not call.dry_run:
            write_rejects(options.rejects, rejected)
    if call.dry_run:
        if process_rank() == 0:
            _show_plan(subjects, sets, options, call)
        return
    _Evaluation(options, call, sets).run(subjects, reference, log)


def _asked(questions: Sequence[Question], model: str) -> Log:
    """What a log of ``model`` will say of which questions it was asked."""
    items = tuple(Item(index=one.row.id, question=one.hash) for one in questions)
    return Log(model=model, sets={"forget": items})


def _reference(options: Options) -> tuple[str | None, Subject | None]:
    """``--reference`` as a stored log's path or as a model."""
    name = options.reference
    if name is None:
        return None, None
    path = Path(name)
    if name == "-":
        raise UsageProblem("--reference cannot be stdin", "name the log's file")
    if path.is_file() and path.suffix != ".gguf":
        return name, None
    if not path.exists() and path.suffix in (".json", ".gz", ".zst"):
        raise MissingInput(f"--reference {name}: no such file", "a log made with --log, or a model")
    return None, find_subject(name, options)


def _show_plan(
    subjects: Sequence[Subject], sets: Mapping[str, Sequence[Question]], options: Options, call: Invocation
) -> None:
    """``--dry-run``: how much there is to ask, without loading weights."""
    from toolbox.models.load import prepare
    from toolbox.unlearning.judge import Judge

    models = []
    for subject in subjects:
        prepare(subject.source, call.reporter.note)
        judge = Judge(sets, _chat(subject, options), metrics=options.wanted, max_new_tokens=options.max_new_tokens)
        models.append({"model": subject.source.name, "template": judge.chat.name, **judge.work})
    rows = {name: len(questions) for name, questions in sets.items()}
    write_plan(call, {"rows": rows, "metrics": options.wanted, "models": models})


def _chat(subject: Subject, options: Options) -> Chat:
    from toolbox.models.chat import Chat
    from toolbox.models.load import load_tokenizer

    tokenizer = load_tokenizer(subject.source, trust_remote_code=options.trust_remote_code)
    return Chat(tokenizer, subject.template, subject.system)


class _Evaluation:
    """The part that needs torch. One model at a time is in memory."""

    def __init__(self, options: Options, call: Invocation, sets: dict[str, tuple[Question, ...]]) -> None:
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call = options, call
        self.accelerator = start_processes()
        leader = self.accelerator.is_main_process
        payload = broadcast_bytes(self.accelerator, msgspec.json.encode(sets) if leader else None)
        self.sets = msgspec.json.decode(payload, type=dict[str, tuple[Question, ...]])
        self.others = self.sets.pop(OTHERS, ())
        self.digests = {name: digest(questions) for name, questions in self.sets.items()}
        self.reference_auc: dict[str, float] | None = None

    def run(self, subjects: Sequence[Subject], reference: Subject | None, log: Log | None) -> None:
        """Judge the reference where it is a model, then every subject; ``log`` is that of a stored reference.

        A reference that is a subject as well is judged once: in batches of its own its numbers would differ from the
        subject's by rounding, and the test between the two would see it.
        """
        report = Report(self.options, self.call) if self.accelerator.is_main_process else None
        everything = (self.sets, self.options.wanted)
        known: tuple[Log, Trial] | None = None if log is None else (log, {})
        if reference is not None:
            same = reference in subjects
            needed = everything if same else ({"forget": self.sets["forget"]}, ("truth_ratio", "es"))
            known = self._examine(reference, *needed, None, same)
            log = known[0]
            member = known[1].get("membership")
            self.reference_auc = member["auc"] if member else None
        for subject in subjects:
            found, trials = (
                known if known is not None and subject == reference else self._examine(subject, *everything, log, True)
            )
            found = msgspec.structs.replace(found, run=subject.run, digests=self.digests)
            if report is not None:
                score = report.score(found, log)
                for name, value in trials.items():
                    setattr(score, name, self._with_privleak(value) if name == "membership" and value else value)
                report.add(found, score)
        if report is not None:
            report.close()
        self.accelerator.wait_for_everyone()

    def _with_privleak(self, member: dict[str, Any]) -> dict[str, Any]:
        """The AUCs, and where the reference is a model how far they are from its own."""
        from toolbox.unlearning.membership import privleak

        against = self.reference_auc
        leak = None if against is None else {k: privleak(auc, against[k]) for k, auc in member["auc"].items()}
        return {**member, "privleak": leak}

    def _examine(
        self,
        subject: Subject,
        sets: Mapping[str, Sequence[Question]],
        metrics: Sequence[str],
        reference: Log | None,
        everything: bool,
    ) -> tuple[Log, Trial]:
        """The numbers of one model, and with ``everything`` its trials; the model is gone when this returns."""
        from toolbox.models.load import prepare
        from toolbox.unlearning.summary import summarise

        options, reporter = self.options, self.call.reporter
        with self.accelerator.main_process_first():
            prepare(subject.source, reporter.note)
        judge = self._judge(subject, sets, metrics)
        work = judge.work
        head = self._load(subject)
        what = f"{subject.source.name} (template {judge.chat.name}), answer"
        with reporter.progress(what, work["pairs"] + work["generations"]) as bar:
            judge.on_rows = bar.advance
            log = judge.log(head, subject.source.name)
        judge.on_rows = None
        if not (self.others or (everything and (options.uwc or options.quantize or options.relearn))):
            return log, {}
        from toolbox.unlearning.trials import Trials

        def load(dtype: str | None) -> TokenLoss:
            return self._load(subject, dtype)

        trials = Trials(options, self.accelerator, load, lambda sets, metrics: self._judge(subject, sets, metrics))
        if not everything:  # a reference: only what others are compared with
            return log, {"membership": trials.membership(head, judge, self.others)}
        reporter.note(f"{subject.source.name}: what survives")
        seed, variant = options.seed, options.utility_truth_ratio
        return log, trials.run(
            head, judge, self.others, lambda found: summarise(found, reference, variant=variant, seed=seed)
        )

    def _load(self, subject: Subject, dtype: str | None = None) -> TokenLoss:
        import torch

        from toolbox.models.load import load_model
        from toolbox.models.token_loss import TokenLoss

        gc.collect()  # the model before this one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        model = load_model(
            subject.source, dtype=dtype or self.options.dtype, trust_remote_code=self.options.trust_remote_code
        )  # fmt: skip
        return TokenLoss(model.to(self.accelerator.device))

    def _judge(self, subject: Subject, sets: Mapping[str, Sequence[Question]], metrics: Sequence[str]) -> Judge:
        from toolbox.models.score import SCORE_TOKENS
        from toolbox.unlearning.judge import Judge

        options, device = self.options, self.accelerator.device
        on_gpu = device.type == "cuda"
        auto = {"batch_tokens": 16 * SCORE_TOKENS if on_gpu else SCORE_TOKENS, "batch_size": 64 if on_gpu else 16}
        sizes = {name: auto[name] if getattr(options, name) == "auto" else getattr(options, name) for name in auto}
        try:
            return Judge(
                sets, _chat(subject, options), metrics=metrics, max_new_tokens=options.max_new_tokens, device=device,
                accelerator=self.accelerator, **sizes,
            )  # fmt: skip
        except BadData as problem:
            if self.accelerator.is_main_process:
                raise
            raise AlreadyReported(problem.exit_code) from None  # every rank finds the same; one says so
