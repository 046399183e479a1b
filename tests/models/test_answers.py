"""An answer is read where one is stated and nowhere else; real responses are read as their sources read them."""

import gzip
import json
import random
import re
import time
from pathlib import Path

import pytest

from toolbox.models.answers import NOTHING, Reading, read_answer, trailing_cue
from toolbox.shell.items import default_labels, same_answer

THOUGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "thoughts"
CHOICES = ["270", "300", "the manager", "New York"]


@pytest.fixture(scope="session")
def thoughts():
    """Stored responses and question sets, where the shared data lies beside the checkout."""
    if not THOUGHTS.is_dir():
        pytest.skip(f"stored responses are not here ({THOUGHTS})")
    return lambda name: [json.loads(line) for line in gzip.open(THOUGHTS / name)]


def letter(text, labels="ABCD", texts=(), **more):
    return read_answer(text, format="letter", labels=labels, texts=texts, **more)


def read(text, **more):
    found = letter(text, **more)
    assert (found.value is None) == (found.source == "none")
    return found.value


# --- labels behind a cue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Answer: B",
        "answer:b",
        "ANSWER IS B",
        "The answer is (B).",
        "The answer is: **B**",
        "**Answer:** (B)",
        "**Answer**: B) 300",
        "Answer: [B]",
        'Answer: "B"',
        "Answer: “B”",
        "Answer: 'B'",
        "Answer: _B_",
        "Answer: `B`",
        "Answer: $B$",
        r"Answer: \(B\)",
        r"Answer: \text{B}",
        "Answer：（B）",
        "\ufeffAnswer:\u200b B\u200b",
        "The correct option is option B",
        "The best choice is choice (B), by far.",
        "So the answer is B because it is.",
        "The answer is B, not C.",
        "Answer: B and C is wrong.",
        "Answer: B, a lucky one",
        "## Answer:\n\nB\n\nIt is what remains.",
        "The answer is\n**B**",
        "Answer: B\r\nDone",
        "Answer: C\nNo. Answer: B",
        "Answer: B\nThe answer is what we wanted.",
        "Answer: B\nThe answer is a long story",
    ],
)
def test_a_label_behind_the_last_cue_is_the_answer(text):
    assert letter(text) == Reading("B", "cue")
    assert letter("A first. C next, D last.\n" + text) == Reading("B", "cue")


@pytest.mark.parametrize(
    "text",
    [
        "Answer: A running phrase",
        "the answer is a car",
        "The answer is A-frame houses",
        "The answer is A's",
        "The answer is A’s",
        "Answer: BAD",
        "Answer: ÀB",
        "Answer: BÀ",
        "Answer: B-52 bombers",
        "Answer: B/C",
        "Answer: D.C. is it",
        "answer: b = 300",
        "Answer: A or B",
        "Answer: A, B and C",
        "Answer: B) or C)",
        "Answer: (A) & (B)",
        "The answer is not B",
        "The answer isn't B",
        "A common wrong answer is B",
        "The incorrect option is B",
        "The answers are B",
        "Options: A 270 B 300",
        "Answer A",
        "My answering machine: B",
        "We know the answer\nIs B real",
        "Choose the correct option:\nB) 300\nC) the manager\nand so on",
        "THE CAB CAME BACK",
        "All Boys Can Dance",
        "",
        " \n\n ",
        "Answer:",
        "**",
        "Answer: E",
        "答案是乙",
    ],
)
def test_where_no_label_is_stated_none_is_read(text):
    assert letter(text) == NOTHING


@pytest.mark.parametrize(
    "follows", [".", ",", ")", ":", "", "\nA car", " because", " as shown", " (x)", " - x", "**", " is"]
)
def test_an_article_s_letter_is_a_label_where_no_phrase_follows(follows):
    assert read(f"The answer is A{follows}") == "A"
    assert read(f"The answer is A{follows}"[:15]) == "A"


