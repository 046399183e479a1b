"""dull-train's options, and what can be wrong with them before anything is read. No torch at import."""

from __future__ import annotations

import os
from dataclasses import dataclass

from toolbox.shell.errors import UsageProblem

NOT_DECIDING = {
    "source", "root", "eval_", "eval_every", "clean_field", "out", "overwrite", "resume", "save_every", "threads",
    "quiet", "plot", "map_fields", "on_bad", "rejects", "shots", "trust_remote_code", "model",
}  # fmt: skip
"""Options that decide no weight, or that are known by a digest."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, by name."""

    source: str = "-"
    root: str | None = None
    eval_: str | None = None
    clean_field: str = "dull.label_clean"
    limit: int | None = None
    out: str = ""
    overwrite: bool = False
    resume: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    method: str = "dull"
    ifd: bool = True
    ifpu: bool = True
    aml: bool = True
    h2t: bool = True
    logit_adjust: bool = True
    gate: str = "auto"
    h2t_always: bool = False
    rho: float = 0.2
    lambda_gate: float | str = "auto"
    lr_gate: float | str = "auto"
    alpha_ifd: float = 0.5
    beta: float = 0.7
    ifpu_scope: str = "t2h"
    eta: float = 1.0
    mixup_alpha: float = 4.0
    remix_kappa: float = 3.0
    remix_tau: float = 0.5
    elr_lambda: float = 3.0
    warmup_epochs: int | str = "auto"
    holdout: float = 0.05
    model: str = "cifar-resnet8"
    trust_remote_code: bool = False
    image_size: int | None = None
    aug: str = "weak"
    epochs: int = 12
    batch_size: int = 64
    micro_batch: int | str = "auto"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    optimizer: str = "sgd"
    schedule: str = "onecycle"
    warmup: float = 0.0
    max_grad_norm: float = 0.0
    ema: float = 0.999
    precision: str = "fp32"
    shots: str = "auto"
    eval_every: int = 1
    save_every: int | str = "auto"
    plot: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0

    @property
    def warm(self) -> int:
        """Epochs before the gate is judged: by default 30 % of the run, at least 3 and at most 30."""
        if self.warmup_epochs == "auto":
            return min(30, max(3, round(0.3 * self.epochs)))
        return int(self.warmup_epochs)

    @property
    def uses_prior(self) -> bool:
        """Whether the loss carries log π."""
        return self.logit_adjust and self.method in ("dull", "la")


def shot_bounds(text: str) -> tuple[int, int] | None:
    """``auto`` or ``HIGH,LOW``; UsageProblem (2) for anything else."""
    if text == "auto":
        return None
    high, _, low = text.partition(",")
    if not (high.isascii() and high.isdigit() and low.isascii() and low.isdigit()) or int(low) > int(high):
        raise UsageProblem(f"--shots {text}: two numbers of images are expected", "as in 100,20, or auto")
    return int(high), int(low)


def check(options: Options) -> None:
    """Refuse (2) what does not fit together, with the reason."""
    if options.clean_field == "label":
        raise UsageProblem("--clean-field is the label field itself", "name the field with the clean labels")
    if options.method != "dull":
        off = [name for name in ("ifd", "ifpu", "aml", "h2t") if not getattr(options, name)]
        words = [f"--no-{name}" for name in off]
        words += ["--gate open"] * (options.gate == "open") + ["--h2t-always"] * options.h2t_always
        if words:
            raise UsageProblem(f"{words[0]} is DULL's, not of --method {options.method}", "leave it out")
    if options.h2t_always and not options.h2t:
        raise UsageProblem("--h2t-always and --no-h2t exclude one another", "give one of them")
    if not options.logit_adjust and options.method not in ("dull", "la"):
        raise UsageProblem(f"--no-logit-adjust: --method {options.method} has none", "leave it out")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UsageProblem(
            "FSDP is not supported: the gates read the head's weights", "use recipes/accelerate/ddp.yaml"
        )
    shot_bounds(options.shots)
