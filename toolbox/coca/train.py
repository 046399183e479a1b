"""coca-train: LoFiT, LoReFT or LoRA on answers that reason about concepts first (or on any others), by one loop."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from toolbox.coca.labels import BENIGN, HARMFUL, safety_label
from toolbox.models.load import ModelSource, find_model
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.records import ANSWER_SHAPES, Row
from toolbox.shell.streams import process_rank
from toolbox.training.language import DataSet, Material, Sets, TrainOptions

if TYPE_CHECKING:
    from toolbox.coca.lofit import HeadGrid
    from toolbox.training.finetune import Outcome

LR = {"lofit": 1e-2, "loreft": 9e-4, "lora": 2e-4}
EPOCHS = {"lofit": 5.0, "loreft": 5.0, "lora": 3.0}
RANK = {"loreft": 4, "lora": 16}
BELONGS = {
    **dict.fromkeys(("heads", "stage", "heads_from", "heads_lr", "heads_epochs", "l1"), ("lofit",)),
    **dict.fromkeys(("layers", "positions", "reft_form"), ("loreft",)),
    **dict.fromkeys(("lora_alpha", "lora_targets"), ("lora",)),
    "rank": ("loreft", "lora"),
    "merge": ("lofit", "lora"),
}
"""Which methods an option means something to."""


@dataclass(frozen=True, kw_only=True)
class Options(TrainOptions):
    """coca-train's options; ``given`` names those that were typed or set by a recipe."""

    row_shapes: ClassVar = ANSWER_SHAPES

    file: str = "-"
    method: str = "lofit"
    heads: str | None = None
    stage: str = "auto"
    heads_from: str | None = None
    heads_lr: float = 5e-3
    heads_epochs: float | None = None
    l1: float = 5e-4
    layers: str | None = None
    positions: str = "f6+l6"
    reft_form: str = "loreft"
    rank: int | str = "auto"
    balance: str | None = None
    merge: str | None = None
    epochs: float | str = "auto"  # type: ignore[assignment]
    max_length: int = 1024
    long_rows: str = "skip"  # type: ignore[assignment]
    loss_on: str = "last"

    def resolved(self, given: frozenset[str] = frozenset()) -> Options:
        """What ``auto`` stands for; UsageProblem (2) for what does not fit together."""
        method = self.method
        for name in sorted(given & BELONGS.keys()):
            if method not in BELONGS[name]:
                flag = "--" + name.replace("_", "-")
                raise UsageProblem(
                    f"{flag} means nothing to --method {method}", f"it belongs to {' and '.join(BELONGS[name])}"
                )
        epochs = EPOCHS[method] if self.epochs == "auto" else self.epochs
        rank = RANK.get(method, 0) if self.rank == "auto" else int(self.rank)
        return replace(
            self, epochs=epochs, rank=rank, lora_r=rank if method == "lora" else 0,
            heads_epochs=self.heads_epochs or epochs, stage=self._stage() if method == "lofit" else self.stage,
        )  # fmt: skip

    @property
    def named_heads(self) -> bool:
        """Whether --heads lists heads one by one."""
        return self.heads is not None and "." in self.heads and not self.heads.endswith("%")

    def _stage(self) -> str:
        known = self.heads_from is not None or self.named_heads
        if self.stage == "a" and known:
            raise UsageProblem("--stage a chooses heads, and they are given", "use --stage b, or leave the heads out")
        if self.stage == "b" and not known:
            raise UsageProblem("--stage b needs heads", "as in --heads-from FILE, or --heads 3.1,3.7,9.0")
        if self.heads_from is not None and self.named_heads:
            raise UsageProblem("--heads and --heads-from both name heads", "give one of them")
        return "b" if known else self.stage


@dataclass(frozen=True)
class CocaTask:
    """What all methods share; LoRA needs no more."""

    options: Options

    def inputs(self) -> dict[str, str]:
        return {"train": self.options.file}

    def watched_names(self) -> tuple[str, ...]:
        return ()

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        rows = data["train"].rows
        if self.options.balance is not None:
            kept = balanced(rows, self.options.balance, self.options.seed)
            call.reporter.note(f"--balance {self.options.balance}: {len(kept)} of {len(rows)} rows")
            rows = kept
        watched = {name: one.rows[: self.options.eval_rows] for name, one in data.items() if name != "train"}
        return Sets({"train": rows}, watched, {name: one.sha256 for name, one in data.items()})

    def plan(self, counts: Mapping[str, int]) -> Any:
        return self._plan(counts, float(self.options.epochs))

    def _plan(self, counts: Mapping[str, int], epochs: float) -> Any:
        from toolbox.training.windows import Plan, Stream

        leading = Stream("train", counts["train"], self.options.batch_size)
        return Plan(leading, (), epochs, self.options.seed)

    def auto_lr(self, parameters: int) -> float:
        return LR[self.options.method]

    def parallel(self) -> tuple[str, ...]:
        return ()

    def needs_reference(self) -> bool:
        return False

    def objective(self, material: Material) -> Any:
        from toolbox.training.token_rows import SupervisedObjective

        return SupervisedObjective(material.encoded, material.pad_id)


