"""The one training loop.

A step takes a window of rows, runs the objective's passes over it in order (micro-batches, gradients reduced on the
last one), lets the objective look at the gradients, clips, and steps the optimisers. What is watched, saved and said
happens between steps. The loop knows nothing about tokens, forgetting or files of results.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from toolbox.shell.errors import AlreadyReported, TryAgain
from toolbox.shell.interrupts import Interrupts
from toolbox.training.heap import keep_freed_memory
from toolbox.training.objective import Ground, Objective, Pass
from toolbox.training.processes import sum_over_processes
from toolbox.training.state import RunState, TrainingTensors, load_tensors, local_part, read_state, save_state
from toolbox.training.stopping import StopWhen
from toolbox.training.windows import Plan, Window, share_out

if TYPE_CHECKING:
    from accelerate import Accelerator

_SAVE_SECONDS = 60.0
"""With ``save_every="auto"``: the least time between two saved states."""
_SAVE_SHARE = 20.0
"""... and so many times as long as the last saving took: it costs at most a twentieth of the run."""
AUTO_TOKENS, AUTO_TOKENS_CPU = 1024, 512
"""With ``micro_batch="auto"``: padded tokens of one backward pass, unless the settings say otherwise. On a CPU more at
a time is no faster and keeps more activations."""

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class LoopSettings:
    """How to step: schedule, clipping, splitting, saving, evaluating.

    ``auto_length``: with ``micro_batch="auto"``, the most that the padded lengths of one backward pass add up to;
    None goes by the device. ``evaluate_start``: whether the model is evaluated before the first step. ``drops``: where
    ``step`` falls.
    """

    lr: float
    warmup: float = 0.0
    schedule: str = "constant"
    max_grad_norm: float = 0.0
    micro_batch: int | str = "auto"
    eval_every: int | str = "epoch"
    save_every: int | str = "auto"
    auto_length: int | None = None
    evaluate_start: bool = True
    drops: tuple[float, ...] = (0.5,)


def learning_rate(
    step: int, steps: int, lr: float, warmup: float, schedule: str, drops: Sequence[float] = (0.5,)
) -> float:
    """The learning rate of ``step`` (1-based) of ``steps``.

    Linear from 0 over the warm-up (a number of steps, or below 1 a share of all), full at its end; then
    ``constant``, ``linear`` / half-``cosine`` to 0 just behind the last step, or (``step``) a tenth at each of
    ``drops``, shares of the run. ``onecycle`` has its own warm-up: torch's OneCycleLR (L. Smith and N. Topin, arXiv
    1708.07120), by half cosines from lr/25 to lr over 30 % of the run and down to lr/250,000.
    """
    if schedule == "onecycle":
        return _one_cycle(step - 1, steps, lr)
    warm = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if step <= warm:
        return lr * step / warm
    share = (step - 1 - warm) / max(1, steps - warm)
    match schedule:
        case "linear":
            return lr * (1 - share)
        case "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * share))
        case "step":
            return lr * 0.1 ** sum(step > round(drop * steps) for drop in drops)
        case _:
            return lr


def _one_cycle(place: int, steps: int, lr: float) -> float:
    peak, end = 0.3 * steps - 1, steps - 1
    low, high, share = lr / 25, lr, place / peak if peak > 0 else 1.0
    if place > peak:
        low, high, share = lr, lr / 25 / 1e4, (place - peak) / max(end - peak, 1)
    return high + (low - high) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


class Loop:
    """Runs a plan; iterate ``run()`` for its events.

    Args:
        accelerator: from ``start_processes``.
        model: the module whose forward the objective calls (already prepared by ``prepare``).
        optimizers: one or more, over disjoint parameters; a group's ``scale`` multiplies the learning rate.
        clipped: parameters inside the gradient-norm clip (default: all trained ones).
        evaluate: gives ``{set: {"n", "es", "prob"}}``; called on every rank.
        state_dir: where states are saved; None saves nothing.
        each_rank: whether ranks hold different things, so that each saves its own also where no parameter is sharded.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: Objective,
        optimizers: Sequence[torch.optim.Optimizer],
        plan: Plan,
        settings: LoopSettings,
        *,
        clipped: Sequence[nn.Parameter] | None = None,
        evaluate: Callable[[], Metrics] | None = None,
        stop_when: StopWhen | None = None,
        state_dir: Path | None = None,
        fingerprint: dict[str, Any] | None = None,
        each_rank: bool = False,
    ) -> None:
        self.accelerator, self.model, self.objective = accelerator, model, objective
        self.optimizers, self.plan, self.settings = list(optimizers), plan, settings
        self.evaluate, self.stop_when = evaluate, stop_when
        self.state_dir, self.fingerprint = state_dir, fingerprint or {}
        unwrapped = accelerator.unwrap_model(model)
        named = {name: p for name, p in unwrapped.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.clipped = list(clipped) if clipped is not None else self.parameters
        self.sharded = any(hasattr(p, "to_local") for p in self.parameters)
        self.apart = self.sharded or each_rank
        self.ground = Ground(accelerator, model, named, self.sharded)
        self.tensors = TrainingTensors(named, [getattr(o, "optimizer", o) for o in self.optimizers])
        self.step = 0
        self.start_metrics: Metrics = {}
        self.metrics: Metrics = {}
        self._measured = -1  # the step self.metrics belong to
        self.stopped = "epochs"
        self._interrupts = Interrupts()
        self._last_save = time.monotonic()
        self._save_cost = 0.0
        self._saved = -1
        self._on_cpu = accelerator.device.type == "cpu"

    # -- resuming -----------------------------------------------------------------------------------------------------
    def resume(self, path: Path) -> None:
        """Continue behind the state in ``path`` (its fingerprint has been checked)."""
        state = read_state(path)
        self.objective.load_state(self.tensors.restore(load_tensors(path, self.accelerator, self.apart)))
        self.step = self._saved = state.step
        self.start_metrics = state.memory.get("start", {})
        self.metrics = state.memory.get("metrics", {})
        self._measured = state.memory.get("measured", -1)
        self.stopped = state.memory.get("stopped", "epochs")

    def save(self) -> None:
        """Save the state behind the current step."""
        if self.state_dir is None or self._saved == self.step:
            return
        self._check_finite()
        began = time.monotonic()
        memory = {
            "start": self.start_metrics,
            "metrics": self.metrics,
            "measured": self._measured,
            "stopped": self.stopped,
        }
        state = RunState(1, self.step, self.fingerprint, memory)
        save_state(self.state_dir, state, self.tensors.collect(self.objective.state()), self.accelerator, self.apart)
        self._last_save = time.monotonic()
        self._save_cost = self._last_save - began
        self._saved = self.step

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self) -> Iterator[dict[str, Any]]:
        """Yield ``step`` and ``eval`` events until the plan ends, the stop condition holds, or a signal asks to stop.

        Raises TryAgain (75) after saving state on SIGINT/SIGTERM, or when a loss or gradient is not finite.
        """
        if self._on_cpu:
            keep_freed_memory()
        with self._interrupts.heard():
            self.objective.start(self.ground)
            if self.step == 0 and self.evaluate is not None and self.settings.evaluate_start:
                yield self._evaluation()
                self.start_metrics = self.metrics
            while self.step < self.plan.steps and self.stopped == "epochs":
                window = self.plan.window(self.step + 1)
                event = self._step(window)
                yield event
                if self._due(window):
                    yield self._evaluation()
                if self._should_stop(event):
                    assert self.stop_when is not None
                    self.stopped = self.stop_when.text
                self._between_steps()
            self._check_finite()
            if self.evaluate is not None and self._measured != self.step:
                yield self._evaluation()

    def _step(self, window: Window) -> dict[str, Any]:
        began = time.monotonic()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        divisors: dict[str, float] = {}
        # Before the passes: an optimiser that runs inside backward needs its rate then.
        how = self.settings
        lr = learning_rate(window.step, self.plan.steps, how.lr, how.warmup, how.schedule, how.drops)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
        self.model.train()
        self.objective.before_window(window)
        try:
            for one in self.objective.passes:
                rows = window.rows[one.stream]
                divisors[one.name] = sum(self.objective.units(one, row) for row in rows)
                found = self._pass(one, rows, divisors[one.name])
                self.objective.after_pass(one, None if one.gradient else self._everywhere(found))
                sums |= found
        except FloatingPointError as error:
            self._give_up(window.step, str(error))
        report = self.objective.report(self._everywhere(sums), divisors)
        norm = self._clip()
        if not (math.isfinite(report["loss"]) and math.isfinite(norm)):
            self._give_up(window.step, f"loss {report['loss']:g}, gradient norm {norm:g}: not finite")
        for optimizer in self.optimizers:
            optimizer.step()
        try:
            more = self.objective.after_step(self.optimizers)
        except FloatingPointError as error:
            self._diverged(str(error))
        self.step = window.step
        seconds = round(time.monotonic() - began, 3)
        return {"event": "step", "step": window.step, "epoch": window.epoch, "lr": lr, **report, **more,
                "grad_norm": norm, "seconds": seconds}  # fmt: skip

    def _everywhere(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Sums over all ranks: numbers, and lists where a vector was summed."""
        if not sums:
            return {}
        names = sorted(sums)
        flat = torch.cat([sums[name].flatten() for name in names]).tolist()
        total = iter(sum_over_processes(self.accelerator, flat))
        found = {name: [next(total) for _ in range(sums[name].numel())] for name in names}
        return {name: values if sums[name].ndim else values[0] for name, values in found.items()}

    def _pass(self, one: Pass, rows: Sequence[int], divisor: float) -> dict[str, Tensor]:
        """One pass over ``rows``: this rank's micro-batches, gradients reduced on the last; gives this rank's sums."""
        sums: dict[str, Tensor] = {}
        wanted = self.settings.micro_batch
        auto = self.settings.auto_length or (AUTO_TOKENS_CPU if self._on_cpu else AUTO_TOKENS)
        most = len(rows) if wanted == "auto" else int(wanted)
        lengths = {row: self.objective.length(one.stream, row) for row in rows}
        shares = share_out(
            range(len(rows)),
            [lengths[row] for row in rows],
            self.accelerator.num_processes,
            most,
            auto if wanted == "auto" else None,
        )
        mine = shares[self.accelerator.process_index]
        for number, places in enumerate(mine):
            # Without rows of its own a rank still takes part, with weight 0, in what the others reduce.
            batch = self.objective.batch(one, [rows[place] for place in places] or [rows[0]])
            batch = batch.to(self.accelerator.device)
            reduces = one.gradient and number == len(mine) - 1
            with contextlib.nullcontext() if reduces else self.accelerator.no_sync(self.model):
                with contextlib.nullcontext() if one.gradient else torch.no_grad():
                    loss, parts = self.objective.loss(self.model, one, batch, divisor)
                if one.gradient:
                    # Engines average gradients over ranks; ours are shares of a sum.
                    self.accelerator.backward((loss if places else loss * 0.0) * self.accelerator.num_processes)
            for name, value in parts.items():
                if places:
                    sums[name] = sums.get(name, 0.0) + value.detach().double()
                else:
                    sums.setdefault(name, torch.zeros(value.shape, dtype=torch.float64, device=value.device))
        return sums

    def _clip(self) -> float:
        gradients = [p.grad for p in self.clipped if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        total = total.full_tensor() if hasattr(total, "full_tensor") else total
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.clipped, self.settings.max_grad_norm, total)
        return float(total)

    def _give_up(self, step: int, why: str) -> NoReturn:
        if not self.objective.ahead:
            self.save()  # the parameters are still those of the last good step
        kept = self.state_dir is not None and self._saved >= 0
        where = f"the state of step {self._saved} is kept" if kept else "nothing was saved"
        self._stop(f"step {step}: {why}; {where}", "try a lower --lr, --max-grad-norm 1, or --precision fp32")

    def _check_finite(self) -> None:
        """The last update may have been one too far: such parameters are neither saved nor handed out."""
        bad = [float(not all(bool(p.isfinite().all()) for p in map(local_part, self.parameters)))]
        if sum_over_processes(self.accelerator, bad)[0]:
            self._diverged("a parameter is not finite")

    def _diverged(self, what: str) -> NoReturn:
        self._stop(f"behind step {self.step}: {what}; the last saved state is kept", "try a lower --lr")

    def _stop(self, what: str, advice: str) -> NoReturn:
        """End all ranks with 75; one of them says why."""
        raise TryAgain(what, advice) if self.accelerator.is_main_process else AlreadyReported(TryAgain.exit_code)

    # -- between steps ------------------------------------------------------------------------------------------------
    def _due(self, window: Window) -> bool:
        if self.evaluate is None:
            return False
        if self.settings.eval_every == "epoch":
            return window.ends_epoch
        every = int(self.settings.eval_every)
        return every > 0 and window.step % every == 0

    def _evaluation(self) -> dict[str, Any]:
        assert self.evaluate is not None
        began = time.monotonic()
        self.model.eval()
        try:
            sets = self.evaluate()
        except FloatingPointError as error:  # on every rank: all have all rows' numbers
            self._diverged(str(error))
        self.metrics, self._measured = sets, self.step
        return {"event": "eval", "step": self.step, "sets": sets, "seconds": round(time.monotonic() - began, 3)}

    def _should_stop(self, event: dict[str, Any]) -> bool:
        if self.stop_when is None:
            return False
        values: dict[str, float] = {"step": event["step"], "loss": event["loss"]}
        if self.stop_when.needs_evaluation:
            if self._measured != self.step:
                return False
            values |= flat(self.metrics)
        return self.stop_when.met(values, flat(self.start_metrics))

    def _between_steps(self) -> None:
        if self.step == self.plan.steps or self.stopped != "epochs":
            return
        wanted = self.settings.save_every
        if wanted == "auto":
            due = time.monotonic() - self._last_save > max(_SAVE_SECONDS, _SAVE_SHARE * self._save_cost)
        else:
            due = int(wanted) > 0 and self.step % int(wanted) == 0
        mine = [float(due and self.accelerator.is_main_process), float(self._interrupts.asked)]
        due_sum, interrupted = sum_over_processes(self.accelerator, mine)  # ranks must agree
        if interrupted:
            self.save()
            kept = f"state saved behind step {self.step}" if self.state_dir else "nothing saved"
            self._stop(f"interrupted; {kept}", "the same command with --resume goes on")
        if due_sum:
            self.save()


def flat(metrics: Metrics) -> dict[str, float]:
    """``{"forget": {"es": 1}}`` as ``{"forget_es": 1}``; intervals are left out."""
    return {
        f"{name}_{key}": value
        for name, values in metrics.items()
        for key, value in values.items()
        if isinstance(value, int | float)
    }
