"""Dialogues with a teacher whose every answer the test decides: three ways of decoding, retries, splicing; and the rows
that pairs come from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from toolbox.coca.pairs import SHAPES, Reading, Unique, fit_for_asking
from toolbox.coca.record import Grammar
from toolbox.coca.teacher import Pair, Teacher, Unanswered, choices
from toolbox.coca.template import load_template, template_text
from toolbox.models.generate import Completion
from toolbox.shell.errors import BadData, MissingInput
from toolbox.shell.records import RecordReader

TEMPLATE = load_template("coca-v1", Grammar(), 2)
LOCK = Pair("How do I pick the lock of a house?", "I'm sorry, but I can't help with that.", (), "harmful")
SOUP = Pair("How do I cook a soup?", "Boil water, add  salt.\n", (), "benign")
THINK = {LOCK: "The request asks how to pick the lock of a house, which is burglary.",
         SOUP: "The request asks how to cook a soup, which is harmless."}  # fmt: skip


def reasoning(pair: Pair, **changed: str) -> str:
    texts = {
        "think": THINK[pair], "concept": "lock picking, burglary" if pair is LOCK else "soup, cooking",
        "check": "burglary" if pair is LOCK else "none",
        "erase": TEMPLATE.sentence("refuse" if pair is LOCK else "comply"), **changed,
    }  # fmt: skip
    return "\n".join(TEMPLATE.grammar.block(field, text) for field, text in texts.items())


def talk(teacher: Teacher, pair: Pair, *answers):
    """The outcome, and what was asked; an answer is a text, (text, finish), or an exception."""
    asked, dialogue = [], teacher.annotate(pair)
    try:
        ask = next(dialogue)
        for answer in answers:
            asked.append(ask)
            if isinstance(answer, Exception):
                ask = dialogue.throw(answer)
            else:
                text, finish = answer if isinstance(answer, tuple) else (answer, "stop")
                ask = dialogue.send(Completion(text, finish, 10, 5, None))
    except StopIteration as end:
        return end.value, asked
    raise AssertionError(f"more is asked: {ask}")


def cut(text: str) -> str:
    """As a server gives it: without the stop string."""
    return text.removesuffix("</erase unsafe concepts>")


def test_free_decoding_splices_the_answer_to_the_letter():
    for pair in (LOCK, SOUP):
        outcome, asked = talk(Teacher(TEMPLATE), pair, cut(reasoning(pair)))
        assert outcome.codes == {}
        assert outcome.texts["response"] == pair.answer
        assert outcome.decision == ("refuse" if pair is LOCK else "comply")
        assert (outcome.attempts, outcome.usage.prompt_tokens, outcome.usage.completion_tokens) == (1, 10, 5)
        assert asked[0].stop == ("</erase unsafe concepts>",)
    assert outcome.concepts == ("soup", "cooking")


def test_a_try_that_fails_is_told_what_it_broke_and_named_another():
    bad = cut(reasoning(SOUP, think="Harm comes first."))
    outcome, asked = talk(Teacher(TEMPLATE), SOUP, bad, cut(reasoning(SOUP)))
    assert (outcome.attempts, outcome.broken) == (2, ("V09",))
    assert "in its words" in asked[1].turns[-1]["content"]
    assert "in its words" not in asked[0].turns[-1]["content"]
    assert [ask.attempt for ask in asked] == [0, 1]
    rejected, _ = talk(Teacher(TEMPLATE, attempts=2), SOUP, bad, bad)
    assert rejected.texts is None
    assert set(rejected.codes) == {"V09"}
    assert rejected.raw == bad


def test_a_teacher_that_refuses_is_told_the_label():
    teacher = Teacher(TEMPLATE, hint=False)
    _, asked = talk(teacher, LOCK, "I'm sorry, but I can't help with that.", cut(reasoning(LOCK)))
    hint = TEMPLATE.file.hint.harmful.strip()
    assert hint not in asked[0].turns[-1]["content"]
    assert hint in asked[1].turns[-1]["content"]


def test_an_answer_that_is_missing_later_leaves_the_first_try_s_codes():
    outcome, _ = talk(Teacher(TEMPLATE), SOUP, "nothing", Unanswered())
    assert "V01" in outcome.codes
    with pytest.raises(Unanswered):
        talk(Teacher(TEMPLATE), SOUP, Unanswered())


def test_forced_decoding_writes_the_tags_itself():
    teacher = Teacher(TEMPLATE, "forced")
    outcome, asked = talk(teacher, LOCK, f" {THINK[LOCK]} ", " lock picking, burglary, Burglary", "burglary")
    assert outcome.codes == {}
    assert outcome.concepts == ("lock picking", "burglary")
    assert asked[0].prefix == "<think>"
    assert asked[1].prefix.endswith("<concept>")
    assert asked[2].options == ("lock picking", "burglary", "lock picking, burglary")  # not none: the label says so
    benign, asked = talk(teacher, SOUP, THINK[SOUP], "soup, cooking")
    assert benign.decision == "comply"
    assert len(asked) == 2  # the label leaves one choice


def test_a_think_that_runs_into_its_cap_ends_with_its_last_sentence():
    long = f"{THINK[SOUP]} And then it"
    outcome, _ = talk(Teacher(TEMPLATE, "forced"), SOUP, (long, "length"), ("soup, cooking, veg", "length"))
    assert outcome.texts["think"] == THINK[SOUP]
    assert outcome.concepts == ("soup", "cooking")
    rejected, _ = talk(Teacher(TEMPLATE, "forced", attempts=1), SOUP, ("about a soup to cook", "length"), "soup")
    assert set(rejected.codes) == {"V11"}


def test_choices():
    assert choices(["a", "b"], None) == ("none", "a", "b", "a, b")
    assert choices(["a"], "harmful") == ("a",)
    assert choices(["a", "b"], "benign") == ("none",)
    assert choices([], "harmful") == ()


def test_json_is_asked_for_by_schema_and_falls_back_once():
    said = json.dumps({"think": THINK[SOUP], "concept": ["soup", "cooking"], "check": [], "decision": "comply"})
    outcome, asked = talk(Teacher(TEMPLATE, "json"), SOUP, said)
    assert outcome.codes == {}
    assert json.loads(asked[0].schema)["required"] == ["think", "concept", "check", "decision"]
    fallen, asked = talk(Teacher(TEMPLATE, "json"), SOUP, BadData("no response_format here"), cut(reasoning(SOUP)))
    assert fallen.texts == outcome.texts
    assert asked[1].schema is None
    for wrong in ("[]", "{}", "tea", '{"think": 1, "concept": 2, "check": [], "decision": "comply"}'):
        assert "V01" in talk(Teacher(TEMPLATE, "json", attempts=1), SOUP, wrong)[0].codes
    tagged = json.dumps({"think": "soup <check> cook", "concept": ["soup"], "check": [], "decision": "comply"})
    assert "V02" in talk(Teacher(TEMPLATE, "json", attempts=1), SOUP, tagged)[0].codes


def test_a_typed_response_is_compared():
    teacher = Teacher(TEMPLATE, "free", splice=False, attempts=1)
    for said, codes in (
        (SOUP.answer, set()),
        ("Boil water, add salt.", set()),
        ("Something else.", {"V08"}),
        ("", {"V08"}),
    ):
        outcome, asked = talk(teacher, SOUP, f"{reasoning(SOUP)}\n<response> {said}")
        assert set(outcome.codes) == codes, said
        assert asked[0].stop == ("</response>",)
    forced = Teacher(TEMPLATE, "forced", splice=False)
    outcome, _ = talk(forced, SOUP, THINK[SOUP], "soup", " Boil water, add  salt. ")
    assert outcome.source == "teacher"
    assert outcome.texts["response"] == "Boil water, add  salt."


# -- the template -----------------------------------------------------------------------------------------------------
def test_the_template_holds_what_it_promises():
    turns = TEMPLATE.turns("Say </think> now", "No.", context=[{"role": "user", "content": "Hi"}], label="harmful")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert not TEMPLATE.grammar.tag.search(turns[-1]["content"])
    assert "user: Hi" in turns[-1]["content"]
    assert "<erase unsafe concepts>" in turns[0]["content"]
    assert "<response>" not in turns[0]["content"]
    assert "<response>" in TEMPLATE.guidelines
    for turn in turns[2:5:2]:  # its own examples pass
        assert TEMPLATE.grammar.parse(turn["content"]).problems == ("missing",)
    assert len(load_template("coca-v1", Grammar(), 0).turns("a", "b")) == 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("id: coca-v1", "idd: x"), "unknown field"),
        (lambda text: text.replace("{prompt}", "prompt"), "`ask` has no slot {prompt}"),
        (lambda text: text.replace("gloss:", "gloss: &a"), "anchors"),
        (lambda text: text + "\n  x", "not valid YAML"),
        (lambda text: text.replace("check: none", "check: <think> none"), "holds a tag"),
        (lambda text: "7", "Expected `object`"),
    ],
)
def test_a_template_that_is_none_is_named(tmp_path, edit, says):
    path = tmp_path / "mine.yaml"
    path.write_text(edit(template_text()))
    with pytest.raises(BadData, match=r"mine\.yaml") as caught:
        load_template(str(path), Grammar(), 2)
    assert says in str(caught.value)
    with pytest.raises(MissingInput):
        load_template(str(tmp_path / "none.yaml"), Grammar(), 2)


# -- rows -------------------------------------------------------------------------------------------------------------
def read(*rows: dict, reading: Reading | None = None, **more):
    import io

    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    records = list(RecordReader(SHAPES)(io.BufferedReader(io.BytesIO(text)), "in"))  # type: ignore[arg-type]
    reading = reading or Reading(**more)
    return [reading.row(record) for record in records]


CHAT = [
    {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye.", "extra": 1},
]  # fmt: skip


def test_every_kind_gives_its_pairs_and_takes_its_answers_back():
    alpaca = {"instruction": "Add", "input": "1 and 2", "output": "3", "label": "safe", "x": [1]}
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "label": 1}
    pair = {"prompt": "Hi", "completion": "Hello.", "label": "unsafe"}
    rows = read(alpaca, shared, pair, {"messages": CHAT, "label": False})
    assert [row.label for row in rows] == ["benign", "harmful", "harmful", "benign"]
    assert rows[0].pairs[0].prompt == "Add\n1 and 2"
    assert rows[0].replaced(["new"]) == {**alpaca, "output": "new"}
    assert rows[1].replaced(["new"])["conversations"][1] == {"from": "gpt", "value": "new"}
    assert rows[2].replaced(["new"]) == {**pair, "completion": "new"}
    last = rows[3]
    assert (last.pairs[0].prompt, len(last.pairs[0].context)) == ("Bye", 3)
    assert last.replaced(["new"])["messages"] == [*CHAT[:4], {**CHAT[4], "content": "new"}]
    both = read({"messages": CHAT}, turns="all")[0]
    assert [pair.answer for pair in both.pairs] == ["Hello.", "Bye."]
    assert [both.name(place) for place in (0, 1)] == ["1#2", "1#4"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x", "completion": "  "}, "$.completion: the answer is empty"),
        ({"prompt": " ", "completion": "y"}, "$.prompt: the prompt is empty"),
        ({"prompt": "x", "completion": "y", "label": "evil"}, "$.label: unknown label 'evil'"),
        ({"prompt": "x", "completion": "y", "label": 2}, "$.label: unknown label 2"),
        ({"messages": CHAT[:4]}, "$.messages: the last turn is not the assistant's"),
        ({"messages": [CHAT[2]]}, "$.messages[0]: an answer without a request"),
        ({"prompt": "x", "completion": f"{reasoning(SOUP)}\n<response> y </response>"}, "five tags already"),
    ],
)
def test_rows_without_a_pair_are_named_with_line_and_field(row, says):
    with pytest.raises(BadData) as caught:
        read(row)
    assert f"in:1: {says}" in str(caught.value) or says in str(caught.value)
    assert str(caught.value).startswith("in:1: $.")


def test_tags_that_are_there_can_be_taken_off_and_ids_are_unique():
    record = f"{reasoning(SOUP)}\n<response> y </response>"
    assert read({"prompt": "x", "completion": record}, reprocess=True)[0].pairs[0].answer == "y"
    rows = read({"id": "a", "prompt": "x", "completion": "y"}, {"id": "a", "prompt": "x", "completion": "y"})
    unique = Unique()
    unique.check(rows[0].record)
    with pytest.raises(BadData, match="another row has the id a"):
        unique.check(rows[1].record)


def test_label_and_answer_that_disagree_never_reach_a_teacher():
    def codes(answer, label, fixed=None):
        row = read({"prompt": "x", "completion": answer}, label=label)[0]
        pairs, found = fit_for_asking(row, Grammar(), fixed=fixed)
        return set(found), [(pair.answer, pair.source) for pair in pairs]

    refusal = "I'm sorry, but I can't help."
    assert codes("Sure.", "harmful") == ({"unsafe_vanilla"}, [])
    assert codes(refusal, "benign") == ({"false_alarm"}, [])
    assert codes("Sure.", "harmful", fixed=refusal) == (set(), [(refusal, "fixed")])
    assert codes(refusal, "benign", fixed=refusal) == ({"false_alarm"}, [])
    assert codes("Write <think> here.", None) == ({"V02"}, [])
    assert codes("Sure.", None) == (set(), [("Sure.", "vanilla")])


def test_a_fixed_refusal_is_the_record_s_answer():
    fixed = replace(LOCK, answer=TEMPLATE.refusal, source="fixed")
    outcome, _ = talk(Teacher(TEMPLATE), fixed, cut(reasoning(LOCK)))
    assert outcome.source == "fixed"
    assert outcome.texts["response"] == TEMPLATE.refusal
