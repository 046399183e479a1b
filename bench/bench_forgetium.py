"""GA, GradDiff and NPO side by side with forgetium 0.2.1 (PyPI): same rows, batch, steps, learning rates and AdamW.

forgetium lives in a virtual environment of this bench's own, which sees the packages of the one that runs the bench, so
that both use the same torch. Its trainer runs as it is; its ``on_step_end`` hook lets ours make a step in between.

Where the two differ, and what was done about it here:

- Rows. forgetium joins prompt and response as they come and adds the end-of-text token; no chat template. It is given
  our rendered prompts; that its collator then makes our tokens and labels is checked.
- NPO. Its default adds the retain loss with factor 1; here 0, as ours. Its reference is a copy of the model, asked
  every step; ours are that model's log-probabilities, scored once before the first step (in no figure here).
- Learning rate and clipping. Its rate always falls linearly to 0 and its gradients are always clipped, at norm 1 by
  default; ours are constant and unclipped unless asked. Here both fall and both clip at 1.
- Weight decay spares what is called ``layernorm.weight``: a Llama's last norm decays. Ours spares all vectors. 0 here.
- Accumulation averages the means of micro-batches, ours is the mean over the window's tokens. One batch a step here.
- Retain rows. It shuffles them anew in every pass over the forget rows; ours all come before one comes twice. Here a
  step takes all rows of both sets.
- AdamW is torch's default implementation there, the fused one here: the same numbers up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from bench.bench_models import need_smollm2, smollm2
from bench.bench_unlearn_steps import BATCH, encoded_people, people_rows, prepare, turns, unlearning_loop
from bench.common import Figure, in_child, ratios
from bench.guest import guest

VERSION = "0.2.1"
_LR = 2e-5
_CLIP = 1.0


# -- side by side (in its environment) --------------------------------------------------------------------------------
def _theirs(kind: str, model: Any, chat: Any, steps: int) -> tuple[Any, Any]:
    """forgetium's unlearner for ``kind``, and its data."""
    from forgetium import (
        ForgetRetainDataset,
        GradientAscentUnlearner,
        GradientDifferenceUnlearner,
        NPOUnlearner,
        QADataset,
        UnlearningConfig,
    )

    config = UnlearningConfig(
        learning_rate=_LR, num_epochs=steps, batch_size=BATCH, max_grad_norm=_CLIP, weight_decay=0.0, warmup_ratio=0.0,
        device="cpu", logging_steps=1, log_level="ERROR",
    )  # fmt: skip
    records = {
        name: [{"prompt": chat.prompt_text(turns(row)[:1]), "response": row["answer"]} for row in rows]
        for name, rows in people_rows(BATCH).items()
    }
    data = ForgetRetainDataset(QADataset(records["forget"]), QADataset(records["retain"]))
    makers = {
        "ga": lambda: GradientAscentUnlearner(model, chat.tokenizer, config),
        "graddiff": lambda: GradientDifferenceUnlearner(model, chat.tokenizer, config, retain_weight=1.0),
        "npo": lambda: NPOUnlearner(model, chat.tokenizer, config, beta=0.1, retain_weight=0.0),
    }
    return makers[kind](), data


def _ours(kind: str, model: Any, rows: dict[str, list[Any]], steps: int) -> Any:
    """The events of our loop for ``kind``."""
    from toolbox.unlearning.losses import make_forget_loss
    from toolbox.unlearning.objectives import Retention, UnlearnObjective
    from toolbox.unlearning.registry import resolve

    forget = make_forget_loss(kind, resolve(kind, {}), seed=0)
    retain = Retention(factor=1.0) if kind == "graddiff" else None
    streams = rows if retain is not None else {"forget": rows["forget"]}
    objective = UnlearnObjective(streams, 0, forget, retain=retain)
    return unlearning_loop(
        *prepare(model, _LR), objective, steps, lr=_LR, schedule="linear", max_grad_norm=_CLIP
    ).run()  # fmt: skip


