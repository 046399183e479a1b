"""What the unlearning trainers share: their data options, arranging sets, the ending. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolbox.models.load import base_model, find_model, load_config
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.records import Row
from toolbox.training.language import (
    NOT_DECIDING,
    DataSet,
    Material,
    Sets,
    TrainOptions,
    digest,
    lr_by_size,
    needs_folder,
)
from toolbox.unlearning.data import check_overlap, hold_out, read_refusals, refusing, with_key_words

if TYPE_CHECKING:
    from toolbox.training.finetune import Outcome

FORGOT_LITTLE = 0.1
"""A fall of the forget set's ES below this share of its start counts as having forgotten little."""


@dataclass(frozen=True, kw_only=True)
class UnlearnOptions(TrainOptions):
    """Options of both trainers; the names are those of the command line."""

    forget: str
    retain: str | None = None
    strict: bool = False
    retain_loss: str = "nll"
    kl_positions: str = "labelled"
    retain_batch: int = 0
    holdout: int = 0
    delta: str | None = None


@dataclass(frozen=True)
class UnlearnTask:
    """An unlearning run as the shared run sees it; a subclass says what the objective is.

    ``retains``: whether retain rows are trained on (else they are watched). ``refuses``: whether forget rows need
    another answer.
    """

    options: UnlearnOptions

    @property
    def retains(self) -> bool:
        raise NotImplementedError

    @property
    def refuses(self) -> bool:
        return False

    @property
    def refusals(self) -> str | None:
        return None

    @property
    def key_words(self) -> str | None:
        return None

    def usable(self, row: Row) -> bool:
        """Whether a forget row has what the objective needs of it."""
        return True

    def parallel(self) -> tuple[str, ...]:
        return ("forget", "refusal") if self.refuses else ()

    def needs_reference(self) -> bool:
        raise NotImplementedError

    def objective(self, material: Material) -> Any:
        raise NotImplementedError

    # -- what the shared run asks -------------------------------------------------------------------------------------
    def inputs(self) -> dict[str, str]:
        found = {"forget": self.options.forget}
        if self.options.retain is not None:
            found["retain"] = self.options.retain
        return found

    def watched_names(self) -> tuple[str, ...]:
        return tuple(self.inputs())

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        options = self.options
        digests = {name: one.sha256 for name, one in data.items()}
        forget = data["forget"].rows
        if self.key_words is not None:
            forget = self._annotated(forget, call)
            digests["forget"] = digest(forget)
        if options.on_bad == "skip":
            forget = self._usable(forget, call)
        train: dict[str, tuple[Row, ...]] = {"forget": forget}
        watched = {"forget": forget}
        if self.refuses:
            texts = None if self.refusals is None else read_refusals(self.refusals, call.streams)
            train["refusal"] = refusing(forget, texts, options.seed)
            digests["refusal"] = digest(train["refusal"])
        if "retain" in data:
            retain = data["retain"].rows
            if warning := check_overlap(forget, retain, options.strict):
                call.reporter.warn(warning)
            held, rest = hold_out(retain, options.holdout)
            watched["retain"] = held or rest
            if self.retains:
                train["retain"] = rest
        watched |= {name: one.rows for name, one in data.items() if name not in ("forget", "retain")}
        return Sets(train, {name: rows[: options.eval_rows] for name, rows in watched.items()}, digests)

    def _annotated(self, rows: Sequence[Row], call: Invocation) -> tuple[Row, ...]:
        from toolbox.unlearning.key_words import read_annotations

        assert self.key_words is not None
        places = [row.index for row in rows]
        found = read_annotations(self.key_words, call.streams, rows, places=places, on_bad=self.options.on_bad)
        if found.skipped:
            call.reporter.warn(f"{self.key_words}: {found.skipped} bad annotations left out")
        if found.missing:
            call.reporter.warn(f"{found.missing} of {len(rows)} forget rows are not annotated in {self.key_words}")
        return with_key_words(rows, found.words)

    def _usable(self, rows: tuple[Row, ...], call: Invocation) -> tuple[Row, ...]:
        """The rows that have what the objective needs; with none of them left all, so that the first one is told."""
        kept = tuple(row for row in rows if self.usable(row))
        left_out = [row.id for row in rows if not self.usable(row)]
        if not kept or not left_out:
            return rows
        call.reporter.warn(
            f"forget: {len(left_out)} rows without what this objective needs left out (ids {', '.join(left_out[:5])})"
        )
        return kept

    def plan(self, counts: Mapping[str, int]) -> Any:
        from toolbox.training.windows import Plan, Stream

        forget = Stream("forget", counts["forget"], self.options.batch_size)
        retain = [Stream("retain", counts["retain"], self.options.retain_batch)] if "retain" in counts else []
        return Plan(forget, retain, self.options.epochs, self.options.seed)

    def auto_lr(self, parameters: int) -> float:
        return lr_by_size(parameters, small=5e-5)