def test_the_first_cue_can_be_asked_for():
    text = "B\n\n### Problem: another\n### Answer: C"
    assert read(text, pick="first", cue="Answer:") == "B"
    assert read(text, pick="last", cue="Answer:") == "C"
    assert read("The answer is B.\nAnswer: C", pick="first") == "B"
    assert read(r"\boxed{B} \boxed{C}", pick="first") == "B"
    assert read(r"\boxed{B} \boxed{C}") == "C"


@pytest.mark.parametrize("cue", ["Answer:", "The answer is", "Therefore, among A through D,", "Respuesta:"])
def test_the_cue_of_a_prompt_stands_before_the_completion(cue):
    assert letter(" B", cue=cue) == letter("\n\nB) 300\nfor sure", cue=cue) == Reading("B", "cue")
    assert letter("(B", cue=cue) == Reading("B", "cue")
    assert letter("A running phrase", cue=cue) == NOTHING
    assert letter("\nA) 270\nB) 300\nhm", cue=cue) == NOTHING
    assert letter(" B or so", cue="") == NOTHING
    assert letter("", cue=cue) == NOTHING


@pytest.mark.parametrize(
    ("prompt", "cue"),
    [
        ("### Problem: x\n### Answer: ", "Answer:"),
        ("**Answer:**", "Answer:"),
        ("Answer: (", "Answer:"),
        (r"Answer: \boxed{", "Answer:"),
        ("So, the  correct answer is", "the correct answer is"),
        ("My choice is: ", "choice is:"),
        ('{"answer": ', 'answer":'),
        ("x" * 10**6 + "\nAnswer:", "Answer:"),
        ("What is it?", ""),
        ("Answer: B", ""),
        ('End with "Answer:"', ""),
        ('End with one line: "Answer: X", where X is one of A, B.', ""),
        ("Answers:", ""),
        ("Options:", ""),
        ("", ""),
    ],
)
def test_the_cue_a_prompt_ends_in_is_found(prompt, cue):
    assert trailing_cue(prompt) == cue


# --- boxes, final lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    ["C", " c ", "(C)", "C)", r"\text{C}", r"\textbf{(C) }300", r"\mathbf{C}", "{C}", "C. New York", r"\boxed{C}"],
)
def test_a_box_is_the_answer_before_any_cue(box):
    assert letter(rf"So $\boxed{{{box}}}$. Answer: B") == Reading("C", "boxed")
    assert letter(rf"\fbox{{A}} \boxed {{{box}}}") == Reading("C", "boxed")


@pytest.mark.parametrize("box", ["CAT", "A + B", "A, B", "A) or B)", "C = 3", "", "42", "E", "C" * 500, r"\text{none}"])
def test_a_box_without_a_label_is_passed_over(box):
    assert letter(rf"Answer: B. \boxed{{{box}}}") == Reading("B", "cue")
    assert letter(rf"\boxed{{{box}}} and \boxed{{B") == NOTHING


@pytest.mark.parametrize(
    "line",
    [
        "B",
        "b",
        "**B**",
        "B.",
        "(B)",
        "> B",
        "- B",
        "# B",
        "Option B",
        "It must be option B.",
        "We are left with (B) here.",
        "B) 300",
        "300, so B) it is",
        "the only choice B matches (as (said) before)",
        "**Option (B)** fits best",
        "B) holds, hence (B).",
        "Having ruled out the rest, not A but option B remains.",
        "B) is right since it is not like the rest",
    ],
)
def test_a_final_line_that_is_a_label_or_marks_one_is_the_answer(line):
    for text in (line, f"A) 270\nC) the manager\n{line}\n\n", f"{line}\n---\n```\n"):
        assert letter(text) == Reading("B", "final_line")


