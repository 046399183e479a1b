"""What the largest settings of the papers need, by formula: ``sizes.py PAGE`` fills the tables of docs/scale.md.

Nothing here is measured. A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; the text around it explains the
formulas that are computed here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GPUS, MEMORY = 8, 80e9
PEAK, SHARE, SMALL_SHARE, BANDWIDTH = 312e12, 0.4, 0.1, 2.0e12
"""FLOP/s of one GPU in bf16, the share of it that is assumed to be reached (by small networks), bytes a second of its
memory."""

SPEED = GPUS * PEAK * SHARE


@dataclass(frozen=True)
class Trained:
    """A training run of a language model: parameters, bytes of state each, and tokens that go through it.

    ``flops`` are those of a token and parameter: 8 is forward, backward and the forward pass that gradient
    checkpointing repeats; 6 where the weights are frozen and have no gradient (2 + 2 + 2).
    """

    name: str
    setting: str
    parameters: float
    state: int
    tokens: float
    flops: int
    sharded: bool
    layers: int
    width: int
    micro: int

    @property
    def on_each(self) -> float:
        """Bytes of state on each GPU."""
        return self.parameters * self.state / (GPUS if self.sharded else 1)

    @property
    def activations(self) -> float:
        """Bytes kept by checkpointing: one bf16 row of the width a token and layer of the micro-batch."""
        return 2.0 * self.micro * self.layers * self.width

    @property
    def seconds(self) -> float:
        return self.flops * self.parameters * self.tokens / SPEED


TRAINED = (
    Trained("SatImp", "Llama-2-7B, TOFU forget10: 125 steps of 16 + 16 rows, at most 500 tokens each",
            6.74e9, 16, 125 * 32 * 500, 8, True, 32, 4096, 4 * 500),
    Trained("GRU", "the same model, 65 steps of 32 + 32 rows; ḡ beside the gradient",
            6.74e9, 20, 65 * 64 * 500, 8, True, 32, 4096, 4 * 500),
    Trained("GRU, LoRA 16", "the same, an adapter on a whole copy a GPU",
            6.74e9, 4, 65 * 64 * 500, 6, False, 32, 4096, 4 * 500),
    Trained("COCA, LoFiT", "Gemma-2-9B, 4,500 rows of at most 1,024 tokens, 5 + 5 epochs; the model frozen",
            9.24e9, 4, 4500 * 1024 * 10, 6, False, 42, 3584, 2 * 1024),
    Trained("LIT", "LLaVA-1.5-13B, 665,000 conversations of about 1,000 tokens (assumed), one epoch",
            13.35e9, 16, 665e3 * 1000, 8, True, 40, 5120, 4 * 1000),
)  # fmt: skip


def trained() -> str:
    """State, activations and time of the trainers of language models."""
    lines = [
        "| method | setting | state | on each of 8 | activations of a micro-batch | fits 80 GB | at least |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for one in TRAINED:
        whole = one.parameters * one.state
        fits = one.on_each + one.activations + (2 * one.parameters if one.flops == 8 else 0) < MEMORY
        how = "sharded" if one.sharded else "a copy"
        lines.append(
            f"| {one.name} | {one.setting} | {_gb(whole)} ({one.state} B) | {_gb(one.on_each)} ({how}) | "
            f"{_gb(one.activations)} | {'yes' if fits else 'no'} | {_time(one.seconds)} |"
        )
    return "\n".join(lines)


def asked() -> str:
    """Generation and scoring: forward passes, and decoding bound by reading the weights."""
    weights, new, prompts = 2 * 70.6e9, 792 * 9 * 256, 792 * 9 * 150
    step = weights / GPUS / BANDWIDTH
    paths, tree, naive = 8000, 43_068 / 50, 1_115_738 / 50
    rows = [
        ("LoT", "Llama-3.1-70B, WinoBias, 792 questions × 9 wordings, 256 new tokens each",
         f"{_gb(weights)} of weights in bf16, {_gb(weights / GPUS)} on each",
         f"decoding {new / 1e6:.1f} M tokens, 256 at a time: {_time(new / 256 * step)}; "
         f"reading {prompts / 1e6:.1f} M tokens: {_time(2 * 70.6e9 * prompts / SPEED)}"),
        ("Landscape", "8,000 paths (50 questions × 10 paths × 4 sets × 4 ways) scored by Llama-3.1-8B",
         f"{_gb(2 * 8.03e9)} of weights in bf16, a copy a GPU",
         f"{paths * tree / 1e6:.1f} M tokens as a tree: {_time(2 * 8.03e9 * paths * tree / SPEED)}; one pass a pair "
         f"would be {paths * naive / 1e6:.0f} M tokens: {_time(2 * 8.03e9 * paths * naive / SPEED)}"),
        ("Landscape", "the same by Llama-3.1-70B",
         f"{_gb(weights)} in each process", "not carried: the scorer keeps a whole model on each GPU"),
    ]  # fmt: skip
    head = ["| method | setting | memory | at least |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def fused() -> str:
    """lwi-fuse on a Llama-3-8B shape."""
    inner, width, layers = 14_336, 4096, 32
    flops = 3 * 2 * inner**2 * width * layers
    group = 2 * 3 * inner * width * 4
    return "\n".join([
        "| what | by formula |", "|---|---:|",
        f"| products of a sweep over {layers} feed-forward groups, 3 · 2n²d each | {flops / 1e12:.0f} TFLOP |",
        f"| the same on one GPU in fp32 (19.5 TFLOP/s, {SHARE:.0%} of it) | {_time(flops / (19.5e12 * SHARE))} |",
        f"| the cost matrix of one group, n × n in fp32 | {_gb(4.0 * inner**2)} |",
        f"| working set of the largest group, both models in fp32 | {_gb(group)} |",
        f"| and two shards of 5 GB | {_gb(group + 10e9)} of host memory |",
    ])  # fmt: skip


def ranked() -> str:
    """LONGER at the paper's length, its tables sharded."""
    from toolbox.longer.costs import Sizes, cache_bytes, flops_per_label

    sizes = Sizes(length=2000, dim=32, merge=8, inner_layers=1, queries=100, layers=1, user_globals=1)
    samples, ids = 5.2e9, 1e9
    lines = ["| what | by formula |", "|---|---:|"]
    for candidates in (1, 32):
        flops = 3 * flops_per_label(sizes, candidates)
        lines.append(
            f"| training of a label, {candidates} a request | {flops / 1e9:.2f} GFLOP; "
            f"5.2 G labels at least {_time(flops * samples / (GPUS * PEAK * SMALL_SHARE))} |"
        )
    table = ids * (32 * 4 + 4)
    return "\n".join([
        *lines,
        f"| tables of 1 G ids of 32 numbers with row-wise Adagrad, 132 B a row | {_gb(table)}, "
        f"{_gb(table / GPUS)} on each |",
        f"| cache of a request in bf16 | {cache_bytes(sizes, 2) / 1e6:.2f} MB |",
    ])  # fmt: skip


