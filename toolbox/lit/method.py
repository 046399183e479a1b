"""LIT's label modes and losses: which tokens are learned from, and what each of them weighs.

arXiv: 2503.22215 (LIT in version 1, L2T in version 2). With X_V the image, X_I the instruction, X_A the response:

    VIT:  L = − Σ_j log p(X_A,j | X_V, X_I, X_A,<j)
    LIT:  L = − Σ_{i ∈ I*} log p(X_I,i | X_V, X_I,<i)  − Σ_j log p(X_A,j | X_V, X_I, X_A,<j)

I* are the instruction tokens without role words and separators (system templates) and without boilerplate sentences
(task templates). One forward pass, no new parameter: a label mask.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from toolbox.lit.templates import SPLITS, template_spans
from toolbox.models.spans import Aligned, Kind

Mode = Literal["vit", "im", "lit-system", "lit"]
MODES: tuple[Mode, ...] = ("vit", "im", "lit-system", "lit")
Normalize = Literal["tokens", "segment", "sample"]
NORMALIZE: tuple[Normalize, ...] = ("tokens", "segment", "sample")

_RESPONSE = (Kind.RESPONSE, Kind.END_OF_TURN)
_SUPERVISED: dict[str, tuple[Kind, ...]] = {
    "vit": _RESPONSE,
    "im": tuple(kind for kind in Kind if kind not in (Kind.PAD, Kind.IMAGE)),
    "lit-system": (*_RESPONSE, Kind.INSTRUCTION, Kind.TASK_TEMPLATE),
    "lit": (*_RESPONSE, Kind.INSTRUCTION),
}


@dataclass(frozen=True)
class Weights:
    """λ_R of responses and their ends, λ_I of every other supervised token (the paper has 1 and 1)."""

    response: float = 1.0
    instruction: float = 1.0


def refine(
    aligned: Aligned, texts: Sequence[str], templates: Collection[str], split: Collection[str] = SPLITS
) -> NDArray[np.uint8]:
    """The kinds of a row's tokens (T,) with task templates and what stands before the first image told apart.

    ``texts`` are those of ``aligned.pieces``. A token between a kept and a masked sentence goes to the side that has
    more of its characters; with as many on both it is masked. What stands before the row's first image cannot see it,
    so its instruction is ``PRE_IMAGE``; rows without an image keep theirs.
    """
    kinds = np.array(aligned.kinds, dtype=np.uint8)
    boilerplate: dict[int, NDArray[np.bool_]] = {}
    for place, owner in enumerate(aligned.chars):
        if owner is None or kinds[place] != Kind.INSTRUCTION:
            continue
        piece, start, stop = owner
        if piece not in boilerplate:
            boilerplate[piece] = _mask(texts[piece], templates, split)
        inside = boilerplate[piece][start:stop]
        if 2 * int(inside.sum()) >= len(inside) and inside.any():
            kinds[place] = Kind.TASK_TEMPLATE
    images = np.flatnonzero(kinds == Kind.IMAGE)
    if len(images):
        before = np.arange(len(kinds)) < images[0]
        kinds[before & np.isin(kinds, (Kind.INSTRUCTION, Kind.TASK_TEMPLATE))] = Kind.PRE_IMAGE
    return kinds


def _mask(text: str, templates: Collection[str], split: Collection[str]) -> NDArray[np.bool_]:
    mask = np.zeros(len(text), dtype=np.bool_)
    for start, stop, template in template_spans(text, templates, split):
        mask[start:stop] = template
    return mask


def supervised(kinds: NDArray[np.uint8], mode: Mode, *, text_only_instructions: bool = True) -> NDArray[np.bool_]:
    """Which tokens (T,) are learned from; never the first one, which nothing predicts.

    Without ``text_only_instructions`` a row without an image is learned from as in VIT.
    """
    if mode not in ("vit", "im") and not text_only_instructions and not (kinds == Kind.IMAGE).any():
        mode = "vit"
    wanted = np.isin(kinds, _SUPERVISED[mode])
    wanted[:1] = False
    return wanted


def is_response(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which tokens belong to an answer, its end included."""
    return np.isin(kinds, _RESPONSE)


@dataclass(frozen=True, slots=True)
class Supervised:
    """How many tokens of a row are learned from: of responses and of the rest; ``weight`` is the row's own."""

    response: int
    instruction: int
    weight: float = 1.0


def coefficients(rows: Sequence[Supervised], weights: Weights, normalize: Normalize) -> list[tuple[float, float]]:
    """``(c_R, c_I)`` of each row of a window, so that the loss is Σ_t c_t ℓ_t over all its supervised tokens.

    With w_t = λ · (weight of the row), λ of the token's side:

    - ``tokens``: c_t = w_t / Σ w over the window, the token mean of LLaVA's code;
    - ``segment``: λ_R · (mean ℓ of response tokens) + λ_I · (mean ℓ of instruction tokens), means over the window;
    - ``sample``: the mean over rows of each row's own weighted mean.

    Sums run over the global window, so that neither micro-batches nor processes show. Where nothing is supervised on a
    side its coefficient is 0.
    """
    if normalize == "tokens":
        total = sum(
            row.weight * (weights.response * row.response + weights.instruction * row.instruction) for row in rows
        )
        return [(_share(row.weight * weights.response, total), _share(row.weight * weights.instruction, total))
                for row in rows]  # fmt: skip
    if normalize == "segment":
        answers = sum(row.weight * row.response for row in rows)
        others = sum(row.weight * row.instruction for row in rows)
        return [(weights.response * _share(row.weight, answers), weights.instruction * _share(row.weight, others))
                for row in rows]  # fmt: skip
    everything = sum(row.weight for row in rows)
    found = []
    for row in rows:
        own = weights.response * row.response + weights.instruction * row.instruction
        share = _share(row.weight, everything)
        found.append((share * _share(weights.response, own), share * _share(weights.instruction, own)))
    return found


def _share(part: float, total: float) -> float:
    return part / total if total > 0 else 0.0


def visual_contribution(with_image: NDArray[np.float64], without: NDArray[np.float64]) -> NDArray[np.float64]:
    """VC = log p(X_A | X_V, X_I) − log p(X_A | ∅, X_I) of rows (n,), in nats; ∅ is an image that shows nothing."""
    return with_image - without
