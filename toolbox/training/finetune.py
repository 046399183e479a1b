"""The heavy half of a language-model training run: processes, model, loop, evaluation, the finished directory."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.models.facts import context_window, is_quantised, run_record
from toolbox.models.load import ModelSource, base_model, find_model, load_config
from toolbox.plots import plot_format
from toolbox.shell.command import Invocation
from toolbox.shell.errors import AlreadyReported, BadData, UsageProblem
from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.shell.records import Row
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.drive import conclude, drive, record_run, repeat_done
from toolbox.training.fingerprint import check_fingerprint
from toolbox.training.journal import Journal
from toolbox.training.language import (
    PROCESSES,
    WEIGHTS,
    Adapting,
    Brief,
    Material,
    Task,
    check_adapter_options,
    fingerprint,
    needs_folder,
    read_sets,
    state_to_resume,
    stop_condition,
    watch_files,
)
from toolbox.training.prepare import choose_parameters, encode_rows, make_optimizer, without_dropout

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.models.chat import Chat, Encoded
    from toolbox.models.token_loss import TokenLoss


@dataclass(frozen=True)
class Outcome:
    """A finished run, as the task's own ending needs it. ``events`` are all events, those of resumed parts included."""

    directory: Path
    events: list[dict[str, Any]]
    done: dict[str, Any]
    source: ModelSource


def train(
    task: Task,
    call: Invocation,
    finish: Callable[[Outcome], None] | None = None,
    before_commit: Callable[[Outcome], None] | None = None,
) -> None:
    """Run ``task`` from its options to a finished output directory.

    ``finish(outcome)`` is called on rank 0 when the result stands under its final name, ``before_commit(outcome)`` when
    it is whole but the output it may replace is still there. Raises what the house's exit codes name; nothing
    half-done stays under ``--out``.
    """
    options = task.options
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    check_adapter_options(options, source.kind)
    if is_quantised(source, trust_remote_code=options.trust_remote_code):
        raise UsageProblem("the model is quantised; its weights cannot be trained", "use the unquantised model")
    for path in options.plot:
        plot_format(path)
        needs_folder(path, "--plot")
    watches = watch_files(options)
    stop_condition(options, [*task.watched_names(), *watches])
    leader = process_rank() == 0
    with ExitStack() as stack:
        out = None
        brief = Brief()
        if leader:
            if not call.dry_run:
                out = stack.enter_context(
                    OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume)
                )
            brief = _brief(task, call, source, out, watches)
        if call.dry_run:
            if leader:
                from toolbox.training.dry_run import show_plan

                show_plan(task, call, source, brief)
            return
        run = _Run(task, call, source, brief, out)
        if run.brief.finished:
            if run.accelerator.is_main_process:
                repeat_done(call, run.writer, options.out)
            return
        outcome = run.go(before_commit)
        if outcome is not None and finish is not None:
            finish(outcome)


def _brief(
    task: Task, call: Invocation, source: ModelSource, out: OutputDirectory | None, watches: Mapping[str, str]
) -> Brief:
    """Read and check everything (rank 0)."""
    sets = task.arrange(read_sets(call, task.options, {**task.inputs(), **watches}), call)
    marks = fingerprint(call, task.options, sets.digests, int(os.environ.get("WORLD_SIZE", "1")), source)
    if out is not None and out.finished:
        record = json.loads((out.final / RUN_FILE).read_bytes())
        made = record.get("fingerprint", {"command": record.get("command")})
        check_fingerprint({**made, PROCESSES: None}, {**marks, PROCESSES: None})  # they do not show in a result
        return Brief(finished=True)
    state = state_to_resume(out.partial, marks) if out is not None and out.resumed else None
    return Brief(
        sets.train,
        sets.watched,
        sets.digests,
        str(out.partial) if out is not None else None,
        str(state) if state else None,
        marks,
    )


