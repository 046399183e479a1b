"""gru-unlearn: the job."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from toolbox.shell.command import Invocation
from toolbox.shell.errors import UsageProblem
from toolbox.shell.records import Row
from toolbox.training.language import Material
from toolbox.unlearning.registry import OBJECTIVES, Constants, Entry, resolve
from toolbox.unlearning.task import (
    UnlearnOptions,
    UnlearnTask,
    check_files,
    check_record,
    rmu_parameters,
    run_task,
    write_record,
)

if TYPE_CHECKING:
    from toolbox.training.finetune import Outcome


@dataclass(frozen=True, kw_only=True)
class Options(UnlearnOptions):
    """gru-unlearn's options; constants of the objective are None where its own default holds."""

    objective: str = "npo"
    rectify: bool = True
    ema: float = 0.8
    ema_dtype: str = "fp32"
    ema_device: str = "auto"
    cos_clip: float | None = None
    scope: str = "model"
    geometry: str = "raw"
    add_retain: float = 0.0
    add_kl: float = 0.0
    log_geffect: str | None = None
    refusals: str | None = None
    gamma: float | None = None
    alpha: float | None = None
    beta: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    delta_margin: float | None = None
    layer: int | None = None
    steer: float | None = None

    @property
    def entry(self) -> Entry:
        return OBJECTIVES[self.objective]

    @property
    def constants(self) -> Constants:
        return resolve(self.objective, {item.name: getattr(self, item.name) for item in fields(Constants)})


@dataclass(frozen=True)
class GruTask(UnlearnTask):
    """Any objective, rectified or bare, as the shared run sees it."""

    options: Options

    @property
    def retains(self) -> bool:
        return self.options.retain is not None

    @property
    def refuses(self) -> bool:
        return self.options.entry.refusals

    @property
    def refusals(self) -> str | None:
        return self.options.refusals

    def usable(self, row: Row) -> bool:
        answered = row.messages is not None and (row.alternate is not None or self.refusals is not None)
        return answered or not self.refuses

    def needs_reference(self) -> bool:
        options, entry = self.options, self.options.entry
        own = entry.retain_loss is not None and options.constants.alpha > 0
        shared = self.retains and options.retain_loss == "kl"
        return entry.reference or own or shared or bool(options.add_kl)

    def objective(self, material: Material) -> Any:
        from toolbox.unlearning.losses import make_forget_loss
        from toolbox.unlearning.objectives import Retention, UnlearnObjective
        from toolbox.unlearning.rectified import GruObjective, Rectifier

        options, constants, entry = self.options, self.options.constants, self.options.entry
        forget = make_forget_loss(options.objective, constants, options.seed)
        positions = options.kl_positions
        own = None
        if constants.alpha > 0:
            kind = entry.retain_loss or options.retain_loss
            own = Retention(kind, constants.alpha, positions if kind == "kl" else "labelled", constants.layer)  # type: ignore[arg-type]
        shared: dict[str, Any] = {"gamma": constants.gamma, "seed": options.seed}
        if not self.retains:
            return UnlearnObjective(material.encoded, material.pad_id, forget, **shared)
        retain = Retention(options.retain_loss, 1.0, positions if options.retain_loss == "kl" else "labelled")  # type: ignore[arg-type]
        given = {item.name: getattr(options, item.name) for item in fields(Rectifier) if hasattr(options, item.name)}
        rectifier = Rectifier(**{**given, "geffect": options.log_geffect is not None})
        return GruObjective(
            material.encoded,
            material.pad_id,
            forget,
            rectifier,
            retain=retain,
            own=own,
            kl_positions=positions,
            **shared,
        )


def check(options: Options) -> None:
    """What does not fit together, before anything is read."""
    entry, constants = options.entry, options.constants
    if options.retain is None:
        if options.rectify:
            raise UsageProblem(
                "rectifying needs --retain rows: their gradient is what must not be hurt",
                "give --retain FILE, or --no-rectify for the bare objective",
            )
        for name, value in (("--alpha", constants.alpha), ("--add-retain", options.add_retain),
                            ("--add-kl", options.add_kl)):  # fmt: skip
            if value > 0:
                raise UsageProblem(
                    f"--objective {options.objective} with {name} {value:g} needs --retain rows", "give --retain FILE"
                )
        if options.log_geffect is not None:
            raise UsageProblem("--log-geffect compares with retain gradients", "give --retain FILE")
    if options.geometry == "optimizer" and options.optimizer != "adamw":
        raise UsageProblem("--geometry optimizer is AdamW's", "use --optimizer adamw, or --geometry raw")
    for name in ("beta", "beta1", "beta2", "delta_margin", "layer", "steer"):
        if getattr(options, name) is not None and name not in entry.options:
            flag = f"--{name.replace('_', '-')}"
            users = ", ".join(one for one, other in OBJECTIVES.items() if name in other.options)
            raise UsageProblem(f"{flag} means nothing to --objective {options.objective}", f"it belongs to {users}")
    if options.refusals is not None and not entry.refusals:
        raise UsageProblem(f"--refusals means nothing to --objective {options.objective}", "it belongs to idk, dpo")
    if (
        options.kl_positions != "labelled"
        and "kl" not in (options.retain_loss, entry.retain_loss)
        and not options.add_kl
    ):
        raise UsageProblem("--kl-positions belongs to --retain-loss kl, --objective klmin or --add-kl")
    if not options.rectify:
        for flag, given in (("--geometry optimizer", options.geometry == "optimizer"),
                            ("--cos-clip", options.cos_clip is not None)):  # fmt: skip
            if given:
                raise UsageProblem(f"{flag} means nothing with --no-rectify", "the bare objective is not corrected")
    check_files(options, options.refusals)
    check_record(options, "--log-geffect", options.log_geffect)


def run(options: Options, call: Invocation) -> None:
    """Unlearn ``options.forget`` and write ``options.out``; events go to stdout."""
    check(options)
    if options.objective == "rmu":
        pattern = rmu_parameters(options, options.constants.layer)
        options = options if options.lora_r else replace(options, train_params=pattern)

    def extras(outcome: Outcome) -> None:
        from toolbox.unlearning.geffect import draw_geffect

        draw = partial(draw_geffect, title=f"G-effect of {options.objective}")
        write_record(outcome, call, "--log-geffect", options.log_geffect, "geffect", draw)

    bare = "" if options.rectify else ", not rectified"
    run_task(GruTask(options), call, f"{options.objective}{bare}", "another --objective", extras)
