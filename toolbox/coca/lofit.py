"""LoFiT: scales that choose attention heads, then offsets at the chosen ones. The base model stays as it is.

With z_{l,i} (d_head) the output of query head i of layer l before the output projection W_o:

    stage a   z ← (1 + A_{l,i}) ⊙ z   at all heads,    loss = CE + λ Σ|A|,   S(l,i) = ‖A_{l,i}‖₂
    stage b   z ← z + v_{l,i}         at the K heads of greatest S,          loss = CE

Source: arXiv 2406.01563, equations 2 to 4; settings from the scripts of ``fc2869/lo-fit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toolbox.models.token_loss import decoder_layers
from toolbox.shell.errors import BadData, UsageProblem

DEVIATION = 1e-3
"""Standard deviation of what A and v are drawn with. The paper writes N(0, 1e-3); read as a deviation here."""

_ATTENTION = ("self_attn", "attention", "attn", "self_attention")
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")


@dataclass(frozen=True)
class HeadGrid:
    """The query heads of a model: ``layers`` × ``heads`` of ``width`` numbers each. Heads are counted from 0."""

    layers: int
    heads: int
    width: int

    @property
    def count(self) -> int:
        return self.layers * self.heads

    @staticmethod
    def of(config: Any) -> HeadGrid:
        """The grid that a transformers configuration tells."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return HeadGrid(text.num_hidden_layers, heads, width)

    def place(self, layer: int, head: int) -> int:
        """The number of a head, counted through all layers; BadData where there is none."""
        if not (0 <= layer < self.layers and 0 <= head < self.heads):
            raise BadData(
                f"--heads {layer}.{head}: no such head",
                f"layers 0 to {self.layers - 1}, query heads 0 to {self.heads - 1}",
            )
        return layer * self.heads + head


def output_projection(layer: nn.Module) -> nn.Linear:
    """The projection behind the heads of one decoder layer; UsageProblem where it cannot be found by its name."""
    for attention in _ATTENTION:
        for name in _OUTPUT:
            found = getattr(getattr(layer, attention, None), name, None)
            if isinstance(found, nn.Linear):
                return found
    raise UsageProblem(
        f"the output projection of {type(layer).__name__} is not known here", "use --method loreft or lora"
    )


def how_many(wanted: str, grid: HeadGrid) -> int:
    """``3%`` or ``32`` as a number of heads. BadData (65) for none, or more than there are."""
    number = float(wanted.rstrip("%"))
    count = max(1, round(number / 100 * grid.count)) if wanted.endswith("%") and number > 0 else int(number)
    if not 0 < count <= grid.count:
        raise BadData(f"--heads {wanted}: {count} of {grid.count} heads", "nothing would be trained: 3% is usual")
    return count


