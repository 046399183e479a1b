"""lwi-train: one more task, learned from the old model and taught by it, through the house's loop."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.lwi.tasks import check_new
from toolbox.lwi.training_data import Pictures, Source, find_split, only, pack, unpack, validation
from toolbox.lwi.training_options import NOT_DECIDING, Options, check
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.drive import conclude, drive, record_run, repeat_done
from toolbox.training.fingerprint import check_fingerprint, deciding, option_marks
from toolbox.training.journal import Journal
from toolbox.training.state import latest_state, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.lwi.task_model import Start

_DROPS = (0.4, 0.6)
"""The paper's: a tenth of the rate from epoch 80 of 200 on, a hundredth from 120."""


@dataclass(frozen=True)
class Brief:
    """What rank 0 tells the others once everything has been read and checked."""

    labels: list[str]
    task: int
    train: bytes = b""
    val: bytes = b""
    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def run(options: Options, call: Invocation) -> None:
    """Train as the options say; raises what the house's exit codes name."""
    from toolbox.lwi.task_model import find_start

    check(options)
    start = find_start(options)
    leader = process_rank() == 0
    with ExitStack() as stack:
        out, brief = None, None
        if leader:
            if not call.dry_run:
                out = OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume)
                stack.enter_context(out)
            brief = _read(options, call, start, out)
        if call.dry_run:
            if brief is not None:
                _show_plan(options, call, start, brief)
            return
        _Run(options, call, start, brief, out).go()


def _read(options: Options, call: Invocation, start: Start, out: OutputDirectory | None) -> Brief:
    """Images, classes and marks of the run. Raises: BadData (65) for all that can be wrong with them."""
    source = Source(options, call)
    split = find_split(source, options)
    task = options.task if options.task is not None else min(len(start.learned), len(split.tasks))
    labels = split.of(task, source.name)
    if start.learned:
        check_new(labels, start.learned, start.name)
        if unknown := [one for one in start.learned if tuple(one) not in split.tasks]:
            told = ", ".join(unknown[0][:5])
            call.reporter.warn(f"{start.name} has learned ({told} ...) as a task, which is none of this split's")
    images = source.images(only(source.manifest, labels), start.pixels.size)
    train = Pictures(images.pixels, images.targets)
    if lacking := [label for place, label in enumerate(labels) if not (train.targets == place).any()]:
        raise BadData(f"no image of class {lacking[0]!r} could be read", "check --root", file=source.name)
    val = validation(options, call, labels, start.pixels.size)
    source.close()
    marks = _fingerprint(options, call, start, labels, train, val)
    if out is None:
        return Brief(list(labels), task, pack(train), pack(val), fingerprint=marks)
    if out.finished:
        record = json.loads((out.final / RUN_FILE).read_bytes())
        check_fingerprint(_but_processes(record.get("fingerprint", {})), _but_processes(marks))
        return Brief(list(labels), task, finished=True)
    state = latest_state(out.partial) if out.resumed else None
    if state is not None:
        check_fingerprint(read_state(state).fingerprint, marks)
    return Brief(
        list(labels), task, pack(train), pack(val), str(out.partial), str(state) if state else None, marks
    )  # fmt: skip


_PROCESSES = "number of processes"


def _but_processes(marks: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in marks.items() if name != _PROCESSES}


def _fingerprint(
    options: Options, call: Invocation, start: Start, labels: tuple[str, ...], train: Pictures, val: Pictures | None
) -> dict[str, Any]:
    from toolbox.models.facts import weights_digest

    marks: dict[str, Any] = option_marks(options, NOT_DECIDING)
    marks |= {"classes": list(labels), "images": train.digest, "--val (its images)": val.digest if val else None}
    marks["weights to start from"] = weights_digest(start.source) if start.source else None
    return marks | {_PROCESSES: int(os.environ.get("WORLD_SIZE", "1")), "command": call.command}


