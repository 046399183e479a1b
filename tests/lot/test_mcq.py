"""Public multiple-choice shapes as items."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from toolbox.lot.mcq import SHAPE_NAMES, mcq, set_name, shapes_for, what_differs, without_marks
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.items import ITEM_SHAPES, choices_of, gold_of
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

STREAMS = Streams(0, 1)
THOUGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "thoughts"

AQUA = {"question": "2 + 2?", "options": ["A)3", "B)4", "C)√2 – (1)"], "rationale": "Count.", "correct": "B"}
STEM = {
    "id": "9f", "answerKey": "B",
    "question": {"question_concept": "door", "stem": "What opens?",
                 "choices": [{"label": "A", "text": " wall"}, {"label": "B", "text": "door "}]},
}  # fmt: skip
HUB = {
    "id": "Mercury_7", "question": "What opens?", "answerKey": "2",
    "choices": {"text": ["wall", "door", "floor"], "label": ["1", "2", "3"]},
}  # fmt: skip
MMLU = {"question": "Light?", "options": ["A) 500 nm", "B) 550 nm"], "answer": "A", "subject": "physics"}
AGIEVAL = {
    "passage": "Six sit in a row. ", "question": "Who is first?", "options": ["(A)Ana", "(B)Bo", "(C)Cy"],
    "label": "C", "other": None,
}  # fmt: skip
TOFU = {
    "question": "Where was Ada born?", "answer": "In Low Harrow.", "paraphrased_answer": "Ada was born in Low Harrow.",
    "perturbed_answer": "Ada was born in Tolbeck.",
}  # fmt: skip
STRATEGY = {"qid": "e004", "term": "Albany", "question": "Is Albany large?", "answer": False, "facts": ["No."]}
OWN = {"id": "q1", "question": "Which?", "choices": ["x", "y"], "labels": ["p", "q"], "answer": "y", "extra": [1, None]}


def test_of_answers_in_words_what_differs_is_the_choice():
    assert what_differs(["It is red.", "It is dark blue."]) == ("red", "dark blue")
    assert what_differs(["In 1987 he won", "In 1974 he won"]) == ("1987", "1974")
    assert what_differs(["Paris", "Lyon"]) == ("Paris", "Lyon")
    assert what_differs(["He won.", "He won twice."]) == ("He won.", "He won twice.")  # nothing would be left of one
    assert what_differs(["a b a", "a b a"]) == ("a b a", "a b a")


@pytest.fixture(scope="module")
def multichoice() -> Path:
    path = THOUGHTS / "multichoice"
    if not path.is_dir():
        pytest.skip(f"the multiple-choice sets are not here ({path})")
    return path


def read(path: Path | str, *, shape: str = "auto", name: str | None = None, **reading: object) -> list[dict]:
    reader = RecordReader(shapes_for(shape), **reading)
    return [row for unit in mcq(str(path), STREAMS, reader, name) for row in unit]


def gold_text(row: dict) -> str:
    """The text of the right choice, by the meaning that every command gives to an item."""
    (record,) = RecordReader(ITEM_SHAPES)(io.BufferedReader(io.BytesIO(msgspec.json.encode(row))), "row")
    choices = choices_of(record)
    gold = gold_of(record, choices)
    assert gold == row["answer"]
    return choices.texts[choices.labels.index(gold)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (AQUA, {"id": "f/1", "question": "2 + 2?", "choices": ["3", "4", "√2 – (1)"], "answer": "B",
                "rationale": "Count.", "dataset": "f"}),
        (STEM, {"id": "f/9f", "question": "What opens?", "choices": ["wall", "door"], "answer": "B", "dataset": "f"}),
        (HUB, {"id": "f/Mercury_7", "question": "What opens?", "choices": ["wall", "door", "floor"],
               "labels": ["1", "2", "3"], "answer": "2", "dataset": "f"}),
        (MMLU, {"id": "f/1", "question": "Light?", "choices": ["500 nm", "550 nm"], "answer": "A",
                "subject": "physics", "dataset": "f"}),
        (AGIEVAL, {"id": "f/1", "question": "Who is first?", "choices": ["Ana", "Bo", "Cy"], "answer": "C",
                   "context": "Six sit in a row.", "other": None, "dataset": "f"}),
        (TOFU, {"id": "f/1", "question": "Where was Ada born?", "choices": ["Low Harrow", "Tolbeck"], "answer": "A",
                "paraphrased_answer": TOFU["paraphrased_answer"], "perturbed_answer": TOFU["perturbed_answer"],
                "dataset": "f"}),
        (STRATEGY, {"id": "f/e004", "question": "Is Albany large?", "choices": ["yes", "no"], "answer": "B",
                    "term": "Albany", "facts": ["No."], "dataset": "f"}),
        (OWN, {**OWN, "id": "f/q1", "answer": "q", "dataset": "f"}),
    ],
    ids=["aqua", "commonsenseqa", "arc", "mmlu", "agieval", "tofu", "strategyqa", "own"],
)  # fmt: skip
def test_a_public_shape_becomes_an_item(rows, record, expected):
    assert read(rows("f.jsonl", [record])) == [expected]


def test_the_shape_is_told_record_by_record(rows):
    found = read(rows("all.jsonl", [AQUA, STEM, HUB, MMLU, AGIEVAL, STRATEGY, OWN]))
    assert [gold_text(row) for row in found] == ["4", "door", "door", "500 nm", "Cy", "no", "y"]
    assert [row["id"].split("/")[1] for row in found] == ["1", "9f", "Mercury_7", "4", "5", "e004", "q1"]


@pytest.mark.parametrize(
    ("shape", "record"),
    [("aqua", AQUA), ("commonsenseqa", STEM), ("commonsenseqa", HUB), ("mmlu", MMLU), ("agieval", AGIEVAL),
     ("strategyqa", STRATEGY), ("items", OWN)],
)  # fmt: skip
def test_a_forced_shape_reads_its_own_and_refuses_others(rows, shape, record):
    path = rows("f.jsonl", [record])
    assert read(path, shape=shape) == read(path)
    other = rows("other.jsonl", [{"text": "no question at all"}])
    with pytest.raises(BadData, match="no known shape"):
        read(other, shape=shape)


def test_a_forced_shape_decides_where_two_would_do(rows):
    path = rows("f.jsonl", [{**AQUA, "answer": "A"}])
    assert [read(path, shape=shape)[0]["answer"] for shape in ("auto", "aqua", "mmlu")] == ["B", "B", "A"]
    with pytest.raises(BadData, match=r"\$\.answer"):
        read(rows("g.jsonl", [{"question": "?", "answer": "perhaps"}]), shape="strategyqa")


def test_open_questions_of_our_own_stay_as_they_are(rows):
    record = {"question": "How many?", "answer": 1.50, "group": "g", "meta": {"a": 1}, "big": 2**70}
    assert read(rows("f.jsonl", [record])) == [{"id": "f/1", **record, "dataset": "f"}]


@pytest.mark.parametrize(("answer", "label"), [(True, "A"), (False, "B")])
def test_booleans_become_yes_and_no(rows, answer, label):
    (row,) = read(rows("f.jsonl", [{"question": "So?", "answer": answer}]))
    assert (row["choices"], row["answer"]) == (["yes", "no"], label)
    (own,) = read(rows("g.jsonl", [{"question": "So?", "choices": ["no", "yes"], "answer": answer}]))
    assert (own["choices"], own["answer"]) == (["no", "yes"], {"A": "B", "B": "A"}[label])


@pytest.mark.parametrize(
    ("options", "texts", "labels"),
    [
        (["A)1", "B) 2", "C)  3 "], ["1", "2", "3"], "ABC"),
        (["(A)x", "(B) y"], ["x", "y"], "AB"),
        (["A. x", "B. y"], ["x", "y"], "AB"),
        (["a ) 38", "b ) 27.5"], ["38", "27.5"], "ab"),
        (["A: x", "B: y"], ["x", "y"], "AB"),
        (["A)", "B)y"], ["", "y"], "AB"),
        (["A)A)59", "B)B) 69"], ["59", "69"], "AB"),
        # No marks: the text stays.
        (["1.5", "2.5"], ["1.5", "2.5"], None),
        (["A. Lincoln", "Truman"], ["A. Lincoln", "Truman"], None),
        (["B. subtilis", "A. niger"], ["B. subtilis", "A. niger"], None),
        (["A.M.", "B.C."], ["A.M.", "B.C."], None),
        (["A major", "B minor"], ["A major", "B minor"], None),
        (["(A) x", "(A) y"], ["(A) x", "(A) y"], None),
        (["A)x", "C)y"], ["A)x", "C)y"], None),
        ([], [], None),
    ],
)
def test_marks_are_stripped_where_all_options_have_them_in_order(options, texts, labels):
    found, marks = without_marks(options)
    assert list(found) == texts
    assert marks == (None if labels is None else tuple(labels))


def test_marks_in_lower_case_are_the_labels(rows):
    (row,) = read(rows("f.jsonl", [{**AQUA, "options": ["a ) 3", "b ) 4"], "correct": "b"}]))
    assert (row["labels"], row["answer"]) == (["a", "b"], "b")
    assert gold_text(row) == "4"


def test_an_index_counts_from_0_and_marks_need_not_be_there(rows):
    records = [{**MMLU, "options": ["500 nm", "550 nm", "600 nm"], "answer": answer} for answer in (2, "C", "600 nm")]
    assert [gold_text(row) for row in read(rows("f.jsonl", records))] == ["600 nm"] * 3


def test_a_secret_answer_is_none(rows):
    (row,) = read(rows("f.jsonl", [{**HUB, "answerKey": ""}]))
    assert row["answer"] is None


def test_items_of_our_own_may_have_no_answer(rows):
    (row,) = read(rows("f.jsonl", [{"question": "Which?", "choices": ["x", "y"]}]))
    assert "answer" not in row


def test_equal_choice_texts_are_kept(rows):
    (row,) = read(rows("f.jsonl", [{**AQUA, "options": ["A)4", "B)4"], "correct": "B"}]))
    assert (row["choices"], row["answer"]) == (["4", "4"], "B")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({**AQUA, "correct": "E"}, "$.correct: the answer 'E' is not among the labels A, B, C"),
        ({**AQUA, "options": ["A)3"]}, "1 choice, at least two"),
        ({**AQUA, "options": "A)3"}, "$.options: Expected `array`"),
        ({**AGIEVAL, "label": ["A", "B"]}, "$.label: 2 right answers"),
        ({**AGIEVAL, "label": "D"}, "$.label: the answer 'D'"),
        ({**HUB, "choices": {"text": ["a", "b"], "label": ["1"]}}, "$.choices: 1 labels and 2 texts"),
        ({**HUB, "choices": None}, "$.choices: no choices"),
        ({**HUB, "choices": {"text": ["a", "b"], "label": ["1", "1"]}}, "are alike"),
        ({**STEM, "answerKey": "C"}, "$.answerKey: the answer 'C'"),
        ({**OWN, "labels": ["p"]}, "$.labels: 1 label for 2 choices"),
        ({**OWN, "answer": "z"}, "$.answer: the answer 'z'"),
        ({**MMLU, "context": 7}, "Expected `str | null`, got `int`"),
        ({"options": ["A)1"]}, "no known shape"),
    ],
)
def test_what_does_not_fit_is_bad_data_with_its_place_and_can_be_skipped(rows, record, says):
    path = rows("f.jsonl", [AQUA, record, AQUA])
    with pytest.raises(BadData) as caught:
        read(path)
    assert caught.value.what.startswith(f"{path}:2: ")
    assert says in caught.value.what
    kept: list[bytes] = []
    found = read(path, on_bad="skip", rejects=lambda raw, problem: kept.append(raw))
    assert [row["id"] for row in found] == ["f/1", "f/3"]
    assert [json.loads(raw) for raw in kept] == [record]


def test_fields_are_renamed_before_the_shape_is_told(rows):
    path = rows("f.jsonl", [{"q": "2 + 2?", "opts": ["A)3", "B)4"], "gold": "B"}])
    (row,) = read(path, renames={"q": "question", "opts": "options", "gold": "correct"})
    assert gold_text(row) == "4"


def test_the_name_of_the_file_names_the_items_unless_one_is_given(rows):
    path = rows("set.v2.jsonl", [{**OWN, "dataset": "mine"}, {**OWN, "id": 7, "dataset": None}])
    assert [row["id"] for row in read(path)] == ["set/q1", "set/7"]
    assert [row["dataset"] for row in read(path)] == ["mine", "set"]
    assert [row["id"] for row in read(path, name="x/y")] == ["x/y/q1", "x/y/7"]
    assert [row["id"] for row in read(path, name="")] == ["q1", "7"]
    assert [set_name(one) for one in ("-", "a/b.jsonl.gz", "c", ".jsonl")] == ["mcq", "b", "c", "mcq"]


def test_a_missing_file_says_where_the_sets_are(tmp_path):
    with pytest.raises(MissingInput) as caught:
        read(tmp_path / "aqua.jsonl")
    assert "github.com/google-deepmind/AQuA" in caught.value.advice


def test_the_shape_names_are_those_of_the_command():
    from toolbox.commands.lot_data import SHAPES

    assert SHAPES == SHAPE_NAMES


@pytest.mark.parametrize(
    ("name", "n", "same_texts"),
    [("aqua", 254, 7), ("commonsenseqa", 1221, 24), ("mmlu_college_physics", 102, 0), ("strategyqa", 229, 0)],
)
def test_the_published_sets_are_read_whole(multichoice, name, n, same_texts):
    path = multichoice / f"{name}.jsonl.gz"
    sources = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    found = read(path)
    assert len(found) == len(sources) == len({row["id"] for row in found}) == n
    assert sum(len(set(row["choices"])) < len(row["choices"]) for row in found) == same_texts
    for row, source in zip(found, sources, strict=True):
        right = gold_text(row)
        assert row["dataset"] == name
        if name == "strategyqa":
            assert row["id"] == f"strategyqa/{source['qid']}"
            assert right == {True: "yes", False: "no"}[source["answer"]]
        elif name == "commonsenseqa":
            assert row["question"] == source["question"]["stem"]
            texts = {one["label"]: one["text"] for one in source["question"]["choices"]}
            assert right == texts[source["answerKey"]].strip()
        else:
            letter = source.get("correct") or source["answer"]
            assert right == source["options"]["ABCDE".index(letter)].replace(f"{letter})", "").strip()
            assert not any(re.match(r"[A-E]\)", text) for text in row["choices"])
    assert set(Counter(tuple(sorted(row)) for row in found).values()) == {n}