# -- checks before anything is read -----------------------------------------------------------------------------------
def check_files(options: UnlearnOptions, *others: str | None) -> None:
    """What does not fit together about --holdout, --delta and where files come from and go; ``others`` are further
    inputs."""
    if [options.forget, options.retain, *others].count("-") > 1:
        raise UsageProblem("only one input can be stdin (-)", "name files for the others")
    if options.retain is None and options.holdout:
        raise UsageProblem("--holdout needs --retain", "it keeps the first rows of that set for evaluation")
    if options.delta is not None and options.lora_r:
        raise UsageProblem("--delta does not apply to --lora-r", "the adapter itself is the difference")
    if options.delta is not None:
        needs_folder(options.delta, "--delta")
        if find_model(options.model, trust_remote_code=options.trust_remote_code).kind in ("adapter", "hub"):
            raise UsageProblem(
                f"--delta needs the base's weights in one place; --model {options.model} is an adapter or on the hub",
                "save it as a directory with transformers first",
            )


def layers_of(options: UnlearnOptions) -> int:
    """How many decoder layers the model has, from its configuration alone."""
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    base = base_model(source, trust_remote_code=options.trust_remote_code)
    return load_config(base, trust_remote_code=options.trust_remote_code).get_text_config().num_hidden_layers


def rmu_parameters(options: UnlearnOptions, layer: int) -> str:
    """``--train-params`` for RMU at ``layer``: the second MLP matrices of that layer and the two below it.

    Raises: UsageProblem where the model has no such layer.
    """
    count = layers_of(options)
    if not 0 <= layer < count:
        raise UsageProblem(
            f"--layer {layer}: the model has layers 0 to {count - 1}", "a layer in the first half is usual"
        )
    if options.train_params is not None:
        return options.train_params
    numbers = "|".join(str(number) for number in range(max(0, layer - 2), layer + 1))
    return rf"\.({numbers})\.(mlp\.)?(down_proj|c_proj|dense_4h_to_h|fc2|fc_out)\."


# -- the ending -------------------------------------------------------------------------------------------------------
def before_after(done: Mapping[str, Any], call: Invocation, factors: str) -> None:
    """The table of every watched set before and after, and a line where the run forgot little."""
    from toolbox.unlearning.tables import before_after_table

    call.reporter.show(before_after_table(done["before"], done["after"], done["steps"]))
    before, after = done["before"]["forget"]["es"], done["after"]["forget"]["es"]
    if before == 0:
        call.reporter.warn("forget ES was 0 before the run: the model does not recite these rows (another --template?)")
    elif before - after < FORGOT_LITTLE * before:
        call.reporter.warn(
            f"the run forgot little (forget ES {before:.3f} -> {after:.3f}): raise --epochs or --lr, or {factors}"
        )


def write_difference(outcome: Outcome, options: UnlearnOptions, call: Invocation) -> None:
    """``--delta``: θ_unlearned − θ_base as safetensors, the base's digest in its header."""
    from toolbox.models.facts import weights_directory
    from toolbox.weights.delta import write_delta
    from toolbox.weights.provenance import header
    from toolbox.weights.read import open_weights

    deciding = {name: value for name, value in call.settings.items() if name not in NOT_DECIDING}
    metadata = header(call.command, deciding, options.seed, {})
    directory = weights_directory(outcome.source)
    assert directory is not None  # check_files() has refused sources without one
    with open_weights(directory) as base, open_weights(outcome.directory) as new:
        write_delta(base, new, str(options.delta), metadata)


def write_record(
    outcome: Outcome, call: Invocation, option: str, path: str | None, key: str, draw: Callable[[list[Any], str], None]
) -> None:
    """The ``key`` records of all steps, those of resumed parts included, to ``path``, and their figure beside it.

    Nothing where ``path`` is None: ``option``, which names it, was not given.
    """
    if path is None:
        return
    import msgspec

    from toolbox.shell.files import atomic_file

    lines = [event["log"][key] for event in outcome.events if key in event.get("log", {})]
    with atomic_file(path) as handle:
        handle.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
    if missing := outcome.done["steps"] - len(lines):
        call.reporter.warn(f"{path} lacks {missing} steps, which ran without {option}")
    if lines:
        draw(lines, figure_path(path))
        call.reporter.note(f"wrote {path} and {figure_path(path)}")


def run_task(
    task: UnlearnTask, call: Invocation, method: str, factors: str, extras: Callable[[Outcome], None] | None = None
) -> None:
    """Train and end: table, figures (named by ``method``), the difference of weights; ``extras`` sees the finished run.

    ``factors`` is what else to try where the run forgot little.
    """
    from toolbox.training.figures import draw_training
    from toolbox.training.finetune import train

    options = task.options

    def finish(outcome: Outcome) -> None:
        before_after(outcome.done, call, factors)
        if extras is not None:
            extras(outcome)
        draw_training(outcome.events, options.plot, f"{call.command} ({method})")

    def before_commit(outcome: Outcome) -> None:
        if options.delta is not None:
            write_difference(outcome, options, call)

    train(task, call, finish, before_commit)


def check_record(options: UnlearnOptions, option: str, path: str | None) -> None:
    """That a record and its figure can be written, before hours are spent on them, and under names of their own."""
    if path is None:
        return
    needs_folder(path, option)
    drawn = figure_path(path)
    if drawn in (path, *options.plot):
        raise UsageProblem(f"{option} {path} draws {drawn}, which has another meaning here", "choose another name")


def figure_path(path: str) -> str:
    """Where the figure of the record ``path`` goes: beside it, as SVG."""
    return str(Path(path).with_suffix(".svg"))
