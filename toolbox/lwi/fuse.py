"""lwi-fuse: the job. Two or more checkpoints in, one fused checkpoint out, a line a permutation group.

Tensors are read one at a time and made when they are written, so that memory holds one group's working set and not the
models. Nothing appears under the output's name before the function of what was aligned has been proved.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from toolbox.lwi import align
from toolbox.lwi.checkpoint import Checkpoint, Fused, Model, check_alike, open_checkpoint, pair_labels
from toolbox.lwi.choices import NOT_DECIDING, Options, check, shares
from toolbox.lwi.expand import expand
from toolbox.lwi.lines import DoneLine, GroupLine, ModelRow, PlanLine
from toolbox.lwi.output import (
    check_space,
    lazy_tensors,
    output_bytes,
    run_record,
    write_directory,
    write_permutations,
)
from toolbox.lwi.plan import Plan, shapes_text
from toolbox.lwi.spec import Spec, builtin_specs, read_spec, template
from toolbox.lwi.verify import Verdict, check_aligned, check_spec
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_directory, atomic_file
from toolbox.shell.launch import under_launcher
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.weights.provenance import canonical, header
from toolbox.weights.write import write_file, write_stream

SAVE_EVERY = 20.0
"""Seconds of matching between two saved states."""


# -- what is fused --------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    """The models, oldest first, and for each the ``k`` of its line if it has one."""

    names: list[str]
    told_k: list[float | None]
    skipped: int = 0
    rejected: list[bytes] = field(default_factory=list)


def read_inputs(options: Options, call: Invocation) -> Inputs:
    """The models of the command line, or of the list on stdin. Raises: BadData (65) for an empty or bad list."""
    if options.models != ("-",):
        names = [str(Path(options.root or ".") / name) if options.root else name for name in options.models]
        return Inputs(names, [None] * len(names))
    rejected: list[bytes] = []
    reader = RecordReader(
        (ModelRow,),
        renames=parse_map(options.map_fields),
        on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )
    rows = [record.value for record in read_records("-", call.streams, reader, "the list of models")]
    if not rows:
        raise BadData("the list of models is empty", 'one {"model": "path"} a line', file="stdin")
    names = [row.model if row.model == "smollm2" else str(Path(options.root or ".") / row.model) for row in rows]
    return Inputs(names, [row.k for row in rows], reader.skipped, rejected)


def find_spec(model: Checkpoint, options: Options) -> tuple[Spec, Plan]:
    """The spec that is given, or ours for this model, expanded over its tensors.

    Raises: BadData (65) where none fits, with the way to a template.
    """
    shapes = {key: model.shape(key) for key in model.names()}
    if options.spec is not None:
        spec = read_spec(options.spec)
        return spec, expand(spec, shapes, model.config)
    if model.directory is None:
        for spec in builtin_specs():
            if spec.match.get("bare"):
                with contextlib.suppress(BadData):
                    return spec, expand(spec, shapes, {})
    else:
        for spec in builtin_specs():
            if spec.fits(model.config):
                return spec, expand(spec, shapes, model.config)
    what = ", ".join(map(str, model.config.get("architectures") or [])) or "bare weights of another layout"
    keys = ", ".join(map(repr, model.names()[:5]))
    raise BadData(
        f"no spec knows {what}; its tensors are {keys}{', ...' if len(shapes) > 5 else ''}",
        f"lwi-fuse {model.name} --print-spec > mine.yaml starts one for --spec mine.yaml",
        file=model.name,
    )


def print_spec(options: Options, call: Invocation) -> None:
    """The expanded spec of the last model as YAML on stdout; for one that none knows a template to fill in."""
    import yaml

    model = open_checkpoint(read_inputs(options, call).names[-1], call.reporter.note)
    try:
        spec, plan = find_spec(model, options)
    except BadData:
        if options.spec is not None:
            raise
        shapes = {key: model.shape(key) for key in model.names()}
        text = template(shapes, model.config.get("architectures") or [])
    else:
        groups = {
            group.name: {"size": group.size, **({"for_each_of": group.parent} if group.parent else {})}
            for group in plan.groups.values()
        }
        shown = {"spec": spec.name, "groups": groups, "deepest": list(plan.deepest[-8:]),
                 "tensors": shapes_text(plan.tensors, plan.groups)}  # fmt: skip
        text = yaml.safe_dump(shown, sort_keys=False, width=1000, default_flow_style=None)
    with call.streams.open_stdout() as handle:
        handle.write(text.encode())


# -- processes ------------------------------------------------------------------------------------------------------
class Ranks:
    """This process among the others; alone, nothing is started."""

    def __init__(self) -> None:
        self.rank, self.count, self.device, self._accelerator = 0, 1, None, None
        if under_launcher():
            from toolbox.training.processes import start_processes

            self._accelerator = start_processes()
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = str(self._accelerator.device)

    def from_first(self, payload: bytes | None) -> bytes:
        """What the first process has, on all."""
        if self.count == 1:
            assert payload is not None
            return payload
        from toolbox.training.processes import broadcast_bytes

        return broadcast_bytes(self._accelerator, payload)

    def from_all(self, payload: bytes) -> list[bytes]:
        """What every process has, on all, by rank."""
        if self.count == 1:
            return [payload]
        from toolbox.training.processes import gather_bytes

        return gather_bytes(self._accelerator, payload)


def device_of(options: Options, ranks: Ranks) -> str:
    """``--device``; auto is this process's GPU where there is one. Raises: UsageProblem (2)."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageProblem("--device cuda: no GPU is here", "leave it out")
    if options.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return ranks.device or "cuda"


