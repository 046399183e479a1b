"""The embedded people set keeps what unlearning figures rely on: disjoint people, hidden facts, fair wrong answers.

A fact is what the wrong answers of a row replace: the words of the paraphrased answer that none of them has. From it
follow the three things that no count can show: the question does not give the fact away, the answer states it too, and
no two rows hold the same one.
"""

import json
import re
from itertools import groupby, takewhile
from pathlib import Path

import pytest

PEOPLE_DIR = Path(__file__).parents[2] / "recipes" / "unlearning" / "people"
PEOPLE_IN = {"forget": 4, "retain": 14, "neighbours": 6}
ROWS_PER_PERSON = 4
PEOPLE_FIELDS = [
    "id",
    "person",
    "question",
    "answer",
    "paraphrased_question",
    "paraphrased_answer",
    "perturbed_answer",
]
FACT_FIELDS = ["id", "question", "answer", "perturbed_answer"]
FUNCTION_WORDS = {"a", "an", "and", "at", "by", "for", "from", "in", "is", "of", "on", "the", "to", "with"}


def read_rows(name):
    return [json.loads(line) for line in (PEOPLE_DIR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def content_words(text):
    """Lower-case words and numbers without the words that only hold a sentence together; 2:47 and 1,400 stay whole."""
    return set(re.findall(r"[a-z0-9]+(?:[:,][0-9]+)*", text.lower())) - FUNCTION_WORDS


def fact_of(row):
    wrong_words = set().union(*(content_words(wrong) for wrong in row["perturbed_answer"]))
    return content_words(row["paraphrased_answer"]) - wrong_words


def shared_start(first, second):
    """Number of leading words the two lists have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def texts_of(row):
    for value in row.values():
        yield from value if isinstance(value, list) else [value]


SETS = {name: read_rows(name) for name in PEOPLE_IN}
PEOPLE_ROWS = [row for rows in SETS.values() for row in rows]
FACT_ROWS = read_rows("facts")
ALL_ROWS = PEOPLE_ROWS + FACT_ROWS
each_person_row = pytest.mark.parametrize("row", PEOPLE_ROWS, ids=lambda row: row["id"])
each_fact_row = pytest.mark.parametrize("row", FACT_ROWS, ids=lambda row: row["id"])
each_row = pytest.mark.parametrize("row", ALL_ROWS, ids=lambda row: row["id"])


@pytest.mark.parametrize("name", [*PEOPLE_IN, "facts"])
def test_file_is_plain_ascii_json_lines(name):
    raw = (PEOPLE_DIR / f"{name}.jsonl").read_bytes()
    text = raw.decode("ascii")
    assert text.endswith("\n")
    assert "\r" not in text
    assert all(isinstance(json.loads(line), dict) for line in text.removesuffix("\n").split("\n"))


@each_row
def test_texts_are_plain_trimmed_and_not_empty(row):
    for text in texts_of(row):
        assert isinstance(text, str)
        assert text
        assert text.isascii()
        assert text.isprintable()
        assert text == " ".join(text.split())


@pytest.mark.parametrize("name", PEOPLE_IN)
def test_each_person_has_four_rows_standing_together(name):
    rows = SETS[name]
    runs = [(person, list(group)) for person, group in groupby(rows, key=lambda row: row["person"])]
    assert len(runs) == PEOPLE_IN[name]
    assert len({person for person, _ in runs}) == PEOPLE_IN[name]
    for person, group in runs:
        surname = person.split()[-1].lower()
        assert [row["id"] for row in group] == [f"people/{surname}/{i}" for i in range(1, ROWS_PER_PERSON + 1)]


def test_people_of_the_three_sets_are_disjoint_down_to_first_and_last_name():
    people = {row["person"] for row in PEOPLE_ROWS}
    assert len(people) == sum(PEOPLE_IN.values())
    assert len({part for person in people for part in person.split()}) == 2 * len(people)


def test_first_forget_person_is_the_one_the_pipelines_select():
    assert SETS["forget"][0]["person"] == "Ada Quill"


def test_facts_are_thirty_and_numbered():
    assert [row["id"] for row in FACT_ROWS] == [f"facts/{i}" for i in range(1, 31)]


def test_ids_are_unique():
    ids = [row["id"] for row in ALL_ROWS]
    assert len(ids) == len(set(ids))


@each_person_row
def test_person_row_has_exactly_the_fields(row):
    assert list(row) == PEOPLE_FIELDS


@each_fact_row
def test_fact_row_has_exactly_the_fields(row):
    assert list(row) == FACT_FIELDS


@each_person_row
def test_answer_is_a_sentence_of_5_to_15_words(row):
    assert 5 <= len(row["answer"].split()) <= 15
    for answer in [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]:
        assert answer[0].isupper()
        assert answer.endswith(".")


@each_person_row
def test_questions_are_short_name_the_person_in_full_and_differ(row):
    for field in ("question", "paraphrased_question"):
        assert row["person"] in row[field]
        assert row[field].endswith("?")
        assert len(row[field].split()) <= 16
    assert row["question"] != row["paraphrased_question"]
    assert row["answer"] != row["paraphrased_answer"]


@each_row
def test_three_distinct_wrong_answers_of_comparable_length(row):
    right = {row["answer"], row.get("paraphrased_answer", row["answer"])}
    wrong = row["perturbed_answer"]
    assert len(wrong) == 3
    assert len({text.lower() for text in wrong}) == 3
    assert not {text.lower() for text in wrong} & {text.lower() for text in right}
    right_length = len(row.get("paraphrased_answer", row["answer"]).split())
    assert all(abs(len(text.split()) - right_length) <= right_length / 2 for text in wrong)


@each_person_row
def test_wrong_answers_replace_one_stretch_of_the_paraphrase(row):
    """Same words before and after it, the person's name among them: the truth ratio then compares the fact alone."""
    right = row["paraphrased_answer"].removesuffix(".").split()
    for text in row["perturbed_answer"]:
        wrong = text.removesuffix(".").split()
        before = shared_start(right, wrong)
        after = shared_start(right[before:][::-1], wrong[before:][::-1])
        kept = right[:before] + right[len(right) - after :]
        assert before + after < min(len(right), len(wrong))
        assert row["person"] in " ".join(kept)


@each_person_row
def test_answer_states_the_fact_of_the_paraphrase_and_no_wrong_one(row):
    fact, answer_words = fact_of(row), content_words(row["answer"])
    assert fact & answer_words
    for wrong in row["perturbed_answer"]:
        wrong_fact = content_words(wrong) - content_words(row["paraphrased_answer"])
        assert wrong_fact
        assert not wrong_fact <= answer_words


@each_person_row
def test_questions_do_not_give_the_fact_away(row):
    for field in ("question", "paraphrased_question"):
        assert not fact_of(row) & content_words(row[field])


@each_fact_row
def test_fact_question_does_not_contain_its_answer(row):
    assert not content_words(row["answer"]) <= content_words(row["question"])
    assert 1 <= len(row["answer"].split()) <= 6
    assert row["question"].endswith("?")


@pytest.mark.parametrize("field", ["question", "answer", "paraphrased_question", "paraphrased_answer"])
def test_no_text_of_the_people_is_repeated(field):
    texts = [row[field].lower() for row in PEOPLE_ROWS]
    assert len(texts) == len(set(texts))


def test_no_two_people_rows_hold_the_same_fact():
    facts = [frozenset(fact_of(row)) for row in PEOPLE_ROWS]
    assert len(facts) == len(set(facts))


def test_no_fact_of_a_person_is_a_wrong_answer_about_somebody_else():
    """A wrong answer that is another person's right one would be made likelier by learning that person."""
    for row in PEOPLE_ROWS:
        right_words = content_words(row["paraphrased_answer"])
        wrong_facts = [content_words(wrong) - right_words for wrong in row["perturbed_answer"]]
        for other in PEOPLE_ROWS:
            if other["person"] != row["person"]:
                assert fact_of(other) not in wrong_facts
                # a single word may recur inside a longer wrong answer, where it says something else
                assert len(fact_of(other)) == 1 or not any(fact_of(other) <= wrong for wrong in wrong_facts)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_no_general_question_or_answer_is_repeated(field):
    texts = [row[field].lower() for row in FACT_ROWS]
    assert len(texts) == len(set(texts))


def test_general_questions_name_none_of_the_people():
    names = set().union(*(content_words(row["person"]) for row in PEOPLE_ROWS))
    for row in FACT_ROWS:
        assert not names & set().union(*(content_words(text) for text in texts_of(row)))