class _Run:
    """One training run in one process."""

    def __init__(
        self, task: Task, call: Invocation, source: ModelSource, brief: Brief, out: OutputDirectory | None
    ) -> None:
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.task, self.call, self.options, self.source, self.out = task, call, task.options, source, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(
            self.options.precision, self.options.tracker, brief.partial or self.options.out
        )
        leader = self.accelerator.is_main_process
        self.brief = Brief.decode(broadcast_bytes(self.accelerator, brief.encode() if leader else None))
        self.writer = JsonlWriter(call.streams, trainer=True)
        self.reporter = call.reporter

    # -- one run ------------------------------------------------------------------------------------------------------
    def go(self, before_commit: Callable[[Outcome], None] | None) -> Outcome | None:
        """Train; returns the outcome on rank 0, None elsewhere."""
        import torch

        torch.manual_seed(self.options.seed)
        tokenizer, chat = self._tokenizer()
        encoded, kept = self._encode_training(chat)
        watched = {name: self._encode(chat, rows, name)[0] for name, rows in self.brief.watched.items()}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        with self._said_once():
            objective = self.task.objective(Material(encoded, kept, tokenizer, pad))
        model, head = self._model()
        parameters = sum(p.numel() for p in model.parameters())
        lr = self.task.auto_lr(parameters) if self.options.lr == "auto" else float(self.options.lr)
        plan = self.task.plan({name: len(rows) for name, rows in encoded.items()})
        loop = self._loop(head, objective, plan, lr, watched, pad)
        parts = {"parts": self.task.trainable(model.config)} if isinstance(self.task, Adapting) else {}
        start = {
            "event": "start",
            "command": self.call.command,
            "settings": self.call.settings,
            "rows": {name: len(rows) for name, rows in encoded.items()},
            "parameters": parameters,
            "trainable": sum(p.numel() for p in loop.parameters),
            **parts,
            "lr": lr,
            "steps": plan.steps,
            "processes": self.accelerator.num_processes,
            "template": chat.name,
        }
        self._say_start(start, source_of_rows=encoded)
        events, journal = self._run_loop(loop, start)
        return self._finish(loop, model, tokenizer, chat, events, journal, start, before_commit)

    def _tokenizer(self) -> tuple[Any, Chat]:
        from toolbox.models.chat import Chat
        from toolbox.models.load import load_tokenizer, prepare

        with self.accelerator.main_process_first():
            prepare(self.source, self.reporter.note)
        trust = self.options.trust_remote_code
        base = base_model(self.source, trust_remote_code=trust)
        self._window = context_window(load_config(base, trust_remote_code=trust))
        tokenizer = load_tokenizer(self.source, trust_remote_code=trust)
        return tokenizer, Chat(tokenizer, self.options.template, self.options.system)

    def _encode_training(self, chat: Chat) -> tuple[dict[str, list[Encoded]], dict[str, list[Row]]]:
        """The training sets as tokens and the rows that were kept of each.

        Sets that the task calls parallel hold different last answers to the same rows: only these answers are labelled,
        and a row that is left out of one is left out of all.
        """
        parallel = [name for name in self.task.parallel() if name in self.brief.train]
        encoded: dict[str, list[Encoded]] = {}
        places: dict[str, list[int]] = {}
        for name, rows in self.brief.train.items():
            encoded[name], places[name] = self._encode(chat, rows, name, "last" if name in parallel else None)
        common = set.intersection(*(set(places[name]) for name in parallel)) if parallel else set()
        for name in parallel:
            pairs = [(one, at) for one, at in zip(encoded[name], places[name], strict=True) if at in common]
            encoded[name], places[name] = [one for one, _ in pairs], [at for _, at in pairs]
        return encoded, {name: [self.brief.train[name][at] for at in places[name]] for name in encoded}

    def _encode(
        self, chat: Chat, rows: Sequence[Row], name: str, loss_on: str | None = None
    ) -> tuple[list[Encoded], list[int]]:
        with self._said_once():
            encoded, places = encode_rows(chat, rows, name, self.options, self.reporter.warn, loss_on)
            longest = max(len(one.ids) for one in encoded)
            if self._window is not None and longest > self._window:
                raise BadData(
                    f"the {name} set has a row of {longest} tokens, too many for the model's window of {self._window}",
                    f"--max-length {self._window} cuts such rows",
                )
        return encoded, places

    @contextmanager
    def _said_once(self) -> Iterator[None]:
        """Every rank finds the same fault in the data; one says so."""
        try:
            yield
        except BadData as problem:
            if self.accelerator.is_main_process:
                raise
            raise AlreadyReported(problem.exit_code) from None

    def _model(self) -> tuple[Any, TokenLoss]:
        from toolbox.models.load import load_model
        from toolbox.models.token_loss import TokenLoss

        model = load_model(self.source, dtype="fp32", trust_remote_code=self.options.trust_remote_code)
        if self.source.kind == "adapter":
            model = model.merge_and_unload()
        without_dropout(model)
        if isinstance(self.task, Adapting):
            return model, self._adapted(model, self.task)
        reference = None
        if self.task.needs_reference() and not self.options.lora_r:
            reference = copy.deepcopy(model).requires_grad_(False)
        if self.options.grad_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.options.lora_r:
            from toolbox.models.adapters import add_lora

            model = add_lora(
                model, r=self.options.lora_r, alpha=self.options.lora_alpha,
                targets=list(self.options.lora_targets) or None, seed=self.options.seed,
            )  # fmt: skip
            if self.options.grad_checkpointing:
                model.enable_input_require_grads()
        else:
            model.requires_grad_(True)
            choose_parameters(model, self.options.train_params)
        return model, TokenLoss(model, self.options.loss_chunk, reference)

    def _adapted(self, model: Any, task: Adapting) -> TokenLoss:
        """The frozen model with the task's module beside it, both in one ``TokenLoss``."""
        from accelerate.utils import DistributedType

        from toolbox.models.token_loss import TokenLoss

        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise UsageProblem(
                "the model is frozen and what is trained is small: sharding it is not supported",
                "use recipes/accelerate/ddp.yaml",
            )
        model.requires_grad_(False)
        if self.options.grad_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        head = TokenLoss(model, self.options.loss_chunk)
        head.beside = task.adapt(head)
        return head

    def _loop(
        self, head: TokenLoss, objective: Any, plan: Any, lr: float, watched: Mapping[str, list[Encoded]], pad: int
    ) -> Any:
        from toolbox.training.loop import Loop, LoopSettings

        optimizer = make_optimizer(head, self.options, lr)
        prepared, optimizer = self.accelerator.prepare(head, optimizer)
        evaluate = partial(self._evaluate, prepared, watched, pad) if watched else None
        settings = LoopSettings(
            lr, self.options.warmup, self.options.schedule, self.options.max_grad_norm, self.options.micro_batch,
            self.options.eval_every, self.options.save_every,
        )  # fmt: skip
        stop = stop_condition(self.options, list(watched))
        state_dir = Path(self.brief.partial) if self.brief.partial and self.options.save_every != 0 else None
        loop = Loop(
            self.accelerator, prepared, objective, [optimizer], plan, settings, evaluate=evaluate, stop_when=stop,
            state_dir=state_dir, fingerprint=self.brief.fingerprint,
        )  # fmt: skip
        if self.brief.state is not None:
            loop.resume(Path(self.brief.state))
        return loop

    def _evaluate(self, model: Any, watched: Mapping[str, Sequence[Encoded]], pad: int) -> dict[str, dict[str, float]]:
        from toolbox.training.evaluate import evaluate_sets

        return evaluate_sets(self.accelerator, model, watched, pad, self.options.seed)

    # -- saying -------------------------------------------------------------------------------------------------------
    def _say_start(self, start: dict[str, Any], source_of_rows: Mapping[str, Sequence[Encoded]]) -> None:
        rows = ", ".join(f"{len(rows)} {name}" for name, rows in source_of_rows.items())
        few = start["trainable"] < 100_000
        trained = f"{start['trainable']:,}" if few else f"{start['trainable'] / 1e6:.1f} M"
        self.reporter.note(
            f"{trained} of {start['parameters'] / 1e6:.1f} M parameters, {rows} rows, "
            f"{start['steps']} steps at lr {start['lr']:g}, template {start['template']}"
        )

    def _run_loop(self, loop: Any, start: dict[str, Any]) -> tuple[list[dict[str, Any]], Journal | None]:
        """Drive the loop; events go to stdout, to the events file and to trackers."""
        if self.options.tracker:
            self.accelerator.init_trackers(self.call.command, {k: str(v) for k, v in self.call.settings.items()})
        driven = drive(loop, start, self.call, self.writer, self.brief.partial, self._follow)
        if self.options.tracker:
            self.accelerator.end_training()
        return driven

    def _follow(self, event: dict[str, Any], _: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from toolbox.training.loop import flat

        numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k != "step"}
        if event["event"] == "eval":
            numbers |= flat(event["sets"])
            text = ", ".join(f"{name} ES {m['es']:.3f} P {m['prob']:.3f}" for name, m in event["sets"].items())
            self.reporter.note(f"step {event['step']}: {text}")
        if self.options.tracker and event["event"] in ("step", "eval"):
            self.accelerator.log(numbers, step=event["step"])
        return [event]

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(
        self,
        loop: Any,
        model: Any,
        tokenizer: Any,
        chat: Chat,
        events: list[dict[str, Any]],
        journal: Journal | None,
        start: dict[str, Any],
        before_commit: Callable[[Outcome], None] | None,
    ) -> Outcome | None:
        from toolbox.training.save import save_model, weights_header

        done = {
            "event": "done",
            "model": self.options.out,
            "steps": loop.step,
            "stopped": loop.stopped,
            "before": loop.start_metrics,
            "after": loop.metrics,
            "seconds": round(sum(e.get("seconds", 0.0) for e in events), 3),
            **loop.objective.summary([event for event in events if event["event"] == "step"]),
        }
        state_dict = self.accelerator.get_state_dict(loop.model) if loop.sharded else None
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return None
        assert self.out is not None
        assert journal is not None
        inputs = dict(self.brief.digests)
        if isinstance(self.task, Adapting):
            metadata = weights_header(self.call.command, self.call.settings, self.options.seed, inputs, self.source)
            module = self.accelerator.unwrap_model(loop.model).beside
            self.task.write(self.out.partial, module, metadata, chat, self.source)
        else:
            save_model(
                self.out.partial, model, tokenizer, chat,
                command=self.call.command, settings=self.call.settings, seed=self.options.seed, inputs=inputs,
                source=self.source, state_dict=state_dict, adapter=self.options.lora_r > 0,
                taught=any(row.messages is not None for rows in self.brief.train.values() for row in rows),
            )  # fmt: skip
        record_run(
            self.out.partial, self.call, self.began, done, start, template=chat.name, system=self.options.system,
            base=self.options.model, inputs=inputs, fingerprint=self.brief.fingerprint,
            chain=[*earlier_runs(self.source), self._link(start)],
        )  # fmt: skip
        outcome = Outcome(self.out.partial, events, done, self.source)
        conclude(journal, self.out, self.writer, done, partial(before_commit, outcome) if before_commit else None)
        self.reporter.note(f"wrote {self.options.out} ({loop.step} steps, stopped by {loop.stopped})")
        self.accelerator.wait_for_everyone()
        return Outcome(self.out.final, events, done, self.source)

    def _link(self, start: Mapping[str, Any]) -> dict[str, Any]:
        """This run as a link of the chain of runs that led to a model: hashes and counts, no names and no texts."""
        return {
            "command": self.call.command,
            "base": self.brief.fingerprint.get(WEIGHTS) or self.source.name,
            "inputs": dict(self.brief.digests),
            "rows": start["rows"],
            "steps": start["steps"],
        }


def earlier_runs(source: ModelSource) -> list[dict[str, Any]]:
    """The chain of runs that made the model ``source``, oldest first; empty for a model that none of ours made."""
    record = run_record(source)
    return record.get("chain", []) if record else []