# -- the fusion -----------------------------------------------------------------------------------------------------
@dataclass
class Fusion:
    """One run: the models, and what has been aligned so far."""

    options: Options
    call: Invocation
    ranks: Ranks
    models: list[Checkpoint]
    k: list[float]
    fingerprint: str = ""
    directory: Path | None = None
    steps: list[align.Aligned] = field(default_factory=list)
    verdict: Verdict = Verdict("off", None)
    seconds: dict[str, float] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)
    _number: int = 0

    @property
    def like(self) -> Checkpoint:
        """The model whose files the output resembles."""
        if self.options.align_only:
            return self.models[0]
        return self.models[0] if self.options.anchor == "first" else self.models[-1]

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 3)

    def run(self) -> Model:
        """Align and fuse all models in turn; what is returned makes its tensors when they are read."""
        first = self.options.anchor == "first"
        fused: Model = self.models[0]
        for number, added in enumerate(self.models[1:]):
            old, new = (added, self.models[0]) if first else (fused, added)
            aligned, rows = self._step(number, old, new)
            if first:
                # The mean so far has its share k, the model that was aligned the rest.
                fused = Fused(aligned.model, fused, aligned.job.plan, rows, 1 - self.k[number])
            else:
                fused = Fused(aligned.model, new, aligned.job.plan, rows, self.k[number])
        return fused

    def _step(self, number: int, old: Model, new: Checkpoint) -> tuple[align.Aligned, Any]:
        options, several = self.options, len(self.models) > 2
        spec, plan = find_spec(new, options)
        check_alike(old, new, plan)
        rows = pair_labels(old, new, plan)
        job = align.prepare(plan, old, new, rows, options, device_of(options, self.ranks))
        limit = options.verify_limit
        run_as = new if isinstance(old, Fused) else old
        assert isinstance(run_as, Checkpoint)
        if not options.no_verify and self.ranks.rank == 0:
            with self.timed("verify"):
                self._take(check_spec(spec, new, plan, options.seed, limit))
        with self.timed("match"):
            self._match(number, job)
        soft = {}
        if self.ranks.rank == 0:
            if not options.no_verify:
                with self.timed("verify"):
                    worst = check_aligned(spec, run_as, job.old, plan, job.state.perms, options.seed, limit)
                self._take(Verdict(self.verdict.how, worst))
            if options.soft:
                soft = align.soft_plans(job, options.tau, options.sinkhorn_iters)
            with self.timed("measure"):
                lines = align.group_lines(job, options.solver, number + 1 if several else None, soft)
        else:
            lines = []
        self.steps.append(align.Aligned(job, job.state.perms, lines, soft))
        return self.steps[-1], rows

    def _take(self, verdict: Verdict) -> None:
        """Keep the weaker kind of proof and the larger difference."""
        hows = {self.verdict.how, verdict.how} - {"off"}
        how = "shrunk" if "shrunk" in hows else verdict.how
        self.verdict = Verdict(how, max(self.verdict.worst or 0.0, verdict.worst or 0.0))

    def _match(self, number: int, job: align.Job) -> None:
        """Both phases, from a saved state where there is one; every rank ends with the same permutations."""
        saved = self.ranks.from_first(self._load(number) if self.ranks.rank == 0 else None)
        if saved:
            job.state = align.state_from(json.loads(saved))
        save = lambda: self._save(number, job)  # noqa: E731
        align.match(job, self.options.workers, save, self.ranks.rank, self.ranks.count)
        for part in self.ranks.from_all(align.state_bytes(job.state)) if self.ranks.count > 1 else []:
            own = align.state_from(json.loads(part))
            own.perms = {name: perm for name, perm in own.perms.items() if name in own.found}
            align.absorb(job.state, own)
        align.divert(job)
        self._save(number, job, force=True)

    # -- restarts
    def _save(self, number: int, job: align.Job, force: bool = False) -> None:
        if self.directory is None or self.ranks.rank != 0 or (self.ranks.count > 1 and not force):
            return
        if not force and time.monotonic() - self._saved < SAVE_EVERY:
            return
        older = sorted(self.directory.glob("step-*"))
        self._number += 1
        content = {"fingerprint": self.fingerprint, "number": number, "deep": force}
        done = [json.loads(align.state_bytes(step.job.state)) for step in self.steps]
        with atomic_directory(self.directory / f"step-{self._number:06d}") as folder:
            state = json.loads(align.state_bytes(job.state))
            (folder / "state.json").write_text(json.dumps({**content, "done": done, "state": state}))
        for path in older:
            with contextlib.suppress(OSError):
                for entry in path.iterdir():
                    entry.unlink()
                path.rmdir()
        self._saved = time.monotonic()

    def _load(self, number: int) -> bytes:
        """The saved state of this step, or nothing. Raises: UsageProblem (2) for a run with other inputs."""
        states = sorted(self.directory.glob("step-*/state.json")) if self.directory is not None else []
        if not states:
            return b""
        self._number = max(self._number, int(states[-1].parent.name.removeprefix("step-")))
        content = json.loads(states[-1].read_bytes())
        if content["fingerprint"] != self.fingerprint:
            raise UsageProblem(
                "--resume with other models or options than the interrupted run had",
                "repeat the interrupted command, or start anew with --overwrite",
            )
        if number < len(content["done"]):
            return json.dumps(content["done"][number]).encode()
        return json.dumps(content["state"]).encode() if number == content["number"] else b""


