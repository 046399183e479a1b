"""lwi-train's options, and what does not fit together. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from toolbox.shell.errors import UsageProblem

DEFAULT_MODEL = "cifar-resnet32"
DEFAULT_SIZE = 32
NOT_DECIDING = frozenset(
    {"manifest", "out", "overwrite", "resume", "root", "map_fields", "on_bad", "rejects", "val", "init", "save_every",
     "plot", "threads", "quiet"}
)  # fmt: skip
"""Options that leave the weights what they are, or are known by a digest."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """lwi-train's options, by name."""

    manifest: str = "-"
    out: str = ""
    overwrite: bool = False
    resume: bool = False
    root: str | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    val: str | None = None
    tasks: int | None = None
    task: int | None = None
    task_field: str | None = None
    class_order: str = "sorted"
    kd: float = 1.0
    kd_temperature: float = 2.0
    aug: str = "weak"
    model: str | None = None
    init: str | None = None
    image_size: int | None = None
    epochs: float = 200
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "step"
    max_grad_norm: float = 10_000.0
    precision: str = "fp32"
    save_every: int | str = "auto"
    plot: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0


def check(options: Options) -> None:
    """Refuse (2) what does not fit together, before anything is read."""
    if options.tasks is None and options.task_field is None:
        raise UsageProblem("how are classes split into tasks?", "--tasks N, or --task-field NAME of the rows")
    if options.task_field is not None and options.class_order != "sorted":
        raise UsageProblem("--class-order is of no use with --task-field", "leave one out")
    if options.model is not None and options.init is not None:
        raise UsageProblem("--init is the model that goes on: --model cannot be another", "leave one out")
    if options.schedule == "patience" and options.val is None:
        raise UsageProblem("--schedule patience looks at a validation loss", "give --val IMAGES")
    if options.val == "-":
        raise UsageProblem("--val -: stdin is for the images to learn", "name a manifest or a folder")
    if options.rejects is not None and not Path(options.rejects).absolute().parent.is_dir():
        raise UsageProblem(f"--rejects {options.rejects}: no such directory", "make it first")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UsageProblem("FSDP is of no use here: these networks are small", "use recipes/accelerate/ddp.yaml")
    for path in options.plot:
        from toolbox.plots import plot_format

        plot_format(path)
