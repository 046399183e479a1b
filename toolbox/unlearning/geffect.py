"""The G-effect by depth: ⟨g_u, g_r⟩ summed over the tensors of one layer; negative where unlearning harms retention.

GRU computes the products anyway (``Rectification.products``, against the retain average): saying where they come from
costs nothing.

Source: the G-effect of "Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond", ICLR 2025,
arXiv 2502.19301, split by layers as there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)(?:\.|$)")
"""The stack of decoder layers: ``layers`` (Llama and most), ``h`` (GPT-2, Falcon), ``blocks`` (MPT) ... """
_NUMBER = re.compile(r"\.(\d+)\.")
_KINDS = (  # the first that fits: GPT-NeoX calls its head embed_out, BLOOM has a norm of its embeddings
    ("head", re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|score|project_out)(?:\.|$)")),
    ("embedding", re.compile(r"emb|wte|wpe|project_in")),
    ("norm", re.compile(r"norm|ln_")),
)
_THIRDS = ("early", "middle", "late")


def depth_groups(names: Sequence[str]) -> list[str]:
    """``embedding``, ``layer 0`` ..., ``norm`` (the final one), ``head`` or ``other`` for each parameter name.

    Names are those of any Hugging Face causal language model, wrapped by PEFT or another module or not: a layer is
    known by the number after the stack's usual names, or, in a model with none of them, by the first number.
    """
    usual = any(_LAYER.search(name) for name in names)
    return [_group(name, _LAYER if usual else _NUMBER) for name in names]


def _group(name: str, layer: re.Pattern[str]) -> str:
    found = layer.search(name)
    if found:
        return f"layer {found[1]}"
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def by_group(products: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """The sum of the products of each group, layers by depth between embedding and norm.

    ``products`` and ``groups`` hold one entry a tensor. The sums add up to the product of the whole vectors.
    """
    sums: dict[str, float] = {}
    for product, group in zip(products, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + product
    return dict(sorted(sums.items(), key=lambda entry: _place(entry[0])))


def _place(group: str) -> tuple[int, int]:
    if group.startswith("layer "):
        return 1, int(group.removeprefix("layer "))
    return {"embedding": 0, "norm": 2, "head": 3}.get(group, 4), 0


def thirds(sums: Mapping[str, float], layers: int | None = None) -> dict[str, float]:
    """``by_group``'s sums with the layers added up by thirds of depth; the other groups as they are.

    Keys are ``early layers``, ``middle layers`` and ``late layers``; a third without a trained layer is left out.

    Args:
        layers: how many layers the model has; by default one more than the highest number in ``sums``.
    """
    numbers = {group: int(group.removeprefix("layer ")) for group in sums if group.startswith("layer ")}
    depth = layers or 1 + max(numbers.values(), default=0)
    found: dict[str, float] = {}
    for group, value in sums.items():
        key = f"{_THIRDS[min(2, 3 * numbers[group] // depth)]} layers" if group in numbers else group
        found[key] = found.get(key, 0.0) + value
    return found


def draw_geffect(lines: Sequence[Mapping[str, Any]], path: str | Path, title: str, layers: int | None = None) -> None:
    """Draw the G-effect over the steps: thirds of depth; beside them, on their own scale, embedding and head.

    Args:
        lines: one a step: ``{"step": 3, "geffect": {"embedding": -.1, "layer 0": .02, ...}}`` with ``by_group``'s sums.
        path: svg, png or pdf; UsageProblem for another suffix.
        layers: as in ``thirds``.
    Raises: ValueError without a line.
    """
    from toolbox.plot_style import GREY
    from toolbox.plots import Panel, Series, curves, plot_format, save

    plot_format(path)
    rows = [thirds(line["geffect"], layers) for line in lines]
    steps = [line["step"] for line in lines]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    panels = []
    for heading, chosen in (
        ("Decoder layers", [key for key in keys if key.endswith(" layers")]),
        ("Embedding and head", [key for key in keys if key in ("embedding", "head")]),
    ):
        drawn = [Series(key, steps, [row.get(key) for row in rows]) for key in chosen]
        if drawn:
            panels.append(Panel(heading, "⟨gᵤ, ḡ⟩, negative harms retention", drawn))
    figure = curves(panels, xlabel="step", title=title)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=GREY, lw=0.9, zorder=1)
            axes.set_ylim(low, high)
    save(figure, path)
