"""Loss, scoring, generation and loading on the embedded model, one thread, fp32."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.common import Figure, Skip, alternate, forget_peak, in_child, memory_mib, question_rows, ratios

LOSS_ROWS = 8


def smollm2() -> tuple[Any, Any]:
    """The embedded model in training shape and the Chat of its tokenizer; Skip when its package is missing."""
    import torch

    from toolbox.models.chat import Chat
    from toolbox.models.load import find_model, load_model, load_tokenizer

    torch.set_num_threads(1)
    source = find_model("smollm2")
    return load_model(source), Chat(load_tokenizer(source))


def need_smollm2() -> None:
    """Skip without the embedded model; de-quantise it now where that is still to be done."""
    from toolbox.models.load import find_model, prepare
    from toolbox.shell.errors import Unavailable

    try:
        prepare(find_model("smollm2"))
    except Unavailable as problem:
        raise Skip(str(problem)) from None


def encoded_rows(chat: Any, count: int) -> tuple[list[Any], str]:
    """Question-and-answer rows as tokens (the model's chat template), and where they are from."""
    rows, source = question_rows(count)
    turns = [(row["question"], row["answer"]) for row in rows]
    return [
        chat.encode([{"role": "user", "content": asked}, {"role": "assistant", "content": said}])
        for asked, said in turns
    ], source


def loss_steps(touch: bool = False) -> tuple[dict[str, Callable[[], float]], str]:
    """Forward and backward of the mean loss, at labelled positions only and by full logits, on one batch.

    Both see the same padded rows and no attention mask, so that the head is the only difference; ``exact`` is the same
    loss with the head in float64 (no backward). With ``touch`` the weights, which are mapped from their file, are read
    once, so that no step brings them into memory.
    """
    import torch

    from toolbox.models.token_loss import TokenLoss, collate

    model, chat = smollm2()
    if touch:
        for parameter in model.parameters():
            parameter.detach().sum()
    rows, source = encoded_rows(chat, LOSS_ROWS)
    batch = collate(rows, pad_id=0)
    targets = torch.full((batch.ids.numel(),), -100)
    targets[batch.where] = batch.labels
    head = TokenLoss(model)

    def labelled() -> float:
        model.zero_grad(set_to_none=True)
        loss = head(batch.ids, batch.where, batch.labels)[0].sum() / len(batch.labels)
        loss.backward()
        return loss.item()

    def full() -> float:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(batch.labels)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def exact() -> float:
        hidden = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state.flatten(0, 1)[batch.where]
        logits = hidden.double() @ model.get_output_embeddings().weight.double().T
        return torch.nn.functional.cross_entropy(logits, batch.labels).item()

    shape = f"{LOSS_ROWS} {source}, {batch.ids.numel()} positions, {len(batch.labels)} labelled"
    return {"labelled": labelled, "full": full, "exact": exact}, shape


def loss_peak(kind: str) -> float:
    """Peak resident MiB of a step of one kind beyond what the loaded model holds. Runs in its own process."""
    steps, _ = loss_steps(touch=True)
    before = memory_mib("VmRSS")
    forget_peak()
    steps[kind]()
    return memory_mib("VmHWM") - before


def token_loss(quick: bool) -> Iterator[Figure]:
    """Labelled positions only against full logits: time, loss, memory."""
    need_smollm2()
    steps, shape = loss_steps()
    losses = {name: step() for name, step in steps.items()}
    del steps["exact"]
    seconds = alternate(1 if quick else 5, steps, warm=False)
    yield Figure.of(
        "token loss: speed", ratios(seconds["full"], seconds["labelled"]), "×", target=">= 1.1", note=shape,
        ratio_of="CPU of forward and backward by full logits / at labelled positions only",
    )  # fmt: skip
    exact = losses["exact"]
    difference = abs(losses["labelled"] - losses["full"]) / exact
    yield Figure("token loss: same loss", difference, "relative", target="<= 1e-5", note="of the two fp32 losses")
    for name, said in (("full", "full logits"), ("labelled", "ours")):
        yield Figure(f"token loss: error, {said}", abs(losses[name] - exact) / exact, "relative",
                     note="against the head in float64")  # fmt: skip
    peaks: dict[str, list[float]] = {"labelled": [], "full": []}
    for _ in range(1 if quick else 2):
        for kind, values in peaks.items():
            values.append(in_child(loss_peak, kind))
    yield Figure.of("token loss: memory of a step, full logits", peaks["full"], "MiB", note="VmHWM, own process")
    yield Figure.of("token loss: memory of a step, ours", peaks["labelled"], "MiB", note="VmHWM, own process")
    yield Figure.of(
        "token loss: memory", ratios(peaks["labelled"], peaks["full"]), "×", target="< 1",
        ratio_of="peak resident memory of a step beyond the loaded model, labelled positions only / full logits",
        note="gradients included in both",
    )  # fmt: skip


def score(quick: bool) -> Iterator[Figure]:
    """Teacher-forced log-probabilities in length-sorted batches, and row by row."""
    need_smollm2()
    from toolbox.models.score import score_rows
    from toolbox.models.token_loss import TokenLoss

    model, chat = smollm2()
    rows, source = encoded_rows(chat, 4 if quick else 16)
    tokens = sum(len(row.ids) for row in rows)
    head = TokenLoss(model)
    runs = {
        "batched": lambda: score_rows(head, rows),
        "single": lambda: score_rows(head, rows, max_tokens=1),
    }
    seconds = alternate(1 if quick else 3, runs)
    yield Figure.of(
        "score: tokens", [tokens / one for one in seconds["batched"]], "tokens/CPU-s",
        note=f"{len(rows)} {source}; all their tokens, no padding; a prototype had 280",
    )  # fmt: skip
    yield Figure.of(
        "score: batches", ratios(seconds["single"], seconds["batched"]), "×",
        ratio_of="CPU of scoring row by row / in length-sorted batches",
    )  # fmt: skip


def generate(quick: bool) -> Iterator[Figure]:
    """Greedy decoding of sixteen prompts, sixteen at a time and one at a time."""
    need_smollm2()
    from toolbox.models.generate import Decoding, LocalBackend, Request

    model, chat = smollm2()
    rows, source = question_rows(16)
    requests = [
        Request(f"{place}/0", tuple(chat.prompt([{"role": "user", "content": row["question"]}])))
        for place, row in enumerate(rows)
    ]
    decoding = Decoding(max_new_tokens=4 if quick else 40)
    sizes = {"batch 16": 16, "batch 1": 1}
    backends = {
        name: LocalBackend(model, chat.tokenizer, end_ids=chat.end_ids, batch_size=size) for name, size in sizes.items()
    }
    texts: dict[str, list[str]] = {}
    speeds: dict[str, list[float]] = {name: [] for name in sizes}
    backends["batch 16"].complete(requests, Decoding(max_new_tokens=2))
    for repeat in range(1 if quick else 3):
        for name in list(sizes)[:: -1 if repeat % 2 else 1]:
            began = time.process_time()
            done = backends[name].complete(requests, decoding)
            seconds = time.process_time() - began
            speeds[name].append(sum(one.n_completion_tokens for one in done) / seconds)
            texts[name] = [one.text for one in done]
    equal = sum(one == other for one, other in zip(*texts.values(), strict=True))
    note = f"{source}, {decoding.max_new_tokens} new tokens; {equal} of 16 completions equal"
    for name, values in speeds.items():
        yield Figure.of(f"generate: {name}", values, "new tokens/CPU-s", note=note)
    yield Figure.of(
        "generate: batching", ratios(speeds["batch 16"], speeds["batch 1"]), "×", target=">= 2",
        ratio_of="new tokens per CPU second, batch 16 / batch 1",
    )  # fmt: skip


def timed_load() -> dict[str, float]:
    """CPU seconds of importing the libraries and of ``prepare`` plus ``load_model``, and the latter's wall seconds.

    Runs in its own process; a cache that lacks the model is filled.
    """
    import torch
    from transformers import AutoModelForCausalLM  # noqa: F401 - both imports belong to the first number
    from transformers.models.llama import modeling_llama  # noqa: F401

    from toolbox.models.load import find_model, load_model, prepare

    torch.set_num_threads(1)
    imports = time.process_time()
    wall = time.monotonic()
    source = find_model("smollm2")
    prepare(source)
    prepared = time.process_time()
    load_model(source)
    return {
        "imports": imports,
        "prepare": prepared - imports,
        "load": time.process_time() - imports,
        "wall": time.monotonic() - wall,
    }


def load(quick: bool) -> Iterator[Figure]:
    """The embedded model from the cache, and the first time, when it is de-quantised into one."""
    need_smollm2()
    repeats = 1 if quick else 3
    warm, cold = [], []
    in_child(timed_load)  # fills the file cache
    for _ in range(repeats):
        warm.append(in_child(timed_load))
        with tempfile.TemporaryDirectory() as empty:
            cold.append(in_child(timed_load, env={"TOOLBOX_CACHE": empty}))
    yield Figure.of("load: imports", [one["imports"] for one in warm], "CPU-s", note="torch, transformers, Llama")
    yield Figure.of("load: warm", [one["load"] for one in warm], "CPU-s", target="< 1", note="prepare and load_model")
    yield Figure.of("load: warm, wall", [one["wall"] for one in warm], "s")
    yield Figure.of("load: de-quantising", [one["prepare"] for one in cold], "CPU-s", note="into an empty cache")
    yield Figure.of(
        "load: gain of the cache", ratios([one["load"] for one in cold], [one["load"] for one in warm]), "×",
        ratio_of="CPU of the first load / of a later one",
    )  # fmt: skip


BENCHES = {"token-loss": token_loss, "score": score, "generate": generate, "load": load}