def _show_plan(options: Options, call: Invocation, start: Start, brief: Brief) -> None:
    """--dry-run: what would be learned; no weights."""
    import math

    import torch
    from transformers import AutoModelForImageClassification

    from toolbox.classify.backbones import backbone_config
    from toolbox.lwi.task_model import read_config

    train = unpack(brief.train)
    assert train is not None
    labels = start.old + brief.labels
    if start.source is not None and start.source.path is not None:
        config = read_config(start.source)
        config.id2label = dict(enumerate(labels))
    else:
        config = backbone_config(start.name, labels, start.pixels.size)
    with torch.device("meta"):
        parameters = sum(one.numel() for one in AutoModelForImageClassification.from_config(config).parameters())
    count = len(train.targets)
    steps = max(1, math.ceil(round(options.epochs * math.ceil(count / options.batch_size), 9)))
    writer = JsonlWriter(call.streams)
    writer.write(
        {"event": "plan", "command": call.command, "task": brief.task, "classes": brief.labels,
         "learned": len(start.old), "images": count, "steps": steps, "parameters": parameters,
         "memory_bytes": 12 * parameters + train.pixels.numel(), "settings": call.settings}
    )  # fmt: skip
    writer.close()
    call.reporter.note(f"task {brief.task}: {len(brief.labels)} classes, {count} images, {steps} steps")


