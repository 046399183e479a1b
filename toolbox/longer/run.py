"""longer-train: from a packed dataset to a model directory, through the house's loop."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.longer.dataset import Manifest, read_manifest
from toolbox.longer.options import FREE_ON_RESUME, NOT_DECIDING, Choices, Options, check, choose
from toolbox.longer.parts import make_config, make_optimizers, stored_name
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.drive import conclude, drive, record_run, repeat_done
from toolbox.training.fingerprint import check_fingerprint, deciding, option_marks
from toolbox.training.state import latest_state, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.longer.data import RequestPlan, Requests
    from toolbox.longer.ranker import Config, Ranker

_PROCESSES, _SCHEMA = "number of processes", "data (its schema)"


@dataclass(frozen=True)
class Brief:
    """What rank 0 tells the others once everything has been checked."""

    choices: Choices
    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False


def run(options: Options, call: Invocation) -> None:
    """Train as the options say; raises what the house's exit codes name."""
    check(options)
    manifest = read_manifest(Path(options.data))
    choices, notes = choose(options, manifest)
    if options.init_from is not None:
        _check_start(Path(options.init_from), manifest)
    leader = process_rank() == 0
    with ExitStack() as stack:
        out = None
        if leader and not call.dry_run:
            out = stack.enter_context(OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume))
        for note in notes:
            call.reporter.note(note)
        if call.dry_run:
            if leader:
                _show_plan(options, call, manifest, choices)
            return
        brief = _brief(options, call, manifest, choices, out) if leader else Brief(choices)
        _Run(options, call, manifest, brief, out).go()


def _check_start(directory: Path, manifest: Manifest) -> None:
    from toolbox.longer.files import read_config

    if read_config(directory).schema != manifest.schema:
        raise BadData("--init-from is a model of other data: its vocabularies differ", "prepare both alike",
                      file=str(directory))  # fmt: skip


def _brief(
    options: Options, call: Invocation, manifest: Manifest, choices: Choices, out: OutputDirectory | None
) -> Brief:
    assert out is not None
    marks = _fingerprint(options, call, manifest)
    if out.finished:
        record = json.loads((out.final / RUN_FILE).read_bytes())
        made = record.get("fingerprint", {"command": record.get("command")})
        _check_schema(made, marks)
        check_fingerprint({**made, _PROCESSES: None}, {**marks, _PROCESSES: None})
        return Brief(choices, finished=True)
    state = latest_state(out.partial) if out.resumed else None
    if state is not None:
        saved = read_state(state).fingerprint
        _check_schema(saved, marks)
        check_fingerprint(saved, marks)
    return Brief(choices, str(out.partial), str(state) if state else None, marks)


def _check_schema(saved: dict[str, Any], marks: dict[str, Any]) -> None:
    if saved.get(_SCHEMA, marks[_SCHEMA]) != marks[_SCHEMA]:
        raise BadData("--resume with a data set of another schema", "give the data set of the interrupted run")


def _fingerprint(options: Options, call: Invocation, manifest: Manifest) -> dict[str, Any]:
    marks = option_marks(options, NOT_DECIDING | FREE_ON_RESUME)
    marks |= {f"data ({name})": sha for name, sha in manifest.files.items()}
    if options.init_from:
        from toolbox.weights.read import open_weights

        with open_weights(Path(options.init_from)) as weights:
            marks["--init-from (its weights)"] = weights.sha256()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return marks | {_SCHEMA: manifest.schema, _PROCESSES: processes, "command": call.command}


def _requests(options: Options, config: Config, split: str) -> Requests:
    from toolbox.longer.data import Dataset, Shape

    shape = Shape(config.max_len, config.merge, options.max_candidates)
    return Dataset(Path(options.data)).split(split, shape)


def _plan(options: Options, requests: Requests) -> RequestPlan:
    from toolbox.longer.data import RequestPlan

    return RequestPlan(
        requests, options.batch_requests, options.epochs, options.seed, order=options.order,
        max_labels=options.max_labels, max_steps=options.max_steps,
    )  # fmt: skip


def _show_plan(options: Options, call: Invocation, manifest: Manifest, choices: Choices) -> None:
    from toolbox.longer.plan import facts

    config = make_config(options, manifest, choices)
    requests = _requests(options, config, "train")
    plan = _plan(options, requests)
    found = facts(config, requests, plan, options.batch_requests)
    writer = JsonlWriter(call.streams)
    writer.write({"event": "plan", "command": call.command, "settings": call.settings, **found})
    writer.close()
    counts = found["parameters"]
    call.reporter.note(
        f"{found['requests']} requests, {found['labels']} labels, {plan.steps} steps; {counts['dense']} dense and "
        f"{counts['tables']} table parameters; about {found['memory_bytes'] / 2**20:.0f} MiB"
    )
    if config.arch == "longer" and config.max_len <= found["merging_saves_above_events"]:
        call.reporter.note(
            f"merging {config.merge} events saves nothing below {found['merging_saves_above_events']} of them"
        )


