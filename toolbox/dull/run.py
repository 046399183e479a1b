"""dull-train: from a manifest with doubtful labels to a classifier and a list of doubts, through the house's loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.classify.classifier import Pixels, find_classifier
from toolbox.classify.shots import shot_groups
from toolbox.dull.brief import Brief, make_brief, share_brief
from toolbox.dull.inputs import Inputs, choose_pixels, decode_inputs, read_inputs, show_plan, tasks_behind
from toolbox.dull.options import NOT_DECIDING, Options, check, shot_bounds
from toolbox.models.load import ModelSource
from toolbox.shell.command import Invocation
from toolbox.shell.files import OutputDirectory
from toolbox.shell.records import parse_map
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.training.drive import conclude, drive, record_run, repeat_done
from toolbox.training.fingerprint import deciding

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from toolbox.dull.assemble import Training
    from toolbox.dull.data import Corpus
    from toolbox.training.journal import Journal


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
        train, held, rejected = read_inputs(options, call, renames, source)
        if call.dry_run:
            show_plan(options, call, train, held, pixels, len(rejected))
            return
        assert out is not None
        inputs = decode_inputs(options, call, train, held, pixels.size, rejected)
        brief = make_brief(options, call, source, inputs, out)
        _Run(options, call, source, pixels, brief, inputs, out).go()


class _Run:
    """One training run in one process."""

    training: Training
    corpus: Corpus

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
        from toolbox.training.processes import start_processes

        self.options, self.call, self.source, self.pixels, self.out = options, call, source, pixels, out
        self.began = time.time()
        self.accelerator: Accelerator = start_processes(options.precision)
        self.brief = share_brief(self.accelerator, brief)
        self.inputs = inputs
        self.held: tuple[Tensor, Any] | None = None
        self.writer = JsonlWriter(call.streams, trainer=True)

    def go(self) -> None:
        """Train, judge, write."""
        import torch

        from toolbox.dull.assemble import assemble
        from toolbox.dull.telling import announce, start_event, told

        if self.brief.finished:
            if self.accelerator.is_main_process:
                repeat_done(self.call, self.writer, self.options.out)
            return
        torch.manual_seed(self.options.seed)
        self._take_images()
        shots = shot_groups(self.corpus.counts.tolist(), shot_bounds(self.options.shots))
        self.groups = shots[0]
        self.training = assemble(
            self.accelerator, self.corpus, self.options, self.source, self.pixels, self.brief,
            note=self.call.reporter.note, evaluate=self._epoch,
        )  # fmt: skip
        loop = self.training.loop
        start = start_event(
            self.call, self.options, self.corpus, shots, parameters=sum(p.numel() for p in loop.parameters),
            steps=loop.plan.steps, processes=self.accelerator.num_processes,
        )  # fmt: skip
        announce(self.call, self.options, start)
        tell = partial(told, self.call)
        events, journal = drive(loop, start, self.call, self.writer, self.brief.partial, tell)
        self._finish(events, journal, start)

    def _take_images(self) -> None:
        """Rank 0's images on every rank: those to learn from, and those to report on."""
        import numpy as np

        from toolbox.dull.data import make_corpus, share_pixels

        images = share_pixels(self.accelerator, None if self.inputs is None else self.inputs.train.pixels)
        self.corpus = make_corpus(self.brief.train, images, self.options.holdout, self.options.seed)
        if self.brief.held is not None:
            mine = None if self.inputs is None or self.inputs.held is None else self.inputs.held.pixels
            self.held = share_pixels(self.accelerator, mine), np.array(self.brief.held.given)

    # -- running ------------------------------------------------------------------------------------------------------
    def _epoch(self) -> dict[str, Any]:
        """Behind an epoch, on every rank: the gate and the next labels, then figures."""
        from toolbox.dull.summary import training_figures

        objective, end, loop = self.training.objective, self.training.end, self.training.loop
        epoch = loop.plan.window(loop.step).epoch
        facts = end(epoch)
        if objective.watches and self.corpus.clean is not None:
            facts |= training_figures(objective, end.found, self.corpus, self.groups, self.options)
        every = self.options.eval_every
        if self.held is not None and ((every and epoch % every == 0) or loop.step == loop.plan.steps):
            facts |= self._judge(*self.held)
        return {"epoch": {"epoch": epoch, **facts}}

    def _judge(self, images: Tensor, truth: Any) -> dict[str, Any]:
        """The averaged network on the reporting set."""
        from toolbox.dull.epoch import predict_shared
        from toolbox.dull.metrics import judged

        logits = predict_shared(self.accelerator, self.training.average, images, self.pixels)
        return judged(logits.argmax(1), truth, self.groups, len(self.corpus.labels))

    # -- finishing ----------------------------------------------------------------------------------------------------
    def _finish(self, events: list[dict[str, Any]], journal: Journal | None, start: dict[str, Any]) -> None:
        from toolbox.dull import metrics
        from toolbox.dull.summary import final_rows
        from toolbox.dull.telling import done_event, shot_words

        options, loop, end = self.options, self.training.loop, self.training.end
        rows, found = final_rows(self.accelerator, self.training.objective, end, self.corpus, self.groups, options)
        if journal is None:
            self.accelerator.wait_for_everyone()
            return
        assert self.out is not None
        text = metrics.warning(found) if found else None
        if text is not None:
            journal.write({"event": "warning", "step": loop.step, "text": text})
            self.call.reporter.warn(text)
        done = done_event(options, events, found, steps=loop.step, stopped=loop.stopped, tripped=end.gate.tripped,
                          samples=len(rows))  # fmt: skip
        self._write(self.out.partial, rows, done, start)
        conclude(journal, self.out, self.writer, done, (lambda: self._draw(events)) if options.plot else None)
        shown = f": accuracy {done['acc']:.3f}, {shot_words(done)}" if "acc" in done else ""
        self.call.reporter.note(f"wrote {options.out}{shown}")
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, rows: list[dict[str, Any]], done: dict[str, Any], start: dict[str, Any]) -> None:
        from toolbox.dull.files import save_model, save_samples, save_state
        from toolbox.weights.provenance import header

        options, objective, fingerprint = self.options, self.training.objective, self.brief.fingerprint
        inputs = {"data": fingerprint["data"]}
        settings = {**deciding(options, NOT_DECIDING), "model": options.model}
        metadata = header(self.call.command, settings, options.seed, inputs)
        save_model(folder, self.training.average, self.corpus, self.pixels, metadata, options.method,
                   tasks_behind(self.source, self.corpus.labels))  # fmt: skip
        if objective.watches:
            save_state(folder, objective, metadata)
        save_samples(folder, rows)
        record_run(folder, self.call, self.began, done, start, inputs=inputs, pixels=asdict(self.pixels),
                   fingerprint=fingerprint)  # fmt: skip

    def _draw(self, events: list[dict[str, Any]]) -> None:
        from toolbox.dull.figures import draw_run

        draw_run(events, self.options.plot, f"{self.options.method} ({self.call.command})")
