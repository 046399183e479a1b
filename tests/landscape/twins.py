"""Features to test with: small hand-made ones, random ones of every kind, and those of the released demo."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolbox.landscape.features import Features, PathScores, QuestionScores, Scoring, assemble

LANDSCAPE = Path(__file__).resolve().parents[3] / "shared" / "data" / "thoughts" / "landscape"

SCORING = Scoring(
    model="SmolLM2-135M-Instruct",
    model_digest="ab" * 32,
    tokenizer_digest="cd" * 32,
    dtype="fp32",
    template="Answer is: {label}) {text}",
    context="auto",
    separator="\n",
    split="line",
    method="tree",
    versions={"torch": "2.13.0"},
    options={"drop_answer_thought": False},
)


def question(identifier: str, distances: Sequence[float], gold: int = 0) -> QuestionScores:
    """A question whose start has these distances, its answers one token each."""
    return QuestionScores(identifier, gold, -np.log(distances), np.ones(len(distances), dtype=int))


def path(
    identifier: str, of: int, distances: Sequence[Sequence[float]], pred: int = -1, **facets: str | None
) -> PathScores:
    """A path through states of these distances; thought i has i tokens of perplexity 2."""
    n = len(distances)
    matrix = np.array(distances, dtype=float).reshape(n, -1)
    tokens = np.arange(1, n + 1)
    return PathScores(
        identifier, of, pred, facets, -np.log(matrix), np.ones(matrix.shape, int), -np.log(2) * tokens, tokens
    )


def random_features(
    seed: int = 0,
    *,
    k: Sequence[int] = (4, 4, 4),
    paths: int = 6,
    longest: int = 9,
    shortest: int = 1,
    gold: bool = True,
    outcomes: Sequence[str] = ("wrong", "correct"),
    gaps: bool = False,
) -> Features:
    """Questions of these k with paths of random length, answers of several tokens, two variants and a data set.

    Every question has right and wrong paths in each variant, where there are as many and ``outcomes`` has both. With
    ``gaps`` only every third question has wrong paths, and the questions are numbered against the order of the paths.
    """
    draw = np.random.default_rng(seed)
    questions, every = [], []
    for number, size in enumerate(k):
        right = int(draw.integers(size))
        tokens = draw.integers(1, 6, size)
        questions.append(QuestionScores(f"q{number}", right if gold else -1, -draw.gamma(3, 1, size) * tokens, tokens))
        for sample in range(paths):
            n = int(draw.integers(shortest, longest + 1))
            wrong = "wrong" in outcomes and (sample // 2 % 2 == 0 or "correct" not in outcomes)
            wrong &= not (gaps and number % 3)
            pred = (right + 1) % size if wrong else right
            facets = {"variant": ("cot", "lot2")[sample % 2], "dataset": "made", "model": None}
            per_thought = draw.integers(1, 20, n)
            every.append(
                PathScores(
                    f"q{number}/{sample}",
                    len(k) - 1 - number if gaps else number,
                    pred,
                    facets,
                    -draw.gamma(3, 1, (n, size)) * tokens,
                    np.tile(tokens, (n, 1)),
                    -draw.gamma(2, 1, n) * per_thought,
                    per_thought,
                )
            )
    return assemble(questions[::-1] if gaps else questions, every, SCORING)


def demo_file(name: str) -> Path:
    """A file of the released demo; the test is skipped where the shared data does not lie beside the checkout."""
    found = LANDSCAPE / name
    if not found.is_file():
        pytest.skip(f"the released demo is not here ({found})")
    return found


def demo_rows() -> list[dict[str, Any]]:
    """The demo's 50 paths."""
    with gzip.open(demo_file("demo_paths.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def demo_features() -> Features:
    """The released distances as features, answers as the released code read them.

    The distances are perplexities already: each answer counts as one token, and so does each thought, whose perplexity
    is its path's (the file has no other).
    """
    rows = demo_rows()
    questions, paths = [], []
    with np.load(demo_file("demo_distances.npz")) as stored:
        for number, identifier in enumerate(dict.fromkeys(row["id"] for row in rows)):
            mine = [row for row in rows if row["id"] == identifier]
            labels = mine[0]["labels"]
            k = len(labels)
            matrix = stored[f"D{number}"][:-k]
            questions.append(question(identifier, matrix[-1, 1:], labels.index(mine[0]["answer"])))
            end = 0
            for row in mine:
                start, end = end, end + len(row["thoughts"])
                pred = labels.index(row["reference_pred"]) if row["reference_pred"] is not None else -1
                facets = {name: row[name] for name in ("model", "variant", "dataset")}
                ones = np.ones(end - start, dtype=int)
                nll = np.log(matrix[end - 1, 0])
                paths.append(
                    PathScores(
                        row["path_id"],
                        number,
                        pred,
                        facets,
                        -np.log(matrix[start:end, 1:]),
                        np.ones((end - start, k), dtype=int),
                        -nll * ones,
                        ones,
                    )
                )
            assert end == len(matrix) - 1
    return assemble(questions, paths, SCORING)
