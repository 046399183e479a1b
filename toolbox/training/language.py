"""The light half of a language-model training run: options, reading, checking. No torch.

Everything that can be wrong with a call is found here, on rank 0, before any model loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

from toolbox.models.facts import weights_digest
from toolbox.models.load import ModelSource, base_model
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.files import sha256_file
from toolbox.shell.records import (
    TRAINING_SHAPES,
    RecordReader,
    Row,
    parse_map,
    read_records,
    training_row,
    write_rejects,
)
from toolbox.shell.streams import display_name
from toolbox.training.fingerprint import check_fingerprint, option_marks
from toolbox.training.stopping import STEP_NAMES, StopWhen, parse


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options that every trainer of language models has; the names are those of the command line.

    ``row_shapes`` are the rows that its inputs may hold; ``long_rows`` what becomes of rows beyond ``max_length``.
    """

    row_shapes: ClassVar[tuple[type[msgspec.Struct], ...]] = TRAINING_SHAPES
    model: str
    out: str
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    template: str = "auto"
    system: str | None = None
    max_length: int = 512
    long_rows: Literal["cut", "skip"] = "cut"
    loss_on: str = "assistant"
    lr: float | str = "auto"
    epochs: float = 5
    batch_size: int = 16
    micro_batch: int | str = "auto"
    weight_decay: float = 0.0
    warmup: float = 0.0
    schedule: str = "constant"
    max_grad_norm: float = 0.0
    precision: str = "fp32"
    optimizer: str = "adamw"
    grad_checkpointing: bool = False
    train_params: str | None = None
    loss_chunk: int = 1024
    seed: int = 0
    lora_r: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    eval_every: int | str = "epoch"
    eval_rows: int = 32
    watch: tuple[str, ...] = ()
    stop_when: str | None = None
    save_every: int | str = "auto"
    plot: tuple[str, ...] = ()
    tracker: tuple[str, ...] = ()
    threads: int | None = None


NOT_DECIDING = {
    # Where things are read from and written to: data is known by its digest.
    *(
        "file",
        "forget",
        "retain",
        "refusals",
        "key_words",
        "log_weights",
        "log_geffect",
        "watch",
        "out",
        "overwrite",
        "resume",
        "on_bad",
        "rejects",
        "delta",
        "merge",
        "heads_from",
        "plot",
    ),
    # What does not touch the result.
    *("tracker", "save_every", "quiet"),
}
"""Options that do not decide the result: left out of fingerprints and of the header of weights."""

PROCESSES = "number of processes"
"""The mark of a fingerprint that tells how many processes a run has."""

WEIGHTS = "model (its weights)"
"""The mark of a fingerprint that identifies the weights a run began from."""

_FREE_ON_RESUME = {"micro_batch", "loss_chunk", "grad_checkpointing", "threads"}
"""Options that a resumed run may change, out of memory for one: they touch nothing but rounding."""


@dataclass(frozen=True)
class DataSet:
    """The rows of one input and the digest of what was read from it."""

    rows: tuple[Row, ...]
    sha256: str


@dataclass(frozen=True)
class Sets:
    """What a run trains on and what it watches, by name; digests of the inputs they came from."""

    train: dict[str, tuple[Row, ...]]
    watched: dict[str, tuple[Row, ...]]
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Material:
    """What an objective is made of: by set, the ``encoded`` rows and the ``rows`` they came from; the tokenizer."""

    encoded: Mapping[str, Sequence[Any]]
    rows: Mapping[str, Sequence[Row]]
    tokenizer: Any
    pad_id: int


class Task(Protocol):
    """What a command adds to the shared run."""

    options: TrainOptions

    def inputs(self) -> dict[str, str]:
        """Files to read, by set name, in order."""

    def watched_names(self) -> tuple[str, ...]:
        """Sets of its own that are evaluated (``--watch`` adds more)."""

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        """Decide what is trained on and watched; raises what is wrong with the data as a whole."""

    def plan(self, counts: Mapping[str, int]) -> Any:
        """The ``windows.Plan`` for so many rows a set."""

    def auto_lr(self, parameters: int) -> float:
        """``--lr auto`` for a model of this size."""

    def parallel(self) -> tuple[str, ...]:
        """Training sets that hold different answers to the same rows, in the same order."""

    def needs_reference(self) -> bool:
        """Whether the loss compares with a frozen copy of the model (with adapters: with the model without them)."""

    def objective(self, material: Material) -> Any:
        """The ``objective.Objective`` over encoded rows."""


@runtime_checkable
class Adapting(Protocol):
    """What a task adds that trains a small module beside the model, and writes that alone; the model is frozen."""

    def adapt(self, head: Any) -> Any:
        """The module to be trained, its hooks in ``head.model``; ``head`` is the ``TokenLoss`` that will be called."""

    def trainable(self, config: Any) -> dict[str, int]:
        """Trained numbers by part, from the model's configuration; raises where there is nothing to train."""

    def write(self, directory: Any, module: Any, metadata: dict[str, str], chat: Any, source: ModelSource) -> None:
        """Write the trained module below ``directory``; ``metadata`` is its file's header."""


def lr_by_size(parameters: int, small: float) -> float:
    """``small`` below 500 M parameters, 2e-5 up to 3 B, 1e-5 above."""
    return small if parameters < 5e8 else 2e-5 if parameters <= 3e9 else 1e-5