# -- the command ----------------------------------------------------------------------------------------------------
def run(options: Options, call: Invocation) -> None:
    """Fuse the models of ``options``: group lines and the weights, or the plan with --dry-run."""
    if call.dry_run:
        options = msgspec_free_replace(options, out=options.out or "-")
    streaming = options.out == "-"
    check(options, streaming and not call.dry_run)
    if options.print_spec:
        if process_rank() == 0:
            print_spec(options, call)
        return
    ranks = Ranks() if not call.dry_run else Ranks.__new__(Ranks)
    if call.dry_run:
        ranks.rank, ranks.count, ranks.device = 0, 1, None
    inputs = _shared_inputs(options, call, ranks)
    models = [open_checkpoint(name, call.reporter.note) for name in inputs.names]
    k = _check_models(options, call, models, inputs)
    if call.dry_run:
        _dry_run(options, call, models, inputs)
        return
    if ranks.rank == 0:
        for path in options.plot:
            from toolbox.plots import plot_format

            plot_format(path)
        if inputs.skipped:
            call.reporter.warn(f"{inputs.skipped} bad rows left out")
        if options.rejects is not None:
            write_rejects(options.rejects, inputs.rejected)
    fusion = Fusion(options, call, ranks, models, k)
    if streaming or fusion.like.directory is None:
        _to_file(fusion, streaming)
    else:
        _to_directory(fusion)


