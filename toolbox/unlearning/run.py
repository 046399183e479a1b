"""satimp-unlearn: the job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.training.language import Material
from toolbox.unlearning.task import (
    UnlearnOptions,
    UnlearnTask,
    check_outputs,
    check_record,
    figure_path,
    run_task,
    write_lines,
)

if TYPE_CHECKING:
    from toolbox.training.finetune import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(UnlearnOptions):
    """satimp-unlearn's options."""

    weighting: str = "satimp"
    beta1: float = 5.0
    beta2: float = 0.1
    gamma: float = 1.0
    alpha: float = 0.1
    granularity: str = "token"
    group_size: int = 10
    instance_prob: str = "sum"
    sampling: str = "soft"
    fraction: float | None = None
    soft_p: float = 1.0
    reduction: str = "token"
    base: str = "ga"
    beta: float = 0.1
    key_words: str | None = None
    log_weights: str | None = None


@dataclass(frozen=True)
class SatImpTask(UnlearnTask):
    """SatImp as the shared run sees it."""

    options: Options

    @property
    def retains(self) -> bool:
        options = self.options
        return options.retain is not None and options.retain_loss != "none" and options.alpha > 0

    @property
    def key_words(self) -> str | None:
        return self.options.key_words

    def needs_reference(self) -> bool:
        return self.retains and self.options.retain_loss == "kl"

    def objective(self, material: Material) -> Any:
        from toolbox.unlearning.ascent import Ascent, Weighting
        from toolbox.unlearning.data import importances
        from toolbox.unlearning.objectives import Retention, UnlearnObjective
        from toolbox.unlearning.satimp import FRACTIONS

        options = self.options
        forget = Ascent(
            Weighting(options.weighting, options.beta1, options.beta2),
            granularity=options.granularity,  # type: ignore[arg-type]
            group_size=options.group_size,
            instance_prob=options.instance_prob,  # type: ignore[arg-type]
            sampling=options.sampling,  # type: ignore[arg-type]
            fraction=FRACTIONS.get(options.sampling, 1.0) if options.fraction is None else options.fraction,
            soft_p=options.soft_p,
            reduction=options.reduction,  # type: ignore[arg-type]
            base=options.base,  # type: ignore[arg-type]
            beta=options.beta,
            histogram=options.log_weights is not None,
        )
        retain = Retention(options.retain_loss, options.alpha, options.kl_positions) if self.retains else None  # type: ignore[arg-type]
        keys = None
        if options.weighting == "annotated":
            keys = importances(material.rows["forget"], material.encoded["forget"], material.tokenizer)
        return UnlearnObjective(
            material.encoded, material.pad_id, forget, gamma=options.gamma, retain=retain, keys=keys, seed=options.seed
        )


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    if options.retain is None and options.retain_loss != "none" and options.alpha > 0:
        raise UsageProblem(
            "--alpha above 0 needs --retain rows to keep", "give --retain FILE, or --retain-loss none to do without"
        )
    of_rows = options.granularity in ("instance", "batch")
    if options.weighting == "annotated" and of_rows:
        raise UsageProblem(
            f"--weighting annotated marks tokens, --granularity {options.granularity} weighs rows", "use token or group"
        )
    if options.key_words is not None and options.weighting != "annotated":
        raise UsageProblem("--key-words belongs to --weighting annotated")
    if options.fraction is not None and options.sampling == "soft":
        raise UsageProblem("--fraction belongs to hard sampling", "as in --sampling topk")
    if options.kl_positions != "labelled" and options.retain_loss != "kl":
        raise UsageProblem("--kl-positions belongs to --retain-loss kl")
    check_outputs(options)
    check_record(options, "--log-weights", options.log_weights)


def run(options: Options, call: Invocation) -> None:
    """Unlearn ``options.forget`` and write ``options.out``; events go to stdout."""
    check(options)

    def extras(outcome: Outcome) -> None:
        if options.log_weights is None:
            return
        from toolbox.unlearning.weight_figure import draw_weights

        lines = write_lines(outcome, "weights", options.log_weights)
        drawn = figure_path(options.log_weights)
        draw_weights(lines, drawn, f"token weights against probability ({options.weighting})")
        call.reporter.note(f"wrote {options.log_weights} and {drawn}")

    run_task(SatImpTask(options), call, options.weighting, "lower --alpha", extras)