def top_heads(scores: Tensor, count: int) -> list[int]:
    """Numbers of the ``count`` heads of greatest score, ascending. ``scores`` (layers, heads); ties go to the first."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True)
    return sorted(order[:count].tolist())


class Lofit(nn.Module):
    """Scales A (layers, heads, d_head), offsets v (K, d_head), and the hooks that apply them.

    Args:
        grid: the heads of the model.
        count: K, the offsets' number; 0 makes none (stage a alone).
        places: numbers of the K heads where they are known; else ``choose`` tells them later.
        scales: whether there are scales (stages a, and a before b).
        seed: of the draw.
    """

    def __init__(
        self, grid: HeadGrid, *, count: int, places: Sequence[int] | None = None, scales: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.grid, self.stage = grid, "a" if scales else "b"
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(DEVIATION * torch.randn(*shape, generator=generator))

        # The offsets first: their draw does not depend on whether scales go before them.
        self.v = drawn(count, grid.width) if count else None
        self.A = drawn(grid.layers, grid.heads, grid.width) if scales else None
        self.scores: Tensor | None = None
        self.places: list[int] = []
        self._rows: dict[int, tuple[int, int]] = {}
        if places is not None:
            self.choose(places)

    @property
    def trainable(self) -> dict[str, int]:
        """Trained numbers of each stage."""
        found = {"a": self.A, "b": self.v}
        return {stage: part.numel() for stage, part in found.items() if part is not None}

    def choose(self, places: Sequence[int]) -> None:
        """Fix the heads of stage b; ``places`` ascending numbers as of ``HeadGrid.place``."""
        self.places = sorted(places)
        self._rows = {}
        layers = [place // self.grid.heads for place in self.places]
        for layer in dict.fromkeys(layers):
            start = layers.index(layer)
            self._rows[layer] = (start, start + layers.count(layer))
        heads = torch.tensor([place % self.grid.heads for place in self.places])
        self.register_buffer("heads", heads.to(self._device()), persistent=False)

    def score(self) -> Tensor:
        """S (layers, heads): the norm of each head's scale."""
        assert self.A is not None
        return self.A.detach().norm(dim=-1)

    def penalty(self) -> Tensor:
        """Σ|A|."""
        assert self.A is not None
        return self.A.abs().sum()

    def start_offsets(self, places: Sequence[int], scores: Tensor | None) -> None:
        """From stage a to stage b: A is 0 from now on, offsets act at ``places``."""
        self.stage = "b"
        self.scores = scores
        self.choose(places)

    def layer_offset(self, layer: int) -> Tensor | None:
        """v of one layer as (heads · d_head,), 0 where a head was not chosen; None without chosen heads."""
        if layer not in self._rows or self.v is None:
            return None
        start, stop = self._rows[layer]
        whole = self.v.new_zeros(self.grid.heads, self.grid.width)
        return whole.index_copy(0, self.heads[start:stop], self.v[start:stop]).flatten()

    def change(self, layer: int, z: Tensor) -> Tensor:
        """``z`` (…, heads · d_head), all heads of a layer at once, as this stage has it."""
        if self.stage == "a":
            assert self.A is not None
            changed = z * (1 + self.A[layer].flatten())
        else:
            offset = self.layer_offset(layer)
            changed = z if offset is None else z + offset
        idle = self._idle() if layer == 0 else None
        if idle is not None:
            changed = changed + idle
        return changed.to(z.dtype)

    def hook(self, model: Any) -> list[RemovableHandle]:
        """Apply this in every forward pass of ``model``, until the handles are removed."""
        handles = []
        for number, layer in enumerate(decoder_layers(model)):
            projection = output_projection(layer)
            if projection.in_features != self.grid.heads * self.grid.width:
                raise BadData(
                    f"layer {number} has {projection.in_features} numbers behind its heads, not "
                    f"{self.grid.heads} × {self.grid.width}", "this architecture is not laid out as its heads say",
                )  # fmt: skip

            def change(_: nn.Module, inputs: tuple[Tensor, ...], number: int = number) -> tuple[Tensor, ...]:
                return (self.change(number, inputs[0]), *inputs[1:])

            handles.append(projection.register_forward_pre_hook(change))
        return handles

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: heads and offsets by layer, scores where heads were chosen by them."""
        found: dict[str, Tensor] = {}
        for layer, (start, stop) in self._rows.items():
            found[f"lofit.heads.{layer}"] = self.heads[start:stop].clone()
            if self.v is not None:
                found[f"lofit.v.{layer}"] = self.v.detach()[start:stop].clone()
        if self.scores is not None:
            found["lofit.scores"] = self.scores.clone()
        return found

    def _idle(self) -> Tensor | None:
        """0, of which the stage's idle parameters are a part: DDP insists that none is left out of a backward pass."""
        idle = self.v if self.stage == "a" else self.A
        if idle is None or not idle.requires_grad or not torch.distributed.is_initialized():
            return None
        return 0.0 * idle.sum()

    def _device(self) -> torch.device:
        return next((part.device for part in self.parameters()), torch.device("cpu"))


def merged_biases(model: Any, lofit: Lofit) -> dict[int, Tensor]:
    """What the offsets add behind W_o, by layer: W_o v, a constant (d_model,), in fp32."""
    found = {}
    for layer in sorted(lofit._rows):
        weight = output_projection(decoder_layers(model)[layer]).weight.detach()
        offset = lofit.layer_offset(layer)
        assert offset is not None
        found[layer] = (weight.double() @ offset.detach().double()).float()
    return found


def read_heads(tensors: Any, grid: HeadGrid, count: str | None, where: str) -> tuple[list[int], Tensor | None]:
    """The heads that a file names, and their scores: those of ``count`` (``3%``, ``32``) by its scores, else its own.

    ``tensors``: anything with names and ``[name]``. BadData (65) for a file of another model or without heads.
    """
    names = set(tensors)
    scores = tensors["lofit.scores"] if "lofit.scores" in names else None
    if scores is not None and tuple(scores.shape) != (grid.layers, grid.heads):
        raise BadData(
            f"scores of {tuple(scores.shape)} heads, the model has {(grid.layers, grid.heads)}",
            "choose heads on the same model", file=where,
        )  # fmt: skip
    if count is not None:
        if scores is None:
            raise BadData("has no scores to choose heads by", "leave --heads out to take its own", file=where)
        return top_heads(scores, how_many(count, grid)), scores
    layers = sorted(int(name.rpartition(".")[2]) for name in names if name.startswith("lofit.heads."))
    if not layers:
        raise BadData("names no heads", "an output of coca-train --method lofit is expected", file=where)
    places = [grid.place(layer, int(head)) for layer in layers for head in tensors[f"lofit.heads.{layer}"].tolist()]
    return places, scores
