"""LoReFT: a low-rank edit of the residual stream at the first and last positions of the prompt, nowhere else.

    h ← h + Rᵀ (W h + b − R h),    R (r, d) with orthonormal rows, W (r, d), b (r)

Source: arXiv 2404.03592, equation 2 and section 3.2; the forms without a part of it are those of ``pyreft`` 0.1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toolbox.models.token_loss import decoder_layers
from toolbox.shell.errors import BadData, UsageProblem

FORMS = ("loreft", "noreft", "lobireft", "direft")
"""As above; R not orthonormal; Rᵀ b alone; without − R h."""

_POSITIONS = re.compile(r"(?:f(\d{1,4}))?\+?(?:l(\d{1,4}))?")


@dataclass(frozen=True)
class Positions:
    """The first ``first`` and the last ``last`` positions of a prompt, each at most half of it, rounded down."""

    first: int
    last: int

    @staticmethod
    def parse(text: str) -> Positions:
        """``f6+l6``, ``f4`` or ``l1``."""
        found = _POSITIONS.fullmatch(text)
        first, last = (int(part or 0) for part in found.groups()) if found else (0, 0)
        if first + last == 0:
            raise UsageProblem(
                f"--positions {text}: no position", "as in f6+l6: the first 6 and the last 6 of a prompt"
            )
        return Positions(first, last)

    def places(self, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (rows, first + last) of prompts that begin at ``starts`` and have ``lengths`` (rows,), and which of
        them hold: first and last never overlap, and a prompt of one token has none."""
        half = (lengths // 2)[:, None]
        one = torch.arange(self.first, device=lengths.device)[None, :]
        two = torch.arange(self.last, device=lengths.device)[None, :]
        columns = torch.cat([starts[:, None] + one, (starts + lengths)[:, None] - self.last + two], dim=1)
        valid = torch.cat([one < half, two >= self.last - half], dim=1)
        return columns.clamp_min(0), valid


def edit(h: Tensor, rotation: Tensor, weight: Tensor | None, bias: Tensor, form: str) -> Tensor:
    """What is added to ``h`` (…, d): Rᵀ (W h + b − R h), or what ``form`` leaves of it.

    ``rotation`` R (r, d), ``weight`` W (r, d), None for lobireft, ``bias`` b (r).
    """
    if form == "lobireft":
        return (bias @ rotation).expand_as(h)
    assert weight is not None
    source = h @ weight.T + bias
    if form != "direft":
        source = source - h @ rotation.T
    return source @ rotation


class _Rotation(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class _Block(nn.Module):
    """R, W and b of one layer; ``orthonormal`` keeps the rows of R so while they are trained."""

    def __init__(self, rotation: Tensor, weight: Tensor | None, bias: Tensor, orthonormal: bool) -> None:
        super().__init__()
        self.rotation = _Rotation(rotation)
        if orthonormal:
            # Householder products: no (d, d) base beside every rotation, which trivialization would keep.
            torch.nn.utils.parametrizations.orthogonal(
                self.rotation, orthogonal_map="householder", use_trivialization=False
            )
            # It keeps signs on the diagonal, cut to whole numbers: what decays below 1 is 0, and a row of R with it.
            self.rotation.parametrizations.weight.original.decays = False
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = nn.Parameter(bias)


def _drawn(width: int, rank: int, form: str, generator: torch.Generator) -> _Block:
    """R orthonormal, W and b as nn.Linear draws them."""
    rows, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator))
    weight, bias = (
        width**-0.5 * (2 * torch.rand(*shape, generator=generator) - 1) for shape in ((rank, width), (rank,))
    )
    return _Block(rows.T.contiguous(), None if form == "lobireft" else weight, bias, form != "noreft")


