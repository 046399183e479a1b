"""lit-tune's options and what does not fit together among them. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from toolbox.lit.build import DEFAULT
from toolbox.lit.templates import split_names
from toolbox.shell.errors import UsageProblem
from toolbox.training.fingerprint import deciding, option_marks
from toolbox.training.language import NOT_DECIDING

PARTS = ("connector", "lm", "vision")
_LR = {"pretrain": 1e-3, "finetune": 2e-5}
"""LLaVA's learning rates."""

_NOT_DECIDING = NOT_DECIDING | {"eval_rows", "image_root", "cache_vision"}
_FREE_ON_RESUME = {"micro_batch", "loss_chunk", "grad_checkpointing", "threads"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-tune's options; the names are those of the command line."""

    file: str = "-"
    model: str = DEFAULT
    trust_remote_code: bool = False
    out: str = ""
    overwrite: bool = False
    resume: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    eval_rows: str | None = None
    image_root: str | None = None
    max_image_pixels: float = 50e6
    max_images_per_row: int = 8
    mode: str = "lit"
    stage: str = "finetune"
    force: bool = False
    task_templates: str = "auto"
    min_share: float = 0.15
    split: str = "newline,punct,colon"
    instruct_weight: float = 1.0
    response_weight: float = 1.0
    normalize: str = "tokens"
    text_only_instructions: str = "on"
    image_position: str = "first"
    control_tokens: str = "escape"
    train_parts: str | None = None
    connector_lr: float | None = None
    vision_lr: float | None = None
    max_steps: int | None = None
    max_length: int = 2048
    overlong: str = "drop"
    group_by_length: bool = False
    cache_vision: str | None = None
    lr: float | str = "auto"
    epochs: float = 1
    batch_size: int = 16
    micro_batch: int | str = "auto"
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    optimizer: str = "adamw"
    grad_checkpointing: bool = False
    loss_chunk: int = 1024
    seed: int = 0
    lora_r: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    eval_every: int | str = "epoch"
    save_every: int | str = "auto"
    threads: int | None = None

    @property
    def parts(self) -> dict[str, int | None]:
        """Trained parts; of ``lm:4`` the number of last layers."""
        default = "connector" if self.stage == "pretrain" else "connector,lm"
        found: dict[str, int | None] = {}
        for word in (self.train_parts or default).split(","):
            match = re.fullmatch(r"(connector|vision|lm)(?::([1-9][0-9]*))?", word.strip())
            if match is None or (match[2] and match[1] != "lm") or match[1] in found:
                raise UsageProblem(f"--train-parts {self.train_parts}: not understood", "as in connector,lm or lm:4")
            found[match[1]] = int(match[2]) if match[2] else None
        return found

    @property
    def splits(self) -> tuple[str, ...]:
        """The sentence rule."""
        return split_names(self.split)

    @property
    def rate(self) -> float:
        """The learning rate, by stage where it is not given."""
        return _LR[self.stage] if self.lr == "auto" else float(self.lr)

    @property
    def label_mode(self) -> str:
        """What is supervised: when a connector is aligned, the caption."""
        return "vit" if self.stage == "pretrain" and not self.force else self.mode

    def deciding(self) -> dict[str, Any]:
        """Options that decide the result."""
        return deciding(self, _NOT_DECIDING)

    def marks(self) -> dict[str, Any]:
        """What a resumed run must share."""
        return option_marks(self, _NOT_DECIDING | _FREE_ON_RESUME)


def check(options: Options, given: frozenset[str] = frozenset()) -> None:
    """What does not fit together. ``given``: options that the user named."""
    _ = options.parts, options.splits
    if options.stage == "pretrain" and options.mode != "vit" and "mode" in given and not options.force:
        raise UsageProblem(
            f"--mode {options.mode} at --stage pretrain: its prompts are fixed and say nothing of the image",
            "LIT belongs to --stage finetune; --force insists",
        )
    if options.lora_r and options.train_parts is not None:
        raise UsageProblem("--train-parts does not apply to --lora-r", "adapters go onto the language model")
    if not options.lora_r and (options.lora_alpha or options.lora_targets):
        raise UsageProblem("--lora-alpha and --lora-targets need --lora-r", "as in --lora-r 8")
    if options.cache_vision is not None and "vision" in options.parts:
        raise UsageProblem("--cache-vision with a trained vision tower: its features change", "leave one out")
    if options.response_weight == 0 and options.instruct_weight == 0:
        raise UsageProblem("--response-weight 0 and --instruct-weight 0: nothing is learned", "keep one above 0")
    if options.file == "-" and options.eval_rows == "-":
        raise UsageProblem("only one input can be stdin (-)", "name a file for the other")
