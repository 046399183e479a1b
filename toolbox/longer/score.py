"""longer-score: requests in, the same with scores out, line by line, with an exact cache of the user's side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolbox.longer.dataset import Manifest, schema_hash
from toolbox.longer.files import load_model, read_config
from toolbox.longer.lines import REQUESTS
from toolbox.longer.method import Cache
from toolbox.longer.ranker import Batch, Ranker
from toolbox.longer.requested import UNKNOWN, Asked, Reader, as_batch
from toolbox.longer.serve import Key, Store, canonical_time
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, MissingInput, ToolboxError, UsageProblem
from toolbox.shell.records import RecordReader, parse_map, read_records, write_rejects
from toolbox.shell.streams import JsonlWriter

_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line, by name."""

    file: str
    model: str
    data: str | None = None
    split: str | None = None
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    kv_cache: bool = True
    cache_mb: float = 256
    cache_time_bucket: int = 0
    cache_dtype: str = "fp32"
    cache_save: str | None = None
    cache_load: str | None = None
    batch_requests: int = 1
    batch_candidates: int = 4096
    check: bool = False
    topk: int = 0
    timings: bool = False
    threads: int | None = None
    seed: int = 0


class NotExact(ToolboxError):
    """``--check`` found a score that the cache has changed."""

    exit_code = 1


def run(options: Options, call: Invocation) -> None:
    """Score what comes in."""
    if options.split is not None and options.data is None:
        raise UsageProblem("--split needs --data", "as in --data DIR --split test")
    if not options.kv_cache and (options.check or options.cache_save or options.cache_load):
        raise UsageProblem("--no-kv-cache leaves nothing to --check, --cache-save or --cache-load", "leave it out")
    if "-" in (options.cache_save, options.cache_load):
        raise UsageProblem("--cache-save and --cache-load take no -: stdin and stdout have the rows", "name a file")
    model_dir = Path(options.model)
    config = read_config(model_dir)
    manifest = _data_of(model_dir)
    if options.data is not None:
        from toolbox.longer.dataset import read_manifest

        if read_manifest(Path(options.data)).schema != config.schema:
            raise BadData("the model is one of other data", "give the data it was trained on",
                          file=options.data)  # fmt: skip
    reader = Reader(model_dir, config, manifest, Path(options.data) if options.data else None)
    source = _Source(options, call, reader)
    writer = JsonlWriter(call.streams)
    if call.dry_run:
        asked = list(source)
        counts = {"requests": len(asked), "candidates": sum(len(one.candidate) for one in asked)}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **counts})
        writer.close()
        return
    server = Server(options, load_model(model_dir), _weights_hash(model_dir))
    for group in _groups(source, options.batch_requests):
        for one, found in zip(group, server.answer(group), strict=True):
            writer.write({**one.row, **found})
            writer.flush()  # so that a caller can wait for each answer
    writer.close()
    server.finish(call, source)


def _data_of(directory: Path) -> Manifest:
    import msgspec

    path = directory / "data.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise MissingInput(f"{path}: missing", "give the whole directory that longer-train wrote") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"damaged: {error}", "train anew", file=str(path)) from None


def _weights_hash(directory: Path) -> str:
    from toolbox.longer.files import table_files
    from toolbox.weights.read import open_weights

    with open_weights(directory) as weights:
        parts = [weights.sha256()]
    for path in table_files(directory):
        with open_weights(path) as weights:
            parts.append(weights.sha256())
    return parts[0] if len(parts) == 1 else schema_hash(parts)


class _Source:
    """The requests of stdin, a file, or a split; counts what it leaves out."""

    def __init__(self, options: Options, call: Invocation, reader: Reader) -> None:
        self.options, self.call, self.reader = options, call, reader
        self.late = 0
        self.rejected: list[bytes] = []
        self.records = RecordReader(
            REQUESTS, renames=parse_map(options.map_fields), on_bad=options.on_bad,
            rejects=lambda raw, _: self.rejected.append(raw),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Asked]:
        if self.options.split is not None:
            yield from self.reader.of_split(self.options.split)
            return
        for record in read_records(self.options.file, self.call.streams, self.records, "the requests"):
            try:
                asked = self.reader(record)
            except BadData as problem:
                import msgspec

                self.records.bad(problem, msgspec.json.encode(record.data))
                continue
            self.late += asked.past.late
            yield asked
        if self.records.skipped:
            self.call.reporter.warn(f"{self.records.skipped} bad rows left out")
        if self.options.rejects and not self.call.dry_run:
            write_rejects(self.options.rejects, self.rejected)


