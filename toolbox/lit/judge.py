"""lit-eval's figures of a model: response losses, the over-fitting gap, and what the image contributes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch

from toolbox.lit.build import vlm_named
from toolbox.lit.data import Labelling, Rows
from toolbox.lit.evaluate import Options
from toolbox.lit.images import ImageStore
from toolbox.lit.lines import TURNS
from toolbox.lit.method import visual_contribution
from toolbox.lit.rows import Counts, Reading, Sample, read_samples
from toolbox.lit.scores import Ratio, gap_interval, line
from toolbox.models.head import Head, token_nll
from toolbox.models.spans import Aligner
from toolbox.models.vlm import collate, find_vlm, hidden_states, inner, load_processor, load_vlm
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter, display_name


class NullStore(ImageStore):
    """Images that show nothing of their row, of the same size: ``noise`` (a function of the row's id and the place
    alone, so that every model sees the same), the ``mean-colour``, or the image of another row (``shuffled``)."""

    def __init__(self, store: ImageStore, kind: str, samples: Sequence[Sample]) -> None:
        self._store, self._kind = store, kind
        pictured = [one for one in samples if one.images]
        half = len(pictured) // 2
        self._other = {one.id: pictured[(place + half) % len(pictured)] for place, one in enumerate(pictured)}

    def of(self, sample: Sample) -> list[Any]:
        """The null images of a row."""
        from PIL import Image as images

        if self._kind == "shuffled":
            other = self._store.of(self._other[sample.id])
            return [other[place % len(other)] for place in range(len(sample.images))]
        found = []
        for place, image in enumerate(self._store.of(sample)):
            shape = (image.height, image.width, 3)
            if self._kind == "noise":
                seed = int.from_bytes(hashlib.sha256(f"{sample.id}/{place}".encode()).digest()[:8], "big")
                pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
            else:
                mean = np.asarray(image, dtype=np.float64).mean((0, 1)).round().astype(np.uint8)
                pixels = np.broadcast_to(mean, shape).copy()
            found.append(images.fromarray(pixels))
        return found


@dataclass(frozen=True)
class Scored:
    """Of each row: Σ log p of its response tokens, how many there are, and whether each is the most probable one."""

    log_p: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray


def judge_model(options: Options, call: Invocation) -> None:
    """Score rows with a model and write the figures."""
    source = find_vlm(vlm_named(str(options.model), call.reporter.note), trust_remote_code=options.trust_remote_code)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    rejected: list[bytes] = []
    held_out = _Set(options.file, options, call, rejected)
    known = _Set(str(options.train_rows), options, call, rejected) if "gap" in options.metrics else None
    processor = load_processor(source, trust_remote_code=options.trust_remote_code)
    test = held_out.rows(processor, store)
    train = None if known is None else known.rows(processor, store, len(test.rows))
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        facts = {"rows": len(test.rows)}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
        writer.close()
        return
    model = load_vlm(source, trust_remote_code=options.trust_remote_code)
    if torch.cuda.is_available():
        model = model.cuda()
    pad = processor.tokenizer.pad_token_id or 0
    seen = score(model, test, pad, options.batch_size)
    images = [_image(row.sample) for row in test.rows]
    how = {"draws": options.bootstrap, "seed": options.seed}
    details: list[dict[str, Any]] = [
        {"id": row.sample.id, "log_p": float(seen.log_p[n]), "tokens": int(seen.tokens[n])}
        for n, row in enumerate(test.rows)
    ]
    for name in options.metrics:
        if name == "nll":
            ratio = Ratio(list(-seen.log_p), list(seen.tokens), images)
            writer.write(line("nll", ratio, **how, exact=float(seen.exact.mean())))  # type: ignore[arg-type]
        elif name == "gap":
            assert train is not None
            learned = score(model, train, pad, options.batch_size)
            writer.write(_gap(seen, images, learned, [_image(row.sample) for row in train.rows], **how))
        else:
            null = Rows(
                test.aligner, NullStore(store, options.null, [row.sample for row in test.rows]), test.how, keep=False
            )
            null.rows = [replace(row, aligned=replace(row.aligned, inputs={})) for row in test.rows]
            blind = score(model, null, pad, options.batch_size)
            contributed = visual_contribution(seen.log_p, blind.log_p)
            for detail, value in zip(details, contributed, strict=True):
                detail["vc"] = float(value)
            ratio = Ratio(list(contributed), [1.0] * len(images), images)
            more = {"null": options.null, "per_token": float(contributed.sum() / seen.tokens.sum()),
                    "exact": float(seen.exact.mean()), "exact_null": float(blind.exact.mean())}  # fmt: skip
            writer.write(line("vc", ratio, **how, **more))  # type: ignore[arg-type]
    writer.close()
    if options.rows_out:
        with atomic_file(options.rows_out) as handle:
            handle.writelines(msgspec.json.encode(row) + b"\n" for row in details)


def _gap(
    test: Scored, images: Sequence[str], train: Scored, known: Sequence[str], *, draws: int, seed: int
) -> dict[str, Any]:  # fmt: skip
    """Held-out less training loss, a token. The images of either set are drawn apart for the interval."""
    over = Ratio(list(-test.log_p), list(test.tokens), images)
    under = Ratio(list(-train.log_p), list(train.tokens), known)
    held_out, learned = over.value, under.value
    assert held_out is not None
    assert learned is not None
    return {"metric": "gap", "value": held_out - learned, "n": len(images), "images": len(set(images)),
            "ci": gap_interval(over, under, draws=draws, seed=seed), "nll": held_out, "nll_train": learned,
            "n_train": len(known)}  # fmt: skip


class _Set:
    """Rows of one source: read at once, aligned when the processor is there."""

    def __init__(self, name: str, options: Options, call: Invocation, rejected: list[bytes]) -> None:
        self.name, self.options, self.call = name, options, call
        self.reader = RecordReader(
            TURNS, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: rejected.append(raw),
        )  # fmt: skip
        self.samples = list(read_samples(name, call.streams, self.reader, Reading(), Counts()))

    def rows(self, processor: Any, store: ImageStore, most: int | None = None) -> Rows:
        """The rows, a sample of ``most`` of them where there are more. Raises: BadData (65) where none is left."""
        found = Rows(Aligner(processor), store, Labelling(mode="vit"))
        found.add(
            _sample(self.samples, most, self.options.seed),
            lambda sample, problem: self.reader.bad(problem, msgspec.json.encode(sample.data)),
        )
        if self.reader.skipped:
            self.call.reporter.warn(f"{display_name(self.name)}: {self.reader.skipped} bad rows left out")
        if not found.rows:
            raise BadData("the set is empty", "give at least one row with an answer", file=display_name(self.name))
        return found


def _sample(samples: list[Sample], most: int | None, seed: int) -> list[Sample]:
    if most is None or len(samples) <= most:
        return samples
    chosen = np.random.default_rng(seed).choice(len(samples), most, replace=False)
    return [samples[place] for place in sorted(chosen)]


def _image(sample: Sample) -> str:
    return "\n".join(sample.images) or sample.id


@torch.no_grad()
def score(model: Any, rows: Rows, pad: int, batch_size: int) -> Scored:
    """Log-probabilities of every row's answers, rows of like length together."""
    count = len(rows.rows)
    log_p, tokens, exact = np.zeros(count), np.zeros(count), np.ones(count, dtype=bool)
    order = sorted(range(count), key=lambda place: len(rows.rows[place].aligned.ids))
    device = next(model.parameters()).device
    head = Head.of(inner(model))
    for start in range(0, count, batch_size):
        places = order[start : start + batch_size]
        labelled = [rows.rows[place] for place in places]
        batch = collate([rows.aligned(place) for place in places], [row.places for row in labelled], pad).to(device)
        hidden = hidden_states(model, batch.inputs).flatten(0, 1)[batch.where]
        nll, hits = token_nll(hidden, head, batch.labels)
        owner = batch.row.cpu().numpy()
        np.subtract.at(log_p, np.array(places)[owner], nll.double().cpu().numpy())
        np.add.at(tokens, np.array(places)[owner], 1)
        np.logical_and.at(exact, np.array(places)[owner], hits.cpu().numpy())
    return Scored(log_p, tokens, exact)
