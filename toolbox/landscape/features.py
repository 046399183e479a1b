"""The features file: what scoring found about every state, and all that maps, metrics and the verifier need.

``Features`` is the one form of it in memory, ``features.safetensors`` on disk; a file is checked when it is read.
Nothing here needs torch or a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from toolbox.landscape.method import Floats, Integers, distance
from toolbox.shell.errors import BadData
from toolbox.weights.arrays import ArrayFile, write_arrays
from toolbox.weights.provenance import canonical

KEY = "landscape"
"""Name of our entry in the header: the format's version and ``Scoring`` as canonical JSON."""

VERSION = 1
MOST_CHOICES = 127  # indices of choices are kept in one signed byte

_ADVICE = "make it anew with landscape-plot, or name the file that landscape-plot wrote"
_EXACT = 1e-9  # relative; distances were made from the log-probabilities beside them


@dataclass(frozen=True, slots=True)
class Scoring:
    """How the states were scored: what must be equal for two files to be comparable.

    ``model`` is a name without directories, the digests are sha256 of weights and tokenizer; ``template`` is the answer
    template, ``context`` auto, prompt or question, ``separator`` and ``split`` as in the states; ``method`` tree,
    prefix or naive. ``versions`` of packages, ``options``: whatever else decides the numbers.
    """

    model: str
    model_digest: str
    tokenizer_digest: str
    dtype: str
    template: str
    context: str
    separator: str
    split: str
    method: str
    versions: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class QuestionScores:
    """A question and its start s_0 = x: (k,) log-probabilities of the answers in nats, and their tokens.

    ``gold``: index of the right choice, −1 where it is not known.
    """

    id: str
    gold: int
    logprob: Floats
    n_tokens: Integers


@dataclass(frozen=True, eq=False, slots=True)
class PathScores:
    """A path of n ≥ 0 thoughts: (n, k) log-probabilities of the answers after each thought, in nats, and their tokens;
    (n,) log p(t_i | s_{i−1}) and |t_i| of the thoughts.

    ``question``: index into the questions; ``pred``: index of the choice that the path answers, −1 for none;
    ``facets``: what pictures and tables are split by, such as ``{"model": ..., "variant": ..., "dataset": ...}``.
    """

    id: str
    question: int
    pred: int
    facets: Mapping[str, str | None]
    logprob: Floats
    n_tokens: Integers
    thought_logprob: Floats
    thought_tokens: Integers


@dataclass(frozen=True, eq=False, slots=True)
class Features:
    """M states of P paths of Q questions with at most K choices; the currency between scoring, map, metrics, verifier.

    States lie path by path in the order of the paths, steps upwards. ``distance``, ``logprob`` (M, K) float64 and
    ``n_tokens`` (M, K): d(s_i, c_j), log p(a_j | s_i) in nats and |a_j|; NaN, NaN and 0 from column k on, choices in
    the order of the question. ``start_distance``, ``start_logprob`` (Q, K): the same of s_0. ``thought_logprob``,
    ``thought_tokens`` (M,): log p(t_i | s_{i−1}) and |t_i|. ``path`` (M,), ``step`` (M,) from 1. ``question`` (P,),
    ``n_steps`` (P,), 0 for a path without thoughts; ``pred`` (P,), −1 for none; ``correct`` (P,): 1 where pred = gold,
    else 0, −1 where gold is not known. ``k`` (Q,), ``gold`` (Q,), −1 where not known. ``path_ids``, ``question_ids``
    are unique; ``facets`` maps a name to one value (or None) a path.
    """

    distance: Floats
    logprob: Floats
    n_tokens: NDArray[np.int16]
    start_distance: Floats
    start_logprob: Floats
    thought_logprob: Floats
    thought_tokens: NDArray[np.int32]
    path: NDArray[np.int32]
    step: NDArray[np.int32]
    question: NDArray[np.int32]
    n_steps: NDArray[np.int32]
    pred: NDArray[np.int8]
    correct: NDArray[np.int8]
    k: NDArray[np.int8]
    gold: NDArray[np.int8]
    path_ids: tuple[str, ...]
    question_ids: tuple[str, ...]
    facets: Mapping[str, tuple[str | None, ...]]
    scoring: Scoring

    @property
    def state_question(self) -> Integers:
        """(M,) the question of each state."""
        return self.question.astype(np.int64)[self.path]

    @property
    def last(self) -> Integers:
        """(M,) the row of the last state of each state's path."""
        return np.cumsum(self.n_steps, dtype=np.int64)[self.path] - 1