class Loreft(nn.Module):
    """Edits of the residual stream behind chosen layers, at prompt positions that ``prompts`` tells.

    Args:
        blocks: by number of the decoder layer, from 0, whose output is edited; of ``drawn`` or ``stored``.
        form: one of ``FORMS``. ``positions``: where in the prompt.
    """

    def __init__(self, blocks: Mapping[int, _Block], positions: Positions, form: str = "loreft") -> None:
        super().__init__()
        self.form, self.positions = form, positions
        self.blocks = nn.ModuleDict({str(layer): blocks[layer] for layer in sorted(blocks)})
        self._where: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def drawn(
        layers: Sequence[int], width: int, rank: int, positions: Positions, form: str = "loreft", seed: int = 0
    ) -> Loreft:
        """To be trained: rank r edits of ``width`` d at ``layers``. BadData (65) for a rank that cannot be."""
        if not 0 < rank <= width:
            raise BadData(f"--rank {rank}: between 1 and the model's width {width}", "4 is usual")
        generator = torch.Generator().manual_seed(seed)
        return Loreft({layer: _drawn(width, rank, form, generator) for layer in sorted(layers)}, positions, form)

    @staticmethod
    def stored(tensors: Mapping[str, Tensor], positions: Positions, form: str) -> Loreft:
        """From what ``tensors`` gave, frozen."""
        layers = {int(name.split(".")[1]) for name in tensors if name.startswith("loreft.")}
        blocks = {
            layer: _Block(
                tensors[f"loreft.{layer}.R"], tensors.get(f"loreft.{layer}.W"), tensors[f"loreft.{layer}.b"], False
            )
            for layer in layers
        }
        return Loreft(blocks, positions, form).requires_grad_(False)

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self.blocks]

    @property
    def trainable(self) -> dict[str, int]:
        """Trained numbers."""
        return {"loreft": sum(part.numel() for part in self.parameters())}

    def prompts(self, starts: Tensor | None, lengths: Tensor | None) -> None:
        """Which columns of the passes to come are prompts: where each row's begins and how long it is, (rows,) each.
        None: nothing is edited."""
        self._where = None if starts is None or lengths is None else self.positions.places(starts, lengths)

    def rotation(self, layer: int) -> Tensor:
        """R (r, d)."""
        return self.blocks[str(layer)].rotation.weight

    def change(self, layer: int, h: Tensor) -> Tensor:
        """``h`` (rows, columns, d) with its prompt positions edited."""
        if self._where is None:
            return h
        columns, valid = (part.to(h.device) for part in self._where)
        if len(columns) != len(h):
            raise ValueError(f"prompts of {len(columns)} rows were told, the pass has {len(h)}")
        block = self.blocks[str(layer)]
        places = columns.clamp_max(h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[-1])
        with torch.autocast(h.device.type, enabled=False):
            found = h.gather(1, places).to(block.bias.dtype)
            added = edit(found, self.rotation(layer), block.weight, block.bias, self.form) * valid[..., None]
            return h.scatter_add(1, places, added.to(h.dtype))

    def hook(self, model: Any) -> list[RemovableHandle]:
        """Apply this in every forward pass of ``model``, until the handles are removed."""
        layers = decoder_layers(model)
        if wrong := [layer for layer in self.layers if not layer < len(layers)]:
            raise BadData(f"layer {wrong[0]}: the model has layers 0 to {len(layers) - 1}", "see --layers")
        handles = []
        for number in self.layers:

            def change(_: nn.Module, __: Any, output: Any, number: int = number) -> Any:
                if isinstance(output, tuple):
                    return (self.change(number, output[0]), *output[1:])
                return self.change(number, output)

            handles.append(layers[number].register_forward_hook(change))
        return handles

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: R, W and b by layer."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            block = self.blocks[str(layer)]
            found[f"loreft.{layer}.R"] = self.rotation(layer).detach().clone()
            if block.weight is not None:
                found[f"loreft.{layer}.W"] = block.weight.detach().clone()
            found[f"loreft.{layer}.b"] = block.bias.detach().clone()
        return found
