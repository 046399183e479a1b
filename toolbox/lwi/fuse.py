"""lwi-fuse: the job. Two or more checkpoints in, one fused checkpoint out, a line a permutation group.

Tensors are read one at a time and made when they are written, so that memory holds one group's working set and not the
models. Nothing appears under the output's name before the function of what was aligned has been proved.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from toolbox.lwi import align
from toolbox.lwi.checkpoint import Checkpoint, Model, check_alike, open_checkpoint, pair_labels
from toolbox.lwi.choices import NOT_DECIDING, Options, check, shares
from toolbox.lwi.fusion import Fusion
from toolbox.lwi.inputs import Inputs, find_spec, print_spec, read_inputs
from toolbox.lwi.lines import DoneLine, GroupLine, PlanLine
from toolbox.lwi.output import (
    check_space,
    lazy_tensors,
    output_bytes,
    run_record,
    write_directory,
    write_permutations,
)
from toolbox.lwi.ranks import Ranks
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_file
from toolbox.shell.launch import under_launcher
from toolbox.shell.records import write_rejects
from toolbox.shell.streams import JsonlWriter, process_rank
from toolbox.weights.provenance import canonical, header
from toolbox.weights.write import write_file, write_stream

_GO, _END = b"go", b"end"


def run(options: Options, call: Invocation) -> None:
    """Fuse the models of ``options``: group lines and the weights, or the plan with --dry-run."""
    if call.dry_run:
        options = dataclasses.replace(options, out=options.out or "-")
    streaming = options.out == "-"
    check(options, streaming and not call.dry_run)
    if options.print_spec:
        if process_rank() == 0:
            print_spec(options, call)
        return
    ranks = Ranks(start=not call.dry_run and under_launcher())
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
    """What is written under each key."""
    options = fusion.options
    if options.align_only:
        return lambda key: fusion.steps[0].of_original(fusion.models[0], key)
    if options.recalibrate is None:
        return fused.read
    from toolbox.lwi.recalibrate import recalibrated

    with fusion.timed("recalibrate"):
        fresh = recalibrated(fusion.like, fused, options.recalibrate, fusion.call.streams, fusion.call.reporter.note)
    return lambda key: fresh[key] if key in fresh else fused.read(key)


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
        recalibrated=options.recalibrate is not None,
        verified=fusion.verdict.how,
        verified_max_rel=None if worst is None else float(f"{worst:.2g}"),
        out=os.path.basename(os.path.normpath(out)) if out != "-" else "-",
    )


def _to_directory(fusion: Fusion) -> None:
    options, call = fusion.options, fusion.call
    assert options.out is not None
    if fusion.ranks.rank != 0:
        _help(fusion)
        return
    with OutputDirectory(options.out, overwrite=options.overwrite, resume=options.resume) as out:
        if out.finished:
            call.reporter.note(f"{options.out} is finished already")
            _report(fusion, [msgspec.convert(json.loads((out.final / RUN_FILE).read_bytes())["done"], DoneLine)])
            _tell(fusion, _END)
            return
        check_space(out.partial, output_bytes(fusion.like))
        _tell(fusion, _GO)
        metadata = _metadata(fusion)
        fusion.directory, fusion.fingerprint = out.partial, canonical(metadata)
        fused = fusion.run()
        done = _done(fusion, options.out)
        tensors = lazy_tensors(fusion.like, _values(fusion, fused))
        writer = JsonlWriter(call.streams, trainer=True)
        for line in _lines(fusion):
            writer.write(line)
        with fusion.timed("write"):
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
    _tell(fusion, _END)


def _help(fusion: Fusion) -> None:
    """What the other processes do: match their share, once the first has the output, and wait for its end."""
    if fusion.ranks.from_first(None) == _GO:
        fusion.run()
        fusion.ranks.from_first(None)


def _tell(fusion: Fusion, what: bytes) -> None:
    """To the other processes; they are let go last, since a launcher ends all when one leaves."""
    if fusion.ranks.count > 1:
        fusion.ranks.from_first(what)


def _to_file(fusion: Fusion, streaming: bool) -> None:
    """Bare weights to a file, or any weights to stdout."""
    options, call = fusion.options, fusion.call
    assert options.out is not None
    if fusion.ranks.rank != 0:
        _help(fusion)
        return
    if streaming:
        if os.isatty(call.streams.stdout_fd):
            raise UsageProblem("weights are not written to a terminal", "redirect: -o - > FILE, or pipe them on")
        _tell(fusion, _GO)
        fused, metadata = fusion.run(), _metadata(fusion)
        with call.streams.open_stdout() as handle:
            write_stream(handle, lazy_tensors(fusion.like, _values(fusion, fused)), metadata)
        done = _done(fusion, "-")
    else:
        check_space(Path(options.out), output_bytes(fusion.like))
        with atomic_file(options.out, overwrite=options.overwrite) as handle:
            _tell(fusion, _GO)
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
    _tell(fusion, _END)


def _report(fusion: Fusion, lines: Sequence[DoneLine]) -> None:
    writer = JsonlWriter(fusion.call.streams, trainer=True)
    for line in lines:
        writer.write(line)
    writer.close()


def _files(fusion: Fusion, done: DoneLine) -> None:
    """--report and --plot, and what people should know of the run."""
    options = fusion.options
    if len({model.name for model in fusion.models}) == 1 and options.shuffle_seed is None:
        fusion.call.reporter.note("the same model twice: the fusion is that model")
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
