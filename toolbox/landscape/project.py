"""The map: all states of questions with equally many choices, one start a question and one landmark a choice, in 2-D.

One fit serves all facets of a map, since only points of the same fit can be compared. t-SNE keeps neighbours together;
distances between its islands mean little.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from toolbox.landscape.features import Features
from toolbox.landscape.method import Floats, Integers, LandmarkKind, gold_first, l1_features, landmarks
from toolbox.shell.errors import BadData, UsageProblem

Projection = Literal["tsne", "pca", "opentsne"]

PERPLEXITY, SEED = 10.0, 42  # the released code's
MANY_STATES = 20_000
"""From here on scikit-learn's t-SNE takes long; openTSNE does not."""


@dataclass(frozen=True, eq=False, slots=True)
class MapRows:
    """N points before projection: question by question its states, path by path, then its start; landmarks last.

    ``matrix`` (N, k) L1 features. ``state`` (N,) the row in ``Features``, −1 for starts and landmarks; ``question``
    (N,) the question, −1 for landmarks. ``gold_first``: whether coordinate 0, and so the first landmark, is the right
    answer's; else coordinates are in the order of the single question's choices.
    """

    k: int
    matrix: Floats
    state: Integers
    question: Integers
    gold_first: bool


@dataclass(frozen=True, eq=False, slots=True)
class LandscapeMap:
    """``MapRows`` with their (N, 2) float64 coordinates, and what they were computed with.

    ``perplexity`` is the one used (None without), ``wanted_perplexity`` the one asked for; ``explained`` is the share
    of the variance that a PCA keeps.
    """

    rows: MapRows
    xy: Floats
    method: Projection
    library: str
    seed: int
    perplexity: float | None = None
    wanted_perplexity: float | None = None
    explained: float | None = None

    @property
    def note(self) -> str | None:
        """What people should know: a perplexity that was lowered because there are few points."""
        if self.perplexity == self.wanted_perplexity:
            return None
        points = f"{len(self.xy)} points are few for t-SNE"
        return f"{points}: perplexity {self.perplexity:.3g} instead of {self.wanted_perplexity:g}"


def question_groups(features: Features, per_question: bool = False) -> list[Integers]:
    """The questions of each map: all of one k together, k upwards; or each alone. Questions without states are left
    out, and so are maps without any."""
    drawn = np.unique(features.state_question)
    if per_question:
        return [drawn[place : place + 1] for place in range(len(drawn))]
    k = features.k[drawn]
    return [drawn[k == size] for size in np.unique(k)]


def map_rows(features: Features, questions: ArrayLike, kind: LandmarkKind = "simplex") -> MapRows:
    """The points of the map of ``questions`` (indices, all of one k), in the order of the released code.

    The right answer's coordinate moves to position 0. Without right answers a map holds a single question.

    Raises: BadData (65) where there are no states; UsageProblem (2) for several questions of which one has no right
    answer, and for landmarks that are not defined; ValueError for different k.
    """
    chosen = np.asarray(questions, dtype=np.int64)
    chosen = chosen[np.isin(chosen, features.state_question)]
    if not len(chosen):
        raise BadData("no thoughts to draw", "give paths with `thoughts` or a `completion`")
    sizes = set(features.k[chosen].tolist())
    if len(sizes) > 1:
        raise ValueError(f"one map needs one number of choices, got {sorted(sizes)}")
    k = sizes.pop()
    unknown = int(np.sum(features.gold[chosen] < 0))
    if unknown and len(chosen) > 1:
        raise UsageProblem(
            f"{unknown} of {len(chosen)} questions have no `answer`, so their choices cannot share a map",
            "give answers, or draw each question on its own with --per-question",
        )
    state, question = _row_order(features, chosen)
    distances = np.where((state >= 0)[:, None], features.distance[state, :k], features.start_distance[question, :k])
    points = gold_first(l1_features(distances), features.gold[question])
    return MapRows(
        k,
        np.concatenate([points, landmarks(k, kind)]),
        np.concatenate([state, np.full(k, -1)]),
        np.concatenate([question, np.full(k, -1)]),
        not unknown,
    )