def watch_files(options: TrainOptions) -> dict[str, str]:
    """``--watch NAME=FILE`` as a mapping; names must be usable in ``--stop-when``."""
    found: dict[str, str] = {}
    for item in options.watch:
        name, _, path = item.partition("=")
        if not name.isidentifier():
            raise UsageProblem(f"--watch {item}: {name!r} is not a plain name", "letters, digits and _")
        if name in found or name in ("train", "forget", "retain"):
            raise UsageProblem(f"--watch {item}: the name {name} is taken", "choose another name")
        found[name] = path
    return found


def stop_condition(options: TrainOptions, sets: Sequence[str]) -> StopWhen | None:
    """The parsed ``--stop-when`` over the metrics of ``sets``."""
    if options.stop_when is None:
        return None
    names = [*STEP_NAMES, *(f"{name}_{metric}" for name in sets for metric in ("es", "prob"))]
    condition = parse(options.stop_when, names)
    if condition.needs_evaluation and options.eval_every == 0:
        raise UsageProblem("--stop-when over watched sets needs evaluations", "as in --eval-every epoch")
    return condition


def read_sets(call: Invocation, options: TrainOptions, inputs: Mapping[str, str]) -> dict[str, DataSet]:
    """Read and validate every input. Raises BadData at the first bad row, or skips it with ``--on-bad skip``."""
    renames = parse_map(options.map_fields)
    if sum(path == "-" for path in inputs.values()) > 1:
        raise UsageProblem("only one input can be stdin (-)", "name files for the others")
    rejected: list[bytes] = []
    data = {}
    for name, path in inputs.items():
        reader = RecordReader(
            options.row_shapes, renames=renames, on_bad=options.on_bad, rejects=lambda raw, _: rejected.append(raw)
        )
        rows = _rows(read_records(path, call.streams, reader, f"the {name} set"), reader)
        if not rows:
            skipped = f" ({reader.skipped} bad rows skipped)" if reader.skipped else ""
            raise BadData(f"the {name} set is empty{skipped}", "give at least one row", file=display_name(path))
        if reader.skipped:
            call.reporter.warn(f"{display_name(path)}: {reader.skipped} bad rows left out")
        data[name] = DataSet(tuple(rows), digest(rows))
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    return data


def _rows(records: Any, reader: RecordReader) -> list[Row]:
    rows = []
    for record in records:
        try:
            rows.append(training_row(record))
        except BadData as problem:
            reader.bad(problem, msgspec.json.encode(record.data))
    return rows


def digest(rows: Sequence[Row]) -> str:
    """sha256 over what was read: ids, texts and annotations, in order (not over file names or formatting)."""
    hasher = hashlib.sha256()
    for row in rows:
        extras = {name: getattr(row, name) for name in ("alternate", "key_words", "weight", "label")}
        given = {name: value for name, value in extras.items() if value is not None}
        hasher.update(msgspec.json.encode((row.id, row.messages, row.text, *([given] if given else []))) + b"\n")
    return hasher.hexdigest()


def fingerprint(
    call: Invocation, options: TrainOptions, digests: Mapping[str, str], processes: int, source: ModelSource
) -> dict[str, Any]:
    """What an interrupted run and its continuation must share, by the name a message can use."""
    marks = option_marks(options, NOT_DECIDING | _FREE_ON_RESUME)
    marks |= {f"data ({name})": sha for name, sha in digests.items()}
    marks |= _weights_marks(source, options)
    if Path(options.template).is_file():
        marks["template (its text)"] = sha256_file(options.template)
    return marks | {PROCESSES: processes, "command": call.command}


def _weights_marks(source: ModelSource, options: TrainOptions) -> dict[str, Any]:
    """Digests of the weights a run begins from; a model on the hub and the embedded one are known by their names."""
    if source.kind == "gguf":
        return {WEIGHTS: sha256_file(str(source.path))}
    if source.kind not in ("directory", "adapter"):
        return {}
    marks: dict[str, Any] = {WEIGHTS: weights_digest(source)}
    if source.kind == "adapter":
        base = base_model(source, trust_remote_code=options.trust_remote_code)
        marks |= {f"base {name}": value for name, value in _weights_marks(base, options).items()}
    return marks


@dataclass(frozen=True)
class Brief:
    """What rank 0 tells the other ranks once everything has been checked."""

    train: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    watched: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    partial: str | None = None
    state: str | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(payload: bytes) -> Brief:
        return msgspec.json.decode(payload, type=Brief)


def check_adapter_options(options: TrainOptions, kind: str) -> None:
    """What does not fit together about adapters."""
    if options.lora_r and kind == "adapter":
        raise UsageProblem("--lora-r on a model that is an adapter itself", "merge it into its base first")
    if options.lora_r and options.train_params:
        raise UsageProblem("--train-params does not apply to --lora-r", "use --lora-targets")
    if not options.lora_r and (options.lora_alpha or options.lora_targets):
        raise UsageProblem("--lora-alpha and --lora-targets need --lora-r", "as in --lora-r 8")


def needs_folder(path: str, option: str) -> None:
    """Raise when ``path`` cannot be made (CannotCreate) or is stdout, before hours are spent on what goes into it."""
    if path == "-":
        raise UsageProblem(f"{option} -: stdout has the events already", "name a file")
    if not Path(path).absolute().parent.is_dir():
        raise CannotCreate(f"{option} {path}: no such directory", "make it first")


def state_to_resume(partial: Path, marks: dict[str, Any]) -> Path | None:
    """The newest state below ``partial``, after checking that it belongs to the same run."""
    from toolbox.training.state import latest_state, read_state

    path = latest_state(partial)
    if path is not None:
        check_fingerprint(read_state(path).fingerprint, marks)
    return path
