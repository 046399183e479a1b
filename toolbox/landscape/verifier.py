"""The path verifier: numbers that describe a path without its label, a model that scores them, and its file.

Source: Zhou et al. 2025, arXiv 2503.22165, section on the verifier, which names a random forest on "states and
consistency" and no more. What stands at which place of the vector, and the models' settings, are ours.

The gold answer never enters, nor does the letter or the place of an answer: choices are ordered by the path itself, so
that another order of the same choices gives the same numbers. scikit-learn fits; predicting needs only numpy, so that a
saved verifier gives the same scores under any version of scikit-learn, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolbox.landscape.features import Features, Scoring
from toolbox.landscape.method import Floats, Integers, l1_features, nearest, path_perplexity, uncertainty_normalised
from toolbox.shell.errors import BadData
from toolbox.weights.arrays import ArrayFile, write_arrays
from toolbox.weights.provenance import canonical

FeatureSet = Literal["states", "summary"]
Kind = Literal["rf", "logreg"]

TREES = 300
SMALLEST_LEAF = 5
INVERSE_PENALTY = 0.1  # scikit-learn's C

KEY = "landscape-verifier"
"""Name of our entry in the header: the format's version, the recipe of the features, and what it was trained on."""

VERSION = 1

_SUMMARY = 5  # numbers a point
_BLOCK = 1 << 21  # (row, tree) pairs that descend at once
_ADVICE = "make it anew with landscape-verify --save"


# --- what describes a path --------------------------------------------------------------------------------------------


