"""Unlearning steps through the training loop, their memory, and scoring a stored log; one thread, fp32."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bench.bench_models import need_smollm2, smollm2
from bench.common import PEOPLE, ROOT, Figure, Skip, alternate, in_child, memory_mib, process_seconds, ratios

BATCH = 8
ALPHA = 0.1
"""SatImp's factor of the retain loss."""
_LR = 1e-6  # small: the weights hardly move, so every step costs the same
_SPLIT = 4
"""Rows of a micro-batch where ours is asked to save memory; left to itself it takes all of them at once."""
_EXPONENTS = (5.0, 0.1)
"""SatImp's (β1, β2)."""

Rows = Mapping[str, Sequence[Any]]


# -- rows and loops ---------------------------------------------------------------------------------------------------
def people_rows(count: int) -> dict[str, list[dict[str, str]]]:
    """The first ``count`` questions with answers of the embedded people's forget and retain sets."""
    found = {}
    for name in ("forget", "retain"):
        lines = (PEOPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        found[name] = [{key: json.loads(line)[key] for key in ("question", "answer")} for line in lines]
    return found


def turns(row: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def encoded_people(chat: Any) -> dict[str, list[Any]]:
    """``BATCH`` rows of each set as tokens, by the model's chat template."""
    return {name: [chat.encode(turns(row)) for row in rows] for name, rows in people_rows(BATCH).items()}


def unlearning_loop(
    accelerator: Any, prepared: Any, optimizer: Any, objective: Any, steps: int, **settings: Any
) -> Any:
    """The trainers' loop over windows of ``BATCH`` forget and as many retain rows: automatic micro-batches, nothing
    evaluated or saved. ``settings`` are ``LoopSettings``'."""
    from toolbox.training.loop import Loop, LoopSettings
    from toolbox.training.windows import Plan, Stream

    counts = {name: len(rows) for name, rows in objective.rows.items()}
    following = [Stream("retain", counts["retain"], 0)] if "retain" in counts else []
    plan = Plan(Stream("forget", counts["forget"], BATCH), following, steps * BATCH / counts["forget"], seed=0)
    wanted = LoopSettings(**{"lr": _LR, "eval_every": 0, "save_every": 0, **settings})
    return Loop(accelerator, prepared, objective, [optimizer], plan, wanted)


def prepare(model: Any, lr: float = _LR) -> tuple[Any, Any, Any]:
    """The accelerator, the model as the trainers wrap it, and their AdamW over it."""
    from toolbox.models.token_loss import TokenLoss
    from toolbox.training.prepare import make_optimizer, without_dropout
    from toolbox.training.processes import start_processes
    from toolbox.unlearning.run import Options

    accelerator = start_processes()
    options = Options(model="smollm2", forget="", out="", batch_size=BATCH)
    without_dropout(model)
    head = TokenLoss(model.requires_grad_(True), options.loss_chunk)
    return accelerator, *accelerator.prepare(head, make_optimizer(head, options, lr))


def objectives(rows: Rows) -> dict[str, Any]:
    """What is compared: GA, GRU around it, GradDiff (α 1) and SatImp (α .1), with the commands' own defaults."""
    from toolbox.unlearning.losses import make_forget_loss
    from toolbox.unlearning.objectives import Retention, UnlearnObjective
    from toolbox.unlearning.rectified import GruObjective, Rectifier
    from toolbox.unlearning.registry import resolve

    def loss(name: str) -> Any:
        return make_forget_loss(name, resolve(name, {}), seed=0)

    forget = {"forget": rows["forget"]}
    return {
        "ga": UnlearnObjective(forget, 0, loss("ga")),
        "gru": GruObjective(rows, 0, loss("ga"), Rectifier(), retain=Retention()),
        "graddiff": UnlearnObjective(rows, 0, loss("graddiff"), retain=Retention(factor=1.0)),
        "satimp": UnlearnObjective(rows, 0, loss("satimp"), retain=Retention(factor=ALPHA)),
    }


# -- time -------------------------------------------------------------------------------------------------------------
def steps(quick: bool) -> Iterator[Figure]:
    """Whole steps of four objectives in turns, over one model and one AdamW: moments of one kind serve all."""
    need_smollm2()
    repeats = 1 if quick else 5
    model, chat = smollm2()
    rows = encoded_people(chat)
    accelerator, prepared, optimizer = prepare(model)
    runs = {
        name: unlearning_loop(accelerator, prepared, optimizer, one, repeats + 1).run()
        for name, one in objectives(rows).items()
    }
    rectified: list[bool] = []

    def gru() -> None:
        rectified.append(next(runs["gru"])["rectified"])

    calls: dict[str, Callable[[], Any]] = {name: lambda run=run: next(run) for name, run in runs.items()}
    with contextlib.ExitStack() as closing:  # in reverse: each has put its signal handlers over the one before
        for run in runs.values():
            closing.callback(run.close)
        seconds = alternate(repeats, {**calls, "gru": gru})
    forget, retain = (sum(len(row.ids) for row in rows[name]) for name in ("forget", "retain"))
    note = f"{BATCH} embedded people forgotten ({forget} tokens), {BATCH} kept ({retain}); AdamW, moments there already"
    for name, said in (("ga", "GA"), ("gru", "GRU(GA)"), ("graddiff", "GradDiff"), ("satimp", "SatImp")):
        yield Figure.of(f"unlearn step: {said}", seconds[name], "CPU-s", note=note)
    yield Figure.of(
        "unlearn step: GRU against GA", ratios(seconds["gru"], seconds["ga"]), "×", target="<= 2.4",
        ratio_of="CPU of a GRU(GA) step / of a GA step without retain rows",
        note=f"{sum(rectified)} of {len(rectified)} steps rectified; update_cos measured",
    )  # fmt: skip
    yield Figure.of(
        "unlearn step: SatImp against GradDiff", ratios(seconds["satimp"], seconds["graddiff"]), "×",
        target="<= 1.05", ratio_of="CPU of a SatImp step / of a GradDiff step",
    )  # fmt: skip


# -- memory -----------------------------------------------------------------------------------------------------------
def plain_satimp(model: Any, rows: Rows) -> Callable[[], float]:
    """SatImp as a short script: all rows of a set in one padded batch, the logits of all positions, one backward."""
    import torch
    from torch.nn import functional

    from toolbox.models.token_loss import collate

    batches = {name: collate(of_set, pad_id=0) for name, of_set in rows.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0, fused=True)

    def nll(name: str) -> Any:
        batch = batches[name]
        targets = torch.full((batch.ids.numel(),), -100)
        targets[batch.where] = batch.labels
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="none")

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        forget, retain = nll("forget"), nll("retain")
        p = torch.exp(-forget.detach())  # 1 where nothing is labelled: no weight
        weight = p ** _EXPONENTS[0] * (1 - p) ** _EXPONENTS[1]
        loss = -(weight * forget).sum() / len(batches["forget"].labels)
        loss = loss + ALPHA * retain.sum() / len(batches["retain"].labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def satimp_peak(kind: str) -> dict[str, float]:
    """Peak resident MiB of a process that makes two SatImp steps, what it held before there was a model, and the first
    step's loss. Run in a fresh process.

    ``ours``: through the loop. ``split``: so, ``_SPLIT`` rows at a time. ``full``: by full logits. ``cloned``: so,
    beside a copy of the model. The second step is the one with AdamW's moments in memory.
    """
    for library in ("accelerate", "transformers.models.llama.modeling_llama"):
        importlib.import_module(library)
    libraries = memory_mib("VmRSS")
    model, chat = smollm2()
    rows = encoded_people(chat)
    reference = None
    if kind in ("ours", "split"):
        given = {"micro_batch": _SPLIT} if kind == "split" else {}
        events = unlearning_loop(*prepare(model), objectives(rows)["satimp"], 2, **given).run()
        losses = [next(events)["loss"] for _ in range(2)]
        events.close()
    else:
        if kind == "cloned":
            reference = copy.deepcopy(model).requires_grad_(False)
        step = plain_satimp(model.requires_grad_(True), rows)
        losses = [step() for _ in range(2)]
    peak = memory_mib("VmHWM")
    del reference  # held until here
    return {"peak": peak, "libraries": libraries, "loss": losses[0]}


def memory(quick: bool) -> Iterator[Figure]:
    """Peak memory of a SatImp run against the simple ways of writing one, each in a process of its own."""
    need_smollm2()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "cloned": [], "full": [], "split": []}
    for repeat in range(1 if quick else 2):
        for kind, runs in found.items():
            if repeat == 0 or kind in ("ours", "cloned"):
                runs.append(in_child(satimp_peak, kind))
    peaks = {kind: [one["peak"] for one in runs] for kind, runs in found.items()}
    beyond = {kind: [one["peak"] - one["libraries"] for one in runs] for kind, runs in found.items()}
    libraries = max(one["libraries"] for runs in found.values() for one in runs)
    shape = f"{BATCH} embedded people forgotten, {BATCH} kept; AdamW, two steps; VmHWM, {libraries:.0f} of it libraries"
    for kind, said in (("ours", "ours"), ("split", f"ours, --micro-batch {_SPLIT}"), ("full", "full logits"),
                       ("cloned", "full logits and a cloned reference")):  # fmt: skip
        yield Figure.of(f"satimp memory: {said}", peaks[kind], "MiB", note=shape)
    said = "ours / full logits of both batches beside a cloned reference model"
    yield Figure.of(
        "satimp memory: against a cloned reference", ratios(peaks["ours"], peaks["cloned"]), "×", target="<= 0.75",
        ratio_of=f"peak resident memory of the process, {said}",
        note="a retain loss by NLL never asks that reference anything; it is only held",
    )  # fmt: skip
    yield Figure.of(
        "satimp memory: the same without libraries", ratios(beyond["ours"], beyond["cloned"]), "×",
        ratio_of=f"peak resident memory beyond the imported libraries, {said}",
    )  # fmt: skip
    yield Figure.of(
        f"satimp memory: the same by --micro-batch {_SPLIT}", ratios(peaks["split"], peaks["cloned"][:1]), "×",
        ratio_of=f"peak resident memory of the process, {said}",
        note="a smaller micro-batch changes rounding, not the step",
    )  # fmt: skip
    yield Figure.of(
        "satimp memory: against full logits", ratios(peaks["ours"][:1], peaks["full"]), "×",
        ratio_of="peak resident memory of the process, ours / full logits of both batches, no reference",
    )  # fmt: skip
    first, other = found["ours"][0]["loss"], found["cloned"][0]["loss"]
    yield Figure("satimp memory: same loss", abs(first - other) / abs(other), "relative", target="<= 1e-5",
                 note="of the first step, ours and the simple version")  # fmt: skip


# -- a stored log -----------------------------------------------------------------------------------------------------
LOGS = ROOT.parent / "shared" / "data" / "unlearning" / "tofu_eval_logs"
_GOLDEN = 1.834066e-21
"""Forget quality of that model, as the log's own project computes it."""


def stored_log(quick: bool) -> Iterator[Figure]:
    """``unlearn-eval --from-log`` with a reference, as true processes."""
    log, reference = (LOGS / f"llama2-7b_{name}_wd0.01.json.gz" for name in ("full", "retain90"))
    if not (log.is_file() and reference.is_file()):
        raise Skip("TOFU's stored logs do not lie beside the checkout")
    command = [sys.executable, str(ROOT / "bin/unlearn-eval"), "--quiet"]
    words = [*command, "--from-log", str(log), "--reference", str(reference)]
    scores = json.loads(subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout)  # fills the file cache
    cpu, wall = [], []
    for _ in range(1 if quick else 3):
        began = time.monotonic()
        cpu.append(process_seconds(words))
        wall.append(time.monotonic() - began)
    rows = sum(scores["n"].values())
    note = f"{rows} items and as many of the reference, start of Python included"
    yield Figure.of("from-log: CPU", cpu, "CPU-s", target="< 3", note=note)
    yield Figure.of("from-log: wall", wall, "s", target="< 3", note=note)
    quality = scores["forget_quality"]
    yield Figure("from-log: forget quality", abs(quality / _GOLDEN - 1), "relative", target="<= 1e-6",
                 note=f"{quality:.6e} against {_GOLDEN:.6e}: what was timed is right")  # fmt: skip


BENCHES = {"unlearn-step": steps, "satimp-memory": memory, "from-log": stored_log}