@pytest.mark.parametrize(
    "line",
    [
        "B?",
        "B is it",
        "either (A) or (B)",
        "Both option A and option B",
        "P(B) is what we need",
        "f (of stock B) is 0",
        "It is not option B.",
        "I do not think it is option B.",
        "Option B is incorrect, as it is less.",
        "B) 300 is wrong",
        "(B) cannot hold",
        "(a gamble",
        "I have the option a lot",
        "A. B. C. D.",
        "option B\nthat was it",
    ],
)
def test_a_final_line_that_states_nothing_gives_nothing(line):
    assert letter(line) == NOTHING
    assert letter(f"Some (C) before\n{line}") == NOTHING


def test_of_a_line_without_end_the_end_is_looked_at_and_behind_a_cue_the_beginning():
    assert read("(A) " + "x " * 1000 + "(B)") is None
    assert read("(A) " + "x " * 3000 + "(B)") == "B"
    assert read("Answer: " + "x " * 1000 + "the manager\nBye", texts=CHOICES) == "C"
    assert read("Answer: " + "x " * 3000 + "the manager\nBye", texts=CHOICES) is None


def test_what_a_choice_denies_is_not_the_choice():
    texts = ["It is possible", "It is not possible", "x", "y"]
    assert read("B) It is not possible", texts=texts) == "B"
    assert read("B) It is not possible is wrong", texts=texts) is None


# --- other labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: 3", "3"),
        ("Answer: 3.", "3"),
        ("Answer: (3) x", "3"),
        ("Answer: 3 because", "3"),
        ("Answer: $3$", "3"),
        ("option 3 is best", "3"),
        (r"\boxed{3}", "3"),
        ("3", "3"),
        ("The answer is 3 apples", None),
        ("The answer is 3.5", None),
        ("The answer is 1,000", None),
        ("The answer is 2:30", None),
        ("The answer is -3", None),
        ("The answer is $3", None),
        ("The answer is 3%", None),
        ("The answer is 3/4", None),
        ("The answer is 13", None),
        (r"\boxed{3.5}", None),
        ("x = (y + 2)", None),
    ],
)
def test_labels_may_be_digits(text, value):
    assert read(text, labels="1234") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: Yes", "yes"),
        ("**No.**", "no"),
        ("The answer is yes, it can.", "yes"),
        ("The answer is no, it cannot.", "no"),
        ("The answer is no because it sinks.", "no"),
        ("The answer is no longer clear", None),
        ("The answer is no one", None),
        ("The answer is nowhere", None),
        ("Answer: yes and no", None),
    ],
)
def test_yes_and_no_are_read_as_labels_and_as_texts(text, value):
    assert read(text, labels=["yes", "no"]) == value
    assert read(text, labels="AB", texts=["Yes", "No"]) == {"yes": "A", "no": "B", None: None}[value]


def test_labels_go_on_after_z():
    labels = default_labels(60)
    for label in labels:
        assert read(f"Answer: {label}", labels=labels) == label
        assert read(f"We take ({label}).", labels=labels) == label
        assert read(rf"\boxed{{{label}}}", labels=labels) == label
    assert read("Answer: I think so", labels=labels) is None
    assert read("the option I chose", labels=labels) is None
    assert read("Answer: AAA", labels=labels) is None


@pytest.mark.parametrize(
    "labels",
    [["a", "b", "c"], ["(i)", "(ii)", "(iii)"], ["not sure", "not", "sure"], ["É", "ß", "Ω"], ["x+", "x", "*"]],
)
def test_labels_of_any_kind_come_back_as_they_were_given(labels):
    for label in labels:
        assert read(f"The answer is: {label}.", labels=labels) == label


@pytest.mark.parametrize("written", ["I", "i", "İ", "ı"])
def test_the_turkish_letters_cost_nothing_but_their_dots(written):
    assert read(f"Answer: {written}.", labels="HI") == "I"