def pictures() -> str:
    """The image classifiers of LwI and DULL: 3 × forward for training, one multiply-add as 2 FLOPs."""
    runs = [
        (
            "LwI",
            "ResNet-18 of widths 64 to 512, Tiny-ImageNet: 100,000 images of 64 × 64, 200 epochs",
            4.46e9,
            2e7,
            11.3e6,
        ),
        ("DULL", "ResNet-50, Clothing1M: 1,000,000 images of 224 × 224, 15 epochs (assumed)", 8.2e9, 1.5e7, 25.6e6),
    ]
    lines = ["| method | setting | state | on one GPU, a tenth of its peak | on 8 |", "|---|---|---:|---:|---:|"]
    for name, setting, flops, images, parameters in runs:
        seconds = 3 * flops * images / (PEAK * SMALL_SHARE)
        lines.append(
            f"| {name} | {setting} | {_gb(12 * parameters)} (12 B) | {_time(seconds)} | {_time(seconds / GPUS)} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "trained": trained, "asked": asked, "fused": fused, "ranked": ranked, "pictures": pictures,
}  # fmt: skip


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def filled(text: str) -> str:
    """The page with its tables as they are computed now."""
    for name, table in TABLES.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise SystemExit(f"one place for the table {name} is expected: <!-- {name} --> ... <!-- end -->")
        text = marked.sub(lambda found, table=table: f"{found[1]}\n{table()}\n\n{found[2]}", text)
    return text


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