def msgspec_free_replace(options: Options, **changes: Any) -> Options:
    """``dataclasses.replace``."""
    import dataclasses

    return dataclasses.replace(options, **changes)


def _shared_inputs(options: Options, call: Invocation, ranks: Ranks) -> Inputs:
    payload = None
    if ranks.rank == 0:
        found = read_inputs(options, call)
        payload = json.dumps([found.names, found.told_k, found.skipped]).encode()
        if ranks.count == 1:
            return found
    names, told_k, skipped = json.loads(ranks.from_first(payload))
    return Inputs(names, told_k, skipped, found.rejected if ranks.rank == 0 else [])


def _check_models(options: Options, call: Invocation, models: Sequence[Checkpoint], inputs: Inputs) -> list[float]:
    """The share of what is older, for each model after the first; and everything that can be refused at once."""
    if len(models) < 2:
        raise UsageProblem("one model cannot be fused", "name two or more, the oldest first")
    if options.align_only and len(models) > 2:
        raise UsageProblem(f"--align-only takes two models, not {len(models)}", "align them one by one")
    if len({model.directory is None for model in models}) > 1:
        raise BadData("a bare file beside a model directory", "give all models in one form", file=models[-1].name)
    k, normalised = shares(options, inputs.told_k, models[0].tasks)
    if normalised:
        call.reporter.note(f"--weights {options.weights}: divided by their sum")
    if len(set(inputs.names)) < len(inputs.names) and options.shuffle_seed is None:
        call.reporter.note("the same model twice: the fusion is that model")
    return k


def _metadata(fusion: Fusion) -> dict[str, str]:
    options, call = fusion.options, fusion.call
    deciding = {name: value for name, value in call.settings.items() if name not in NOT_DECIDING}
    inputs = {f"model{place}": model.weights.sha256() for place, model in enumerate(fusion.models)}
    if options.spec is not None:
        from toolbox.shell.files import sha256_file

        inputs["spec"] = sha256_file(options.spec)
    return header("lwi-fuse", {**deciding, "k": fusion.k}, options.seed, inputs)


def _values(fusion: Fusion, fused: Model) -> Callable[[str], Tensor]:
    if fusion.options.align_only:
        return lambda key: fusion.steps[0].of_original(fusion.models[0], key)
    return fused.read


def _lines(fusion: Fusion) -> list[GroupLine]:
    return [line for step in fusion.steps for line in step.lines]


def _done(fusion: Fusion, out: str) -> DoneLine:
    options, lines = fusion.options, _lines(fusion)
    worst = fusion.verdict.worst
    return DoneLine(
        groups=len(lines),
        sweeps=max((step.job.state.sweeps for step in fusion.steps), default=0),
        k=[] if options.align_only else [round(k, 6) for k in fusion.k],
        lossy=any(step.soft for step in fusion.steps),
        recalibrated=False,
        verified=fusion.verdict.how,
        verified_max_rel=None if worst is None else float(f"{worst:.2g}"),
        out=os.path.basename(os.path.normpath(out)) if out != "-" else "-",
    )


def _to_directory(fusion: Fusion) -> None:
    options, call = fusion.options, fusion.call
    assert options.out is not None
    if fusion.ranks.rank != 0:
        fusion.run()
        fusion.ranks.from_first(None)
        return
    with OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume) as out:
        if out.finished:
            call.reporter.note(f"{options.out} is finished already")
            _report(fusion, [msgspec.convert(json.loads((out.final / RUN_FILE).read_bytes())["done"], DoneLine)])
            _release(fusion)
            return
        check_space(out.partial, output_bytes(fusion.like))
        metadata = _metadata(fusion)
        fusion.directory, fusion.fingerprint = out.partial, canonical(metadata)
        fused = fusion.run()
        done = _done(fusion, options.out)
        writer = JsonlWriter(call.streams, trainer=True)
        for line in _lines(fusion):
            writer.write(line)
        with fusion.timed("write"):
            tensors = lazy_tensors(fusion.like, _values(fusion, fused))
            write_directory(out.partial, fusion.like, tensors, metadata, options.shard_bytes)
            write_permutations(out.partial, fusion.steps, metadata)
        digests = {model.name: model.weights.sha256() for model in fusion.models}
        record = run_record(
            "lwi-fuse", call.settings, models=digests, seconds=fusion.seconds, done=msgspec.to_builtins(done)
        )
        with atomic_file(out.partial / RUN_FILE) as handle:
            handle.write((json.dumps(record, indent=2, default=str) + "\n").encode())
        out.commit()
    writer.write(done)
    writer.close()
    _files(fusion, done)
    _release(fusion)


