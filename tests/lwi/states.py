"""States after tasks, untrained: for what reads models and does not care how they came about."""

from __future__ import annotations

from pathlib import Path

from tests.lwi.pictures import CLASSES, SIZE

TASKS = (CLASSES[:2], CLASSES[2:])


def write_states(folder: Path, *names: str, seed: int = 0, tasks=TASKS) -> None:
    """A state after each task, with names in order, below ``folder``."""
    from tests.lwi.nets import stir
    from toolbox.classify.backbones import backbone_config, new_backbone
    from toolbox.classify.classifier import Pixels
    from toolbox.lwi.task_model import DEFAULT_PIXELS, write

    for t, name in enumerate(names):
        labels = [label for task in tasks[: t + 1] for label in task]
        model = stir(new_backbone(backbone_config("cifar-resnet8", labels, SIZE, widths=[4, 5, 6]), seed), seed + t)
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name, model, tasks[: t + 1], Pixels(SIZE, DEFAULT_PIXELS.mean, DEFAULT_PIXELS.std), {})