class _Run:
    """One training run in one process."""

    def __init__(
        self, options: Options, call: Invocation, manifest: Manifest, brief: Brief, out: OutputDirectory | None
    ) -> None:
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call, self.manifest, self.out = options, call, manifest, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(options.precision)
        leader = self.accelerator.is_main_process
        sent = broadcast_bytes(self.accelerator, msgspec.json.encode(brief) if leader else None)
        self.brief = msgspec.json.decode(sent, type=Brief)
        self.writer = JsonlWriter(call.streams, trainer=True)
        self.config = make_config(options, manifest, self.brief.choices)

    def go(self) -> None:
        """Train, judge, write."""
        import torch

        if self.brief.finished:
            if self.accelerator.is_main_process:
                repeat_done(self.call, self.writer, self.options.out)
            return
        torch.manual_seed(self.options.seed)
        train = _requests(self.options, self.config, "train")
        valid = _requests(self.options, self.config, "valid")
        model = self._model()
        loop, early = self._loop(model, train, valid)
        start = self._start(model, train, loop)
        self.call.reporter.note(
            f"{self.config.arch}: {start['parameters']['dense']} dense and {start['parameters']['tables']} table "
            f"parameters, {start['requests']} requests, {start['labels']} labels, {loop.plan.steps} steps"
        )
        events, journal = drive(loop, start, self.call, self.writer, self.brief.partial, self._told)
        if early is not None:
            early.restore()
        self._finish(loop, model, early, valid, events, journal, start)

    # -- building -----------------------------------------------------------------------------------------------------
    def _model(self) -> Ranker:
        import torch

        from toolbox.longer.files import load_into
        from toolbox.longer.ranker import Ranker, table_sizes
        from toolbox.longer.tables import DenseTables

        sizes = table_sizes(self.config)
        if self.options.embedding == "torchrec":
            from toolbox.longer.sharded import ShardedTables

            tables: Any = ShardedTables(
                *sizes, kernel=self.options.torchrec_kernel, lr=self.options.emb_lr, eps=1e-8, seed=self.options.seed,
                device=self.accelerator.device,
            )  # fmt: skip
            torch.manual_seed(self.options.seed)  # planning shards may draw, and not alike in one process and in two
        else:
            sparse = self.accelerator.num_processes == 1 and self.options.optimizer == "adamw"
            tables = DenseTables(*sizes, sparse=sparse)
        model = Ranker(self.config, tables=tables, recompute=self.options.recompute)
        if self.options.init_from is not None:
            load_into(model, Path(self.options.init_from), grow=True)
        return model

    def _loop(self, model: Ranker, train: Requests, valid: Requests) -> tuple[Any, Any]:
        from toolbox.longer.judge import judged
        from toolbox.longer.objective import AUTO_LENGTH, ClickObjective, EarlyStop, StoppingObjective
        from toolbox.training.loop import Loop, LoopSettings

        options = self.options
        dense = [p for name, p in model.named_parameters() if not name.startswith("tables.")]
        optimizers = make_optimizers(model, options)
        prepared, *optimizers = self.accelerator.prepare(model, *optimizers)
        early = None
        sharded = model.tables if options.embedding == "torchrec" else None
        objective = ClickObjective(train, self.config.arch)
        if sharded is not None:
            scale = options.emb_lr / options.lr
            rate = optimizers[0].param_groups[0]
            objective = ClickObjective(
                train,
                self.config.arch,
                sharded,
                lambda: sharded.push_rate(rate["lr"] * scale),  # type: ignore[operator]
            )
        if options.early_stop is not None:
            early = EarlyStop(options.early_stop, options.patience, model)
            objective = StoppingObjective(train, self.config.arch, early)
        evaluate = None
        if options.eval_every or early is not None:
            evaluate = lambda: {"valid": judged(self.accelerator, model, valid)}  # noqa: E731
        settings = LoopSettings(
            options.lr, options.warmup, options.schedule, options.max_grad_norm, options.micro_batch,
            options.eval_every, options.save_every, auto_length=AUTO_LENGTH, evaluate_start=False,
        )  # fmt: skip
        loop = Loop(
            self.accelerator, prepared, objective, optimizers, _plan(options, train), settings, clipped=dense,
            evaluate=evaluate, stop_when=early,  # type: ignore[arg-type]
            state_dir=Path(self.brief.partial) if self.brief.partial and options.save_every != 0 else None,
            fingerprint=self.brief.fingerprint, each_rank=sharded is not None,
        )  # fmt: skip
        if self.brief.state is not None:
            loop.resume(Path(self.brief.state))
        return loop, early

    def _start(self, model: Ranker, train: Requests, loop: Any) -> dict[str, Any]:
        from toolbox.longer.ranker import table_sizes

        rows, widths = table_sizes(self.config)
        dense = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables."))
        return {
            "event": "start",
            "command": self.call.command,
            "settings": self.call.settings,
            "requests": len(train),
            "labels": int(train.candidates.sum()),
            "parameters": {"dense": dense, "tables": sum(rows[name] * widths[name] for name in rows)},
            "steps": loop.plan.steps,
            "processes": self.accelerator.num_processes,
        }

    # -- running ------------------------------------------------------------------------------------------------------
    def _told(self, event: dict[str, Any], _: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if event["event"] == "step":
            seconds = max(event["seconds"], 1e-3)
            event["labels_per_s"] = round(event["labels"] / seconds)
            event["tokens_per_s"] = round(event["tokens"] / seconds)
        elif event["event"] == "eval":
            self.call.reporter.note(f"step {event['step']}: valid AUC {_shown(event['sets']['valid']['auc'])}")
        return [event]

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(
        self, loop: Any, model: Ranker, early: Any, valid: Requests, events: list[dict[str, Any]], journal: Any,
        start: dict[str, Any],
    ) -> None:  # fmt: skip
        from toolbox.longer.judge import judged
        from toolbox.longer.plan import flops_per_label

        held_out = _requests(self.options, self.config, "test")
        train = loop.objective.requests
        judge = partial(judged, self.accelerator, model)
        steps = [event for event in events if event["event"] == "step"]
        done = {
            "event": "done",
            "model": self.options.out,
            "steps": loop.step,
            "stopped": loop.stopped if early is None else f"{loop.stopped}; step {early.step} is kept",
            "labels": sum(event["labels"] for event in steps),
            "valid": judge(valid),
            "test": judge(held_out),
            "params": start["parameters"],
            "flops_per_label": flops_per_label(self.config, float(train.length.mean()), float(train.candidates.mean())),
            "seed": self.options.seed,
            "seconds": round(sum(event.get("seconds", 0.0) for event in events), 3),
            "peak_mem_mb": _peak_mib(self.accelerator),
        }
        if self.options.embedding == "torchrec":
            from toolbox.longer.sharded import save_shards

            place = self.accelerator.process_index, self.accelerator.num_processes
            save_shards(Path(str(self.brief.partial)), model.tables, *place, {"format": "pt"})  # type: ignore[arg-type]
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            assert self.out is not None
            assert journal is not None
            self._write(model, done, start)
            conclude(journal, self.out, self.writer, done, partial(self._draw, events) if self.options.plot else None)
            shown = _shown(done["test"]["auc"])
            self.call.reporter.note(
                f"wrote {self.options.out}: test AUC {shown}, LogLoss {done['test']['logloss']:.4f}"
            )
        self.accelerator.wait_for_everyone()

    def _write(self, model: Ranker, done: dict[str, Any], start: dict[str, Any]) -> None:
        from toolbox.longer.files import save_model
        from toolbox.weights.provenance import header

        assert self.out is not None
        inputs = {"data": self.manifest.schema, **self.manifest.inputs}
        metadata = header(self.call.command, deciding(self.options, NOT_DECIDING), self.options.seed, inputs)
        tensors = {stored_name(name, self.config): one.detach() for name, one in model.named_parameters()}
        save_model(self.out.partial, self.config, tensors, metadata, Path(self.options.data))
        record_run(
            self.out.partial, self.call, self.began, done, start, inputs=inputs, fingerprint=self.brief.fingerprint
        )

    def _draw(self, events: list[dict[str, Any]]) -> None:
        from toolbox.longer.figures import draw_run

        draw_run(events, self.options.plot, f"{self.config.arch} ({self.call.command})")


def _peak_mib(accelerator: Accelerator) -> float:
    """Peak of the device's memory on CUDA, else of resident memory, in MiB."""
    if accelerator.device.type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return round(next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0) / 1024, 1)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
