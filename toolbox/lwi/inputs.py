"""The models of one call, and the spec that fits them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from toolbox.lwi.checkpoint import Checkpoint, open_checkpoint
from toolbox.lwi.choices import Options
from toolbox.lwi.expand import expand
from toolbox.lwi.lines import ModelRow
from toolbox.lwi.plan import Plan, shapes_text
from toolbox.lwi.spec import Spec, builtin_specs, read_spec, template
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.records import RecordReader, parse_map, read_records


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
                try:
                    return spec, expand(spec, shapes, model.config)
                except BadData as problem:
                    raise BadData(problem.reason, problem.advice, file=model.name) from None
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
