"""What rank 0 has checked before a run and tells the other processes: rows, fingerprint, a state to go on from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from toolbox.dull.inputs import Inputs
from toolbox.dull.options import NOT_DECIDING, Options
from toolbox.models.load import ModelSource
from toolbox.shell.command import Invocation
from toolbox.shell.files import RUN_FILE, OutputDirectory
from toolbox.training.fingerprint import check_fingerprint, option_marks
from toolbox.training.state import latest_state, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_PROCESSES = "number of processes"


@dataclass
class Brief:
    """``partial`` is where the output grows, ``state`` the saved state to go on from; ``train`` and ``held`` are
    ``data.Facts``. ``finished``: the output was whole already."""

    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    train: Any = None
    held: Any = None


def make_brief(
    options: Options, call: Invocation, source: ModelSource | None, inputs: Inputs, out: OutputDirectory
) -> Brief:
    """Rank 0's brief. BadData (65) or UsageProblem (2): ``--resume`` of a run with other options, data or processes."""
    from toolbox.dull.data import gather_facts, make_corpus

    facts = gather_facts(inputs.train, options.clean_field)
    corpus = make_corpus(facts, inputs.train.pixels, options.holdout, options.seed)
    marks = option_marks(options, NOT_DECIDING)
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


def share_brief(accelerator: Accelerator, brief: Brief) -> Brief:
    """Rank 0's brief on every rank; what the others pass does not count."""
    from toolbox.dull.data import Facts
    from toolbox.training.processes import broadcast_bytes

    mine = msgspec.json.encode(vars(brief)) if accelerator.is_main_process else None
    shared = Brief(**msgspec.json.decode(broadcast_bytes(accelerator, mine)))
    shared.train = msgspec.convert(shared.train, Facts)
    if shared.held is not None:
        shared.held = msgspec.convert(shared.held, Facts)
    return shared


def _weights(options: Options, source: ModelSource | None) -> str:
    """What the run starts from: the name of a backbone of ours, or the digest of weights."""
    if source is None:
        return options.model
    from toolbox.models.facts import weights_digest

    return weights_digest(source) or options.model
