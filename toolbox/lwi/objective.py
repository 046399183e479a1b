"""What lwi-train minimises: the new task's cross entropy, and the distance from what the old model says.

Source: Z. Chen et al., "Learning without Isolation" (ICML 2025, arXiv 2505.18568); the distillation is that of Z. Li
and D. Hoiem, "Learning without Forgetting" (arXiv 1606.09282), in the form that FACIL trains it (M. Masana et al.,
arXiv 2010.15277).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolbox.classify.augment import crop_at, flip_where
from toolbox.training.objective import Ground, Objective, Pass
from toolbox.training.windows import Window

PAD = 4
"""Pixels of black around an image before it is cut at a random place."""


def distillation(new: Tensor, old: Tensor, temperature: float) -> Tensor:
    """D = -Σ_c softmax(z_old/T)_c log softmax(z_new/T)_c for each row of logits (n, classes) of the OLD classes.

    All old heads are one softmax. The gradient is that of KL(old, new); no factor T², as in FACIL. Returns (n,).
    """
    return -((old / temperature).softmax(1) * (new / temperature).log_softmax(1)).sum(1)


class SplitHead(nn.Module):
    """A linear head in two parts: the rows of learned classes, frozen, and those of the new task.

    What has no gradient has no momentum and no weight decay either: frozen rows stay bitwise what they were.
    """

    def __init__(self, head: nn.Linear, learned: int, added: int, seed: int) -> None:
        """``head`` with its first ``learned`` rows kept, and ``added`` rows drawn by ``seed`` as torch draws them."""
        super().__init__()
        bias = head.bias is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.new = nn.Linear(head.in_features, added, bias=bias)
        self.old = nn.Linear(head.in_features, learned, bias=bias) if learned else None
        if self.old is not None:
            self.old.load_state_dict({name: value[:learned] for name, value in head.state_dict().items()})
            self.old.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        new = self.new(hidden)
        return new if self.old is None else torch.cat([self.old(hidden), new], dim=-1)

    def merged(self) -> nn.Linear:
        """The same head as one layer."""
        parts = [self.new] if self.old is None else [self.old, self.new]
        rows = sum(part.out_features for part in parts)
        head = nn.Linear(self.new.in_features, rows, bias=self.new.bias is not None)
        names = head.state_dict()
        head.load_state_dict({name: torch.cat([part.state_dict()[name] for part in parts]).cpu() for name in names})
        return head


def find_head(model: nn.Module, classes: int) -> str:
    """The name of the last linear layer with ``classes`` outputs. KeyError: there is none."""
    heads = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one.out_features == classes]
    if not heads:
        raise KeyError(classes)
    return heads[-1]


class ImageBatch:
    """Bytes of images (n, 3, size, size), their classes (n,) counted within the task, and how to augment them."""

    def __init__(self, pixels: Tensor, targets: Tensor, places: Tensor | None) -> None:
        self.pixels, self.targets, self.places = pixels, targets, places

    def to(self, device: torch.device) -> ImageBatch:
        places = None if self.places is None else self.places.to(device)
        return ImageBatch(self.pixels.to(device), self.targets.to(device), places)

    def images(self) -> Tensor:
        """The images, augmented."""
        if self.places is None:
            return self.pixels
        top, left, mirrored = self.places.unbind(1)
        return flip_where(crop_at(self.pixels, PAD, top, left), mirrored.bool())


class TaskObjective(Objective):
    """Loss of a step over N images: (1/N) Σ CE(new rows of the head, y) + λ D(old rows, the old model's).

    A row of the loop is an image. Augmentation is drawn a window at a time, so that it does not depend on how many
    processes or micro-batches share the window.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: Tensor,
        prepare: Any,
        *,
        learned: int,
        teacher: nn.Module | None,
        kd: float,
        temperature: float,
        augment: bool,
        seed: int,
        patience: Patience | None = None,
    ) -> None:
        self.pixels, self.targets, self.prepare = pixels, targets, prepare
        self.learned, self.teacher, self.kd, self.temperature = learned, teacher, kd, temperature
        self.augment, self.seed, self.patience = augment, seed, patience
        self._places: dict[int, np.ndarray] = {}
        self._buffers: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}

    def start(self, ground: Ground) -> None:
        """Move the teacher beside the model; take back batch-norm statistics of a resumed run."""
        self._autocast = ground.accelerator.autocast
        model = ground.accelerator.unwrap_model(ground.model)
        self._buffers = dict(model.named_buffers())
        for name, value in self._loaded.items():
            self._buffers[name].copy_(value)
        if self.teacher is not None:
            self.teacher.to(ground.accelerator.device).eval().requires_grad_(False)

    def length(self, stream: str, row: int) -> int:
        """1: all images are of one size."""
        return 1

    def units(self, one: Pass, row: int) -> float:
        """1: the loss is a mean over images."""
        return 1.0

    def before_window(self, window: Window) -> None:
        """Draw where each image of the window is cut and whether it is mirrored."""
        if not self.augment:
            return
        rows = window.rows["train"]
        draw = np.random.default_rng(np.random.SeedSequence([self.seed & 0xFFFFFFFF, self.seed >> 32, window.step]))
        corners = draw.integers(0, 2 * PAD + 1, (len(rows), 2))
        places = np.concatenate([corners, draw.integers(0, 2, (len(rows), 1))], axis=1)
        self._places = dict(zip(rows, places, strict=True))

    def batch(self, one: Pass, rows: Sequence[int]) -> ImageBatch:
        """The images as they are stored, and their draws."""
        index = torch.as_tensor(list(rows))
        places = torch.from_numpy(np.stack([self._places[row] for row in rows])) if self.augment else None
        return ImageBatch(self.pixels[index], self.targets[index], places)

    def loss(self, model: nn.Module, one: Pass, batch: ImageBatch, divisor: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ CE + λ Σ D over the batch, divided by the images of the whole window."""
        inputs = self.prepare(batch.images())
        if inputs.is_cuda:  # on a CPU its kernels for odd numbers of channels write past their memory
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        logits = model(pixel_values=inputs).logits.float()
        new = logits[:, self.learned :]
        ce = F.cross_entropy(new, batch.targets, reduction="sum")
        kd = torch.zeros((), device=logits.device)
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                old = self.teacher(pixel_values=inputs).logits.float()
            kd = distillation(logits[:, : self.learned], old[:, : self.learned], self.temperature).sum()
        right = (new.detach().argmax(1) == batch.targets).sum()
        return (ce + self.kd * kd) / divisor, {"ce": ce.detach(), "kd": kd.detach(), "right": right}

    def report(self, sums: dict[str, Any], divisors: dict[str, float]) -> dict[str, Any]:
        """Means over the step's images; ``right`` is the share the new head got right while training."""
        found = {name: sums[name] / divisors["train"] for name in ("ce", "kd", "right")}
        return {"loss": found["ce"] + self.kd * found["kd"], **found, "n": int(divisors["train"])}

    def state(self) -> dict[str, Tensor]:
        """Batch-norm statistics, which are no parameters, and the patience's memory."""
        kept = {f"buffer {name}": value.detach().clone() for name, value in self._buffers.items()}
        return kept | ({} if self.patience is None else self.patience.state())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        self._loaded = {name.removeprefix("buffer "): v for name, v in state.items() if name.startswith("buffer ")}
        if self.patience is not None:
            self.patience.load_state(state)


class Patience:
    """FACIL's schedule: after ``patience`` epochs without a lower validation loss the rate falls by ``factor`` and the
    best weights come back; below ``least`` the run ends. The best weights are those handed out.

    Has the face of a stop condition (``met``). The rate is a scale on the optimiser's groups, which the loop multiplies
    with ``lr``.
    """

    needs_evaluation = True

    def __init__(
        self, model: nn.Module, lr: float, *, factor: float = 3.0, patience: int = 5, least: float = 1e-4
    ) -> None:
        self.model, self.lr, self.factor, self.patience, self.least = model, lr, factor, patience, least
        self.text = f"the learning rate fell below {least:g}"
        self.best, self.left, self.scale = math.inf, patience, 1.0
        self.kept: dict[str, Tensor] = {}
        self.groups: list[dict[str, Any]] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Whose rate falls."""
        self.groups = optimizer.param_groups
        self._apply()

    def met(self, values: Mapping[str, float], start: Mapping[str, float]) -> bool:
        """Whether to stop, given the figures of an evaluation."""
        loss = values["val_loss"]
        if loss < self.best:
            self.best, self.left = loss, self.patience
            self.kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            return False
        self.left -= 1
        if self.left > 0:
            return False
        self.scale /= self.factor
        if self.lr * self.scale < self.least:
            return True
        self.left = self.patience
        self.restore()
        self._apply()
        return False

    def _apply(self) -> None:
        for group in self.groups:
            group["scale"] = self.scale

    def restore(self) -> None:
        """Give the model its best weights back."""
        if self.kept:
            self.model.load_state_dict(self.kept)

    def state(self) -> dict[str, Tensor]:
        """Best loss, epochs left, the rate's scale, and the best weights."""
        mark = torch.tensor([self.best, self.left, self.scale], dtype=torch.float64)
        return {"patience": mark, **{f"best {name}": value for name, value in self.kept.items()}}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave."""
        best, left, self.scale = state["patience"].tolist()
        self.best, self.left = best, int(left)
        self.kept = {name.removeprefix("best "): value for name, value in state.items() if name.startswith("best ")}
        self._apply()
