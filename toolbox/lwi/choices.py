"""lwi-fuse's options, what they mean for a plan, and what does not fit together."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolbox.lwi.match import Sinkhorn, Solver, hungarian
from toolbox.lwi.plan import Plan
from toolbox.shell.errors import UsageProblem

NOT_DECIDING = frozenset(
    {"models", "out", "report", "plot", "rejects", "on_bad", "map_fields", "root", "workers", "threads", "quiet",
     "max_shard_size", "overwrite", "resume", "verify_limit", "device", "spec", "print_spec"}
)  # fmt: skip
"""Options that leave the weights what they are; models and spec are told by their digests."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """lwi-fuse's options."""

    models: tuple[str, ...] = ()
    out: str | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    root: str | None = None
    report: str | None = None
    plot: tuple[str, ...] = ()
    k: str = "0.5"
    weights: str | None = None
    anchor: str = "order"
    deep: str | None = None
    no_diversion: bool = False
    matching: str = "coordinate"
    metric: str = "sqeuclidean"
    solver: str = "lsa"
    tau: float = 0.05
    sinkhorn_iters: int = 200
    soft: bool = False
    groups: str | None = None
    align_only: bool = False
    shuffle_seed: int | None = None
    recalibrate: str | None = None
    spec: str | None = None
    print_spec: bool = False
    max_sweeps: int | None = None
    verify_limit: float = 2e9
    no_verify: bool = False
    device: str = "auto"
    workers: int = 1
    max_shard_size: str = "5GB"
    threads: int | None = None
    seed: int = 0
    overwrite: bool = False
    resume: bool = False

    @property
    def assignment(self) -> Solver:
        """The solver of ``--solver``."""
        return hungarian if self.solver == "lsa" else Sinkhorn(self.tau, self.sinkhorn_iters)

    @property
    def shard_bytes(self) -> int:
        """``--max-shard-size`` in bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", self.max_shard_size.strip())
        if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
            raise UsageProblem(f"--max-shard-size {self.max_shard_size}: not a size", "as in 5GB or 500MB")
        return int(float(found[1]) * _UNITS[found[2].upper()])


def check(options: Options, streaming: bool) -> None:
    """What does not fit together, before anything is read. ``streaming``: the weights go to stdout."""
    if not options.models:
        raise UsageProblem("no models", "name the old and the new one, or - for a list on stdin")
    if "-" in options.models and len(options.models) > 1:
        raise UsageProblem("- is a list of models and stands alone", "name all models, or list all of them")
    if options.out is None and not options.print_spec:
        raise UsageProblem("no --out", "name a directory, a file (bare weights), or - for a stream")
    _ = options.shard_bytes
    fixed_k(options)
    told_weights(options)
    _compiled("groups", options.groups)
    if options.deep is not None and options.no_diversion:
        raise UsageProblem("--deep and --no-diversion exclude one another", "leave one out")
    if options.soft and options.solver != "sinkhorn":
        raise UsageProblem("--soft needs a soft plan", "add --solver sinkhorn")
    if options.soft and options.align_only:
        raise UsageProblem("--soft would not keep OLD's function, which --align-only promises", "leave one out")
    if options.recalibrate is not None and options.align_only:
        raise UsageProblem("--recalibrate would change OLD, which --align-only only renumbers", "leave one out")
    if options.recalibrate == "-":
        raise UsageProblem("--recalibrate -: name a manifest or a folder", "stdin is for the list of models")
    if options.resume and (streaming or (options.out or "").endswith(".safetensors")):
        raise UsageProblem("--resume continues a directory", "run again: a bare file is written in one go")
    for option, path in (("report", options.report), ("rejects", options.rejects)):
        if path == "-":
            raise UsageProblem(f"--{option} -: stdout is taken", "name a file")
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageProblem(f"--{option} {path}: no such directory", "make it first")


def _compiled(option: str, text: str | None) -> re.Pattern[str] | None:
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise UsageProblem(f"--{option} {text}: not a regular expression: {error}", "as in --groups 'ff|kv'") from None


# -- how much each model weighs -------------------------------------------------------------------------------------
def fixed_k(options: Options) -> float | None:
    """``--k`` as a number, None for auto. Raises: UsageProblem (2) outside [0, 1]."""
    if options.k == "auto":
        return None
    try:
        value = float(options.k)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageProblem(f"--k {options.k}: a number from 0 to 1, or auto, is expected", "k is the weight of OLD")
    return value


def told_weights(options: Options) -> list[float] | None:
    """``--weights``, one a model, as given. Raises: UsageProblem (2)."""
    if options.weights is None:
        return None
    try:
        values = [float(text) for text in options.weights.split(",")]
    except ValueError:
        values = [-1.0]
    if any(not 0 <= value < float("inf") for value in values) or not sum(values) > 0:
        raise UsageProblem(f"--weights {options.weights}: numbers from 0 on are expected", "as in --weights .5,.3,.2")
    return values


def shares(options: Options, row_k: Sequence[float | None], tasks: int | None) -> tuple[list[float], bool]:
    """For each model after the first, the share of all before it; and whether ``--weights`` had to be normalised.

    fused_t = k_t aligned(fused_{t-1}) + (1 - k_t) M_t. Weights w give the same mean by k_t = (w_0 + ... + w_{t-1}) /
    (w_0 + ... + w_t). ``auto`` is t / (t + 1), with t the tasks that have been learned before.
    Raises: UsageProblem (2) for a wrong number of weights, or auto without known tasks.
    """
    count = len(row_k)
    if (weights := told_weights(options)) is not None:
        if len(weights) != count:
            raise UsageProblem(f"--weights names {len(weights)}, there are {count} models", "one a model")
        total = [sum(weights[: place + 1]) for place in range(count)]
        told = [0.5 if total[t] == 0 else total[t - 1] / total[t] for t in range(1, count)]
        return told, abs(total[-1] - 1) > 1e-9
    if options.anchor == "first" and count > 2:
        return [t / (t + 1) for t in range(1, count)], False
    k = fixed_k(options)
    if k is None and tasks is None:
        raise UsageProblem("--k auto: OLD does not say how many tasks it has learned (lwi_tasks)", "give --k a number")
    told = []
    for t in range(1, count):
        here = row_k[t]
        seen = (tasks or 0) + t - 1
        told.append(here if here is not None else seen / (seen + 1) if k is None else k)
    return told, False


# -- which groups move, and how -------------------------------------------------------------------------------------
def moving_groups(options: Options, plan: Plan, common_base: bool) -> list[str]:
    """The groups that may move: those of ``--groups``, else all but the residual stream of models with one base.

    Raises: UsageProblem (2) for an expression that fits none.
    """
    pattern = _compiled("groups", options.groups)
    if pattern is None:
        return [name for name in plan.groups if not (common_base and name == plan.stream)]
    found = [name for name in plan.groups if pattern.search(name)]
    if not found:
        raise UsageProblem(f"--groups {options.groups}: fits none", f"there are {_some(plan.groups)}")
    return found


def deep_groups(options: Options, plan: Plan, moving: Collection[str]) -> list[str]:
    """The dissimilar groups, shallow to deep. Raises: UsageProblem (2) for more than there are, or a misfit."""
    if options.no_diversion or options.matching == "identity":
        return []
    counted = plan.deepest
    if options.deep is None:
        return [name for name in counted[len(counted) - plan.deep_default :] if name in moving]
    if options.deep.isdigit():
        count = int(options.deep)
        if count > len(counted):
            raise UsageProblem(f"--deep {count}: there are {len(counted)} such groups", f"they are {_some(counted)}")
        chosen = list(counted[len(counted) - count :])
    else:
        pattern = _compiled("deep", options.deep)
        assert pattern is not None
        chosen = [name for name in plan.groups if pattern.search(name)]
        if not chosen:
            raise UsageProblem(f"--deep {options.deep}: fits no group", f"there are {_some(plan.groups)}")
    if held := [name for name in chosen if name not in moving]:
        raise UsageProblem(f"--deep: {_some(held)} may not move", "let --groups fit them too")
    return chosen


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
