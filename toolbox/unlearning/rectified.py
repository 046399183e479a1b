"""Any unlearning objective with GRU's projection around it: g_u is projected against the average of ∇L_r."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolbox.models.chat import Encoded
from toolbox.training.objective import Ground, Pass
from toolbox.training.state import local_part
from toolbox.unlearning.geffect import by_group, depth_groups
from toolbox.unlearning.geometry import correct_step, update_cosine
from toolbox.unlearning.gru import Rectification, RetainAverage, rectify, scope_groups
from toolbox.unlearning.losses import ForgetLoss
from toolbox.unlearning.objectives import Retention, UnlearnObjective
from toolbox.unlearning.products import cosine, dot

if TYPE_CHECKING:
    from toolbox.training.windows import Window

_AVERAGE = "average/"


@dataclass(frozen=True)
class Rectifier:
    """How gradients are rectified; the names are those of the command line. ``rectify`` off only reports."""

    rectify: bool = True
    ema: float = 0.8
    ema_dtype: str = "fp32"
    ema_device: str = "auto"
    scope: str = "model"
    geometry: str = "raw"
    cos_clip: float | None = None
    add_retain: float = 0.0
    add_kl: float = 0.0
    geffect: bool = False


class GruObjective(UnlearnObjective):
    """The passes of a step: ∇L_r, folded into ḡ; the objective's own passes, which leave g_u in ``.grad``; the
    projection; what is added unprojected.

    Where the objective's own retain term is of L_r's kind it is not computed twice: α·g_r is where g_u begins.

    Args:
        retain: L_r, of which ḡ averages the gradient (its factor is not looked at).
        own: the objective's own retain term, part of g_u; None without one.
        kl_positions: where the KL that is added behind the projection is taken.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Encoded]],
        pad_id: int,
        forget: ForgetLoss,
        rectifier: Rectifier,
        *,
        retain: Retention,
        own: Retention | None = None,
        kl_positions: str = "labelled",
        gamma: float = 1.0,
        keys: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rows, pad_id, forget, gamma=gamma, keys=keys, seed=seed)
        self.rectifier = rectifier
        self.own = own.factor if own is not None else 0.0
        self.shares = own is not None and (own.kind, own.positions) == (retain.kind, retain.positions)
        self.terms = {"retain": Retention(retain.kind, 1.0, retain.positions)}
        before, after = [Pass("retain", "retain")], []
        if own is not None and not self.shares:
            self.terms["own"] = own
            before.append(Pass("own", "retain"))
        if rectifier.add_kl:
            self.terms["kl"] = Retention("kl", rectifier.add_kl, kl_positions)
            after.append(Pass("kl", "retain"))
        self.passes = (*before, *self.passes, *after)
        dtype = torch.bfloat16 if rectifier.ema_dtype == "bf16" else torch.float32
        self.average = RetainAverage(rectifier.ema, dtype, None if rectifier.ema_device == "auto" else "cpu")
        self._kept: list[Tensor | None] = []
        self._found: Rectification | None = None
        self._fresh = 0.0
        self._effects: dict[str, float] = {}

    # -- state --------------------------------------------------------------------------------------------------------
    def start(self, ground: Ground) -> None:
        super().start(ground)
        self.ground = ground
        self.groups = scope_groups(list(ground.parameters), self.rectifier.scope)
        self.depths = depth_groups(list(ground.parameters))

    def state(self) -> dict[str, Tensor]:
        average = {f"{_AVERAGE}{place}": tensor for place, tensor in self.average.state().items()}
        return {**super().state(), **average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        average = {name.removeprefix(_AVERAGE): one for name, one in state.items() if name.startswith(_AVERAGE)}
        self.average.load_state(average)

    def before_window(self, window: Window) -> None:
        super().before_window(window)
        self._kept, self._found, self._effects = [], None, {}

    # -- gradients ----------------------------------------------------------------------------------------------------
    def _gradients(self) -> list[Tensor | None]:
        return [None if p.grad is None else local_part(p.grad) for p in self.parameters]

    @torch.no_grad()
    def after_pass(self, one: Pass, sums: Mapping[str, Any] | None) -> None:
        super().after_pass(one, sums)
        if one.name == "retain":
            self._fold()
        elif one.name == "forget":
            self._project()

    def _check_finite(self, gradients: Sequence[Tensor | None]) -> None:
        """FloatingPointError, on all ranks alike, before ḡ takes in what is not finite."""
        norm = torch.nn.utils.get_total_norm([one for one in gradients if one is not None])
        if self.ground.reduce([float(not norm.isfinite())])[0]:
            raise FloatingPointError("the retain gradient is not finite")

    def _fold(self) -> None:
        """Take g_r into ḡ; what stays in ``.grad`` is where g_u begins."""
        gradients = self._gradients()
        rectifier = self.rectifier
        self._check_finite(gradients)
        self.ahead = True
        self.average.fold(gradients)
        self._fresh = cosine(gradients, self.average.tensors, reduce=self.ground.reduce)
        if rectifier.add_retain or (rectifier.geffect and rectifier.ema < 1):
            self._kept = [None if one is None else one.clone() for one in gradients]
        for parameter in self.parameters:
            if parameter.grad is None:  # no part of L_r; still a part of the one vector
                parameter.grad = torch.zeros_like(parameter)
            elif self.shares:
                parameter.grad.mul_(self.own)
            else:
                parameter.grad.zero_()

    def _project(self) -> None:
        gradients = self._gradients()
        rectifier = self.rectifier
        if rectifier.geffect and rectifier.ema < 1:
            self._effects = by_group(self._products(gradients, self._kept), self.depths)
        self._found = rectify(
            gradients, self.average.tensors, reduce=self.ground.reduce, groups=self.groups,
            cos_clip=rectifier.cos_clip, apply=rectifier.rectify,
        )  # fmt: skip
        if rectifier.geffect and rectifier.ema == 1:  # ḡ is g_r itself
            self._effects = by_group(self._found.products, self.depths)
        if rectifier.add_retain:
            for gradient, kept in zip(gradients, self._kept, strict=True):
                if gradient is not None and kept is not None:
                    gradient.add_(kept, alpha=rectifier.add_retain)
            self._kept = []

    def _products(self, gradients: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> list[float]:
        """⟨g_u, g_r⟩ of each tensor over all ranks; 0 where one of them is missing."""
        there = [k for k, pair in enumerate(zip(gradients, others, strict=True)) if all(x is not None for x in pair)]
        found = self.ground.reduce(dot([gradients[k] for k in there], [others[k] for k in there]))  # type: ignore[misc]
        products = [0.0] * len(gradients)
        for place, value in zip(there, found, strict=True):
            products[place] = value
        return products

    # -- saying -------------------------------------------------------------------------------------------------------
    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        found = super().report(sums, divisors)
        # L_r is watched; only what is descended counts as the loss.
        descended = (self.own if self.shares else 0.0) + self.rectifier.add_retain
        found["loss"] += (descended - 1.0) * found["loss_retain"]
        one = self._found
        assert one is not None
        found |= {
            "dot": one.dot, "cos": one.cos, "norm_forget": one.norm_forget, "norm_retain": one.norm_retain,
            "rectified": one.rectified, "coef": one.coef, "norm_after": one.norm_after, "cos_after": one.cos_after,
            "cos_fresh": self._fresh,
        }  # fmt: skip
        if self._effects:
            line = {"step": self._step, "geffect": self._effects}
            found["log"] = {**found.get("log", {}), "geffect": line}
        return found

    def summary(self, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The share of steps that were rectified (with a narrower scope the mean share of its groups)."""
        return {"rectified": sum(step["rectified"] for step in steps) / len(steps)} if steps else {}

    @torch.no_grad()
    def after_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        self.ahead = False
        given = self.parameters, optimizers, self.average.tensors
        if self.rectifier.geometry == "optimizer" and self.rectifier.rectify:
            correction = correct_step(*given, reduce=self.ground.reduce)
            return {"update_cos": correction.update_cos, "corrected": correction.corrected}
        return {"update_cos": update_cosine(*given, reduce=self.ground.reduce)}
