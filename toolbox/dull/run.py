"""dull-train: from a manifest with doubtful labels to a classifier and a list of doubts, through the house's loop."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.classify.classifier import Pixels, find_classifier
from toolbox.classify.shots import shot_groups
from toolbox.dull.inputs import Inputs, choose_pixels, decode_inputs, read_inputs, show_plan
from toolbox.dull.options import Options, check, shot_bounds
from toolbox.models.load import ModelSource
from toolbox.shell.command import Invocation
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_file
from toolbox.shell.records import parse_map
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.state import check_fingerprint, latest_state, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from toolbox.dull.data import Corpus, Facts
    from toolbox.dull.gates import Gated

_PROCESSES = "number of processes"
GATE_RATE = 10.0
"""lr_gate is so many times the learning rate, unless it is given."""
LAST = 10


@dataclass
class Brief:
    """What rank 0 tells the others once everything has been checked."""

    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    train: Any = None
    held: Any = None


def run(options: Options, call: Invocation) -> None:
    """Train as the options say; raises what the house's exit codes name."""
    check(options)
    renames = parse_map(options.map_fields)
    source = find_classifier(options.model, trust_remote_code=options.trust_remote_code)
    pixels = choose_pixels(options, source)
    leader = process_rank() == 0
    with ExitStack() as stack:
        if not leader:
            _Run(options, call, source, pixels, Brief(), None, None).go()
            return
        out = None
        if not call.dry_run:
            out = stack.enter_context(OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume))
        train, held, rejected = read_inputs(options, call, renames)
        if call.dry_run:
            show_plan(options, call, train, held, pixels, len(rejected))
            return
        assert out is not None
        inputs = decode_inputs(options, call, train, held, pixels.size, rejected)
        brief = _brief(options, call, source, inputs, out)
        _Run(options, call, source, pixels, brief, inputs, out).go()


def _brief(
    options: Options, call: Invocation, source: ModelSource | None, inputs: Inputs, out: OutputDirectory
) -> Brief:
    from toolbox.dull.data import gather_facts, make_corpus

    facts = gather_facts(inputs.train, options.clean_field)
    corpus = make_corpus(facts, inputs.train.pixels, options.holdout, options.seed)
    marks = {f"--{name}": value for name, value in options.deciding().items()}
    marks |= {"data": corpus.digest(), "--model": _weights(options, source), "command": call.command}
    marks[_PROCESSES] = int(os.environ.get("WORLD_SIZE", "1"))
    if out.finished:
        made = json.loads((out.final / RUN_FILE).read_bytes()).get("fingerprint", {})
        check_fingerprint({**made, _PROCESSES: None}, {**marks, _PROCESSES: None})
        return Brief(finished=True, train=facts)
    state = latest_state(out.partial) if out.resumed else None
    if state is not None:
        check_fingerprint(read_state(state).fingerprint, marks)
    held = None if inputs.held is None else gather_facts(inputs.held, options.clean_field)
    return Brief(str(out.partial), str(state) if state else None, marks, train=facts, held=held)


def _weights(options: Options, source: ModelSource | None) -> str:
    """What the run starts from: the name of a backbone of ours, or the digest of weights."""
    if source is None:
        return options.model
    from toolbox.models.facts import weights_digest

    return weights_digest(source) or options.model


def make_optimizers(model: Gated, options: Options, lr_gate: float) -> tuple[list[Any], list[Any]]:
    """The trained parameters but the gates; and their optimiser, followed by that of the gates where these are trained.

    Gates go by plain SGD: neither momentum nor decay may move them.
    """
    import torch

    weights = [p for name, p in model.named_parameters() if p.requires_grad and name != "gates"]
    decay = options.weight_decay
    if options.optimizer == "sgd":
        optimizers: list[Any] = [torch.optim.SGD(weights, lr=options.lr, momentum=options.momentum, weight_decay=decay)]
    else:
        optimizers = [torch.optim.AdamW(weights, lr=options.lr, weight_decay=decay)]
    if model.gates.requires_grad:
        optimizers.append(torch.optim.SGD([{"params": [model.gates], "scale": lr_gate / options.lr}], lr=lr_gate))
    return weights, optimizers


