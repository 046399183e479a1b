"""DULL: a step against plain cross entropy in the same harness, and noise for a million rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from bench.common import Figure, alternate, in_child, memory_mib, ratios

CLASSES, SIZE, BATCH = 10, 32, 64


def stepper(method: str, acting: float) -> Callable[[], None]:
    """One whole step by the objective's own hooks: draws, batch, passes, optimisers, gates, averages.

    ``acting`` is the share of labels acted upon; then half of the batch is mixed too. Images are noise: what a step
    costs does not depend on them.
    """
    import numpy as np
    import torch

    from toolbox.classify.backbones import backbone_config, new_backbone
    from toolbox.classify.classifier import Pixels
    from toolbox.dull.data import Corpus
    from toolbox.dull.gates import Gated
    from toolbox.dull.objective import DullObjective, Labels
    from toolbox.dull.options import Options
    from toolbox.training.windows import Plan, Stream

    draw, count = np.random.default_rng(0), 16 * BATCH
    names = tuple(map(str, range(CLASSES)))
    pixels = torch.from_numpy(draw.integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))
    given = np.sort(draw.integers(0, CLASSES, count))
    corpus = Corpus(tuple(map(str, range(count))), names, pixels, given, None, np.arange(count), np.zeros(0, np.int64))
    config = backbone_config("cifar-resnet8", list(names), SIZE)
    net = new_backbone(config, 0).to(memory_format=torch.channels_last)
    model = Gated(net, CLASSES, trained=method == "dull").train()
    how = Pixels(SIZE, (0.5,) * 3, (0.25,) * 3)
    objective = DullObjective(corpus, model, new_backbone(config, 0), Options(method=method), how, steps=1000,
                              lambda_gate=1e-3)  # fmt: skip
    if acting:
        rows = np.sort(draw.permutation(count)[: int(acting * count)])
        right = (given[rows] + 1) % CLASSES
        targets = 0.3 * np.eye(CLASSES)[given[rows]] + 0.7 * np.eye(CLASSES)[right]
        objective.labels = Labels(objective.labels.prior, rows, targets, right, 0.5, 1.0)
    weights = [p for name, p in model.named_parameters() if name != "gates"]
    optimizers: list[Any] = [torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4)]
    if method == "dull":
        optimizers.append(torch.optim.SGD([model.gates], lr=0.1))
    plan, at = Plan(Stream("train", count, BATCH), (), 1000.0, 0), [0]

    def step() -> None:
        at[0] += 1
        window = plan.window(at[0])
        rows = window.rows["train"]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        objective.before_window(window)
        loss, _ = objective.loss(model, objective.passes[0], objective.batch(objective.passes[0], rows), len(rows))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        objective.after_step(optimizers)

    return step


def steps(quick: bool) -> Iterator[Figure]:
    """CPU seconds of steps side by side, the gate shut and open."""
    import torch

    torch.set_num_threads(1)
    repeats, burst = (1, 1) if quick else (9, 4)
    made = {"ce": stepper("ce", 0.0), "shut": stepper("dull", 0.0), "open": stepper("dull", 0.2)}
    bursts = {name: (lambda step=step: [step() for _ in range(burst)]) for name, step in made.items()}
    seconds = alternate(repeats, bursts)
    images = [1000 * value / (burst * BATCH) for value in seconds["ce"]]
    yield Figure.of("dull-step: cross entropy, ResNet-8", images, "ms an image", note="32 x 32, one core")
    for name in ("shut", "open"):
        yield Figure.of(f"dull-step: DULL, gate {name}", ratios(seconds[name], seconds["ce"]), "ratio",
                        target="<= 1.35", ratio_of="DULL's step / cross entropy's")  # fmt: skip


def noised(count: int) -> float:
    """Peak of resident memory, in MiB, of dull-noise over so many rows on stdin; in a process of its own."""
    import sys

    from toolbox.commands.dull_noise import main

    try:
        main(["--imbalance", ".1", "--rate", ".2", "--quiet"])
    except SystemExit as done:
        if done.code:
            sys.exit(done.code)
    return memory_mib("VmHWM")


def rows(count: int) -> Iterator[bytes]:
    """A balanced manifest with a field of text that memory should not hold."""
    for number in range(count):
        row = {"id": f"{number:07d}", "image": f"a/{number}.jpg", "label": number % CLASSES, "note": "x" * 200}
        yield json.dumps(row).encode() + b"\n"


def noise(quick: bool) -> Iterator[Figure]:
    """Memory of dull-noise against the number of rows: ids, labels and offsets, not the rows."""
    small, large = (1_000, 20_000) if quick else (10_000, 1_000_000)
    peaks = [in_child(noised, count, feed=rows(count)) for count in (small, large)]
    size = sum(len(row) for row in rows(100)) / 100
    grown = (peaks[1] - peaks[0]) * 2**20 / (large - small)
    yield Figure("dull-noise: memory a row", grown, "bytes", note=f"{large:,} rows of {size:.0f} bytes; ids are kept")


BENCHES = {"dull-step": steps, "dull-noise": noise}
