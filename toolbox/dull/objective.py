"""DULL and its baselines as one objective of the house's loop: one forward an image and step.

    warm-up      CE(z + log π, y~) + α L_ifd(onehot(y~))
    afterwards   CE(z + log π, t) + α L_ifd(t) + .5 ramp (L_keep + L_un) on a batch that is partly mixed
    ce, la       CE without and with log π
    elr          CE + λ log(1 − <p, q>)     (S. Liu et al., arXiv 2007.00151, equation 6)

t differs from the given label only for samples that the safety gate lets be touched (``Labels.acting``); these are
worked out behind each epoch, in ``toolbox.dull.epoch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from toolbox.classify.augment import crop_at, flip_where
from toolbox.dull.data import Corpus
from toolbox.dull.gates import Gated, project, sparsity
from toolbox.dull.mix import draw_mixing, head_share
from toolbox.dull.options import Options
from toolbox.dull.table import Posteriors
from toolbox.dull.unlearn import unlearning_loss, weakened, wrong_only
from toolbox.training.objective import Ground, Objective, Pass
from toolbox.training.windows import Window

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolbox.classify.classifier import Pixels

IFPU_WEIGHT = 0.5


@dataclass
class Labels:
    """What the epochs decide: rows whose label is acted upon, their targets t (n, C), the class r taken for right.

    ``prior`` is π; ``mixing`` the share of a batch that is mixed; ``ramp`` that of IFPU's losses.
    """

    prior: NDArray[np.float64]
    acting: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    targets: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    right: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    mixing: float = 0.0
    ramp: float = 0.0

    def state(self) -> dict[str, Tensor]:
        numbers = {"prior": self.prior, "acting": self.acting, "targets": self.targets, "right": self.right,
                   "shares": np.array([self.mixing, self.ramp])}  # fmt: skip
        return {f"labels/{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in numbers.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.prior, self.acting, self.targets, self.right, shares = (
            state[f"labels/{name}"].numpy().copy() for name in ("prior", "acting", "targets", "right", "shares")
        )
        self.mixing, self.ramp = float(shares[0]), float(shares[1])


@dataclass
class Batch:
    """One micro-batch: uint8 images with their draws, perhaps partners, targets and who is acted upon."""

    rows: NDArray[np.int64]
    plain: NDArray[np.bool_]
    tensors: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.rows, self.plain, {name: one.to(device) for name, one in self.tensors.items()})


class DullObjective(Objective):
    """Rows are places in ``corpus.train``. ``table`` is q; ``average`` a copy of the network, for averaged weights."""

    passes = (Pass("train", "train"),)

    def __init__(
        self,
        corpus: Corpus,
        model: Gated,
        average: nn.Module,
        options: Options,
        pixels: Pixels,
        *,
        steps: int,
        lambda_gate: float,
    ) -> None:
        self.corpus, self.model, self.options, self.pixels = corpus, model, options, pixels
        self.steps, self.lambda_gate = steps, lambda_gate
        self.classes = len(corpus.labels)
        self.given = corpus.given[corpus.train]
        self.members = [np.flatnonzero(self.given == number) for number in range(self.classes)]
        self.table = Posteriors(len(corpus.train), self.classes)
        self.labels = Labels(corpus.counts / len(corpus.train))
        self.average = average.eval().requires_grad_(False)
        self.extra: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self.ifd = options.method == "dull" and options.ifd
        self.watches = options.method in ("dull", "elr")
        self._accelerator: Accelerator | None = None
        self._window: Window | None = None

    # -- the loop's questions -----------------------------------------------------------------------------------------
    def start(self, ground: Ground) -> None:
        self._accelerator = ground.accelerator
        self.average.to(ground.accelerator.device)

    def length(self, stream: str, row: int) -> int:
        return 1

    def units(self, one: Pass, row: int) -> float:
        return 1.0

    def before_window(self, window: Window) -> None:
        """Everything random of the step, for the whole window: the same however it is split."""
        rows = np.array(window.rows["train"], dtype=np.int64)
        self._window, self._place = window, {int(row): place for place, row in enumerate(rows)}
        words = np.random.SeedSequence([self.options.seed, 3, window.step])
        generator = np.random.Generator(np.random.PCG64(words))
        pad = self.pixels.size // 8
        self._draws = {
            name: torch.from_numpy(generator.integers(0, high, len(rows)))
            for name, high in (("top", 2 * pad + 1), ("left", 2 * pad + 1), ("flip", 2),
                               ("other_top", 2 * pad + 1), ("other_left", 2 * pad + 1), ("other_flip", 2))
        }  # fmt: skip
        self._mixing = draw_mixing(
            rows, window.epoch, self.labels.mixing, self.members, generator, self.options.mixup_alpha
        )
        self._weights = (
            torch.as_tensor(self.labels.prior, dtype=torch.float32).clamp_min(1e-12).log(),
            self.options.alpha_ifd * window.step / self.steps,
        )

    def targets_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """t (n, C): one-hot but for rows that are acted upon."""
        found = np.zeros((len(rows), self.classes))
        found[np.arange(len(rows)), self.given[rows]] = 1.0
        if len(self.labels.acting):
            at = np.searchsorted(self.labels.acting, rows).clip(max=len(self.labels.acting) - 1)
            acts = self.labels.acting[at] == rows
            found[acts] = self.labels.targets[at[acts]]
        return found

    def batch(self, one: Pass, rows: Sequence[int]) -> Batch:
        numbers = np.array(rows, dtype=np.int64)
        places = np.array([self._place[int(row)] for row in rows])
        index = torch.from_numpy(places)
        tensors = {name: values[index] for name, values in self._draws.items()}
        tensors["images"] = self.corpus.pixels[torch.from_numpy(self.corpus.train[numbers])]
        tensors["given"] = torch.from_numpy(self.given[numbers])
        targets = self.targets_of(numbers)
        mixed = self._mixing.mixed[places]
        if mixed.any():
            partner = self._mixing.partner[places]
            weight = np.where(mixed, self._mixing.weight[places], 1.0)
            sizes = self.corpus.counts.astype(np.float64)
            own, other = sizes[self.given[numbers]], sizes[self.given[partner]]
            share = head_share(weight, own, other, self.options.remix_kappa, self.options.remix_tau)
            share = np.where(mixed, share, 1.0)[:, None]
            targets = share * targets + (1 - share) * self.targets_of(partner)
            tensors["others"] = self.corpus.pixels[torch.from_numpy(self.corpus.train[partner])]
            tensors["weight"] = torch.from_numpy(weight).float()
        acts = np.isin(numbers, self.labels.acting) & ~mixed
        if acts.any() and self.options.ifpu and self.ifd and self.labels.ramp > 0:
            right = self.labels.right[np.searchsorted(self.labels.acting, numbers[acts])]
            tensors["acts"] = torch.from_numpy(acts)
            tensors["right"] = torch.from_numpy(right)
        tensors["targets"] = torch.from_numpy(targets).float()
        return Batch(numbers, ~mixed, tensors)

    def _augment(self, images: Tensor, batch: Batch, prefix: str = "") -> Tensor:
        if self.options.aug == "none":
            return self.pixels.prepare(images)
        tensors = batch.tensors
        pad = self.pixels.size // 8
        images = crop_at(images, pad, tensors[f"{prefix}top"], tensors[f"{prefix}left"])
        if self.options.aug == "weak":
            images = flip_where(images, tensors[f"{prefix}flip"].bool())
        return self.pixels.prepare(images)

    def loss(self, model: nn.Module, one: Pass, batch: Batch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        tensors = batch.tensors
        images = self._augment(tensors["images"], batch)
        if "others" in tensors:
            weight = tensors["weight"].view(-1, 1, 1, 1)
            images = weight * images + (1 - weight) * self._augment(tensors["others"], batch, "other_")
        masks = self._masks(tensors)
        images = images.contiguous(memory_format=torch.channels_last)
        out = model(images, tensors["targets"] if self.ifd else None, masks)
        log_prior, alpha = self._weights
        shift = log_prior.to(images.device) if self.options.uses_prior else 0.0
        parts = {"loss_ce": _cross_entropy(out["logits"] + shift, tensors["targets"]).sum()}
        nothing = torch.zeros((), device=images.device)  # every rank reports the same sums
        parts |= {name: nothing for name in ("loss_ifd", "loss_keep", "loss_unlearn") if self.options.method == "dull"}
        loss = parts["loss_ce"]
        if self.ifd:
            parts["loss_ifd"] = _cross_entropy(out["gated"] + shift, tensors["targets"]).sum()
            loss = loss + alpha * parts["loss_ifd"]
        if masks:
            acts, given = tensors["acts"], tensors["given"]
            parts["loss_keep"] = _cross_entropy(out["keep"][acts] + shift, tensors["targets"][acts]).sum()
            parts["loss_unlearn"] = unlearning_loss(out["wrong"][acts], given[acts]).sum()
            loss = loss + IFPU_WEIGHT * self.labels.ramp * (parts["loss_keep"] + parts["loss_unlearn"])
        if self.watches:
            loss = loss + self._watch(out["logits"], batch)
        told = {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}
        if self.ifd:  # not told as loss: early in a run the pressure on the gates would dwarf it
            pressed = self.lambda_gate * sparsity(self.model.gates, self.options.rho)
            loss = loss + alpha * len(batch.rows) * pressed
        return loss / divisor, told

    def _masks(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if "acts" not in tensors:
            return None
        acts, gates = tensors["acts"], self.model.gates
        mask = torch.zeros(len(acts), len(gates), device=gates.device)
        mask[acts] = wrong_only(gates, tensors["given"][acts], tensors["right"])
        return {"keep": weakened(mask, self.options.eta), "wrong": mask}

    def _watch(self, logits: Tensor, batch: Batch) -> Tensor | float:
        """Update q from this forward; ELR's regulariser, computed with the updated q."""
        predicted = logits.detach().softmax(1).cpu().double().numpy()
        if np.isfinite(predicted).all():  # else the step is given up, behind the backward pass
            self.table.update(batch.rows[batch.plain], predicted[batch.plain], self.options.beta)
        if self.options.method != "elr":
            return 0.0
        q = torch.from_numpy(self.table.get(batch.rows)).float().to(logits.device)
        inner = (logits.softmax(1).clamp(1e-4, 1 - 1e-4) * q).sum(1)
        return self.options.elr_lambda * (1 - inner).clamp_min(1e-4).log().sum()

    def after_pass(self, one: Pass, sums: Mapping[str, Any] | None) -> None:
        """The reduced gradients are the same on every rank, so all give the step up, or none."""
        gradient = self.model.head[0].weight.grad
        if gradient is not None and not bool(gradient.isfinite().all()):
            assert self._window is not None
            ids = [self.corpus.ids[self.corpus.train[row]] for row in self._window.rows["train"]]
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            raise FloatingPointError(f"loss or gradient not finite (batch: {', '.join(ids[:5])}{more})")

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        count = divisors["train"]
        return {**{name: value / count for name, value in sums.items()}, "images": int(count)}

    def after_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        if self.ifd:
            project(self.model.gates.data)
        assert self._window is not None
        self.follow(self._window.step)
        return {}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Average the weights: decay min(--ema, (1 + s)/(10 + s)) at step s; counts are copied."""
        decay = min(self.options.ema, (1 + step) / (10 + step))
        mine, theirs = self.average.state_dict(), self.model.backbone.state_dict()
        floats = [name for name, one in mine.items() if one.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])

    # -- going on from a saved state ----------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """q, labels, the averaged weights, and the network's buffers, which the loop does not know."""
        if self._accelerator is not None:
            self.table.exchange(self._accelerator)
        found = {f"table/{name}": value for name, value in self.table.state().items()} if self.watches else {}
        found |= self.labels.state()
        found |= {f"average/{name}": value.contiguous() for name, value in self.average.state_dict().items()}
        found |= {f"buffer/{name}": value for name, value in self.model.backbone.named_buffers()}
        for name, give in self.extra.items():
            found |= {f"{name}/{key}": value for key, value in give().items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.watches:
            self.table.load(_below(state, "table"))
        self.labels.load(state)
        self.average.load_state_dict(_below(state, "average"))
        for name, buffer in self.model.backbone.named_buffers():
            buffer.copy_(state[f"buffer/{name}"])
        self.loaded = state


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): one for name, one in state.items() if name.startswith(f"{prefix}/")}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−Σ_c t_c log softmax(logits)_c, (batch,)."""
    return F.cross_entropy(logits, targets, reduction="none")