def _groups(source: Iterator[Asked] | Any, size: int) -> Iterator[list[Asked]]:
    group: list[Asked] = []
    for one in source:
        group.append(one)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class Server:
    """A loaded model that answers groups of requests."""

    def __init__(self, options: Options, model: Ranker, digest: str) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.merge = model.config.merge
        self.store = Store(digest, int(options.cache_mb * 2**20), options.cache_dtype)
        self.loaded = self.store.load(options.cache_load, self.device) if options.cache_load else 0
        self.checked, self.worst = 0, 0.0

    def answer(self, group: Sequence[Asked]) -> list[dict[str, Any]]:
        """What is added to each request's line."""
        with torch.inference_mode():
            times = [self._time(one) for one in group]
            caches, states, seconds = self._caches(group, times)
            return [
                self._score(one, t, cache, state, share)
                for one, t, cache, state, share in zip(group, times, caches, states, seconds, strict=True)
            ]

    def _time(self, one: Asked) -> int:
        last = int(one.past.ts[-1]) if len(one.past.ts) else None
        return canonical_time(one.ts, last, self.options.cache_time_bucket)

    def _caches(
        self, group: Sequence[Asked], times: Sequence[int]
    ) -> tuple[list[Cache | None], list[str], list[float]]:  # fmt: skip
        """The cache of each request, whether it was there, and its share of the seconds that prefilling took."""
        if not self.options.kv_cache:
            return [None] * len(group), ["off"] * len(group), [0.0] * len(group)
        keys = [Key(one.user, one.past.digest(), t) for one, t in zip(group, times, strict=True)]
        caches = [self.store.get(key) if len(one.candidate) else {} for one, key in zip(group, keys, strict=True)]
        states = ["miss" if cache is None else "hit" for cache in caches]
        missing = [place for place, cache in enumerate(caches) if cache is None]
        seconds = [0.0] * len(group)
        if missing:
            began = time.perf_counter()
            batch = as_batch([group[p] for p in missing], [times[p] for p in missing], self.merge).to(self.device)
            whole = self.model.user_side(batch)
            for row, place in enumerate(missing):
                one = {name: tensor[row : row + 1] for name, tensor in whole.items()}
                caches[place] = self.store.put(keys[place], one)
                seconds[place] = (time.perf_counter() - began) / len(missing)
        states = ["off" if not len(one.candidate) else state for one, state in zip(group, states, strict=True)]
        return caches, states, seconds

    def _score(self, one: Asked, t: int, cache: Cache | None, state: str, prefill: float) -> dict[str, Any]:
        began = time.perf_counter()
        scores: list[float] = []
        if len(one.candidate):
            batch = as_batch([one], [t], self.merge).to(self.device)
            logits = self._joint(batch) if cache is None else self._against(cache, batch)
            scores = torch.sigmoid(logits)[0].tolist()
            if self.options.check and cache is not None:
                self._check(one, batch, scores)
        spent = time.perf_counter() - began
        found: dict[str, Any] = {
            "scores": scores,
            "oov": int((one.candidate == UNKNOWN).sum()),
            "hist_len": one.past.whole,
            "cache": state,
        }
        if self.options.topk:
            best = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[: self.options.topk]
            found["top"] = [[_name(one.names[place]), scores[place]] for place in best]
        if self.options.timings:
            found |= {"prefill_ms": round(1e3 * prefill, 3), "score_ms": round(1e3 * spent, 3)}
        return found

    def _against(self, cache: Cache, batch: Batch) -> torch.Tensor:
        most, parts = self.options.batch_candidates, []
        for begin in range(0, batch.candidate.shape[1], most):
            parts.append(self.model.candidate_logits(cache, _columns(batch, begin, begin + most)))
        return torch.cat(parts, 1)

    def _joint(self, batch: Batch) -> torch.Tensor:
        """Each candidate with its whole history, nothing shared."""
        return torch.cat(
            [self.model.joint_logits(_columns(batch, c, c + 1)) for c in range(batch.candidate.shape[1])], 1
        )

    def _check(self, one: Asked, batch: Batch, scores: Sequence[float]) -> None:
        slow = torch.sigmoid(self._joint(batch))[0].tolist()
        apart = max(abs(a - b) for a, b in zip(scores, slow, strict=True))
        self.checked += 1
        self.worst = max(self.worst, apart)
        if not apart <= _TOLERANCE[self.options.cache_dtype]:
            named = f"user {one.user} at {one.ts}"
            raise NotExact(
                f"--check: request {self.checked} ({named}): the cache moves a score by {apart:.2g}",
                "this is a fault of the tool, or of a cache file",
            )

    def finish(self, call: Invocation, source: _Source) -> None:
        """Tell what happened, and save the cache."""
        if source.late:
            call.reporter.note(f"{source.late} events at or after their request's time were left out")
        if self.options.kv_cache:
            store = self.store
            call.reporter.note(
                f"cache: {store.hits} hits, {store.misses} misses, {store.dropped} dropped, {len(store)} entries of "
                f"{store.bytes / 2**20:.1f} MiB"
            )
        if self.options.check:
            call.reporter.note(f"checked {self.checked} requests, largest difference {self.worst:.2g}")
        if self.options.cache_save:
            self.store.save(self.options.cache_save)


def _columns(batch: Batch, begin: int, end: int) -> Batch:
    """Some of the candidates."""
    from dataclasses import replace

    sides = {name: one[:, begin:end] for name, one in batch.candidate_sides.items()}
    return replace(batch, candidate=batch.candidate[:, begin:end], candidate_sides=sides)


def _name(candidate: Any) -> Any:
    return candidate["item"] if isinstance(candidate, dict) else candidate
