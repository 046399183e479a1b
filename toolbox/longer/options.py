"""longer-train's options, and what can be wrong with them before anything is read. No torch at import."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec

from toolbox.longer.dataset import Manifest
from toolbox.shell.errors import UsageProblem
from toolbox.shell.lists import comma_list

PLAIN_TABLES = "dense"
KERNELS = ("fused", "fused_uvm", "fused_uvm_caching", "key_value")

NOT_DECIDING = {"data", "out", "overwrite", "resume", "save_every", "threads", "quiet", "plot", "init_from"}
"""Options that do not decide the result, or are known by a digest."""
FREE_ON_RESUME = {"micro_batch", "recompute"}
"""What a resumed run may change: it touches nothing but memory and rounding."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, by name."""

    data: str
    out: str
    overwrite: bool = False
    resume: bool = False
    arch: str = "longer"
    max_len: int = 2048
    dim: int = 32
    merge: int = 8
    inner_layers: int = 1
    queries: str = "100"
    query_strategy: str = "recent"
    layers: int = 1
    heads: int | None = None
    globals_: str | None = None
    cls: int = 1
    time_delta: bool = True
    position: bool = True
    readout: str = "target"
    dropout: float = 0.0
    attention: str = "auto"
    embedding: str = PLAIN_TABLES
    torchrec_kernel: str = "fused"
    init_from: str | None = None
    batch_requests: int = 64
    max_candidates: int = 64
    micro_batch: int | str = "auto"
    epochs: float = 1.0
    max_labels: int | None = None
    max_steps: int | None = None
    lr: float = 1e-3
    emb_lr: float = 0.05
    weight_decay: float = 0.01
    warmup: float = 0.02
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    order: str = "shuffle"
    precision: str = "fp32"
    recompute: str = "none"
    eval_every: int = 0
    early_stop: str | None = None
    patience: int = 2
    save_every: int | str = "auto"
    plot: tuple[str, ...] = ()
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Choices:
    """What the options come to with this data set."""

    max_len: int
    queries: int
    uid: bool
    cls: int
    heads: int | None
    attention: str


def check(options: Options) -> None:
    """Refuse (2) what does not fit together, with the reason."""
    merge = options.merge if options.arch == "longer" else 1
    width = options.dim * merge
    if options.heads is not None and width % options.heads:
        raise UsageProblem(f"--heads {options.heads} does not divide the width {width} (--dim times --merge)", None)
    if options.heads is None and width > 64 and width % (width // 64):
        raise UsageProblem(f"the default of {width // 64} heads does not divide the width {width}", "give --heads")
    if options.dim > 32 and options.dim % (options.dim // 32):
        raise UsageProblem(f"--dim {options.dim}: not divisible by its {options.dim // 32} inner heads", "as in 64")
    if options.readout == "target+cls" and options.arch not in ("longer", "transformer"):
        raise UsageProblem(f"--readout target+cls: {options.arch} has no CLS tokens", "leave it out")
    if options.query_strategy != "recent" and options.arch != "longer":
        raise UsageProblem(f"--query-strategy is LONGER's, not of {options.arch}", "leave it out")
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UsageProblem(
            "FSDP is of no use here: the dense part is small", "tables scale through --embedding torchrec"
        )
    query_count(options.queries, options.max_len, merge)
    _check_torchrec(options)
    _check_devices(options)


def _check_torchrec(options: Options) -> None:
    if options.embedding != "torchrec":
        if options.torchrec_kernel != "fused":
            raise UsageProblem("--torchrec-kernel needs --embedding torchrec", None)
        return
    if options.precision == "fp16":
        raise UsageProblem("fp16 with --embedding torchrec: its optimiser runs before scaling is undone",
                           "use --precision bf16")  # fmt: skip
    if options.micro_batch not in ("auto", options.batch_requests):
        raise UsageProblem("--micro-batch with --embedding torchrec: its optimiser runs at every backward",
                           "leave --micro-batch out")  # fmt: skip
    if options.optimizer != "adamw" or options.early_stop or options.init_from:
        raise UsageProblem(
            "--embedding torchrec goes with --optimizer adamw, without --early-stop and --init-from", None
        )
    missing = [name for name in ("torchrec", "fbgemm_gpu") if find_spec(name) is None]
    if missing:
        raise UsageProblem(
            f"--embedding torchrec: {' and '.join(missing)} not installed",
            "pip install 'toolbox-ten[torchrec]' on CUDA, or make setup-torchrec on a CPU",
        )


def _check_devices(options: Options) -> None:
    needs = []
    if options.attention == "flex":
        needs.append("--attention flex")
    if options.precision == "fp16":
        needs.append("--precision fp16")
    if options.torchrec_kernel != "fused":
        needs.append(f"--torchrec-kernel {options.torchrec_kernel}")
    if needs:
        import torch

        if not torch.cuda.is_available():
            raise UsageProblem(f"{needs[0]} needs a CUDA device, there is none", "leave it out")
    if options.precision == "fp16":
        raise UsageProblem("--precision fp16: the loop has no loss scaling", "use bf16, which needs none")


def query_count(text: str, max_len: int, merge: int) -> int:
    """``100`` or ``40%`` of the merged tokens, at most all of them; UsageProblem (2) for anything else."""
    tokens = -(-max_len // merge)
    number = text.removesuffix("%")
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError:
        value = math.nan
    if not value > 0 or (text.endswith("%") and value > 100):
        raise UsageProblem(f"--queries {text}: a number of merged tokens, or a share of them", "as in 100 or 40%")
    return min(tokens, math.ceil(value / 100 * tokens) if text.endswith("%") else int(value))


def choose(options: Options, manifest: Manifest) -> tuple[Choices, list[str]]:
    """The choices for this data set, and notes about those that a user may not expect."""
    notes = []
    merge = options.merge if options.arch == "longer" else 1
    max_len = -(-options.max_len // merge) * merge
    if max_len != options.max_len:
        notes.append(f"--max-len rounded up to {max_len}, a multiple of --merge")
    queries = query_count(options.queries, max_len, merge)
    if not options.queries.endswith("%") and int(options.queries) > queries and options.arch == "longer":
        notes.append(f"--queries clamped to {queries}, all merged tokens there are")
    if options.globals_ is None:
        uid = not manifest.user_disjoint
        if manifest.user_disjoint:
            notes.append("test users are not in training: no uid token (--globals cls,uid would add one)")
        names = ("cls", "uid") if uid else ("cls",)
    else:
        none = options.globals_ == "none"
        names = () if none else comma_list("globals", options.globals_, ("cls", "uid"), besides="none")
    cls = options.cls if "cls" in names and options.arch in ("longer", "transformer") else 0
    if options.readout == "target+cls" and not cls:
        raise UsageProblem("--readout target+cls without CLS tokens", "name cls in --globals")
    attention = "sdpa" if options.attention == "auto" else options.attention
    return Choices(max_len, queries, "uid" in names, cls, options.heads, attention), notes