# Name -> (format type, dimensions as letters). ``names`` holds the identifiers as JSON, for the format has no text.
_ARRAYS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("distance", "logprob"), ("F64", "MK")),
    "n_tokens": ("I16", "MK"),
    **dict.fromkeys(("start_distance", "start_logprob"), ("F64", "QK")),
    "thought_logprob": ("F64", "M"),
    **dict.fromkeys(("thought_tokens", "path", "step"), ("I32", "M")),
    **dict.fromkeys(("question", "n_steps"), ("I32", "P")),
    **dict.fromkeys(("pred", "correct"), ("I8", "P")),
    **dict.fromkeys(("k", "gold"), ("I8", "Q")),
}
_NAMES = "names"
_KINDS = {**{name: kind for name, (kind, _) in _ARRAYS.items()}, _NAMES: "U8"}


class _Names(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    paths: tuple[str, ...]
    questions: tuple[str, ...]
    facets: dict[str, tuple[str | None, ...]]


class _Header(msgspec.Struct, frozen=True):
    version: int
    scoring: Scoring


# --- making -----------------------------------------------------------------------------------------------------------


def assemble(questions: Sequence[QuestionScores], paths: Sequence[PathScores], scoring: Scoring) -> Features:
    """One ``Features`` of scored questions and paths, in the order given; distances and ``correct`` are computed here.

    Raises BadData where numbers do not fit together (log-probabilities that are not finite, a k above 127, unknown
    indices, an identifier twice); messages name the path and the state.
    """
    if not paths:
        raise BadData("no paths", "give at least one reasoning path")
    k = [len(question.logprob) for question in questions]
    if max(k) > MOST_CHOICES:
        raise BadData(f"a question has {max(k)} choices, more than {MOST_CHOICES}")
    n_steps = [len(path.logprob) for path in paths]
    state_logprob, n_tokens = (_padded([getattr(path, part) for path in paths], max(k)) for part in _SCORED)
    start_logprob, start_tokens = (
        _padded([np.asarray(getattr(question, part))[None] for question in questions], max(k)) for part in _SCORED
    )
    gold = np.array([question.gold for question in questions])
    question = np.array([path.question for path in paths])
    if question.min() < 0 or question.max() >= len(questions):
        raise BadData("a path names a question that is not there")
    pred = np.array([path.pred for path in paths])
    facets = dict.fromkeys(name for path in paths for name in path.facets)
    features = Features(
        distance=distance(state_logprob, n_tokens),
        logprob=state_logprob,
        n_tokens=_whole(np.nan_to_num(n_tokens), np.int16, "n_tokens"),
        start_distance=distance(start_logprob, start_tokens),
        start_logprob=start_logprob,
        thought_logprob=_joined([path.thought_logprob for path in paths]),
        thought_tokens=_whole(_joined([path.thought_tokens for path in paths]), np.int32, "thought_tokens"),
        path=np.repeat(np.arange(len(paths), dtype=np.int32), n_steps),
        step=_steps(n_steps).astype(np.int32),
        question=question.astype(np.int32),
        n_steps=np.array(n_steps, dtype=np.int32),
        pred=_whole(pred, np.int8, "pred"),
        correct=_correct(pred, gold[question]),
        k=np.array(k, dtype=np.int8),
        gold=_whole(gold, np.int8, "gold"),
        path_ids=tuple(path.id for path in paths),
        question_ids=tuple(question.id for question in questions),
        facets={name: tuple(path.facets.get(name) for path in paths) for name in facets},
        scoring=scoring,
    )
    check(features)
    return features


_SCORED = ("logprob", "n_tokens")


def _padded(parts: Sequence[Any], width: int) -> Floats:
    """The (n, k) parts below one another, float64, NaN from column k on."""
    rows = np.full((sum(len(part) for part in parts), width), np.nan)
    at = 0
    for part in parts:
        block = np.asarray(part, dtype=np.float64)
        if len(block):
            rows[at : at + len(block), : block.shape[1]] = block
        at += len(block)
    return rows


def _joined(parts: Sequence[Any]) -> Floats:
    return np.concatenate([np.asarray(part, dtype=np.float64).reshape(-1) for part in parts])


def _whole(values: NDArray[Any], kind: type[np.signedinteger[Any]], name: str) -> NDArray[Any]:
    bounds = np.iinfo(kind)
    if values.size and not (bounds.min <= values.min() and values.max() <= bounds.max):
        raise BadData(f"{name} holds {values.max():g}, more than the {bounds.max} that the file can")
    return values.astype(kind)


def _steps(n_steps: Sequence[int] | NDArray[np.int32]) -> Integers:
    """1..n of every path, one after the other."""
    counts = np.asarray(n_steps, dtype=np.int64)
    ends = np.cumsum(counts)
    return np.arange(1, counts.sum() + 1) - np.repeat(ends - counts, counts)


def _correct(pred: NDArray[Any], gold: NDArray[Any]) -> NDArray[np.int8]:
    return np.where(gold < 0, -1, pred == gold).astype(np.int8)


# --- checking ---------------------------------------------------------------------------------------------------------


def check(features: Features, file: str | None = None) -> None:
    """Whether everything in ``features`` fits together; BadData (65) naming path and state of the first fault."""

    def bad(what: str) -> BadData:
        return BadData(what, _ADVICE, file=file)

    sizes = _sizes(features, bad)
    if not sizes["P"] or not sizes["Q"]:
        raise bad("no paths")
    for name, ids in (("path", features.path_ids), ("question", features.question_ids)):
        for one, times in Counter(ids).most_common(1):
            if times > 1:
                raise bad(f"{name} id {one!r} occurs twice")
    n_steps, k = features.n_steps.astype(np.int64), features.k.astype(np.int64)
    if n_steps.min() < 0 or n_steps.sum() != sizes["M"]:
        raise bad(f"n_steps add up to {n_steps.sum()} states, {sizes['M']} are there")
    if not np.array_equal(features.path, np.repeat(np.arange(sizes["P"]), n_steps)):
        raise bad("path: the states are not in the order of the paths")
    if not np.array_equal(features.step, _steps(n_steps)):
        raise bad("step: the states of a path are not numbered from 1")
    if features.question.min() < 0 or features.question.max() >= sizes["Q"]:
        raise bad("question: a path names a question that is not there")
    if k.min() < 2 or k.max() != sizes["K"]:
        raise bad(f"k: needs 2..{sizes['K']} choices with the largest reached, found {k.min()}..{k.max()}")
    gold, of = features.gold.astype(np.int64), features.question
    for name, index, bound in (("gold", gold, k), ("pred", features.pred.astype(np.int64), k[of])):
        if np.any((index < -1) | (index >= bound)):
            raise bad(f"{name} is not among the choices")
    if not np.array_equal(features.correct, _correct(features.pred, gold[of])):
        raise bad("correct: does not follow from pred and gold")
    _check_numbers(features, k, bad)


def _sizes(features: Features, bad: Callable[[str], BadData]) -> dict[str, int]:
    """The numbers M, P, Q, K, after the shape of every array and the lengths of the names were compared with them."""
    sizes: dict[str, int] = {"P": len(features.path_ids), "Q": len(features.question_ids)}
    for name, (_, letters) in _ARRAYS.items():
        shape = getattr(features, name).shape
        if len(shape) != len(letters):
            raise bad(f"{name} has {len(shape)} dimensions, not {len(letters)}")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise bad(f"{name} has shape {shape}, where {letter} is {sizes[letter]} elsewhere")
    for name, values in features.facets.items():
        if len(values) != sizes["P"]:
            raise bad(f"facet {name!r} has {len(values)} values for {sizes['P']} paths")
    return sizes


def _check_numbers(features: Features, k: Integers, bad: Callable[[str], BadData]) -> None:
    """Distances positive and finite up to k, absent beyond, and equal to what the log-probabilities give."""
    beyond = np.arange(features.distance.shape[1]) >= k[:, None]
    state_beyond = beyond[features.state_question]

    def state(rows: NDArray[np.bool_]) -> str:
        first = int(np.argmax(rows))
        return f"path {features.path_ids[features.path[first]]!r}, state {features.step[first]}"

    def start(rows: NDArray[np.bool_]) -> str:
        return f"question {features.question_ids[int(np.argmax(rows))]!r}, start"

    for prefix, absent, place in (("", state_beyond, state), ("start_", beyond, start)):
        for name in ("distance", "logprob"):
            values = getattr(features, prefix + name)
            wrong = (np.isfinite(values) if name == "logprob" else np.isfinite(values) & (values > 0)) == absent
            wrong |= absent & ~np.isnan(values)
            if wrong.any():
                raise bad(f"{place(wrong.any(axis=1))}: {prefix}{name} is missing, not finite or too many")
    counted = features.n_tokens > 0
    if np.any(counted == state_beyond) or np.any(features.n_tokens < 0):
        raise bad(f"{state((counted == state_beyond).any(axis=1))}: n_tokens does not fit its number of choices")
    given = features.distance[~state_beyond]
    computed = distance(features.logprob, features.n_tokens)[~state_beyond]
    if not np.allclose(given, computed, rtol=_EXACT, atol=0):
        raise bad("distance: does not follow from logprob and n_tokens")
    if not np.isfinite(features.thought_logprob).all():
        raise bad(f"{state(~np.isfinite(features.thought_logprob))}: thought_logprob is not finite")
    if np.any(features.thought_tokens < 0):
        raise bad(f"{state(features.thought_tokens < 0)}: thought_tokens is negative")


# --- the file ---------------------------------------------------------------------------------------------------------


def write_features(path: str | Path, features: Features, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``features`` as one safetensors file, whole or not at all; equal features give equal bytes.

    ``metadata``: further strings for the header, such as those of ``toolbox.weights.provenance.header``.
    """
    names = {"paths": features.path_ids, "questions": features.question_ids, "facets": dict(features.facets)}
    arrays = {name: getattr(features, name) for name in _KINDS if name != _NAMES}
    arrays[_NAMES] = np.frombuffer(canonical(names).encode(), dtype=np.uint8)
    told = canonical({"version": VERSION, "scoring": msgspec.to_builtins(features.scoring)})
    write_arrays(path, arrays, _KINDS, {**(metadata or {}), KEY: told})


def read_features(path: str | Path) -> Features:
    """Read and check a features file.

    Raises: MissingInput (66) for a file that is not there, BadData (65) for one that is damaged, is something else, or
    whose parts do not fit together. Arrays are read-only.
    """
    found = ArrayFile(path, _ADVICE)
    file, field = found.file, f"__metadata__.{KEY}"
    if KEY not in found.metadata:
        raise BadData("is not a features file of landscape-plot", _ADVICE, file=file, field=field)
    told = _decoded(found.metadata[KEY].encode(), _Header, field, file)
    if told.version != VERSION:
        raise BadData(f"is of version {told.version}, known is {VERSION}", _ADVICE, file=file)
    arrays = found.arrays(_KINDS)
    names = _decoded(arrays.pop(_NAMES).tobytes(), _Names, _NAMES, file)
    features = Features(
        **arrays, path_ids=names.paths, question_ids=names.questions, facets=names.facets, scoring=told.scoring
    )
    check(features, file)
    return features


def _decoded(raw: bytes, kind: type, field: str, file: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadData(f"cannot be read: {error}", _ADVICE, file=file, field=field) from None
