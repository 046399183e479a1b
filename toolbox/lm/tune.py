"""lm-tune: supervised fine-tuning of a causal language model on conversations, questions and answers, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolbox.shell.command import Invocation
from toolbox.training.language import DataSet, Material, Sets, TrainOptions, lr_by_size


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """lm-tune's options; ``file`` is where the rows come from."""

    file: str = "-"


@dataclass(frozen=True)
class TuneTask:
    """Supervised fine-tuning as the shared run sees it."""

    options: Options

    def inputs(self) -> dict[str, str]:
        return {"train": self.options.file}

    def watched_names(self) -> tuple[str, ...]:
        return ()

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        watched = {name: one.rows[: self.options.eval_rows] for name, one in data.items() if name != "train"}
        return Sets({"train": data["train"].rows}, watched, {name: one.sha256 for name, one in data.items()})

    def plan(self, counts: Mapping[str, int]) -> Any:
        from toolbox.training.windows import Plan, Stream

        leading = Stream("train", counts["train"], self.options.batch_size)
        return Plan(leading, (), self.options.epochs, self.options.seed)

    def auto_lr(self, parameters: int) -> float:
        return lr_by_size(parameters, small=1e-4)

    def parallel(self) -> tuple[str, ...]:
        return ()

    def needs_reference(self) -> bool:
        return False

    def objective(self, material: Material) -> Any:
        from toolbox.training.token_rows import SupervisedObjective

        return SupervisedObjective(material.encoded, material.pad_id)


def run(options: Options, call: Invocation) -> None:
    """Fine-tune and write ``options.out``; events go to stdout."""
    from toolbox.training.figures import draw_training
    from toolbox.training.finetune import Outcome, train

    def finish(outcome: Outcome) -> None:
        draw_training(outcome.events, options.plot, f"lm-tune: {options.model}")

    train(TuneTask(options), call, finish)
