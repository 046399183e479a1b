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
from toolbox.lit.lines import TURNS, ScoredRow
from toolbox.lit.method import visual_contribution
from toolbox.lit.rows import Counts, Reading, Sample, read_samples
from toolbox.lit.scores import Ratio, gap, gap_interval, line
from toolbox.models.head import Head, token_nll
from toolbox.models.spans import Aligner
from toolbox.models.vlm import collate, find_vlm, hidden_states, inner, load_processor, load_vlm
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
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
    figures = _Figures(options, call, test, seen)
    for name in options.metrics:
        if name == "nll":
            writer.write(figures.nll())
        elif name == "gap":
            assert train is not None
            writer.write(figures.gap(train, score(model, train, pad, options.batch_size)))
        else:
            null = Rows(
                test.aligner, NullStore(store, options.null, [row.sample for row in test.rows]), test.how, keep=False
            )
            null.rows = [replace(row, aligned=replace(row.aligned, inputs={})) for row in test.rows]
            writer.write(figures.vc(score(model, null, pad, options.batch_size)))
    writer.close()
    if options.rows_out:
        with atomic_file(options.rows_out) as handle:
            handle.writelines(msgspec.json.encode(row) + b"\n" for row in figures.kept)


class _Figures:
    """Lines of figures; ``kept`` has the values of single rows. With ``--compare`` the rows that another model's run
    kept are the other side, matched by id."""

    def __init__(self, options: Options, call: Invocation, test: Rows, seen: Scored) -> None:
        self.how: dict[str, Any] = {"draws": options.bootstrap, "seed": options.seed}
        self.seen, self.null, self.name = seen, options.null, str(options.compare)
        self.other = None if options.compare is None else _stored(self.name, call)
        self.ids = [row.sample.id for row in test.rows]
        self.images = [_image(row.sample) for row in test.rows]
        self.kept = _kept("test", self.ids, seen)

    def nll(self) -> dict[str, Any]:
        """The loss of a response token."""
        theirs = None if self.other is None else self._ratio("test", self.ids, self.images)
        return line("nll", _loss(self.seen, self.images), other=theirs, **self.how, exact=float(self.seen.exact.mean()))

    def vc(self, blind: Scored) -> dict[str, Any]:
        """What the image contributes to an answer."""
        values = visual_contribution(self.seen.log_p, blind.log_p)
        for row, value in zip(self.kept, values, strict=False):
            row["vc"] = float(value)
        theirs = None
        if self.other is not None:
            rows = [self._find("test", name) for name in self.ids]
            if any(row.vc is None for row in rows):
                raise BadData("it has no vc to compare with", "judge that model with --metric vc", file=self.name)
            theirs = Ratio([float(row.vc or 0.0) for row in rows], [1.0] * len(rows), self.images)
        more = {"null": self.null, "per_token": float(values.sum() / self.seen.tokens.sum()),
                "exact": float(self.seen.exact.mean()), "exact_null": float(blind.exact.mean())}  # fmt: skip
        ratio = Ratio(list(values), [1.0] * len(values), self.images)
        return line("vc", ratio, other=theirs, **self.how, **more)

    def gap(self, train: Rows, learned: Scored) -> dict[str, Any]:
        """Held-out less training loss, a token; the images of either set are drawn apart for the interval."""
        ids, images = [row.sample.id for row in train.rows], [_image(row.sample) for row in train.rows]
        self.kept += _kept("train", ids, learned)
        sides = _loss(self.seen, self.images), _loss(learned, images)
        found = {"metric": "gap", "value": gap(sides), "n": len(self.ids), "images": len(set(self.images)),
                 "ci": gap_interval(sides, **self.how), "nll": sides[0].value, "nll_train": sides[1].value,
                 "n_train": len(ids)}  # fmt: skip
        if self.other is not None:
            theirs = self._ratio("test", self.ids, self.images), self._ratio("train", ids, images)
            there, mine = gap(theirs), gap(sides)
            assert there is not None
            assert mine is not None
            found["compare"] = {"value": there, "difference": mine - there,
                                "ci": gap_interval(sides, **self.how, theirs=theirs)}  # fmt: skip
        return found

    def _ratio(self, kind: str, ids: Sequence[str], images: Sequence[str]) -> Ratio:
        rows = [self._find(kind, name) for name in ids]
        return Ratio([-row.log_p for row in rows], [float(row.tokens) for row in rows], images)

    def _find(self, kind: str, name: str) -> ScoredRow:
        assert self.other is not None
        found = self.other.get((kind, name))
        if found is None:
            raise BadData(f"no row {name!r} of the {kind} set", "compare models on the same rows", file=self.name)
        return found


def _loss(scored: Scored, images: Sequence[str]) -> Ratio:
    return Ratio(list(-scored.log_p), list(scored.tokens), images)


def _kept(kind: str, ids: Sequence[str], scored: Scored) -> list[dict[str, Any]]:
    numbers = zip(ids, scored.log_p, scored.tokens, strict=True)
    return [{"set": kind, "id": name, "log_p": float(p), "tokens": int(n)} for name, p, n in numbers]


def _stored(name: str, call: Invocation) -> dict[tuple[str, str], ScoredRow]:
    found: dict[tuple[str, str], ScoredRow] = {}
    for record in read_records(name, call.streams, RecordReader((ScoredRow,)), "--compare"):
        if found.setdefault((record.value.set, record.id), record.value) is not record.value:
            raise record.bad(f"the id {record.id!r} is there twice", "ids must be single", "$.id")
    return found


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