class _Run:
    """One training run in one process."""

    def __init__(
        self,
        options: Options,
        call: Invocation,
        source: ModelSource | None,
        pixels: Pixels,
        brief: Brief,
        inputs: Inputs | None,
        out: OutputDirectory | None,
    ) -> None:
        from toolbox.dull.data import Facts
        from toolbox.training.processes import broadcast_bytes, start_processes

        self.options, self.call, self.source, self.pixels, self.out = options, call, source, pixels, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(options.precision)
        leader = self.accelerator.is_main_process
        content = {**vars(brief)} if leader else None
        sent = broadcast_bytes(self.accelerator, msgspec.json.encode(content) if leader else None)
        self.brief = Brief(**msgspec.json.decode(sent))
        self.brief.train = msgspec.convert(self.brief.train, Facts)
        if self.brief.held is not None:
            self.brief.held = msgspec.convert(self.brief.held, Facts)
        self.inputs = inputs
        self.writer = JsonlWriter(call.streams, trainer=True)

    def go(self) -> None:
        """Train, judge, write."""
        import torch

        from toolbox.dull.data import make_corpus, share_pixels

        if self.brief.finished:
            self._repeat_done()
            return
        torch.manual_seed(self.options.seed)
        leader = self.inputs is not None
        facts: Facts = self.brief.train
        images = share_pixels(self.accelerator, self.inputs.train.pixels if leader else None)
        self.corpus: Corpus = make_corpus(facts, images, self.options.holdout, self.options.seed)
        self.held: tuple[Tensor, Any] | None = None
        if self.brief.held is not None:
            import numpy as np

            others = share_pixels(self.accelerator, self.inputs.held.pixels if leader else None)
            self.held = others, np.array(self.brief.held.given)
        counts = self.corpus.counts.tolist()
        self.groups, self.how = shot_groups(counts, shot_bounds(self.options.shots))
        loop = self._build()
        start = self._start(loop)
        self._say(start)
        events, journal = self._drive(loop, start)
        self._finish(loop, events, journal, start)

    # -- building -----------------------------------------------------------------------------------------------------
    def _build(self) -> Any:
        from copy import deepcopy

        import torch

        from toolbox.classify.classifier import load_classifier
        from toolbox.classify.sync import share_batch_norm
        from toolbox.dull.epoch import EpochEnd
        from toolbox.dull.gates import Gated, auto_lambda
        from toolbox.dull.objective import DullObjective
        from toolbox.training.loop import Loop, LoopSettings
        from toolbox.training.prepare import without_dropout
        from toolbox.training.windows import Plan, Stream

        options = self.options
        backbone, anew = load_classifier(
            options.model, self.source, self.corpus.labels, image_size=self.pixels.size, seed=options.seed,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
        if anew:
            self.call.reporter.note(f"the head of {options.model} has other classes: drawn anew")
        without_dropout(backbone)
        backbone.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, and what tensor cores want
        average = deepcopy(backbone)
        if self.accelerator.num_processes > 1:
            backbone = share_batch_norm(backbone, self.accelerator.device)
        model = Gated(backbone, len(self.corpus.labels), trained=options.method == "dull" and options.ifd)
        plan = Plan(
            Stream("train", len(self.corpus.train), options.batch_size), (), float(options.epochs), options.seed
        )
        lr_gate = GATE_RATE * options.lr if options.lr_gate == "auto" else float(options.lr_gate)
        press = auto_lambda(lr_gate, plan.steps) if options.lambda_gate == "auto" else float(options.lambda_gate)
        weights, optimizers = make_optimizers(model, options, lr_gate)
        prepared, *optimizers = self.accelerator.prepare(model, *optimizers)
        self.objective = DullObjective(
            self.corpus, model, average, options, self.pixels, steps=plan.steps, lambda_gate=press
        )
        self.average = average
        self.end = EpochEnd(self.accelerator, self.objective, options, optimizers)
        settings = LoopSettings(
            options.lr, options.warmup, options.schedule, options.max_grad_norm, options.micro_batch, "epoch",
            options.save_every, auto_length=options.batch_size, evaluate_start=False,
        )  # fmt: skip
        loop = Loop(
            self.accelerator, prepared, self.objective, optimizers, plan, settings, clipped=weights,
            evaluate=self._epoch,
            state_dir=Path(self.brief.partial) if self.brief.partial and options.save_every != 0 else None,
            fingerprint=self.brief.fingerprint,
        )  # fmt: skip
        average.to(self.accelerator.device)
        self.loop = loop
        if self.brief.state is not None:
            loop.resume(Path(self.brief.state))
            self.end.load(self.objective.loaded)
        return loop

    def _epoch(self) -> dict[str, Any]:
        """Behind an epoch, on every rank: the gate and the next labels, then figures."""
        from toolbox.dull.summary import training_figures

        epoch = self.loop.plan.window(self.loop.step).epoch
        facts = self.end(epoch)
        if self.objective.watches and self.corpus.clean is not None:
            facts |= training_figures(self.objective, self.end.found, self.corpus, self.groups, self.options)
        every = self.options.eval_every
        if self.held is not None and ((every and epoch % every == 0) or self.loop.step == self.loop.plan.steps):
            facts |= self._judge()
        return {"epoch": {"epoch": epoch, **facts}}

    def _judge(self) -> dict[str, Any]:
        """The averaged network on the reporting set."""
        from toolbox.dull.epoch import predict_shared
        from toolbox.dull.metrics import judged

        assert self.held is not None
        logits = predict_shared(self.accelerator, self.average, self.held[0], self.pixels)
        return judged(logits.argmax(1), self.held[1], self.groups, len(self.corpus.labels))

    def _start(self, loop: Any) -> dict[str, Any]:
        counts = self.corpus.counts.tolist()
        return {
            "event": "start",
            "command": self.call.command,
            "settings": self.call.settings,
            "rows": len(self.corpus.train),
            "holdout": len(self.corpus.holdout),
            "classes": list(self.corpus.labels),
            "counts": counts,
            "imbalance": max(counts) / max(1, min(counts)),
            "shots": {name: [self.corpus.labels[n] for n in members] for name, members in self.groups.items()},
            "shots_by": self.how,
            "parameters": sum(p.numel() for p in loop.parameters),
            "steps": loop.plan.steps,
            "warmup_epochs": self.options.warm,
            "processes": self.accelerator.num_processes,
        }

    def _say(self, start: dict[str, Any]) -> None:
        say, counts = self.call.reporter, start["counts"]
        say.note(
            f"{self.options.method}: {start['rows']} images ({start['holdout']} held out) in {len(counts)} classes of "
            f"{max(counts)} to {min(counts)}, {start['parameters']:,} parameters, {start['steps']} steps"
        )
        small = [label for label, count in zip(start["classes"], counts, strict=True) if count < 2]
        if small:
            say.warn(f"fewer than two training images of {', '.join(small[:5])}: treated as clean")
        if self.options.method == "dull" and self.options.gate == "open":
            say.warn("--gate open: labels are acted upon whether or not the data bear it out")
        if self.options.method == "dull" and self.options.gate == "auto" and not len(self.corpus.holdout):
            say.warn("without a hold-out there is no evidence: the gate stays shut")

    # -- running ------------------------------------------------------------------------------------------------------
    def _drive(self, loop: Any, start: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        from toolbox.training.journal import EVENTS_FILE, Journal

        journal = None
        events: list[dict[str, Any]] = []
        if self.accelerator.is_main_process:
            journal = Journal(self.writer, Path(str(self.brief.partial)) / EVENTS_FILE, loop.step)
            events = journal.events
            if loop.step:
                self.call.reporter.note(f"goes on behind step {loop.step}")
        with self.call.reporter.progress("step", loop.plan.steps) as bar:
            bar.advance(loop.step)
            for event in chain([] if events else [start], loop.run()):
                for one in self._epoch_events(event, events) if event["event"] == "eval" else [event]:
                    if journal is not None:
                        journal.write(one)
                    else:
                        events.append(one)
                if event["event"] == "step":
                    bar.advance(1, f"loss {event['loss']:.4f}")
        return events, journal

    def _epoch_events(self, event: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The loop's evaluation as an ``epoch`` event, with the means of the epoch's steps; and what it calls for."""
        facts = event["sets"]["epoch"]
        steps = [one for one in events if one["event"] == "step" and one["epoch"] == facts["epoch"]]
        images = sum(one["images"] for one in steps) or 1
        last = steps[-1] if steps else {}
        names = [name for name in ("loss", "loss_ce", "loss_ifd", "loss_keep", "loss_unlearn") if name in last]
        means = {name: sum(one[name] * one["images"] for one in steps) / images for name in names}
        epoch = {"event": "epoch", "step": event["step"], "epoch": facts["epoch"], "lr": last.get("lr"), **means,
                 **facts, "seconds": event["seconds"]}  # fmt: skip
        shown = [f"loss {means['loss']:.4f}"] if means else []
        if "acc" in facts:
            shown.append(f"accuracy {facts['acc']:.3f}, " + _shots(facts))
        if facts.get("gate_open"):
            shown.append(f"open for {', '.join(facts['gate_open'][:5])}")
        self.call.reporter.note(f"epoch {facts['epoch']}: {', '.join(shown)}")
        tripped = [{"event": "gate_tripped", "step": event["step"], "epoch": facts["epoch"]}]
        return [epoch, *(tripped if facts.get("gate") == "tripped" else [])]

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(self, loop: Any, events: list[dict[str, Any]], journal: Any, start: dict[str, Any]) -> None:
        from toolbox.dull import metrics
        from toolbox.dull.summary import final_rows

        rows, found = final_rows(self.accelerator, self.objective, self.end, self.corpus, self.groups, self.options)
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return
        assert self.out is not None
        epochs = [event for event in events if event["event"] == "epoch"]
        scored = [event["acc"] for event in epochs if "acc" in event]
        last = epochs[-1] if epochs else {}
        text = metrics.warning(found) if found else None
        if text is not None:
            journal.write({"event": "warning", "step": loop.step, "text": text})
            self.call.reporter.warn(text)
        judged = {name: last[name] for name in ("acc", "acc_ci", "n", "many", "medium", "few", "macro_f1", "recall",
                                                "predicted") if name in last}  # fmt: skip
        done = {
            "event": "done",
            "model": self.options.out,
            "method": self.options.method,
            "steps": loop.step,
            "stopped": loop.stopped,
            **judged,
            **({"acc_last10": sum(scored[-LAST:]) / len(scored[-LAST:])} if scored else {}),
            "gate_open": last.get("gate_open", []),
            "gate_tripped": self.end.gate.tripped,
            "samples": len(rows),
            **({"detection": found} if found else {}),
            "seed": self.options.seed,
            "seconds": round(sum(event.get("seconds", 0.0) for event in events), 3),
        }
        self._write(rows, done, start)
        journal.write(done)
        journal.close()
        if self.options.plot:
            from toolbox.dull.figures import draw_run

            draw_run(events, self.options.plot, f"{self.options.method} ({self.call.command})")
        self.out.commit()
        self.writer.close()
        shown = f": accuracy {done['acc']:.3f}, {_shots(done)}" if "acc" in done else ""
        self.call.reporter.note(f"wrote {self.options.out}{shown}")
        self.accelerator.wait_for_everyone()

    def _write(self, rows: list[dict[str, Any]], done: dict[str, Any], start: dict[str, Any]) -> None:
        from toolbox.dull.files import save_model, save_state
        from toolbox.weights.provenance import header

        assert self.out is not None
        options, partial = self.options, self.out.partial
        inputs = {"data": self.brief.fingerprint["data"]}
        metadata = header(self.call.command, {**options.deciding(), "model": options.model}, options.seed, inputs)
        save_model(partial, self.average, self.corpus, self.pixels, metadata, options.method)
        if self.objective.watches:
            save_state(partial, self.objective, metadata)
        with atomic_file(partial / "samples.jsonl") as handle:
            handle.writelines(msgspec.json.encode(row) + b"\n" for row in rows)
        record = {
            "command": self.call.command,
            "settings": self.call.settings,
            "inputs": inputs,
            "pixels": asdict(self.pixels),
            "fingerprint": self.brief.fingerprint,
            "start": {key: value for key, value in start.items() if key not in ("event", "settings", "command")},
            "done": done,
            "versions": {name: version(name) for name in ("toolbox-ten", "torch", "transformers", "accelerate")},
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.began)),
            "wall_seconds": round(time.time() - self.began, 1),
        }
        with atomic_file(partial / RUN_FILE) as handle:
            handle.write(json.dumps(record, indent=2).encode() + b"\n")

    def _repeat_done(self) -> None:
        """``--resume`` of a run that is finished: say so and write its last event again."""
        if self.accelerator.is_main_process:
            record = json.loads((Path(self.options.out) / RUN_FILE).read_text())
            self.call.reporter.note(f"{self.options.out} is finished; nothing to do")
            self.writer.write(record.get("done", {"event": "done", "model": self.options.out}))
            self.writer.close()


def _shots(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {facts[name]:.3f}" for name in ("many", "medium", "few") if facts.get(name) is not None)