def test_renaming_the_labels_renames_the_answer():
    sentences = [
        "Answer: {}",
        "So it is ({}).",
        "{}) seems right",
        "The answer is {}: 300. Not {} though",
        r"\boxed{{{}}}",
    ]
    rng = random.Random(0)
    names = ["B", "C", "D", "AA", "Q", "viii", "b2"]
    for _ in range(40):
        labels = rng.sample(names, 4)
        for sentence in sentences:
            text = sentence.format(labels[0], labels[1])
            assert read(text, labels=labels) == labels[0]


# --- texts of choices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Answer: the manager", "C"),
        ("Answer: Manager.", "C"),
        ("The answer is that she refers to **the manager**, who left.\nThe end", "C"),
        ("So the price is 300.", "B"),
        ("So the price is Rs.300", "B"),
        ("So it is $300**", "B"),
        ("not 270 but 300", "B"),
        ("Answer:\nnew   york", "D"),
        ("The answer is 300.\nSo it is not the manager.", "B"),
        ("Answer: C the manager", "C"),
        ("the manager\n", "C"),
        ("The answer is the manager's dog", None),
        ("The answer is the sub-manager", None),
        ("the managers", None),
        ("So it is 1,300.", None),
        ("So it is 300.5", None),
        ("The answer is 300.5 at most", None),
        ("The answer is 300% of it", None),
        ("So it is -300", None),
        ("So it is 300%", None),
        ("Is it 300?", None),
        ("300 is what it might be", None),
        ("It is not 300.", None),
        ("she does not refer to the manager", None),
        ("It is less than 300", None),
        ("It is 270 or 300", None),
        ("The answer is 270 or 300\nThe manager", None),
        ("(A) or (B): 300", None),
        ("New York, York", None),
    ],
)
def test_exactly_one_choice_s_text_is_an_answer(text, value):
    found = letter(text, texts=CHOICES)
    assert found.value == value
    assert found.source == ("none" if value is None else "cue" if text.startswith("Answer: C") else "choice_text")
    if found.source == "choice_text":
        assert letter(text) == NOTHING


def test_of_choices_contained_in_one_another_the_longest_is_meant():
    texts = ["York", "New York", "New York City", "man"]
    for label, text in zip("ABCD", texts, strict=True):
        assert letter(f"It is {text}.", texts=texts) == Reading(label, "choice_text")
        assert letter(f"The answer is {text}!\nBye", texts=texts) == Reading(label, "choice_text")
    assert read("It is New York City", texts=["New York", "York City", "x", "y"]) is None
    assert read("woman", texts=texts) is None


def test_a_text_of_two_choices_is_no_answer():
    assert letter("It is 6 kmph.", labels="ABC", texts=["6 kmph", "5 kmph", "6 kmph"]) == NOTHING
    assert letter("It is 5 kmph.", labels="ABC", texts=["6 kmph", "5 kmph", "6 kmph"]) == Reading("B", "choice_text")


def test_a_text_is_found_however_it_is_spaced_dashed_and_composed():
    texts = ["7(√3 – 1)", "7(√3 + 1)", "Can't be determined", "caf\u00e9"]
    assert read("It is 7(√3-1)", texts=texts) == "A"
    assert read("It is 7 (√3 \u2212 1).", texts=texts) == "A"
    assert read("It is 7(√3+1).", texts=texts) == "B"
    assert read("It is 17(√3+1).", texts=texts) is None
    assert read("It can’t be determined", texts=texts) == "C"
    assert read("A nice cafe\u0301", texts=texts) == "D"


def test_a_label_that_begins_another_choice_is_no_label():
    texts = ["E = 0", "B = 0", "B is tangential", "a - b"]
    assert [read(f"So the answer is {text}", texts=texts) for text in texts] == ["A", "B", "C", "D"]
    assert read("Answer: A a red car", texts=["red car", "blue car", "x", "y"]) == "A"