class AdaptingTask(CocaTask):
    """Methods that train a module of ours beside the frozen model."""

    def write(self, directory: Path, module: Any, metadata: dict[str, str], chat: Any, source: ModelSource) -> None:
        """``intervention.safetensors``: the trained tensors, and what they belong to in its header."""
        from toolbox.coca.intervention import FILE, described
        from toolbox.shell.files import atomic_file
        from toolbox.weights.write import write_file

        about = {"base": self._base(source), "template": chat.name, "system": self.options.system,
                 "template_sha256": hashlib.sha256(chat.source.encode()).hexdigest(), **self.about(module)}  # fmt: skip
        with atomic_file(directory / FILE) as handle:
            write_file(handle, module.tensors(), described(metadata, about))

    def about(self, module: Any) -> dict[str, Any]:
        """What is to be known of the method when the file is read."""
        raise NotImplementedError

    def _base(self, source: ModelSource) -> dict[str, Any]:
        from toolbox.coca.intervention import config_digest
        from toolbox.models.facts import weights_digest
        from toolbox.models.load import load_config

        name = Path(source.name).name if source.kind in ("directory", "gguf") else source.name
        config = load_config(source, trust_remote_code=self.options.trust_remote_code)
        return {"name": name, "config_sha256": config_digest(config), "weights_sha256": weights_digest(source)}


class LofitTask(AdaptingTask):
    """Heads chosen by scales, then offsets at them."""

    def arrange(self, data: Mapping[str, DataSet], call: Invocation) -> Sets:
        sets = super().arrange(data, call)
        if self.options.heads_from is not None:
            from toolbox.coca.intervention import open_intervention

            with open_intervention(self.options.heads_from) as weights:
                sets.digests["heads"] = weights.sha256()
        return sets

    def adapt(self, head: Any) -> Any:
        from toolbox.coca.lofit import HeadGrid, Lofit

        grid = HeadGrid.of(head.model.config)
        places, count = self._heads(grid)
        options = self.options
        if options.merge is not None:
            from toolbox.coca.merge import biased_config

            biased_config(head.model.config)
        scales = options.stage != "b"
        module = Lofit(
            grid, count=0 if options.stage == "a" else count, places=places, scales=scales, seed=options.seed
        )
        if module.A is not None:
            module.A.lr_scale = options.heads_lr / self._lr
        module.hook(head.model)
        return module

    @property
    def _lr(self) -> float:
        return LR["lofit"] if self.options.lr == "auto" else float(self.options.lr)

    def _heads(self, grid: HeadGrid) -> tuple[list[int] | None, int]:
        """Numbers of the heads where they are given, and how many."""
        from toolbox.coca.lofit import how_many, read_heads

        options = self.options
        if options.heads_from is not None:
            from toolbox.coca.intervention import open_intervention

            with open_intervention(options.heads_from) as weights:
                places, _ = read_heads(weights, grid, options.heads, options.heads_from)
            return places, len(places)
        if options.named_heads:
            places = sorted({grid.place(*pair) for pair in parse_heads(str(options.heads))})
            return places, len(places)
        return None, how_many(options.heads or "3%", grid)

    def trainable(self, config: Any) -> dict[str, int]:
        from toolbox.coca.lofit import HeadGrid

        grid = HeadGrid.of(config)
        _, count = self._heads(grid)
        if self.options.merge is not None:
            from toolbox.coca.merge import biased_config

            biased_config(config)
        stages = {"a": grid.count * grid.width, "b": count * grid.width}
        return {stage: number for stage, number in stages.items() if self.options.stage in ("auto", stage)}

    def _first(self, counts: Mapping[str, int]) -> int:
        """Steps of stage a."""
        assert self.options.heads_epochs is not None
        return 0 if self.options.stage == "b" else self._plan(counts, self.options.heads_epochs).steps

    def plan(self, counts: Mapping[str, int]) -> Any:
        first = self._first(counts)
        last = 0 if self.options.stage == "a" else super().plan(counts).steps
        return self._plan(counts, (first + last) / self._plan(counts, 1).steps)

    def objective(self, material: Material) -> Any:
        from toolbox.coca.objective import LofitObjective

        first = self._first({name: len(rows) for name, rows in material.encoded.items()})
        return LofitObjective(
            material.encoded, material.pad_id, first=first, wanted=self.options.heads or "3%", l1=self.options.l1
        )

    def write(self, directory: Path, module: Any, metadata: dict[str, str], chat: Any, source: ModelSource) -> None:
        if module.stage == "a":  # stage a alone: the heads are what it is for
            from toolbox.coca.lofit import top_heads

            scores = module.score().cpu()
            module.start_offsets(top_heads(scores, self._heads(module.grid)[1]), scores)
        super().write(directory, module, metadata, chat, source)

    def about(self, module: Any) -> dict[str, Any]:
        grid = module.grid
        return {"method": "lofit", "grid": {"layers": grid.layers, "heads": grid.heads, "width": grid.width}}