class _Run:
    """One training run in one process."""

    def __init__(
        self, options: Options, call: Invocation, start: Start, brief: Brief | None, out: OutputDirectory | None
    ) -> None:
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call, self.begin, self.out = options, call, start, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(options.precision)
        sent = broadcast_bytes(self.accelerator, None if brief is None else msgspec.msgpack.encode(brief))
        self.brief = msgspec.msgpack.decode(sent, type=Brief)
        self.writer = JsonlWriter(call.streams, trainer=True)

    def go(self) -> None:
        """Train, judge, write."""
        if self.brief.finished:
            if self.accelerator.is_main_process:
                repeat_done(self.call, self.writer, self.options.out)
            return
        train, self.val = unpack(self.brief.train), unpack(self.brief.val)
        assert train is not None
        loop, patience = self._loop(train)
        first = self._start(loop, len(train.targets))
        note = f"task {self.brief.task}: {len(self.brief.labels)} new classes, {len(train.targets)} images"
        self.call.reporter.note(f"{note}, {loop.plan.steps} steps")
        events, journal = drive(loop, first, self.call, self.writer, self.brief.partial, self._told)
        if patience is not None:
            patience.restore()
        self._finish(loop, events, journal, first)

    # -- building -----------------------------------------------------------------------------------------------------
    def _loop(self, train: Pictures) -> tuple[Any, Any]:
        import torch

        from toolbox.classify.sync import share_batch_norm
        from toolbox.lwi.objective import Patience, TaskObjective
        from toolbox.lwi.task_model import build
        from toolbox.training.loop import Loop, LoopSettings
        from toolbox.training.prepare import without_dropout
        from toolbox.training.windows import Plan, Stream

        options, begin = self.options, self.begin
        torch.manual_seed(options.seed)
        model, teacher = build(options, begin, self.brief.labels)
        without_dropout(model)
        if self.accelerator.num_processes > 1:
            model = share_batch_norm(model, self.accelerator.device)
        if self.accelerator.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        self.model = model
        trained = [one for one in model.parameters() if one.requires_grad]
        groups = [
            {"params": [one for one in trained if one.ndim >= 2], "weight_decay": options.weight_decay},
            {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
        patience = Patience(model, options.lr) if options.schedule == "patience" else None
        prepared, optimizer = self.accelerator.prepare(model, optimizer)
        if patience is not None:
            patience.attach(optimizer)
        objective = TaskObjective(
            train.pixels, train.targets, begin.pixels.prepare, learned=len(begin.old), teacher=teacher, kd=options.kd,
            temperature=options.kd_temperature, augment=options.aug == "weak", seed=options.seed, patience=patience,
        )  # fmt: skip
        settings = LoopSettings(
            options.lr, 0.0, "constant" if patience else options.schedule, options.max_grad_norm, "auto", "epoch",
            options.save_every, auto_length=options.batch_size, evaluate_start=False, drops=_DROPS,
        )  # fmt: skip
        plan = Plan(Stream("train", len(train.targets), options.batch_size), (), options.epochs, options.seed)
        loop = Loop(
            self.accelerator, prepared, objective, [optimizer], plan, settings, evaluate=self._judge,
            stop_when=patience,  # type: ignore[arg-type]
            state_dir=Path(self.brief.partial) if self.brief.partial and options.save_every != 0 else None,
            fingerprint=self.brief.fingerprint,
        )  # fmt: skip
        if self.brief.state is not None:
            loop.resume(Path(self.brief.state))
        return loop, patience

    def _judge(self) -> dict[str, Any]:
        """The task's validation images: mean loss over the new rows, TAw (new rows only), TAg (all rows)."""
        from torch.nn import functional as F

        from toolbox.classify.evaluate import among, predict
        from toolbox.training.processes import sum_over_processes

        if self.val is None:
            return {}
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        learned, classes = len(self.begin.old), len(self.brief.labels)
        sums = [0.0] * 3
        targets = self.val.targets[rank::world] + learned
        if len(targets):
            logits = predict(self.model, self.val.pixels[rank::world], prepare=self.begin.pixels.prepare)
            new = range(learned, learned + classes)
            sums = [
                float(F.cross_entropy(logits[:, learned:], targets - learned, reduction="sum")),
                float((among(logits, new) == targets).sum()),
                float((logits.argmax(1) == targets).sum()),
            ]
        loss, taw, tag = (one / len(self.val.targets) for one in sum_over_processes(self.accelerator, sums))
        return {"val": {"n": len(self.val.targets), "loss": loss, "taw": taw, "tag": tag}}

    def _start(self, loop: Any, images: int) -> dict[str, Any]:
        return {
            "event": "start",
            "command": self.call.command,
            "settings": self.call.settings,
            "task": self.brief.task,
            "classes": self.brief.labels,
            "learned": len(self.begin.old),
            "images": images,
            "val": 0 if self.val is None else len(self.val.targets),
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "steps": loop.plan.steps,
            "processes": self.accelerator.num_processes,
        }

    # -- running ------------------------------------------------------------------------------------------------------
    def _told(self, event: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if event["event"] == "eval":
            event = epoch_event(events, event)
            self._say(event)
        return [event]

    def _say(self, event: dict[str, Any]) -> None:
        judged = "" if event["taw"] is None else f", TAw {event['taw']:.3f}, TAg {event['tag']:.3f}"
        self.call.reporter.note(f"epoch {event['epoch']}: loss {event['loss']:.4f}{judged}")

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(self, loop: Any, events: list[dict[str, Any]], journal: Journal | None, start: dict[str, Any]) -> None:
        judged = self._judge().get("val", {})
        if self.accelerator.is_main_process:
            assert self.out is not None
            done = {
                "event": "done",
                "model": self.options.out,
                "task": self.brief.task,
                "classes": len(self.begin.old) + len(self.brief.labels),
                "steps": loop.step,
                "stopped": loop.stopped,
                **{name: judged.get(name) for name in ("taw", "tag")},
                "val_loss": judged.get("loss"),
                "seed": self.options.seed,
                "seconds": round(sum(event.get("seconds", 0.0) for event in events), 3),
            }
            assert journal is not None
            self._write(done, start)
            conclude(journal, self.out, self.writer, done, (lambda: self._draw(events)) if self.options.plot else None)
            self.call.reporter.note(f"wrote {self.options.out}")
        self.accelerator.wait_for_everyone()

    def _write(self, done: dict[str, Any], start: dict[str, Any]) -> None:
        from toolbox.lwi.task_model import write
        from toolbox.weights.provenance import header

        assert self.out is not None
        marks = self.brief.fingerprint
        named = {"images": "images", "val": "--val (its images)", "init": "weights to start from"}
        inputs = {name: marks[mark] for name, mark in named.items() if marks[mark]}
        tasks = [*self.begin.learned, self.brief.labels]
        metadata = header(self.call.command, deciding(self.options, NOT_DECIDING), self.options.seed, inputs)
        write(self.out.partial, self.model, tasks, self.begin.pixels, metadata)
        record_run(self.out.partial, self.call, self.began, done, start, inputs=inputs, fingerprint=marks)

    def _draw(self, events: list[dict[str, Any]]) -> None:
        from toolbox.lwi.task_figures import draw_training

        draw_training(events, self.options.plot, f"task {self.brief.task} ({self.call.command})")


def epoch_event(events: list[dict[str, Any]], judged: dict[str, Any]) -> dict[str, Any]:
    """The event of an epoch: means over the images of its steps, and the validation images as they stand."""
    steps: list[dict[str, Any]] = []
    for event in reversed(events):
        if event["event"] in ("epoch", "start"):
            break
        if event["event"] == "step":
            steps.append(event)
    count = sum(event["n"] for event in steps)
    means = {name: sum(one[name] * one["n"] for one in steps) / count for name in ("loss", "ce", "kd", "right")}
    val = judged["sets"].get("val", {})
    return {
        "event": "epoch", "epoch": steps[0]["epoch"], "step": judged["step"], **means, "taw": val.get("taw"),
        "tag": val.get("tag"), "val_loss": val.get("loss"), "lr": steps[0]["lr"], "seconds": judged["seconds"],
    }  # fmt: skip