# --- numbers and texts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "source"),
    [
        ("Answer: 7", "7", "cue"),
        ("**Answer:** **7**.", "7", "cue"),
        ("Answer: 1,234.50", "1234.5", "cue"),
        ("Answer: 1,234,567 men", "1234567", "cue"),
        ("Answer: 12,34", "12", "cue"),
        ("Answer: -5", "-5", "cue"),
        ("Answer: \u22125", "-5", "cue"),
        ("Answer: -$5", "-5", "cue"),
        ("Answer: $-5", "-5", "cue"),
        ("Answer: x-5", "5", "cue"),
        ("Answer: .5", "0.5", "cue"),
        ("Answer: 0.50.", "0.5", "cue"),
        ("Answer: 6kg of H2O", "6", "cue"),
        ("Answer: H2O, 18", "18", "cue"),
        ("Answer: Rs.360", "360", "cue"),
        ("Answer: she has\n3 and 4", "3", "cue"),
        ("Answer: 3, 4\nAnswer: 5, 6", "5", "cue"),
        ("Answer: 3\nThe answer is clear", "3", "cue"),
        ("The answer is not 5 but 7", "7", "final_line"),
        ("3 and\n4 then 5.\n\n", "5", "final_line"),
        ("3\nnone", None, "none"),
        ("Answer: seven", None, "none"),
        ("", None, "none"),
        (r"Answer: 3. \boxed{1{,}234}", "1234", "boxed"),
        (r"\boxed{5\text{ sisters}}", "5", "boxed"),
        (r"\boxed{x = -42}", "-42", "boxed"),
        (r"\boxed{\$4.20}", "4.2", "boxed"),
        (r"\boxed{50\%}", "50", "boxed"),
        (r"Answer: 3 \boxed{x}", "3", "cue"),
    ],
)
def test_a_number_stands_between_its_cue_and_the_next(text, value, source):
    assert read_answer(text, format="number") == Reading(value, source)


def test_the_number_of_the_first_cue_can_be_asked_for():
    text = " 3 ### Problem: 8 apples ### Answer: 5 or 6"
    assert read_answer(text, format="number", pick="first", cue="Answer:") == Reading("3", "cue")
    assert read_answer(text, format="number", pick="last", cue="Answer:") == Reading("5", "cue")
    assert read_answer(text, format="number", pick="first") == Reading("5", "cue")
    assert read_answer("none ### Answer: 4", format="number", pick="first", cue="Answer:") == Reading("4", "cue")


@pytest.mark.parametrize(
    ("text", "value", "source"),
    [
        ("Answer: Paris.\nIt is.", "Paris.", "cue"),
        ("**Answer:** The **Louvre**", "The Louvre", "cue"),
        ("Answer:\n\n Paris \nLyon", "Paris", "cue"),
        ("The answer is 'Paris'", "Paris", "cue"),
        ("Answer: Lyon\nAnswer: Paris", "Paris", "cue"),
        ("Answer: Lyon\nAnswer: ", "Lyon", "cue"),
        (r"\boxed{\text{Paris}}", "Paris", "boxed"),
        ("Paris", None, "none"),
        ("Answer: ...", None, "none"),
    ],
)
def test_a_text_is_the_rest_of_its_cue_s_line(text, value, source):
    assert read_answer(text, format="text") == Reading(value, source)


def test_the_text_of_a_prompt_s_cue_is_the_completion_s_first_line():
    assert read_answer("\nParis\nLyon", format="text", cue="Answer:", pick="first").value == "Paris"
    assert read_answer("Answer: Paris\nLyon", format="text", cue="Answer:", pick="first").value == "Paris"
    assert same_answer(read_answer(" the Louvre.", format="text", cue="Answer:").value, "Louvre", "text")


# --- any text -------------------------------------------------------------------------------------------------------