def path_features(features: Features, own: ArrayLike, feature_set: FeatureSet = "states", points: int = 10) -> Floats:
    """(P, F) numbers a path, at ``points`` = B stages of its progress; NaN for a path without thoughts.

    ``own`` (P,): index of the choice that the path answers; −1 stands for the choice that its last state is nearest
    to. Stage b is state ⌈b·n/B⌉ of n, so short paths repeat states and the last stage is the last state.

    ``states``: at each stage the k shares f_i, the own answer's first and the others in the order of their distance at
    the last state, then the consistency c_i: F = B(k + 1). For questions of one k.

    ``summary``: at each stage the own share, the smallest other, that minus the own, u_i/ln k, and the thought's
    −log p a token in nats (the logarithm of its perplexity; 0 without tokens): F = 5B, whatever k is.

    Raises: BadData for ``states`` of several k.
    """
    sizes = np.unique(features.k[np.unique(features.question)])
    if feature_set == "states" and len(sizes) > 1:
        told = ", ".join(map(str, sizes[:-1])) + f" and {sizes[-1]}"
        raise BadData(f"questions of {told} choices do not share states", "--feature-set summary takes them together")
    here = np.flatnonzero(features.n_steps > 0)
    n = features.n_steps[here].astype(np.int64)
    ends = np.cumsum(features.n_steps, dtype=np.int64)[here]
    rows = (ends - n)[:, None] - (-np.arange(1, points + 1) * n[:, None] // points) - 1
    shares = l1_features(features.distance)[:, : sizes[-1]]
    choice = nearest(shares)
    mine = np.asarray(own, dtype=np.int64)[here]
    mine = np.where(mine < 0, choice[ends - 1], mine)
    if feature_set == "states":
        numbers = _states(shares, choice, mine, rows)
    else:
        numbers = _summary(shares, _surprise(features), mine, rows)
    result = np.full((len(features.n_steps), numbers.shape[1] * numbers.shape[2]), np.nan)
    result[here] = numbers.reshape(len(here), -1)
    return result


def n_features(feature_set: FeatureSet, points: int, k: int) -> int:
    """F, the length of ``path_features``."""
    return points * (k + 1 if feature_set == "states" else _SUMMARY)


def _states(shares: Floats, choice: Integers, own: Integers, rows: Integers) -> Floats:
    """(N, B, k + 1) from the (M, k) shares of all states; ``rows`` (N, B) are those of the stages."""
    final = shares[rows[:, -1]]
    np.put_along_axis(final, own[:, None], -1.0, axis=1)  # below every share: to the front
    order = np.argsort(final, axis=1, kind="stable")
    ordered = np.take_along_axis(shares[rows], order[:, None, :], axis=2)
    agrees = choice[rows] == choice[rows[:, -1:]]
    return np.concatenate([ordered, agrees[:, :, None]], axis=2)


def _summary(shares: Floats, surprise: Floats, own: Integers, rows: Integers) -> Floats:
    """(N, B, 5) from the (M, K) shares and the (M,) surprise of all states."""
    at_stage = shares[rows]
    place = np.broadcast_to(own[:, None, None], (*rows.shape, 1))
    mine = np.take_along_axis(at_stage, place, axis=2)[:, :, 0]
    np.put_along_axis(at_stage, place, np.nan, axis=2)
    other = np.nanmin(at_stage, axis=2)
    return np.stack([mine, other, other - mine, uncertainty_normalised(shares)[rows], surprise[rows]], axis=2)


def _surprise(features: Features) -> Floats:
    """(M,) −log p(t_i | s_{i−1}) a token, in nats. The perplexity itself would overflow and outweigh all else."""
    return -features.thought_logprob / np.maximum(features.thought_tokens, 1)


def training_free_scores(features: Features) -> dict[str, Floats]:
    """Name to (P,) scores that nothing is fitted for, higher for better; NaN for a path without thoughts.

    The last state's uncertainty (as u/ln k, so that questions of different k share a scale; the order within a question
    is that of u), the path's perplexity and its number of thoughts, each with a minus.
    """
    last = np.cumsum(features.n_steps, dtype=np.int64) - 1
    thoughtful = features.n_steps > 0
    certain = np.full(len(last), np.nan)
    certain[thoughtful] = -uncertainty_normalised(l1_features(features.distance))[last[thoughtful]]
    fluent = -path_perplexity(features.thought_logprob, features.thought_tokens, features.path, len(last))
    # Thoughts without a single token have no perplexity: the path goes behind the others.
    fluent = np.where(thoughtful & np.isnan(fluent), -np.inf, fluent)
    return {
        "−uncertainty of the last state": certain,
        "−perplexity of the path": fluent,
        "−number of thoughts": np.where(thoughtful, -features.n_steps.astype(np.float64), np.nan),
    }


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Forest:
    """A random forest as arrays over the N nodes of its T trees, tree by tree, a node before its children.

    ``start`` (T + 1,): tree t has the nodes start[t] .. start[t + 1] − 1, its root first. ``left``, ``right`` (N,):
    the children's places among all nodes, −1 at a leaf. An inner node sends x to the left where x[feature] ≤ threshold.
    ``probability`` (N,): the share of right paths among a node's training paths.
    """

    start: NDArray[np.int32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: Floats
    probability: Floats

    def predict(self, x: Floats) -> Floats:
        """(n,) the probability that a path is right, the mean over trees, from (n, F) features."""
        # scikit-learn grows its trees on float32 and compares these with float64 thresholds. In float64 throughout, a
        # value next to a threshold would take the other branch.
        x = np.asarray(x, dtype=np.float32).astype(np.float64)
        roots = self.start[:-1]
        rows = max(1, _BLOCK // len(roots))
        parts = [self._leaves(x[first : first + rows], roots) for first in range(0, len(x), rows)]
        return np.concatenate([self.probability[leaves].mean(axis=1) for leaves in parts]) if parts else np.empty(0)

    def _leaves(self, x: Floats, roots: NDArray[np.int32]) -> Integers:
        """(n, T) the leaf of each row in each tree: all descend together, one level a turn."""
        node = np.tile(roots.astype(np.int64), len(x))
        row = np.repeat(np.arange(len(x)), len(roots))
        moving = np.flatnonzero(self.left[node] >= 0)
        while len(moving):
            at = node[moving]
            goes_left = x[row[moving], self.feature[at]] <= self.threshold[at]
            node[moving] = np.where(goes_left, self.left[at], self.right[at])
            moving = moving[self.left[node[moving]] >= 0]
        return node.reshape(len(x), len(roots))


@dataclass(frozen=True, eq=False, slots=True)
class Logistic:
    """Logistic regression on standardised features: σ(Σ_f coefficient_f (x_f − mean_f)/scale_f + intercept), all (F,)
    but the intercept (1,)."""

    mean: Floats
    scale: Floats
    coefficient: Floats
    intercept: Floats

    def predict(self, x: Floats) -> Floats:
        """(n,) the probability that a path is right, from (n, F) features."""
        standard = (np.asarray(x, dtype=np.float64) - self.mean) / self.scale
        # Not by BLAS, whose last digits depend on the number of threads; tanh cannot overflow.
        logit = np.einsum("nf,f->n", standard, self.coefficient) + self.intercept[0]
        return 0.5 * (1.0 + np.tanh(0.5 * logit))


Model = Forest | Logistic


def fit(x: Floats, correct: ArrayLike, kind: Kind = "rf", *, seed: int = 0, trees: int = TREES) -> Model:
    """A model of whether a path is right, from (n, F) features and (n,) outcomes.

    ``rf``: scikit-learn's random forest, ``trees`` trees on bootstrap samples, √F features tried at each split, leaves
    of at least 5 paths. ``logreg``: features standardised, L2 penalty with C = .1. Where all outcomes are the same
    there is nothing to tell apart: the score is (right + 1)/(n + 2) for every path. ValueError: no row.
    """
    right = np.asarray(correct).astype(bool)
    if not len(right):
        raise ValueError("a verifier needs at least one path")
    if right.all() or not right.any():
        odds = (right.sum() + 1) / (len(right) - right.sum() + 1)
        zeros = np.zeros(x.shape[1])
        return Logistic(zeros, zeros + 1.0, zeros, np.log([odds]))
    # Imported here: reading, checking and scoring with a saved verifier need no scikit-learn.
    if kind == "logreg":
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(x)
        model = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000).fit(scaler.transform(x), right)
        return Logistic(scaler.mean_, scaler.scale_, model.coef_[0], model.intercept_)
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(trees, min_samples_leaf=SMALLEST_LEAF, max_features="sqrt", random_state=seed)
    return forest_of(forest.fit(x, right))


def forest_of(model: Any) -> Forest:
    """The arrays of a fitted scikit-learn ``RandomForestClassifier`` of two classes, the second being "right"."""
    trees = [estimator.tree_ for estimator in model.estimators_]
    start = np.cumsum([0, *(tree.node_count for tree in trees)])
    shifts = np.repeat(start[:-1], np.diff(start))

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(tree, name) for tree in trees])

    left, right = (np.where(one < 0, -1, one + shifts) for one in (joined("children_left"), joined("children_right")))
    counts = np.concatenate([tree.value[:, 0, :] for tree in trees])
    return Forest(
        start.astype(np.int32),
        left.astype(np.int32),
        right.astype(np.int32),
        np.where(left < 0, -1, joined("feature")).astype(np.int32),
        np.where(left < 0, 0.0, joined("threshold")),
        counts[:, 1] / counts.sum(axis=1),
    )


