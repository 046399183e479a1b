"""The training loop as lm-tune drives it, on the embedded model, one thread, fp32."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bench_models import encoded_rows, need_smollm2, smollm2
from bench.common import Figure, Skip, ratios

BATCH = 8
_LR = 1e-6  # small: the weights hardly move, so every step costs the same
_STATE_GIB = 4
"""Room for two states of parameters and two moments: the older one goes when the newer stands."""


def tuning_loop(model: Any, rows: Sequence[Any], steps: int, state_dir: Path | None = None) -> Any:
    """``lm-tune``'s loop over ``rows`` in windows of ``BATCH``: AdamW, automatic micro-batches, no evaluation."""
    from toolbox.lm.tune import Options
    from toolbox.models.token_loss import TokenLoss
    from toolbox.training.loop import Loop, LoopSettings
    from toolbox.training.prepare import make_optimizer
    from toolbox.training.processes import start_processes
    from toolbox.training.token_rows import SupervisedObjective
    from toolbox.training.windows import Plan, Stream

    accelerator = start_processes()
    options = Options(model="smollm2", out="", batch_size=BATCH, weight_decay=0.01)
    head = TokenLoss(model.requires_grad_(True), options.loss_chunk)
    prepared, optimizer = accelerator.prepare(head, make_optimizer(head, options, _LR))
    leading = Stream("train", len(rows), BATCH)
    plan = Plan(leading, (), steps * BATCH / len(rows), seed=0)
    settings = LoopSettings(_LR, eval_every=0, save_every=0)
    objective = SupervisedObjective({"train": rows}, pad_id=0)
    return Loop(accelerator, prepared, objective, [optimizer], plan, settings, state_dir=state_dir)


def plain_step(model: Any, rows: Sequence[Any]) -> Callable[[], None]:
    """What a short script does: all rows in one padded batch with its mask, transformers' own loss, AdamW."""
    import torch

    from toolbox.models.token_loss import collate

    batch = collate(rows, pad_id=0)
    targets = torch.full_like(batch.ids, -100)
    targets.view(-1)[batch.where + 1] = batch.labels  # transformers shifts them back
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=targets, use_cache=False).loss.backward()
        optimizer.step()

    return step


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    wall, cpu = time.monotonic(), time.process_time()
    function()
    return time.process_time() - cpu, time.monotonic() - wall


def tune(quick: bool) -> Iterator[Figure]:
    """Training tokens through the loop, and the loop's step against a plain one on the same rows."""
    need_smollm2()
    repeats = 1 if quick else 5
    model, chat = smollm2()
    rows, source = encoded_rows(chat, BATCH)
    tokens = sum(len(row.ids) for row in rows)
    events = tuning_loop(model, rows, repeats + 1).run()
    steps = {"loop": lambda: next(events), "plain": plain_step(model, rows)}
    seconds: dict[str, list[float]] = {"loop": [], "plain": []}
    for repeat in range(repeats + 1):
        for name in list(steps)[:: -1 if repeat % 2 else 1]:
            used, _ = timed(steps[name])
            if repeat:  # the first step of each makes its moments
                seconds[name].append(used)
    events.close()
    yield Figure.of(
        "tune: tokens", [tokens / one for one in seconds["loop"]], "tokens/CPU-s", target=">= 60",
        note=f"{BATCH} {source} a step, {tokens} tokens: all tokens of the rows, no padding",
    )  # fmt: skip
    yield Figure.of(
        "tune: against a plain step", ratios(seconds["plain"], seconds["loop"]), "×",
        ratio_of="CPU of a step by full logits over one padded batch / of the loop's step",
    )  # fmt: skip


def saved_state(quick: bool) -> Iterator[Figure]:
    """Writing the state of a run (parameters, moments, random states) against one step of it."""
    need_smollm2()
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if free < _STATE_GIB:
        raise Skip(f"{_STATE_GIB} GiB of temporary space are needed, {free:.1f} are free")
    repeats = 1 if quick else 3
    model, chat = smollm2()
    rows, source = encoded_rows(chat, BATCH)
    stepped, saved, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        loop = tuning_loop(model, rows, repeats + 1, Path(folder))
        events = loop.run()
        next(events)  # the first step makes the moments
        for _ in range(repeats):
            stepped.append(timed(lambda: next(events)))
            saved.append(timed(loop.save))
            size = sum(file.stat().st_size for file in Path(folder).glob("step-*/*"))
        events.close()
    yield Figure.of("state: save", [cpu for cpu, _ in saved], "CPU-s", note=f"{size / 2**30:.2f} GiB")
    yield Figure.of("state: save, wall", [wall for _, wall in saved], "s", note="flushed to the disk")
    note = f"{BATCH} {source} a step"
    for place, unit in enumerate(("CPU", "wall time")):
        above, below = ([pair[place] for pair in pairs] for pairs in (saved, stepped))
        yield Figure.of(
            f"state: {unit} against a step", ratios(above, below), "×",
            ratio_of=f"{unit} of saving a state / of one step", note=note,
        )  # fmt: skip


BENCHES = {"tune": tune, "state": saved_state}
