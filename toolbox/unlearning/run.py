"""satimp-unlearn: the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolbox.models.load import find_model
from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.training.language import NOT_DECIDING, DataSet, Sets, TrainOptions, lr_by_size, needs_folder
from toolbox.unlearning.data import check_overlap, hold_out

if TYPE_CHECKING:
    from toolbox.training.finetune import Outcome

FORGOT_LITTLE = 0.1
"""A fall of the forget set's ES below this share of its start counts as having forgotten little."""


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """satimp-unlearn's options."""

    forget: str
    retain: str | None = None
    strict: bool = False
    weighting: str = "satimp"
    beta1: float = 5.0
    beta2: float = 0.1
    gamma: float = 1.0
    alpha: float = 0.1
    retain_loss: str = "nll"
    retain_batch: int = 0
    holdout: int = 0
    delta: str | None = None

    @property
    def retains(self) -> bool:
        """Whether retain rows are trained on."""
        return self.retain is not None and self.retain_loss != "none" and self.alpha > 0


@dataclass(frozen=True)
class SatImpTask:
    """SatImp as the shared run sees it."""

    options: Options

    def inputs(self) -> dict[str, str]:
        found = {"forget": self.options.forget}
        if self.options.retain is not None:
            found["retain"] = self.options.retain
        return found

    def watched_names(self) -> tuple[str, ...]:
        return tuple(self.inputs())

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        options = self.options
        train = {"forget": data["forget"].rows}
        watched = {"forget": data["forget"].rows}
        if "retain" in data:
            retain = data["retain"].rows
            if warning := check_overlap(train["forget"], retain, options.strict):
                call.reporter.warn(warning)
            held, rest = hold_out(retain, options.holdout)
            watched["retain"] = held or rest
            if options.retains:
                train["retain"] = rest
        watched |= {name: one.rows for name, one in data.items() if name not in ("forget", "retain")}
        return Sets(
            train,
            {name: rows[: options.eval_rows] for name, rows in watched.items()},
            {name: one.sha256 for name, one in data.items()},
        )

    def plan(self, counts: Mapping[str, int]) -> Any:
        from toolbox.training.windows import Plan, Stream

        forget = Stream("forget", counts["forget"], self.options.batch_size)
        retain = [Stream("retain", counts["retain"], self.options.retain_batch)] if "retain" in counts else []
        return Plan(forget, retain, self.options.epochs, self.options.seed)

    def auto_lr(self, parameters: int) -> float:
        return lr_by_size(parameters, small=5e-5)

    def objective(self, encoded: Mapping[str, Sequence[Any]], pad_id: int) -> Any:
        from toolbox.unlearning.objectives import SatImpObjective
        from toolbox.unlearning.satimp import exponents

        beta1, beta2 = exponents(self.options.weighting, self.options.beta1, self.options.beta2)
        return SatImpObjective(
            encoded, pad_id, beta1=beta1, beta2=beta2, gamma=self.options.gamma, alpha=self.options.alpha
        )


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    if options.retain is None and options.retain_loss != "none" and options.alpha > 0:
        raise UsageProblem(
            "--alpha above 0 needs --retain rows to keep", "give --retain FILE, or --retain-loss none to do without"
        )
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


def run(options: Options, call: Invocation) -> None:
    """Unlearn ``options.forget`` and write ``options.out``; events go to stdout."""
    from toolbox.training.figures import draw_training
    from toolbox.training.finetune import train

    check(options)

    def finish(outcome: Outcome) -> None:
        before_after(outcome.done, call)
        draw_training(outcome.events, options.plot, f"satimp-unlearn ({options.weighting})")

    def before_commit(outcome: Outcome) -> None:
        if options.delta is not None:
            write_difference(outcome, options, call)

    train(SatImpTask(options), call, finish, before_commit)


def before_after(done: Mapping[str, Any], call: Invocation) -> None:
    """The table of every watched set before and after, and a line where the run forgot little."""
    from toolbox.unlearning.tables import before_after_table

    call.reporter.show(before_after_table(done["before"], done["after"], done["steps"]))
    before, after = done["before"]["forget"]["es"], done["after"]["forget"]["es"]
    if before == 0:
        call.reporter.warn("forget ES was 0 before the run: the model does not recite these rows (another --template?)")
    elif before - after < FORGOT_LITTLE * before:
        call.reporter.warn(
            f"the run forgot little (forget ES {before:.3f} -> {after:.3f}): raise --epochs or --lr, or lower --alpha"
        )


def write_difference(outcome: Outcome, options: Options, call: Invocation) -> None:
    """``--delta``: θ_unlearned − θ_base as safetensors, the base's digest in its header."""
    from toolbox.models.facts import weights_directory
    from toolbox.weights.delta import write_delta
    from toolbox.weights.provenance import header
    from toolbox.weights.read import open_weights

    deciding = {name: value for name, value in call.settings.items() if name not in NOT_DECIDING}
    metadata = header(call.command, deciding, options.seed, {})
    directory = weights_directory(outcome.source)
    assert directory is not None  # check() has refused sources without one
    with open_weights(directory) as base, open_weights(outcome.directory) as new:
        write_delta(base, new, str(options.delta), metadata)