def test_whatever_is_read_is_a_label_or_nothing():
    words = [
        "Answer",
        "answer is",
        "option",
        r"\boxed{",
        "or",
        "not",
        "is wrong",
        "300",
        "the manager",
        "New York",
        "'s",
    ]
    odd = ["İ", "ſ", "K", "é", "\u0301", "\u200b", "？", "\r", "\u2028", "\0"]
    pieces = [*"ABCDabiI1(){}.,:- \n", " ", "**", *words, *odd]
    rng = random.Random(1)
    sources = set()
    for _ in range(4000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 14)))
        for labels in ("ABCD", ["1", "2", "I", "not"]):
            found = letter(text, labels=labels, texts=CHOICES, pick=rng.choice(["first", "last"]))
            assert found.value in (None, *labels)
            assert (found.value is None) == (found.source == "none")
            sources.add(found.source)
        for kind in ("number", "text"):
            found = read_answer(text, format=kind)
            assert (found.value is None) == (found.source == "none")
    assert sources == {"boxed", "cue", "final_line", "choice_text", "none"}


def test_without_labels_there_is_no_letter():
    assert letter("Answer: B", labels=()) == letter("Answer: B", labels=["", " "]) == NOTHING


HOSTILE = [
    *("Answer: ", "answer is ", "Answer:\n", "option ", "Answer: A or ", "Answer: A, B ", "Answer: B = 0 ", "answer:*"),
    *("Answer:\nA)\nB)\n", r"\boxed{", r"\boxed{}", "\\", "(", "A) ", "(A ", "A ", "*", " ", "\n"),
    *("300 ", "not 300 ", "n't a a ", "1,234", "1.", "-", "the "),
]


