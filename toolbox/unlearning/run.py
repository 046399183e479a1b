"""satimp-unlearn: the job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.records import Row
from toolbox.training.language import Material
from toolbox.unlearning.task import (
    UnlearnOptions,
    UnlearnTask,
    check_files,
    check_record,
    run_task,
    write_record,
)

if TYPE_CHECKING:
    from toolbox.training.finetune import Outcome

DEFAULTS = {"beta1": 5.0, "beta2": 0.1, "group_size": 10, "instance_prob": "sum", "soft_p": 1.0, "beta": 0.1}
"""Of options that belong to one variant alone."""

BELONGS = {
    "beta1": ("weighting", ("satimp", "simsat")),
    "beta2": ("weighting", ("satimp", "simimp")),
    "key_words": ("weighting", ("annotated",)),
    "group_size": ("granularity", ("group",)),
    "instance_prob": ("granularity", ("instance", "batch")),
    "fraction": ("sampling", ("topk", "bottomk", "random")),
    "soft_p": ("sampling", ("random",)),
    "beta": ("base", ("npo",)),
}
"""Which variants an option means something to."""


@dataclass(frozen=True, kw_only=True)
class Options(UnlearnOptions):
    """satimp-unlearn's options."""

    weighting: str = "satimp"
    beta1: float | None = None
    beta2: float | None = None
    gamma: float = 1.0
    alpha: float = 0.1
    granularity: str = "token"
    group_size: int | None = None
    instance_prob: str | None = None
    sampling: str = "soft"
    fraction: float | None = None
    soft_p: float | None = None
    reduction: str = "token"
    base: str = "ga"
    beta: float | None = None
    key_words: str | None = None
    log_weights: str | None = None

    def chosen(self, name: str) -> Any:
        """An option of one variant alone: what is given, else its default."""
        given = getattr(self, name)
        return DEFAULTS[name] if given is None else given


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

    def usable(self, row: Row) -> bool:
        return self.options.weighting != "annotated" or row.key_words is not None or row.weight is not None

    def needs_reference(self) -> bool:
        return self.retains and self.options.retain_loss == "kl"

    def objective(self, material: Material) -> Any:
        from toolbox.unlearning.ascent import Ascent, Weighting
        from toolbox.unlearning.data import importances
        from toolbox.unlearning.objectives import Retention, UnlearnObjective
        from toolbox.unlearning.satimp import FRACTIONS

        options = self.options
        forget = Ascent(
            Weighting(options.weighting, options.chosen("beta1"), options.chosen("beta2")),
            granularity=options.granularity,  # type: ignore[arg-type]
            group_size=options.chosen("group_size"),
            instance_prob=options.chosen("instance_prob"),
            sampling=options.sampling,  # type: ignore[arg-type]
            fraction=FRACTIONS.get(options.sampling, 1.0) if options.fraction is None else options.fraction,
            soft_p=options.chosen("soft_p"),
            reduction=options.reduction,  # type: ignore[arg-type]
            base=options.base,  # type: ignore[arg-type]
            beta=options.chosen("beta"),
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
    for name, (option, values) in BELONGS.items():
        chosen = getattr(options, option)
        if getattr(options, name) is not None and chosen not in values:
            flags = f"--{name.replace('_', '-')}", f"--{option}"
            raise UsageProblem(
                f"{flags[0]} means nothing to {flags[1]} {chosen}", f"it belongs to {flags[1]} {', '.join(values)}"
            )
    if options.kl_positions != "labelled" and options.retain_loss != "kl":
        raise UsageProblem("--kl-positions belongs to --retain-loss kl")
    check_files(options, options.key_words)
    check_record(options, "--log-weights", options.log_weights)


def run(options: Options, call: Invocation) -> None:
    """Unlearn ``options.forget`` and write ``options.out``; events go to stdout."""
    check(options)

    def extras(outcome: Outcome) -> None:
        from toolbox.unlearning.weight_figure import draw_weights

        draw = partial(draw_weights, title=f"token weights against probability ({options.weighting})")
        write_record(outcome, call, "--log-weights", options.log_weights, "weights", draw)

    run_task(SatImpTask(options), call, options.weighting, "lower --alpha", extras)