# --- the file ---------------------------------------------------------------------------------------------------------


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model takes: its kind, and the arguments of ``path_features``; ``k`` is None for ``summary``."""

    kind: Kind
    feature_set: FeatureSet
    points: int
    k: int | None

    @property
    def n_features(self) -> int:
        return n_features(self.feature_set, self.points, self.k or 0)


@dataclass(frozen=True, eq=False, slots=True)
class Verifier:
    """A fitted model, what it takes, how the states it was fitted on were scored, and the questions it has seen.

    ``seen`` (Q, 8) are digests of 8 bytes, so that the file holds neither id nor text; ``paths`` and ``right`` count
    the training paths.
    """

    recipe: Recipe
    model: Model
    scoring: Scoring
    paths: int
    right: int
    seen: NDArray[np.uint8] = field(default_factory=lambda: np.empty((0, 8), np.uint8))

    def has_seen(self, digest: bytes) -> bool:
        return bool(len(self.seen)) and bool((self.seen == np.frombuffer(digest, np.uint8)).all(axis=1).any())


def scored_alike(scoring: Scoring) -> dict[str, Any]:
    """Name to value of what decides distances by more than rounding, whichever paths were scored, on which machine."""
    names = ("model", "model_digest", "tokenizer_digest", "template", "context", "separator", "split")
    options = ("chat_template", "compat", "drop_answer_thought", "system")
    return {**{name: getattr(scoring, name) for name in names}, **{name: scoring.options.get(name) for name in options}}


class _Header(msgspec.Struct, frozen=True):
    version: int
    recipe: Recipe
    scoring: Scoring
    paths: int
    right: int


_ARRAYS: dict[str, dict[str, str]] = {
    "rf": {
        **dict.fromkeys(("start", "left", "right", "feature"), "I32"),
        **dict.fromkeys(("threshold", "probability"), "F64"),
    },
    "logreg": dict.fromkeys(("mean", "scale", "coefficient", "intercept"), "F64"),
}
_SEEN = "seen"


def write_verifier(
    path: str | Path, verifier: Verifier, metadata: Mapping[str, str] | None = None, *, overwrite: bool = True
) -> None:
    """Write one safetensors file, whole or not at all; equal verifiers give equal bytes.

    ``metadata``: further strings for the header, such as those of ``toolbox.weights.provenance.header``.
    """
    kinds = _kinds(verifier.recipe.kind)
    arrays = {name: verifier.seen if name == _SEEN else getattr(verifier.model, name) for name in kinds}
    told = _Header(VERSION, verifier.recipe, verifier.scoring, verifier.paths, verifier.right)
    header = {**(metadata or {}), KEY: canonical(msgspec.to_builtins(told))}
    write_arrays(path, arrays, kinds, header, overwrite=overwrite)


def _kinds(kind: Kind) -> dict[str, str]:
    """Name to format type of the arrays of a model of that kind."""
    return {**_ARRAYS[kind], _SEEN: "U8"}


def read_verifier(path: str | Path) -> Verifier:
    """Read and check a saved verifier.

    Raises: MissingInput (66) for a file that is not there; BadData (65) for one that is damaged, is something else, or
    whose trees lead nowhere: what passes here can be descended without end or fault for any features of its length.
    """
    found = ArrayFile(path, _ADVICE)
    file, field_name = found.file, f"__metadata__.{KEY}"
    if KEY not in found.metadata:
        raise BadData("is not a verifier of landscape-verify", _ADVICE, file=file, field=field_name)
    try:
        told = msgspec.json.decode(found.metadata[KEY].encode(), type=_Header)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise BadData(f"cannot be read: {error}", _ADVICE, file=file, field=field_name) from None
    if told.version != VERSION:
        raise BadData(f"is of version {told.version}, known is {VERSION}", _ADVICE, file=file)
    arrays = found.arrays(_kinds(told.recipe.kind))
    seen = arrays.pop(_SEEN)
    model: Model = Forest(**arrays) if told.recipe.kind == "rf" else Logistic(**arrays)
    for wrong in _faults(told.recipe, model, seen):
        raise BadData(wrong, _ADVICE, file=file)
    return Verifier(told.recipe, model, told.scoring, told.paths, told.right, seen)


def _faults(recipe: Recipe, model: Model, seen: NDArray[np.uint8]) -> Iterable[str]:
    """What does not fit together."""
    if recipe.points < 1 or (recipe.k is None) != (recipe.feature_set == "summary") or (recipe.k or 2) < 2:
        yield "its recipe of features cannot be followed"
        return
    if seen.ndim != 2 or seen.shape[1] != 8:
        yield f"seen has shape {seen.shape}"
    if isinstance(model, Logistic):
        for name in ("mean", "scale", "coefficient", "intercept"):
            values, size = getattr(model, name), 1 if name == "intercept" else recipe.n_features
            if values.shape != (size,) or not np.isfinite(values).all() or (name == "scale" and (values <= 0).any()):
                yield f"{name} does not hold {size} usable numbers"
        return
    yield from _tree_faults(model, recipe.n_features)


def _tree_faults(forest: Forest, n_features: int) -> Iterable[str]:
    nodes = len(forest.left)
    if any(
        getattr(forest, name).shape != (nodes,) for name in ("left", "right", "feature", "threshold", "probability")
    ):
        yield "its arrays of nodes differ in length"
        return
    start = forest.start.astype(np.int64)
    if start.ndim != 1 or len(start) < 2 or start[0] != 0 or start[-1] != nodes or (np.diff(start) < 1).any():
        yield "start does not divide the nodes into trees"
        return
    place, inner = np.arange(nodes), forest.left >= 0
    end = np.repeat(start[1:], np.diff(start))
    for child in (forest.left, forest.right):
        # Children come after their parent, so every descent ends.
        if not np.where(inner, (child > place) & (child < end), child == -1).all():
            yield "a node's children are not nodes behind it in its tree"
    if not ((forest.feature >= 0) & (forest.feature < n_features))[inner].all():
        yield f"a node asks for a feature that is none of the {n_features}"
    if not np.isfinite(forest.threshold).all():
        yield "a threshold is not finite"
    if not ((forest.probability >= 0) & (forest.probability <= 1)).all():
        yield "a probability does not lie between 0 and 1"