def same_tokens(data: Any, chat: Any, rows: dict[str, list[Any]]) -> bool:
    """Whether forgetium's collator makes our tokens and labels of its prompts and responses."""
    from forgetium import QACollator

    collator = QACollator(chat.tokenizer)
    for name, dataset in (("forget", data.forget), ("retain", data.retain)):
        for place, row in enumerate(rows[name]):
            batch = collator([dataset[place]])
            labels = [token if on else -100 for token, on in zip(row.ids, row.labelled, strict=True)]
            if batch["input_ids"][0].tolist() != list(row.ids) or batch["labels"][0].tolist() != labels:
                return False
    return True


def race(kind: str, steps: int) -> dict[str, Any]:
    """Losses and CPU seconds of ``steps`` steps of each, in turns. Runs in forgetium's environment.

    A step of theirs is all between two calls of their hook: loading rows, loss, clipping, AdamW, schedule, log.
    """
    from toolbox.models.load import find_model, load_model

    model, chat = smollm2()
    rows = encoded_people(chat)
    unlearner, data = _theirs(kind, load_model(find_model("smollm2")).requires_grad_(True), chat, steps)
    events = _ours(kind, model, rows, steps)
    seconds: dict[str, list[float]] = {"forgetium": [], "ours": []}
    losses: list[float] = []

    def turn(step: int, loss: float) -> None:
        nonlocal began
        seconds["forgetium"].append(time.process_time() - began)
        began = time.process_time()
        losses.append(next(events)["loss"])
        seconds["ours"].append(time.process_time() - began)
        began = time.process_time()

    unlearner.on_step_end = turn
    equal = same_tokens(data, chat, rows)
    began = time.process_time()
    history = unlearner.fit(data)
    events.close()
    used = rows["forget"] + (rows["retain"] if kind == "graddiff" else [])
    return {
        "losses": {"forgetium": [one["loss"] for one in history.steps], "ours": losses},
        "seconds": {name: values[1:] for name, values in seconds.items()},  # the first step makes the moments
        "tokens": sum(len(row.ids) for row in used),
        "equal": equal,
    }


# -- figures ----------------------------------------------------------------------------------------------------------
_NAMES = {"ga": "GA", "graddiff": "GradDiff", "npo": "NPO"}
_DIFFERENCES = {
    "ga": "same definition",
    "graddiff": "same definition, α 1",
    "npo": "same definition, β .1; their default adds α 1 of retain loss, set to 0; they ask a copy of the model every "
    "step, we score it once before the first, in neither time",
}


def forgetium(quick: bool) -> Iterator[Figure]:
    """Loss and speed of three methods, both trainers as they are, step about step in one process."""
    need_smollm2()
    # pydantic is all that it imports and we do not depend on; a developer's tool may have brought it already.
    python = guest("forgetium", VERSION, "pydantic>=2.6")
    for kind, name in _NAMES.items():
        found = in_child(race, kind, 2 if quick else 4, python=python)
        losses, seconds, tokens = found["losses"], found["seconds"], found["tokens"]
        if not found["equal"]:
            raise AssertionError("forgetium's collator no longer makes the same tokens and labels of these rows")
        gaps = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(losses["forgetium"], losses["ours"], strict=True)]
        yield Figure(
            f"forgetium {name}: loss of step 1", gaps[0], "relative", target="<= 1e-4",
            note=f"{losses['ours'][0]:.7g} against {losses['forgetium'][0]:.7g}; same tokens; {_DIFFERENCES[kind]}",
        )  # fmt: skip
        yield Figure(
            f"forgetium {name}: loss of all steps", max(gaps), "relative", repeats=len(gaps),
            note=f"largest; last {losses['ours'][-1]:.6g} against {losses['forgetium'][-1]:.6g}; lr {_LR:g} falling",
        )  # fmt: skip
        for who, said in (("ours", "ours"), ("forgetium", f"forgetium {VERSION}")):
            yield Figure.of(
                f"forgetium {name}: tokens, {said}", [tokens / one for one in seconds[who]], "tokens/CPU-s",
                note=f"{tokens} tokens a step: all of {BATCH} embedded people a set, no padding",
            )  # fmt: skip
        yield Figure.of(
            f"forgetium {name}: speed", ratios(seconds["forgetium"], seconds["ours"]), "×", target=">= 1.1",
            ratio_of="CPU of a step of forgetium's trainer / of ours", note=_DIFFERENCES[kind],
        )  # fmt: skip


BENCHES = {"forgetium": forgetium}
