"""lit-tune: from rows with images to a tuned model, through the house's loop."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.lit.build import vlm_named
from toolbox.lit.data import Rows
from toolbox.lit.images import ImageStore
from toolbox.lit.method import Weights
from toolbox.lit.options import Options, check
from toolbox.lit.prepare import PROCESSES, Brief, marks, read_all, write_templates
from toolbox.models.load import ModelSource
from toolbox.models.vlm import find_vlm, load_processor
from toolbox.shell.command import Invocation
from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.drive import conclude, drive, record_run, repeat_done
from toolbox.training.fingerprint import check_fingerprint
from toolbox.training.journal import Journal
from toolbox.training.state import latest_state, read_state
from toolbox.training.windows import Plan, Stream

if TYPE_CHECKING:
    from accelerate import Accelerator

TEMPLATES_FILE = "task_templates.jsonl"


def run(options: Options, call: Invocation, given: frozenset[str] = frozenset()) -> None:
    """Train as the options say; raises what the house's exit codes name."""
    check(options, given)
    source = find_vlm(vlm_named(options.model, call.reporter.note), trust_remote_code=options.trust_remote_code)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    leader = process_rank() == 0
    with ExitStack() as stack:
        out = None
        brief, ready = Brief(), None
        if leader:
            if not call.dry_run:
                out = stack.enter_context(
                    OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume)
                )
            load = partial(load_processor, source, trust_remote_code=options.trust_remote_code)
            brief, *ready = read_all(options, call, load, store)
            if call.dry_run:
                _show_plan(options, call, ready[0])
                return
            assert out is not None
            brief = _continued(brief, marks(options, call, brief, source), out)
        elif call.dry_run:
            return
        _Run(options, call, source, store, brief, ready, out).go()


def _continued(brief: Brief, now: dict[str, Any], out: OutputDirectory) -> Brief:
    """The brief with what an earlier part of the run left."""
    if out.finished:
        record = json.loads((out.final / RUN_FILE).read_bytes())
        made = record.get("fingerprint", {"command": record.get("command")})
        check_fingerprint({**made, PROCESSES: None}, {**now, PROCESSES: None})
        return Brief(finished=True)
    state = latest_state(out.partial) if out.resumed else None
    if state is not None:
        check_fingerprint(read_state(state).fingerprint, now)
    return replace(brief, partial=str(out.partial), state=str(state) if state else None, fingerprint=now)


def plan_of(options: Options, rows: Rows) -> Plan:
    """The windows of the run."""
    stream = Stream("train", len(rows.rows), options.batch_size)
    lengths = [len(row.aligned.ids) for row in rows.rows] if options.group_by_length else None
    plan = Plan(stream, [], options.epochs, options.seed, lengths)
    if options.max_steps is not None:
        plan = Plan(stream, [], options.max_steps / plan.per_epoch, options.seed, lengths)
    return plan


def _show_plan(options: Options, call: Invocation, rows: Rows) -> None:
    plan = plan_of(options, rows)
    writer = JsonlWriter(call.streams)
    facts = {"rows": len(rows.rows), "steps": plan.steps, **rows.tally.record()}
    writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
    writer.close()
    call.reporter.note(
        f"{len(rows.rows)} rows, {plan.steps} steps; supervised: {rows.tally.response} response and "
        f"{rows.tally.instruction} instruction tokens"
    )


