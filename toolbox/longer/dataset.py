"""The packed dataset on disk: what its directory holds, and the check of one that is there.

``manifest.json`` (counts, schema, hashes), ``vocab/*.json`` (row 0 padding, row 1 out of vocabulary, then these names),
``items.safetensors`` (latest features of an item), ``events.safetensors`` (all events by user, oldest to newest) and
``samples.{train,valid,test}.safetensors`` (whose histories are pointers into the events).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from toolbox.longer.columns import read_columns
from toolbox.longer.splits import SPLITS
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.files import sha256_file

FORMAT = 1
MANIFEST = "manifest.json"


class Manifest(msgspec.Struct, kw_only=True):
    """``manifest.json``."""

    format: int
    schema: str
    """Hash of everything that gives the numbers in the columns their meaning: vocabularies, features, time unit."""
    users: int
    train_users: int
    """Users with training samples come first; the others have no vector of their own."""
    items: int
    events: int
    samples: dict[str, int]
    requests: dict[str, int]
    positive_rate: dict[str, float]
    out_of_vocabulary: dict[str, dict[str, float]]
    """By split: the share of positives and of negatives whose item is not in the vocabulary."""
    side: list[str]
    event_side: list[str]
    context: list[str]
    vocabulary: dict[str, int]
    hash_buckets: int | None
    split: str
    boundaries: list[int]
    user_disjoint: bool
    request_window: int | None
    negatives: int
    time_range: list[int]
    ts_scale: float
    history_length: dict[str, float]
    inputs: dict[str, str]
    files: dict[str, str]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a dataset; MissingInput (66) without one, BadData (65) where it is not one of ours."""
    path = directory / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInput(f"{directory}: is not a dataset (no {MANIFEST})", "make one with longer-prep") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"damaged manifest: {error}", "make the dataset anew", file=str(path)) from None
    if manifest.format != FORMAT:
        raise BadData(f"format {manifest.format}, this version reads {FORMAT}", "longer-prep anew", file=str(path))
    return manifest


def read_vocabulary(directory: Path, name: str) -> list[str]:
    """The names of a vocabulary, the first of which has row 2 (of users: position 0)."""
    path = directory / "vocab" / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except FileNotFoundError:
        raise BadData("the file is missing", "make it anew with longer-prep", file=str(path)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"damaged vocabulary: {error}", "make it anew with longer-prep", file=str(path)) from None


def bucket(name: str, buckets: int) -> int:
    """The row of an item by hash: 2 and up."""
    return 2 + int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % buckets


def schema_hash(parts: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()


def verify(directory: Path) -> list[str]:
    """What is wrong with a dataset: hashes that do not fit, pointers that leak, ids outside their tables."""
    manifest = read_manifest(directory)
    problems = []
    for name, sha in sorted(manifest.files.items()):
        path = directory / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(path) != sha:
            problems.append(f"{name}: its content is not what the manifest says")
    if problems:
        return problems
    events = read_columns(directory / "events.safetensors")
    problems += _bad_events(events, manifest)
    for split in SPLITS:
        samples = read_columns(directory / f"samples.{split}.safetensors")
        problems += [f"samples.{split}: {what}" for what in _bad_samples(events, samples, manifest)]
    return problems


def _bad_events(events: dict[str, np.ndarray], manifest: Manifest) -> Iterator[str]:
    ptr, ts = events["user_ptr"], events["ts"]
    if len(ptr) != manifest.users + 1 or ptr[0] != 0 or ptr[-1] != len(ts) or (np.diff(ptr) < 0).any():
        yield "events: the pointers of users are not ascending over all events"
        return
    later = np.diff(ts) < 0
    borders = ptr[1:-1]
    later[borders[(borders > 0) & (borders < len(ts))] - 1] = False
    if later.any():
        yield f"events: event {int(np.argmax(later)) + 1} is older than the one before it"
    if len(ts) and int(events["item"].max()) >= manifest.vocabulary["item"]:
        yield "events: an item outside the vocabulary"


def _bad_samples(
    events: dict[str, np.ndarray], samples: dict[str, np.ndarray], manifest: Manifest
) -> Iterator[str]:  # fmt: skip
    user, end, ts = samples["user"], samples["hist_end"], samples["ts"]
    if not len(user):
        yield "empty"
        return
    if int(user.max()) >= manifest.users or int(samples["item"].max()) >= manifest.vocabulary["item"]:
        yield "a user or an item outside its vocabulary"
        return
    ptr, times = events["user_ptr"], events["ts"]
    if ((end < ptr[user]) | (end > ptr[user + 1])).any():
        yield "a history that is not the user's"
        return
    some = end > ptr[user]
    if (times[end[some] - 1] >= ts[some]).any():
        yield "a history with an event at or after the request"
    more = end < ptr[user + 1]
    if (times[end[more]] < ts[more]).any():
        yield "a history that leaves out an event before the request"
    if not np.isin(samples["label"], (0, 1)).all():
        yield "a label that is neither 0 nor 1"
