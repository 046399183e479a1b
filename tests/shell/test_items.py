"""Items and paths are read with their choices; answers become labels, numbers have one spelling, words are compared."""

import io
import json
import random
import time

import pytest

from toolbox.shell.errors import BadData
from toolbox.shell.items import (
    ITEM_SHAPES,
    PATH_SHAPES,
    Choices,
    answer_format,
    canonical_number,
    choices_of,
    default_labels,
    gold_of,
    number,
    plain,
    same_answer,
)
from toolbox.shell.records import RecordReader, json_schema


def record(shapes=ITEM_SHAPES, **row):
    (found,) = RecordReader(shapes)(io.BufferedReader(io.BytesIO(json.dumps(row).encode())), "rows")
    return found


def item(**fields):
    return record(question="q", **fields)


def gold(**fields):
    found = item(**fields)
    return gold_of(found, choices_of(found))


def complaint(**fields):
    with pytest.raises(BadData) as failed:
        gold(**fields)
    assert failed.value.advice
    return failed.value.what


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_an_item_needs_its_question_alone():
    value = record(question="q").value
    assert (value.id, value.choices, value.labels, value.answer, value.context, value.group) == (None,) * 6
    assert value.meta == {}
    assert record(question="q").value.meta is not value.meta
    with pytest.raises(BadData, match="expected question"):
        record(choices=["a", "b"])
    with pytest.raises(BadData, match=r"rows:1: \$\.question"):
        record(question="")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"completion": ""}, "CompletedPath"),
        ({"thoughts": ["one", "two"]}, "ThoughtPath"),
        ({"thoughts": "one"}, "ThoughtPath"),
        ({"pred": "B"}, "AnsweredPath"),
        ({"pred": False}, "AnsweredPath"),
        ({"pred": 7.5, "completion": None}, "AnsweredPath"),
        ({"pred": None}, "AnsweredPath"),
        ({"pred": None, "completion": "x", "thoughts": []}, "CompletedPath"),
    ],
)
def test_a_path_needs_a_text_or_an_answer_and_no_question(row, shape):
    value = record(PATH_SHAPES, **row).value
    assert type(value).__name__ == shape
    assert (value.question, value.sample, value.variant, value.score, value.keep) == (None, 0, None, None, None)
    for field, content in row.items():
        assert getattr(value, field) == content


def test_a_path_without_text_and_answer_is_refused():
    with pytest.raises(BadData, match="expected completion, or thoughts, or pred"):
        record(PATH_SHAPES, question="q", completion=None)
    with pytest.raises(BadData, match=r"\$\.format"):
        record(PATH_SHAPES, completion="c", format="word")


def test_every_path_shape_has_all_fields_of_an_item():
    for shape in PATH_SHAPES:
        assert set(ITEM_SHAPES[0].__struct_fields__) < set(shape.__struct_fields__)
        assert set(shape.__struct_fields__) == set(PATH_SHAPES[0].__struct_fields__)
    schema = json_schema((*ITEM_SHAPES, *PATH_SHAPES))
    for shape in (*ITEM_SHAPES, *PATH_SHAPES):
        assert schema["$defs"][shape.__name__]["required"] == list(shape.needs)


# --- choices --------------------------------------------------------------------------------------------------------


def test_labels_run_through_the_alphabet_and_on_in_pairs():
    labels = default_labels(26 + 26 * 26 + 2)
    assert labels[:3] + labels[25:29] + labels[51:53] == ("A", "B", "C", "Z", "AA", "AB", "AC", "AZ", "BA")
    assert labels[-3:] == ("ZZ", "AAA", "AAB")
    assert len(set(labels)) == len(labels)
    assert default_labels(0) == ()


def test_choices_have_labels_given_or_from_the_alphabet():
    assert choices_of(item()) is None
    assert choices_of(item(choices=["x", "y", "x"])) == Choices(("A", "B", "C"), ("x", "y", "x"))
    assert choices_of(item(choices=["x", "y"], labels=[1, " ii "])) == Choices(("1", "ii"), ("x", "y"))
    assert choices_of(item(labels=["yes", "no"])) == Choices(("yes", "no"), ())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"choices": ["x"]}, "$.choices: 1 choice, at least two are needed"),
        ({"choices": []}, "$.choices: no choices, at least two are needed"),
        ({"labels": ["A"]}, "$.labels: 1 label, at least two are needed"),
        ({"choices": ["x", "y"], "labels": ["A"]}, "$.labels: 1 label for 2 choices"),
        ({"choices": ["x", "y"], "labels": []}, "$.labels: no labels for 2 choices"),
        ({"labels": ["A", "B", "A"]}, "$.labels: labels 'A' and 'A' are alike"),
        ({"labels": [1, "1"]}, "$.labels: labels '1' and '1' are alike"),
        ({"labels": ["A", "a"]}, "$.labels: labels 'A' and 'a' are alike"),
        ({"labels": ["A", " "]}, "$.labels: an empty label"),
    ],
)
def test_choices_that_cannot_be_told_apart_are_bad_data(fields, what):
    assert complaint(**fields) == f"rows:1: {what}"


# --- the right answer -----------------------------------------------------------------------------------------------

FRUITS = {"choices": ["fig", "The pear", "plum"]}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        *[(written, "B") for written in ("B", "b", " B ", "(B)", "B)", "B.", 1, 1.0, "The pear", "the pear.", "pear")],
        ("fig", "A"),
        (0, "A"),
        (2, "C"),
        (None, None),
        ("", None),
        (" ", None),
    ],
)
def test_the_answer_is_a_label_an_index_or_a_text(answer, label):
    assert gold(**FRUITS, answer=answer) == label


