"""The user's side of requests, kept between them: least recently used out first, saved to and read from safetensors.

Keys and values depend on the request's time, and positions and groups count from the newest event. So an entry belongs
to a model, a user, a history and a time, and is used only where all four agree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from toolbox.longer.method import Cache
from toolbox.shell.errors import BadData
from toolbox.shell.files import atomic_file
from toolbox.weights.provenance import header
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Key(NamedTuple):
    """What an entry belongs to, beside the model: the user, the digest of the history, the time it is scored at."""

    user: str
    history: str
    time: int


class Store:
    """Caches by key, at most ``most`` bytes of them; numbers are kept in ``dtype``."""

    def __init__(self, model: str, most: int, dtype: str = "fp32") -> None:
        self.model, self.most, self.dtype = model, most, dtype
        self.bytes = self.hits = self.misses = self.dropped = 0
        self._entries: OrderedDict[Key, Cache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Cache | None:
        """The entry, in fp32, or None; counted as hit or miss."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return {name: _as(tensor, torch.float32) for name, tensor in found.items()}

    def put(self, key: Key, cache: Mapping[str, torch.Tensor]) -> Cache:
        """Keep an entry, and give it as a later ``get`` will: a first answer must not differ from the next."""
        kept = {name: _as(tensor, DTYPES[self.dtype]).contiguous() for name, tensor in cache.items()}
        size = _size(kept)
        if size <= self.most:
            old = self._entries.pop(key, None)
            self.bytes += size - (_size(old) if old is not None else 0)
            self._entries[key] = kept
            while self.bytes > self.most:
                _, dropped = self._entries.popitem(last=False)
                self.bytes -= _size(dropped)
                self.dropped += 1
        return {name: _as(tensor, torch.float32) for name, tensor in kept.items()}

    def save(self, path: str) -> None:
        """Write all entries, least recently used first."""
        keys = list(self._entries)
        tensors = {
            f"{place}.{name}": tensor.cpu()
            for place, key in enumerate(keys)
            for name, tensor in self._entries[key].items()
        }
        metadata = header("longer-score", {"cache-dtype": self.dtype}, None, {"model": self.model})
        metadata |= {"model": self.model, "entries": msgspec.json.encode(keys).decode()}
        with atomic_file(path) as handle:
            write_file(handle, tensors, metadata)

    def load(self, path: str, device: Any) -> int:
        """Take entries from a file; how many. BadData (65), before anything is used, where they are another model's."""
        with open_weights(Path(path)) as weights:
            metadata = weights.metadata
            if metadata.get("model") != self.model:
                raise BadData("is the cache of another model", "make it anew with --cache-save", file=path)
            try:
                keys = msgspec.json.decode(metadata.get("entries", ""), type=list[Key])
            except msgspec.MsgspecError as error:
                raise BadData(f"damaged cache: {error}", "make it anew with --cache-save", file=path) from None
            names: dict[int, list[str]] = {}
            for name in weights.names():
                place, _, _ = name.partition(".")
                if not place.isdigit() or int(place) >= len(keys):
                    raise BadData(f"tensor {name!r} belongs to no entry", "make it anew with --cache-save", file=path)
                names.setdefault(int(place), []).append(name)
            for place, key in enumerate(keys):
                tensors = {name.partition(".")[2]: weights.tensor(name).to(device) for name in names.get(place, [])}
                self.put(key, tensors)
        return len(keys)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _size(cache: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in cache.values())


def canonical_time(ts: int, last: int | None, bucket: int) -> int:
    """The time a request is scored at: its own, or with ``bucket`` S the start of its bucket, behind the last event.

    All requests of a bucket with one history are then scored alike, whichever came first.
    """
    if not bucket:
        return ts
    start = ts // bucket * bucket
    return start if last is None else max(start, last + 1)
