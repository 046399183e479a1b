"""Stored features and the rows they belong to: what is the same in any order, and what is told where it is not."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest

from tests.landscape.twins import SCORING, random_features
from toolbox.landscape.data import Paths
from toolbox.landscape.features import Features
from toolbox.landscape.stored import check_asked, match, wording_of
from toolbox.landscape.wording import Wording
from toolbox.shell.errors import BadData
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.records import RecordReader


def mixed() -> Features:
    """Questions of 2, 5 and 3 choices, one path without thoughts."""
    return random_features(3, k=(2, 5, 3), paths=5, shortest=0)


def rows_of(features: Features) -> list[dict[str, Any]]:
    return [
        {
            "id": features.question_ids[of],
            "path_id": path_id,
            "choices": [f"thing {number}" for number in range(features.k[of])],
            "thoughts": [f"Thought {number}." for number in range(n)],
        }
        for path_id, of, n in zip(features.path_ids, features.question, features.n_steps, strict=True)
    ]


def read(rows: list[dict[str, Any]]) -> Paths:
    paths = Paths(wording_of(SCORING), scored=False)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for record in RecordReader(PATH_SHAPES)(io.BufferedReader(io.BytesIO(text.encode())), "x"):
        paths.add(record)
    return paths


def test_a_file_serves_the_paths_it_was_made_from_in_any_order():
    features = mixed()
    rows = rows_of(features)
    assert match(features, read(rows), "f").tolist() == list(range(15))
    assert match(features, read(rows[::-1]), "f").tolist() == list(range(15))[::-1]


def test_paths_word_for_word():
    features = mixed()
    paths = read(rows_of(features))
    told = dataclasses.replace(features.scoring, options={**features.scoring.options, "paths": paths.texts_digest()})
    marked = dataclasses.replace(features, scoring=told)
    match(marked, paths, "f")
    rows = rows_of(features)
    rows[1]["choices"][0] = "another thing"
    for row in rows[:5]:
        row["choices"] = rows[1]["choices"]
    with pytest.raises(BadData, match="f: was made from other thoughts or choices than these"):
        match(marked, read(rows), "f")


def test_other_paths_and_other_thoughts_are_told():
    features = mixed()
    rows = rows_of(features)
    n = len(rows[0]["thoughts"])
    for changed, message in (
        ([*rows, {**rows[0], "path_id": "new"}], "has no path 'new'"),
        (rows[2:], r"did not come in: 'q0/0' \(2 in all\)"),
        ([{**rows[0], "thoughts": [*rows[0]["thoughts"], "One more."]}, *rows[1:]],
         f"'q0/0' has {n} thoughts there and {n + 1} here"),
        ([{**row, "id": "other"} for row in rows[:5]] + rows[5:], "answers question 'q0' there and 'other' here"),
        ([{**row, "choices": ["a", "b", "c"]} for row in rows[:5]] + rows[5:], "'q0' has 2 choices there and 3 here"),
    ):  # fmt: skip
        with pytest.raises(BadData, match=message):
            match(features, read(changed), "f")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"template": "Answer is: {label}"}, r"template 'Answer is: \{label\}\) \{text\}', asked for is"),
        ({"model": "other"}, "model 'SmolLM2-135M-Instruct'"),
        ({"split": "sentence"}, "split 'line'"),
        ({"drop_answer_thought": True}, "drop_answer_thought False"),
    ],
)
def test_another_scoring_is_told(asked, message):
    check_asked(SCORING, {"template": SCORING.template, "model": None, "drop_answer_thought": False}, "f")
    with pytest.raises(BadData, match=f"f: was scored with {message}"):
        check_asked(SCORING, asked, "f")


def test_rows_are_read_as_those_of_the_file_were():
    assert wording_of(SCORING) == Wording()
    reference = Wording.reference("sentence")
    scoring = dataclasses.replace(
        SCORING, template=reference.template, context="question", separator=" ", split="sentence",
        options={"compat": "reference", "drop_answer_thought": False},
    )  # fmt: skip
    assert wording_of(scoring) == reference