def test_a_label_goes_before_an_index_and_an_index_before_a_text():
    assert gold(choices=["x", "y", "z"], labels=[1, 2, 3], answer=1) == "1"
    assert gold(choices=["x", "y", "z"], labels=["2", "1", "0"], answer=0) == "0"
    assert gold(choices=["1", "0", "5"], answer=1) == "B"
    assert gold(choices=["1", "0", "5"], answer="1") == "A"
    assert gold(choices=["1", "0", "5"], answer=5) == "C"
    assert gold(choices=["B", "A"], answer="A") == "A"
    assert gold(labels=["A", "B"], answer=1) == "B"


def test_truth_is_the_choice_that_says_yes_or_true():
    for true, false in (("Yes.", "No."), ("True", "False")):
        assert gold(choices=[false, true], answer=True) == "B"
        assert gold(choices=[false, true], answer=False) == "A"
        assert gold(labels=[true[:-1] if "." in true else true, "other"], answer=True) in ("Yes", "True")
    assert "the answer 'true' is not among" in complaint(**FRUITS, answer=True)


@pytest.mark.parametrize("answer", ["D", "2", 3, -1, 1.5, "figs", "AB"])
def test_an_answer_outside_the_choices_is_bad_data(answer):
    assert complaint(**FRUITS, answer=answer) == (
        f"rows:1: $.answer: the answer {str(answer)!r} is not among the labels A, B, C"
    )


def test_the_text_of_two_choices_is_no_answer_and_long_ones_are_not_quoted_whole():
    assert "the answer 'x' is the text of A and C" in complaint(choices=["x", "y", "x"], answer="x")
    assert gold(choices=["x", "X"], answer="X") == "B"  # to the letter
    assert len(complaint(choices=[str(i) for i in range(99)], answer="w" * 10**6)) < 200


@pytest.mark.parametrize(
    ("answer", "found"),
    [("Paris", "Paris"), (" 7 ", "7"), (7, "7"), (7.0, "7"), (0.5, "0.5"), (True, "yes"), (False, "no"), ("", None)],
)
def test_without_choices_the_answer_is_a_string(answer, found):
    assert gold(answer=answer) == found


def test_the_format_follows_from_the_choices_and_the_answer():
    choices = Choices(("A", "B"), ())
    assert answer_format(choices, "A") == answer_format(choices, None) == "letter"
    assert [answer_format(None, gold) for gold in ("7", "-1,234.5", "seven", "7 kg", None)] == [
        "number",
        "number",
        "text",
        "text",
        "text",
    ]


# --- numbers and words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", 1234.5),
        (" 1,234,567 ", 1234567),
        ("1\u202f234", 1234),
        ("-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        (".5", 0.5),
        ("-.5", -0.5),
        ("007", 7),
        ("1e3", 1000),
        ("1.5E-3", 0.0015),
    ],
)
def test_a_number_is_read_with_or_without_separators(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "-", ".", "12,34", "1,2345", "1.234,5", ",123", "5 kg", "$5", "1/2", "5.", "nan", "inf", "1e999", "0x10", "٣"],
)
def test_what_is_more_or_less_than_a_number_is_none(text):
    assert number(text) is None


def test_equal_numbers_have_one_spelling():
    rng = random.Random(0)
    for _ in range(2000):
        value = rng.choice([1, -1]) * round(rng.random() * 10 ** rng.randint(0, 9), rng.randint(0, 4))
        spelled = {f"{value:.4f}", f"{value:,.4f}", f"{value:.5f}".replace("-", "\u2212"), f"{value:,.6f}"}
        assert len({canonical_number(text) for text in spelled}) == 1
        assert float(canonical_number(f"{value:,.4f}")) == value
    assert [canonical_number(text) for text in ("-0", "0.0", "00", "1,000.50", "+1E+05", "seven")] == [
        "0",
        "0",
        "0",
        "1000.5",
        "1e05",
        None,
    ]


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("The  Louvre.", "louvre"),
        ("“A cat”", "cat"),
        ("**An** apple!", "an** apple"),
        ("the", "the"),
        ("A", "a"),
        ("(B)", "b"),
        ("-5", "-5"),
        (".5", ".5"),
        ("- 5 %.", "5 %"),
        ("C#", "c#"),
        ("# Title", "title"),
        ("vitamin A", "vitamin a"),
        ("Theory", "theory"),
        ("a - b", "a - b"),
        ("Straße", "strasse"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),
        ("\u200bParis\u2060", "paris"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_plain_text_is_what_counts_in_a_comparison(text, bare):
    assert plain(text) == bare
    assert plain(bare) == bare


@pytest.mark.parametrize("piece", ["the ", ".", "-", "1,234", ",111", "a\n"])
def test_a_long_text_costs_linear_time(piece):
    text = "1,111" + piece * (200_000 // len(piece)) + "x"
    start = time.process_time()
    plain(text), plain(piece * 50_000), number(text), same_answer(text, text[:-1], "number")
    assert time.process_time() - start < 1


def test_answers_are_the_same_by_their_format():
    assert same_answer("b", "B ", "letter")
    assert not same_answer("A", "B", "letter")
    assert same_answer("1,234.50", "1234.5", "number")
    assert same_answer("1e3", "1000", "number")
    assert not same_answer("7", "-7", "number")
    assert not same_answer("12345678901234567", "12345678901234568", "number")  # one float
    assert same_answer("seven", "Seven.", "number")
    assert not same_answer("7 sisters", "7", "number")
    assert same_answer("The Louvre.", "louvre", "text")
    assert not same_answer("1,000", "1000", "text")