def _release(fusion: Fusion) -> None:
    """Let the other processes go only now: a launcher ends all when one leaves."""
    if fusion.ranks.count > 1:
        fusion.ranks.from_first(b"done")


def _to_file(fusion: Fusion, streaming: bool) -> None:
    """Bare weights to a file, or any weights to stdout."""
    options, call = fusion.options, fusion.call
    assert options.out is not None
    if fusion.ranks.rank != 0:
        fusion.run()
        fusion.ranks.from_first(None)
        return
    if streaming:
        if os.isatty(call.streams.stdout_fd):
            raise UsageProblem("weights are not written to a terminal", "redirect: -o - > FILE, or pipe them on")
        fused, metadata = fusion.run(), _metadata(fusion)
        with call.streams.open_stdout() as handle:
            write_stream(handle, lazy_tensors(fusion.like, _values(fusion, fused)), metadata)
        done = _done(fusion, "-")
    else:
        check_space(Path(options.out), output_bytes(fusion.like))
        with atomic_file(options.out, overwrite=options.overwrite) as handle:
            fused, metadata = fusion.run(), _metadata(fusion)
            done = _done(fusion, options.out)
            write_file(handle, lazy_tensors(fusion.like, _values(fusion, fused)), metadata)
        writer = JsonlWriter(call.streams, trainer=True)
        for line in (*_lines(fusion), done):
            writer.write(line)
        writer.close()
    _files(fusion, done)
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in fusion.seconds.items())
    call.reporter.note(f"{spent}; peak memory {run_record('', {})['peak_memory_mib']:.0f} MiB")
    _release(fusion)


def _report(fusion: Fusion, lines: Sequence[DoneLine]) -> None:
    writer = JsonlWriter(fusion.call.streams, trainer=True)
    for line in lines:
        writer.write(line)
    writer.close()


def _files(fusion: Fusion, done: DoneLine) -> None:
    """--report and --plot."""
    options = fusion.options
    if options.report is not None:
        with atomic_file(options.report) as handle:
            handle.writelines(msgspec.json.encode(line) + b"\n" for line in (*_lines(fusion), done))
    for path in options.plot:
        from toolbox.lwi.figures import draw

        draw(_lines(fusion), path)


def _dry_run(options: Options, call: Invocation, models: Sequence[Checkpoint], inputs: Inputs) -> None:
    """The plan: groups, work and memory, without reading a tensor but the two that tell of a common base."""
    new = models[-1]
    spec, plan = find_spec(new, options)
    for old in models[:-1]:
        check_alike(old, new, plan)
    rows = pair_labels(models[0], new, plan)
    job = align.prepare(plan, models[0], new, rows, options, "cpu")
    largest = max((group.size * group.parents for group in plan.groups.values()), default=0)
    widest = max((max(new.shape(key) or (0,)) * min(new.shape(key) or (0,)) for key in new.names()), default=0)
    writer = JsonlWriter(call.streams)
    writer.write(
        PlanLine(
            command=call.command,
            models=len(models),
            spec=spec.name,
            groups=len(plan.groups),
            moving=len(job.moving),
            deep=job.deep,
            parameters=new.parameters,
            flops_per_sweep=sum(align.flops(plan, name) for name in job.moving),
            memory_mib=round((12 * largest**2 + 24 * widest) / 2**20, 1),
            output_bytes=output_bytes(new),
            skipped=inputs.skipped,
            settings=call.settings,
        )
    )
    writer.close()