class LoreftTask(AdaptingTask):
    """Low-rank edits at prompt positions."""

    def adapt(self, head: Any) -> Any:
        from toolbox.coca.loreft import Loreft, Positions
        from toolbox.coca.objective import tell_prompts

        options, config = self.options, head.model.config.get_text_config(decoder=True)
        module = Loreft.drawn(
            layer_range(options.layers, config.num_hidden_layers), config.hidden_size, int(options.rank),
            Positions.parse(options.positions), options.reft_form, options.seed,
        )  # fmt: skip
        module.hook(head.model)
        tell_prompts(module, head)
        return module

    def trainable(self, config: Any) -> dict[str, int]:
        """L · (2 r d + r)."""
        text = config.get_text_config(decoder=True)
        layers, rank = len(layer_range(self.options.layers, text.num_hidden_layers)), int(self.options.rank)
        matrices = 1 if self.options.reft_form == "lobireft" else 2
        return {"loreft": layers * (matrices * rank * text.hidden_size + rank)}

    def about(self, module: Any) -> dict[str, Any]:
        options = self.options
        return {"method": "loreft", "form": options.reft_form, "positions": options.positions,
                "rank": int(options.rank), "layers": module.layers}  # fmt: skip


TASKS: dict[str, type[CocaTask]] = {"lofit": LofitTask, "loreft": LoreftTask, "lora": CocaTask}


# -- small parts ------------------------------------------------------------------------------------------------------
def parse_heads(text: str) -> list[tuple[int, int]]:
    """``3.1,9.0`` as (layer, head) pairs; UsageProblem for anything else."""
    pairs = []
    for item in text.split(","):
        layer, _, head = item.partition(".")
        if not (layer.isdecimal() and head.isdecimal()):
            raise UsageProblem(f"--heads {item}: expected LAYER.HEAD", "as in 3.1,9.0, or a number, or 3%")
        pairs.append((int(layer), int(head)))
    return pairs


def layer_range(text: str | None, layers: int) -> list[int]:
    """``9-17`` or ``9`` as layer numbers; None: 10 to 18 of 32, scaled. BadData (65) for layers that do not exist."""
    first, last = (round(10 * layers / 32), round(18 * layers / 32)) if text is None else _ends(text)
    last = min(last, layers - 1) if text is None else last
    if not first <= last < layers:
        raise BadData(f"--layers {text}: no such layers", f"the model has layers 0 to {layers - 1}")
    return list(range(first, last + 1))


def _ends(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise UsageProblem(f"--layers {text}: expected A-B", "as in 9-17")
    return int(first), int(last) if dash else int(first)


def balanced(rows: tuple[Row, ...], ratio: str, seed: int) -> tuple[Row, ...]:
    """As many rows as give harmful to benign ``H:B``, in their order; of the class with too many a seeded sample.

    Raises: UsageProblem (2) for what is no ratio; BadData (65) for a row without a label that can be told.
    """
    harmful, colon, benign = ratio.partition(":")
    if not (colon and harmful.isdecimal() and benign.isdecimal()) or int(harmful) + int(benign) == 0:
        raise UsageProblem(f"--balance {ratio}: expected H:B", "as in 1:1, or 500:3000")
    parts = {HARMFUL: int(harmful), BENIGN: int(benign)}
    places: dict[str, list[int]] = {HARMFUL: [], BENIGN: []}
    for place, row in enumerate(rows):
        label = safety_label(row.label)
        if label is None:
            what = "no label" if row.label is None else "unknown label"
            raise BadData(f"{what}, which --balance needs", "harmful or benign", file=row.file, line=row.line,
                          field="$.label")  # fmt: skip
        places[label].append(place)
    units = min((len(places[name]) / part for name, part in parts.items() if part), default=0.0)
    draw = random.Random(seed)
    kept = [place for name, part in parts.items() for place in draw.sample(places[name], int(units * part + 1e-9))]
    if not kept:
        raise BadData(f"--balance {ratio} leaves no row", "are both kinds there?")
    return tuple(rows[place] for place in sorted(kept))


def run(options: Options, call: Invocation, given: frozenset[str] = frozenset()) -> None:
    """Train and write ``options.out``; events go to stdout."""
    from toolbox.shell.files import OutputDirectory
    from toolbox.training.figures import draw_training
    from toolbox.training.finetune import train

    options = options.resolved(given)
    if options.named_heads:
        parse_heads(str(options.heads))
    source = find_model(options.model, trust_remote_code=options.trust_remote_code)
    if source.kind == "adapter":
        raise UsageProblem("an intervention on an adapter would belong to neither model", "merge the adapter first")
    with contextlib.ExitStack() as stack:
        merged = None
        if options.merge is not None and process_rank() == 0 and not call.dry_run:
            merged = stack.enter_context(
                OutputDirectory(options.merge, overwrite=options.overwrite, resume=options.resume)
            )

        def finish(outcome: Outcome) -> None:
            draw_training(outcome.events, options.plot, f"coca-train: {options.method}")
            if merged is not None and not merged.finished:
                from toolbox.coca.merge import write_merged

                write_merged(outcome, options, call, merged)

        train(TASKS[options.method](options), call, finish)