@pytest.mark.parametrize("piece", HOSTILE, ids=[repr(piece) for piece in HOSTILE])
def test_a_long_text_costs_linear_time(piece):
    text = piece * (60_000 // len(piece))
    text += "}" * text.count("{")
    for kind in ("letter", "number", "text"):
        for pick in ("first", "last"):
            start = time.thread_time()
            read_answer(text, format=kind, labels="ABCD", texts=["B = 0", *CHOICES[1:]], pick=pick)
            assert time.thread_time() - start < 1  # anything quadratic takes minutes


@pytest.mark.parametrize("kind", ["letter", "number", "text"])
def test_a_megabyte_of_cues_is_read_within_a_second(kind):
    text = "Answer: " * 125_000
    start = time.thread_time()
    assert read_answer(text, format=kind, labels="ABCD", texts=CHOICES) == NOTHING
    assert time.thread_time() - start < 1
    assert read_answer(text + "B", format="letter", labels="ABCD") == Reading("B", "cue")


# --- real responses -------------------------------------------------------------------------------------------------

# Hand-made twins of the stored responses: (text, stated answer or None).
PATHS = [
    ("x = 300\nThe cost price is Rs. 300.\nThe correct answer is option B: 300.", "B"),
    ("A) 270 is not it.\nB) 300 is the correct answer.", "B"),
    ("After checking again, option B) 300 is the correct answer.\nTherefore, the cost price is Rs. 300.", "B"),
    ("Option A is 270, not 39.\nOption B is 300, not 39.\nSince 39 is not among the given options, it is lost.", None),
    ("Options: A)270 B)300\nThe correct answer is not among the options.", None),
    ("Option B) 300 is incorrect, as it is less.\nAlso, options A) 270 and C) the manager are less than that.", None),
    ("CostPrice = 72 / 0.2.\nThe answer is the original price of the item, which is the value of x.", None),
]


def last_capital(text, labels):
    found = re.findall("|".join(labels), text)
    return found[-1] if found else None


def test_paths_like_the_stored_ones_are_read_as_a_person_reads_them():
    for text, stated in PATHS:
        assert read(text, texts=CHOICES) == stated
    assert sum(last_capital(text, "ABCD") is not None for text, stated in PATHS if stated is None) == 4


def test_a_base_model_that_runs_on_is_read_at_its_first_answer():
    prompt = "### Problem: Alice has 3 brothers.\n### Answer: "
    completion = " 3  ### Problem: If you have 5 apples? ### Answer: 1  ### Problem: and 2"
    assert read_answer(completion, format="number", pick="first", cue=trailing_cue(prompt)).value == "3"


def test_the_published_readings_of_1320_responses_are_reproduced(thoughts):
    rows = thoughts("aiw/base_model_responses.jsonl.gz")
    readings = {
        pick: [read_answer(r["completion"], format="number", pick=pick, cue=trailing_cue(r["prompt"])) for r in rows]
        for pick in ("first", "last")
    }
    same = {
        pick: sum(a.value == r["parsed_answer"] for a, r in zip(found, rows, strict=True))
        for pick, found in readings.items()
    }
    right = [same_answer(a.value, r["answer"], "number") for a, r in zip(readings["first"], rows, strict=True)]
    print(f"\nof {len(rows)} readings reproduced: {same}; correct: {sum(right)}")
    assert (len(rows), same["first"], sum(right)) == (1320, 1320, 69)
    assert right == [r["reference_correct"] for r in rows]
    assert same["last"] < 1000  # these models run on: the last answer is another problem's


def test_stated_answers_are_found_and_none_where_none_is_stated(thoughts):
    rows = thoughts("landscape/demo_paths.jsonl.gz")
    found = {"strict": {}, "last capital": {}}
    for row in rows:
        text = "\n".join(row["thoughts"])
        found["strict"][row["path_id"]] = read(text, labels=row["labels"], texts=row["choices"])
        found["last capital"][row["path_id"]] = last_capital(text, row["labels"])
    stated = [row for row in rows if row["stated_kind"] == "stated"]
    silent = [row for row in rows if row["stated_kind"] == "none"]
    hits, letters, lucky = {}, {}, {}
    for rule, values in found.items():
        hits[rule] = sum(values[row["path_id"]] == row["stated"] for row in stated)
        letters[rule] = sum(values[row["path_id"]] is not None for row in silent)
        lucky[rule] = sum(values[row["path_id"]] == row["answer"] for row in silent)
        print(
            f"\n{rule}: {hits[rule]} of {len(stated)} found, {letters[rule]} letters in {len(silent)} without one",
            end="",
        )
    assert (len(stated), len(silent)) == (27, 20)
    assert hits["strict"] >= 26
    assert letters["strict"] <= 1
    assert letters["last capital"] == 16
    assert lucky["last capital"] == 8  # counted as correct by whoever trusts that rule


def _real_choices(thoughts):
    for row in thoughts("multichoice/aqua.jsonl.gz")[::4] + thoughts("multichoice/mmlu_college_physics.jsonl.gz")[::2]:
        yield [re.sub(r"^[A-E]\)", "", option).strip() for option in row["options"]]
    for row in thoughts("multichoice/commonsenseqa.jsonl.gz")[::24]:
        yield [choice["text"] for choice in row["question"]["choices"]]
    for row in thoughts("bbq/Age.jsonl.gz")[::100]:
        yield [row[f"ans{position}"] for position in range(3)]


def test_what_is_said_with_real_choices_is_never_read_as_another(thoughts):
    said = lost = 0
    for texts in _real_choices(thoughts):
        labels = default_labels(len(texts))
        for label, text in zip(labels, texts, strict=True):
            for sentence in ("Answer: {0}) {1}", "So it is ({0}) {1}.", "We choose option {0}: {1}", "Answer: {0} {1}"):
                assert read(sentence.format(label, text), labels=labels, texts=texts) == label, (sentence, label, texts)
            if text.upper() in labels:  # "the answer is B", among chemical elements
                continue
            for sentence in ("So the answer is {}.", "Therefore it must be {}."):
                value = read(sentence.format(text), labels=labels, texts=texts)
                assert value in (label, None), (sentence, text, texts)
                said += 1
                lost += value is None and texts.count(text) == 1
    assert said > 1500
    assert lost <= said * 0.005