def _row_order(features: Features, chosen: Integers) -> tuple[Integers, Integers]:
    """(state, question) of every point that is no landmark: question by question the states, then the start (−1)."""
    rank = np.full(len(features.k), -1)
    rank[chosen] = np.arange(len(chosen))
    of_state = features.state_question
    states = np.flatnonzero(rank[of_state] >= 0)
    state = np.concatenate([states, np.full(len(chosen), -1)])
    question = np.concatenate([of_state[states], chosen])
    order = np.lexsort((np.where(state < 0, len(of_state), state), rank[question]))
    return state[order], question[order]


def project(
    rows: MapRows, method: Projection = "tsne", *, perplexity: float = PERPLEXITY, seed: int = SEED
) -> LandscapeMap:
    """Project all points to two dimensions in one fit; the same seed, library version and machine give the same map.

    ``tsne``: scikit-learn's, started from a PCA; ``opentsne``: the package of that name, for more than some 20,000
    states; ``pca``: the two directions of largest variance. A perplexity that the points do not allow is lowered to
    (N − 1)/3 (see ``LandscapeMap.note``).

    Raises: UsageProblem (2) where openTSNE is not installed.
    """
    if method == "pca":
        return _pca(rows, seed)
    allowed = min(perplexity, (len(rows.matrix) - 1) / 3)
    embed = {"tsne": _sklearn_tsne, "opentsne": _open_tsne}[method]
    xy, library = embed(rows.matrix, allowed, seed)
    return LandscapeMap(rows, xy, method, library, seed, allowed, perplexity)


def _pca(rows: MapRows, seed: int) -> LandscapeMap:
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, svd_solver="full")
    xy = pca.fit_transform(rows.matrix).astype(np.float64)
    explained = float(np.sum(pca.explained_variance_ratio_))
    return LandscapeMap(rows, xy, "pca", _library("scikit-learn"), seed, explained=explained)


def _sklearn_tsne(matrix: Floats, perplexity: float, seed: int) -> tuple[Floats, str]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # Threads add up the normaliser in no fixed order, and a last bit may become another map; on few points or busy
    # cores they also cost more than they give.
    with threadpool_limits(1):
        xy = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(matrix)
    return xy.astype(np.float64), _library("scikit-learn")


def _open_tsne(matrix: Floats, perplexity: float, seed: int) -> tuple[Floats, str]:
    try:
        from openTSNE import TSNE
    except ImportError:
        raise UsageProblem("openTSNE is not installed", "pip install openTSNE, or use --project tsne") from None
    xy = TSNE(n_components=2, perplexity=perplexity, initialization="pca", random_state=seed, n_jobs=1).fit(matrix)
    return np.asarray(xy, dtype=np.float64), _library("openTSNE")


def _library(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def coordinate_records(landscape: LandscapeMap, features: Features) -> Iterator[dict[str, Any]]:
    """A JSON object a point, in the map's order: ``{path_id, step, progress, x, y, k}`` for states.

    Starts have ``id`` of the question instead of ``path_id`` and step 0, landmarks ``landmark``: the place of their
    coordinate, 0 for the right answer where there is one.
    """
    rows = landscape.rows
    landmark = 0
    for state, question, (x, y) in zip(rows.state.tolist(), rows.question.tolist(), landscape.xy.tolist(), strict=True):
        place = {"x": x, "y": y, "k": rows.k}
        if state >= 0:
            path, step = int(features.path[state]), int(features.step[state])
            told = {"path_id": features.path_ids[path], "step": step, "progress": step / int(features.n_steps[path])}
        elif question >= 0:
            told = {"id": features.question_ids[question], "step": 0, "progress": 0.0}
        else:
            told = {"landmark": landmark}
            landmark += 1
        yield {**told, **place}


def many_states_advice(maps: Sequence[MapRows], method: Projection) -> str | None:
    """A line for people where another projection would be much faster."""
    most = max((len(rows.matrix) for rows in maps), default=0)
    if method != "tsne" or most <= MANY_STATES:
        return None
    return f"t-SNE of {most} states takes long: --project opentsne (pip install openTSNE) or pca is faster"
