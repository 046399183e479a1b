"""Erasers against the package concept-erasure, and a LoFiT step against a LoRA step and against a loop over heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.bench_models import encoded_rows, need_smollm2, smollm2
from bench.common import Figure, Skip, alternate, forget_peak, in_child, memory_mib, ratios

WIDTH = 576
_LR = 1e-6  # small: the weights hardly move, so every step costs the same


def states(rows: int, width: int = WIDTH, seed: int = 0) -> tuple[Any, Any]:
    """Rows like hidden states: float32, far from the origin, condition number of some 1e4; two classes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mixing, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    scale = torch.logspace(1, -1, width)
    z = torch.arange(rows) % 2
    x = torch.randn(rows, width, generator=generator) * scale @ mixing + 10 + 0.3 * z[:, None]
    return x, z


def leace_fit(quick: bool) -> Iterator[Figure]:
    """Fitting the eraser of a binary label on 1,020 × 576 float32 states, both in float64, without shrinkage."""
    if importlib.util.find_spec("concept_erasure") is None:
        raise Skip("concept-erasure is not installed")
    import torch
    from concept_erasure import LeaceFitter

    from toolbox.coca.erase import Moments, leace

    x, z = states(1020)

    def ours() -> Any:
        return leace(Moments(WIDTH, 2).update(x, z), shrinkage=False)

    def theirs() -> Any:
        fitter = LeaceFitter(WIDTH, 1, constrain_cov_trace=False, shrinkage=False, dtype=torch.float64)
        return fitter.update(x.double(), z).eraser

    seconds = alternate(2 if quick else 15, {"ours": ours, "theirs": theirs})
    yield Figure.of(
        "leace: against concept-erasure", ratios(seconds["theirs"], seconds["ours"]), "×", target=">= 3",
        ratio_of="CPU of the package's fit / of ours", note="1,020 × 576, two classes, no shrinkage",
    )  # fmt: skip
    wide = x.double()
    apart = float((ours()(wide) - theirs()(wide)).abs().max())
    yield Figure("leace: largest difference", apart, "", target="< 1e-9", note="of erased states")


def stream(rows: int) -> float:
    """Peak MiB beyond what is loaded while ``rows`` rows of 256 numbers are streamed into an eraser."""
    from toolbox.coca.erase import Moments, leace

    x, z = states(2000, 256)
    moments = Moments(256, 2).update(x[:100], z[:100])
    forget_peak()
    before = memory_mib("VmRSS")
    for _ in range(rows // len(x)):
        moments.update(x, z)
    leace(moments)
    return memory_mib("VmHWM") - before


def leace_stream(quick: bool) -> Iterator[Figure]:
    """Memory of streaming a million rows into an eraser, against ten thousand."""
    few, many = (in_child(stream, count) for count in (10_000, 20_000 if quick else 1_000_000))
    yield Figure("leace: memory for 1e6 rows", many, "MiB", note="beyond the loaded process, batches of 2,000 × 256")
    yield Figure("leace: 1e6 rows against 1e4", many - few, "MiB", target="< 20", note="what more rows add")


def adapted_step(model: Any, rows: Sequence[Any], adapt: Callable[[Any], Any]) -> Callable[[], None]:
    """One AdamW step of what ``adapt(model)`` trains, over all rows in one batch."""
    import torch

    from toolbox.models.token_loss import TokenLoss, collate

    batch = collate(rows, pad_id=0)
    adapted, trained = adapt(model)
    head = TokenLoss(adapted, 1024)
    optimizer = torch.optim.AdamW(trained, lr=_LR, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nll, _ = head(batch.ids, batch.where, batch.labels)
        nll.mean().backward()
        optimizer.step()

    return step


def lofit_step(quick: bool) -> Iterator[Figure]:
    """Steps of LoFiT (both stages) and of LoRA r 16 on the embedded model, on the same rows."""
    need_smollm2()
    import copy

    from toolbox.coca.lofit import HeadGrid, Lofit
    from toolbox.models.adapters import add_lora

    model, chat = smollm2()
    model.requires_grad_(False)
    rows, source = encoded_rows(chat, 4)
    grid = HeadGrid.of(model.config)

    def lofit(stage: str) -> Callable[[Any], Any]:
        def adapt(base: Any) -> Any:
            places = None if stage == "a" else list(range(0, grid.count, 33))
            module = Lofit(grid, count=0 if stage == "a" else len(places or ()), places=places, scales=stage == "a")
            module.hook(base)
            return base, list(module.parameters())

        return adapt

    def lora(base: Any) -> Any:
        adapted = add_lora(base, r=16)
        return adapted, [p for p in adapted.parameters() if p.requires_grad]

    steps = {name: adapted_step(copy.deepcopy(model), rows, adapt)
             for name, adapt in (("a", lofit("a")), ("b", lofit("b")), ("lora", lora))}  # fmt: skip
    seconds = alternate(1 if quick else 5, steps)
    for stage in "ab":
        yield Figure.of(
            f"lofit: stage {stage} against LoRA", ratios(seconds[stage], seconds["lora"]), "×", target="<= 1.1",
            ratio_of="CPU of a LoFiT step / of a LoRA step", note=f"SmolLM2, {len(rows)} {source}, r 16",
        )  # fmt: skip


def lofit_hook(quick: bool) -> Iterator[Figure]:
    """The hook alone, forward and backward, against the same in a loop over a layer's heads: 32 heads of 128."""
    import torch

    from toolbox.coca.lofit import HeadGrid, Lofit

    grid = HeadGrid(1, 32, 128)
    module = Lofit(grid, count=32, places=range(32))
    z = torch.randn(4, 32, 4096)
    assert module.v is not None

    def vectorised() -> None:
        module.change(0, z).sum().backward()

    def looped() -> None:
        parts = [z[..., 128 * i : 128 * (i + 1)] + module.v[i] for i in range(32)]
        torch.cat(parts, dim=-1).sum().backward()

    seconds = alternate(3 if quick else 15, {name: lambda f=f: [f() for _ in range(30)] for name, f in
                                             (("vectorised", vectorised), ("looped", looped))})  # fmt: skip
    yield Figure.of(
        "lofit: hook against a loop over heads", ratios(seconds["looped"], seconds["vectorised"]), "×", target=">= 3",
        ratio_of="CPU of a loop over 32 heads / of the hook", note="4 × 32 tokens, forward and backward",
    )  # fmt: skip


BENCHES = {"leace": leace_fit, "leace-stream": leace_stream, "lofit-step": lofit_step, "lofit-hook": lofit_hook}