class _Run:
    """One training run in one process."""

    def __init__(
        self, options: Options, call: Invocation, source: ModelSource, store: ImageStore, brief: Brief,
        ready: list[Rows] | None, out: OutputDirectory | None,
    ) -> None:  # fmt: skip
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call, self.source, self.store, self.out = options, call, source, store, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(options.precision)
        sent = None
        if self.accelerator.is_main_process:
            bare = [[replace(one, data={}) for one in samples] for samples in (brief.train, brief.watched)]
            sent = msgspec.json.encode(replace(brief, train=bare[0], watched=bare[1]))
        self.brief = msgspec.json.decode(broadcast_bytes(self.accelerator, sent), type=Brief)
        self.writer = JsonlWriter(call.streams, trainer=True)
        self.ready = ready

    def go(self) -> None:
        """Train and write."""
        import torch

        from toolbox.lit.tuned import trainable
        from toolbox.models.vlm import load_vlm

        if self.brief.finished:
            if self.accelerator.is_main_process:
                repeat_done(self.call, self.writer, self.options.out)
            return
        torch.manual_seed(self.options.seed)
        trust = self.options.trust_remote_code
        train, watched = self._labelled()
        self.processor = train.aligner.processor
        model = load_vlm(self.source, trust_remote_code=trust)
        self._check_causal(model, train)
        tower = self._use_cache(model, train, watched)
        model = trainable(model, self.options, self.source)
        loop = self._loop(model, train, watched)
        start = self._start(model, train, watched, loop)
        events, journal = drive(loop, start, self.call, self.writer, self.brief.partial, self._told)
        self._finish(loop, model, tower, train, events, journal, start)

    # -- building -----------------------------------------------------------------------------------------------------
    def _labelled(self) -> list[Rows]:
        """Training and held-out rows: rank 0 has made them, the others make them again."""
        from toolbox.models.spans import Aligner

        if self.ready is not None:
            return self.ready
        processor = load_processor(self.source, trust_remote_code=self.options.trust_remote_code)
        aligner = Aligner(processor, self.options.control_tokens)  # type: ignore[arg-type]
        how, made = self.brief.labelling(self.options), []
        for samples in (self.brief.train, self.brief.watched):
            made.append(Rows(aligner, self.store, how))
            made[-1].add(samples, _never)
        return made

    def _check_causal(self, model: Any, train: Rows) -> None:
        """Only a loss on instructions needs it."""
        from toolbox.models.vlm import check_causal

        if self.options.label_mode == "vit":
            return
        for place, row in enumerate(train.rows[:100]):
            asked = [at for at, on in zip(row.places, row.response, strict=True) if not on]
            if asked:
                check_causal(model, train.aligned(place), asked[-1], self._pad)
                return

    @property
    def _pad(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return 0 if pad is None else pad

    def _use_cache(self, model: Any, train: Rows, watched: Rows) -> Any:
        if self.options.cache_vision is None:
            return None
        from toolbox.lit.vision_cache import cached_features, use_cached

        samples = [row.sample for row in (*train.rows, *watched.rows)]
        path, tell = self.options.cache_vision, self.call.reporter.note
        with self.accelerator.main_process_first():
            features = cached_features(model, self.processor, samples, self.store, path, tell)
        train.features = watched.features = features
        return use_cached(model)

    def _loop(self, model: Any, train: Rows, watched: Rows) -> Any:
        from toolbox.lit.objective import LabelledTokens, VisionLoss
        from toolbox.lit.tuned import judged
        from toolbox.training.loop import Loop, LoopSettings
        from toolbox.training.prepare import make_optimizer

        options = self.options
        head = VisionLoss(model, options.loss_chunk)
        weights = Weights(options.response_weight, options.instruct_weight)
        objective = LabelledTokens(train, self._pad, weights, options.normalize)  # type: ignore[arg-type]
        optimizer = make_optimizer(head, options, options.rate)  # type: ignore[arg-type]
        prepared, optimizer = self.accelerator.prepare(head, optimizer)
        evaluate = None
        if watched.rows:
            evaluate = lambda: {"eval": judged(self.accelerator, prepared, watched, self._pad)}  # noqa: E731
        settings = LoopSettings(
            options.rate, options.warmup, options.schedule, options.max_grad_norm, options.micro_batch,
            options.eval_every, options.save_every,
        )  # fmt: skip
        loop = Loop(
            self.accelerator, prepared, objective, [optimizer], plan_of(options, train), settings,
            evaluate=evaluate, fingerprint=self.brief.fingerprint,
            state_dir=Path(self.brief.partial) if self.brief.partial and options.save_every != 0 else None,
        )  # fmt: skip
        if self.brief.state is not None:
            loop.resume(Path(self.brief.state))
        return loop

    def _start(self, model: Any, train: Rows, watched: Rows, loop: Any) -> dict[str, Any]:
        parameters = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in loop.parameters)
        counts = {"train": len(train.rows), **({"eval": len(watched.rows)} if watched.rows else {})}
        self.call.reporter.note(
            f"{trained / 1e6:.2f} of {parameters / 1e6:.2f} M parameters, {len(train.rows)} rows, {loop.plan.steps} "
            f"steps; supervised: {train.tally.response} response and {train.tally.instruction} instruction tokens"
        )
        return {
            "event": "start",
            "command": self.call.command,
            "settings": self.call.settings,
            "rows": counts,
            "supervised": {"response": train.tally.response, "instruction": train.tally.instruction},
            "parameters": parameters,
            "trainable": trained,
            "lr": self.options.rate,
            "steps": loop.plan.steps,
            "processes": self.accelerator.num_processes,
        }

    # -- running ------------------------------------------------------------------------------------------------------
    def _told(self, event: dict[str, Any], _: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if event["event"] == "step":
            event["tokens_per_s"] = round(event["tokens"] / max(event["seconds"], 1e-3))
        elif event["event"] == "eval":
            found = event["sets"]["eval"]["loss_response"]
            self.call.reporter.note(f"step {event['step']}: held-out response loss {found:.4f}")
        return [event]

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(
        self, loop: Any, model: Any, tower: Any, train: Rows, events: list[dict[str, Any]], journal: Journal | None,
        start: dict[str, Any],
    ) -> None:  # fmt: skip
        from toolbox.lit.tuned import save
        from toolbox.lit.vision_cache import put_back

        steps = [event for event in events if event["event"] == "step"]
        done = {
            "event": "done",
            "model": self.options.out,
            "steps": loop.step,
            "stopped": loop.stopped,
            "loss": steps[-1]["loss"],
            "loss_response": steps[-1]["loss_response"],
            "loss_instruction": steps[-1]["loss_instruction"],
            "before": loop.start_metrics,
            "after": loop.metrics,
            "seconds": round(sum(event.get("seconds", 0.0) for event in events), 3),
        }
        if tower is not None:
            put_back(model, tower)
        state_dict = self.accelerator.get_state_dict(loop.model) if loop.sharded else None
        if self.accelerator.is_main_process:
            assert self.out is not None
            assert journal is not None
            save(self.out.partial, model, self.processor, self.options, self.source, self.brief.digests, state_dict)
            write_templates(self.out.partial / TEMPLATES_FILE, self.brief)
            record_run(
                self.out.partial, self.call, self.began, done, start, base=self.options.model,
                inputs=self.brief.digests, fingerprint=self.brief.fingerprint,
                rows={**train.tally.record(), **self.brief.counts},
            )  # fmt: skip
            conclude(journal, self.out, self.writer, done)
            self.call.reporter.note(f"wrote {self.options.out} ({loop.step} steps)")
        self.accelerator.wait_for_everyone()


def _never(sample: Any, problem: Exception) -> None:
    """Rank 0 has checked every row already."""
    raise problem
