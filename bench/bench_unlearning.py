"""Rectifying the gradient of a whole model, against the style that flattens everything into one vector in float64."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.common import Figure, forget_peak, in_child, memory_mib, ratios

_LAYERS, _WIDTH, _KEYS, _INNER, _VOCABULARY = 30, 576, 192, 1536, 49152
"""SmolLM2-135M: a Llama with tied embeddings, 134.5 million parameters in 272 tensors."""


def shapes(layers: int) -> list[tuple[int, ...]]:
    """The shapes of all parameters with so many of the model's layers."""
    attention = [(_WIDTH, _WIDTH), (_KEYS, _WIDTH), (_KEYS, _WIDTH), (_WIDTH, _WIDTH)]
    layer = [*attention, (_INNER, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER), (_WIDTH,), (_WIDTH,)]
    return [(_VOCABULARY, _WIDTH), *layer * layers, (_WIDTH,)]


def conflict(layers: int) -> tuple[list[Any], list[Any]]:
    """Random gradients g_u and ḡ at a cosine of −.05."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    forget = [torch.randn(shape) for shape in shapes(layers)]
    retain = [torch.randn_like(gradient).sub_(gradient, alpha=0.05) for gradient in forget]
    return forget, retain


def flattened(forget: Sequence[Any], retain: Sequence[Any]) -> float:
    """The style: one fp32 vector of each gradient, the sign test tensor by tensor in their own dtype, the projection on
    float64 copies, and what comes out as fp32 again, written back tensor by tensor. The cosine before."""
    import torch

    g, r = (torch.cat([gradient.reshape(-1) for gradient in gradients]) for gradients in (forget, retain))
    ends = [*itertools.accumulate(gradient.numel() for gradient in forget)]
    spans = [slice(end - gradient.numel(), end) for gradient, end in zip(forget, ends, strict=True)]
    product = sum(float((g[span] * r[span]).sum()) for span in spans)
    cosine = product / float(g.norm() * r.norm())
    if product < 0:
        wide, mean = g.to(torch.float64), r.to(torch.float64)
        along = torch.dot(wide, mean) / torch.dot(mean, mean) * mean
        g = (wide - along).to(g.dtype)
    for gradient, span in zip(forget, spans, strict=True):
        gradient.copy_(g[span].view_as(gradient))
    return cosine


def rectified(forget: Sequence[Any], retain: Sequence[Any]) -> float:
    """Ours: decision, projection and the cosine measured afterwards."""
    from toolbox.unlearning.gru import rectify

    return rectify(forget, retain, reduce=list).cos


def unmeasured(forget: Sequence[Any], retain: Sequence[Any]) -> float:
    """The same without measuring what came out: the products, then one subtraction a tensor."""
    from toolbox.unlearning.gru import rectify

    found = rectify(forget, retain, reduce=list, apply=False)
    coef = found.dot / found.norm_retain**2
    for gradient, mean in zip(forget, retain, strict=True):
        gradient.add_(mean, alpha=-coef)
    return found.cos


STYLES: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "flatten": flattened,
    "rectify": rectified,
    "unmeasured": unmeasured,
}


def peak_growth(style: str, layers: int) -> float:
    """MiB that one rectification takes at its peak beyond g_u and ḡ. Run in a fresh process."""
    forget, retain = conflict(layers)
    STYLES[style](forget[-1:], retain[-1:])  # what torch keeps for itself from its first call on
    before = memory_mib("VmRSS")
    forget_peak()
    STYLES[style](forget, retain)
    return memory_mib("VmHWM") - before


def rectify_whole_model(quick: bool) -> Iterator[Figure]:
    """Time and memory of rectifying 134.5 million fp32 numbers that conflict, by both styles in turns."""
    from toolbox.unlearning.gru import cosine

    repeats, layers = (1, 1) if quick else (5, _LAYERS)
    forget, retain = conflict(layers)
    count = sum(gradient.numel() for gradient in forget)
    note = f"{count / 1e6:.1f} M fp32 numbers in {len(forget)} tensors"
    seconds: dict[str, list[float]] = {name: [] for name in STYLES}
    left = 0.0
    for repeat in range(repeats + 1):
        for name in list(STYLES)[:: -1 if repeat % 2 else 1]:
            for gradient, mean in zip(forget, retain, strict=True):  # a conflict again
                gradient.sub_(mean, alpha=0.05)
            began = time.process_time()
            before = STYLES[name](forget, retain)
            if repeat:  # the first of each is its warm-up
                seconds[name].append(time.process_time() - began)
            if not before < 0:
                raise AssertionError(f"{name}: cosine {before} is no conflict")
            if name == "rectify":
                left = max(left, abs(cosine(forget, retain, reduce=list)))
    yield Figure.of("rectify: time", seconds["rectify"], "CPU-s", note=note)
    yield Figure.of("rectify: time without measuring", seconds["unmeasured"], "CPU-s", note="no cos_after")
    yield Figure.of(
        "rectify: against flattening", ratios(seconds["flatten"], seconds["rectify"]), "×", target=">= 10",
        ratio_of="CPU of one float64 vector / of the rectified step, cos_after measured",
    )  # fmt: skip
    yield Figure.of(
        "rectify: against flattening, unmeasured", ratios(seconds["flatten"], seconds["unmeasured"]), "×",
        ratio_of="CPU of one float64 vector / of products and projection alone",
    )  # fmt: skip
    yield Figure("rectify: |cos| after", left, "", target="<= 1e-6", repeats=repeats, note="largest; 0 is orthogonal")
    memory = {style: in_child(peak_growth, style, layers) for style in ("rectify", "flatten")}
    yield Figure("rectify: memory", memory["rectify"] / 1000 * 1.048576, "GB", target="<= 0.6",
                 note="resident peak beyond g_u and ḡ, fresh process")  # fmt: skip
    yield Figure("rectify: memory of flattening", memory["flatten"] / 1000 * 1.048576, "GB", note="the same beyond")


BENCHES = {"rectify": rectify_whole_model}
