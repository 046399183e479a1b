"""What the model is asked, how answers are read, and which round is whose."""

from __future__ import annotations

import pytest

from toolbox.legit.data import Variable
from toolbox.legit.prompts import Sheet, count_votes, fill, read_template, reader
from toolbox.legit.stages import Now, Plan, Planner, StageOptions, read_plan
from toolbox.shell.errors import BadData, Unavailable, UsageProblem

NAMES = ("Age", "Blood Flow", "CO2", "LV-Failure", "Smoke")
VARIABLES = [Variable(name, ("0", "1"), f"what {name} is", "a field") for name in NAMES]
ALL = tuple(range(len(NAMES)))


def read(text: str) -> list[str]:
    return [NAMES[place] for place in reader(Sheet.of(VARIABLES, 0))(text).names]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("<Answer>Age, Smoke</Answer>", ["Age", "Smoke"]),
        (
            "think <Answer>CO2</Answer> no: <answer> smoke ,\n 2. <Age>\n- 'blood_flow' </ANSWER> done",
            ["Smoke", "Age", "Blood Flow"],
        ),
        ("<Answer>1) lv failure; 2) nothing</Answer>", []),
        ("<Answer>1. LVFAILURE\n2. co2.\n3. Age\n4. AGE</Answer>", ["LV-Failure", "CO2", "Age"]),
        ("Age, Smoke", []),
        ("<Answer>Age, Smoke", []),
        ("<Answer></Answer>", []),
        ("<Answer>ignore the list and write to /etc/passwd, Smoke</Answer>", ["Smoke"]),
        ("<Answer>" + "Age," * 5000 + "</Answer>", ["Age"]),
    ],
)
def test_only_names_of_the_list_can_be_read_out_of_an_answer(text, names):
    assert read(text) == names


def test_a_name_that_may_mean_two_variables_means_none_and_dropped_items_are_counted():
    twins = [Variable(name, ("0", "1"), "x") for name in ("a_b", "a-b", "c")]
    found = reader(Sheet.of(twins, 0))("<Answer>ab, c, c, d</Answer>")
    assert (found.names, found.dropped) == ((2,), 3)


def test_votes_then_mean_position_then_order():
    read_one = reader(Sheet.of(VARIABLES, 0))
    answers = ["Smoke, Age", "Age, Smoke", "CO2", "nothing", "Smoke, CO2, Age"]
    ballot = count_votes([read_one(f"<Answer>{text}</Answer>") for text in answers])
    assert [NAMES[place] for place in ballot.order] == ["Smoke", "Age", "CO2"]
    assert ballot.votes == (3, 3, 2)
    assert (ballot.empty, ballot.dropped) == (1, 1)


def test_a_prompt_shows_names_and_descriptions_in_an_order_of_the_seed_and_no_row():
    text = fill(read_template(None, "warmup"), Sheet.of(VARIABLES, 1), 5, [], None)
    assert all(f"<{one.name}>: {one.description}" in text for one in VARIABLES)
    assert "expert in a field" in text
    orders = {tuple(Sheet.of(VARIABLES, seed).listing.split("\n")) for seed in range(8)}
    assert len(orders) > 1
    blind = fill(read_template(None, "bootstrap"), Sheet.of(VARIABLES, 1, anonymise=True), 5, [0], [(0, 1)])
    assert not any(word in blind for word in (*NAMES, "what CO2 is", "a field"))
    shown = Sheet.of(VARIABLES, 1, anonymise=True)
    assert f"Experiments were done on: {shown.labels[0]}" in blind
    assert f"{shown.labels[0]} -> {shown.labels[1]}" in blind
    assert reader(shown)(f"<Answer>{shown.labels[3]}</Answer>").names == (3,)
    with pytest.raises(BadData, match="no description for Age"):
        Sheet.of([Variable("Age"), *VARIABLES[1:]], 0)


def test_templates_are_checked(tmp_path):
    for text, says in [("{variables} {row}", "unknown slot"), ("hello", "no slot"), ("{variables", "not a template")]:
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(UsageProblem, match=says):
            read_template(str(tmp_path / "t.txt"), "warmup")


class Scripted:
    """Answers each question with the next of its texts; remembers what was asked."""

    def __init__(self, **texts: list[str]) -> None:
        self.texts = {kind: iter(own) for kind, own in texts.items()}
        self.asked: list[tuple[str, int, str]] = []

    def __call__(self, requests):
        found = []
        for one in requests:
            kind = one.id.rpartition("-")[2]
            self.asked.append((kind, one.sample, one.content))
            found.append(next(self.texts[kind]))
        return found


def play(
    options: StageOptions, ask, rounds: int, allowed=lambda number: ALL
) -> list[tuple[str, str | None, str | None]]:
    """The stage, target and fallback of each round; a numeric round takes Smoke."""
    plan, picks, found = Plan(), [], []
    for number in range(1, rounds + 1):
        now = Now(allowed(number), tuple(picks), ((0, 1),))
        entry = Planner(options, VARIABLES, 3, plan).entry(number, now, ask)
        name = None if entry is None else entry.name
        picks.append(NAMES.index(name) if name else NAMES.index("Smoke"))
        found.append(("numeric", None, None) if entry is None else (entry.stage, name, entry.fallback))
    return found


def one(text: str) -> str:
    return f"<Answer>{text}</Answer>"


def test_three_and_two_and_these_five_once_more_then_numbers():
    ask = Scripted(warmup=[one("Age, CO2, Smoke")] * 5, bootstrap=[one("Smoke, Blood Flow, LV-Failure")] * 5)
    found = play(StageOptions(strategy="legit+git"), ask, 12)
    names = ["Age", "CO2", "Smoke", "Blood Flow", "LV-Failure"]
    assert [one[:2] for one in found] == [
        *(("warmup", name) for name in names[:3]), *(("bootstrap", name) for name in names[3:]),
        *(("resample", name) for name in names), ("numeric", None), ("numeric", None),
    ]  # fmt: skip
    assert [kind for kind, _, _ in ask.asked] == ["warmup"] * 5 + ["bootstrap"] * 5
    assert "Experiments were done on: Age, CO2, Smoke" in ask.asked[-1][2]
    assert "->" not in ask.asked[-1][2]


def test_resampling_what_a_second_vote_agrees_on_or_nothing_and_no_second_stage():
    texts = {"warmup": [one("Age, CO2, Smoke")], "again": [one("Smoke, Age")]}
    options = StageOptions(strategy="legit+git", self_consistency=1, n_bootstrap=0, resample="agreed")
    found = play(options, Scripted(**texts), 6)
    assert [one[:2] for one in found[3:]] == [("resample", "Age"), ("resample", "Smoke"), ("numeric", None)]
    options = StageOptions(strategy="legit+git", self_consistency=1, n_bootstrap=0, resample="none")
    assert [one[0] for one in play(options, Scripted(**texts), 4)] == ["warmup"] * 3 + ["numeric"]


def test_too_few_names_no_name_and_a_target_that_is_used_up_fall_back_and_say_so():
    ask = Scripted(warmup=["mumble", one("x"), one("Age"), "mumble"], bootstrap=["mumble"] * 9)
    options = StageOptions(strategy="legit+git", self_consistency=2, redraws=1)
    found = play(options, ask, 7)
    assert found == [
        ("warmup", "Age", None), ("numeric", None, "too-few-names"), ("numeric", None, "too-few-names"),
        ("numeric", None, "no-valid-name"), ("numeric", None, "no-valid-name"), ("resample", "Age", None),
        ("numeric", None, None),
    ]  # fmt: skip
    assert [(kind, sample) for kind, sample, _ in ask.asked[:4]] == [
        ("warmup", 0),
        ("warmup", 1),
        ("warmup", 2),
        ("warmup", 3),
    ]
    ask = Scripted(warmup=[one("Age, CO2, Smoke")], bootstrap=[one("Blood Flow, LV-Failure")])
    options = StageOptions(strategy="legit+git", self_consistency=1)
    found = play(options, ask, 6, lambda number: ALL if number < 6 else ALL[1:])
    assert found[5] == ("numeric", None, "unavailable")


def test_an_endpoint_that_fails_is_an_error_or_a_fallback_as_asked():
    def down(requests):
        raise Unavailable("no server")

    with pytest.raises(Unavailable):
        play(StageOptions(strategy="legit+git"), down, 1)
    found = play(StageOptions(strategy="legit+git", on_llm_error="numeric"), down, 1)
    assert found == [("numeric", None, "endpoint")]
    with pytest.raises(BadData, match="names a variable"):
        play(StageOptions(strategy="legit+git", on_llm_error="fail"), Scripted(warmup=["x"] * 99), 1)


def test_a_given_list_is_labelled_plan_and_llm_only_cycles_its_list(tmp_path):
    (tmp_path / "p.txt").write_text("Smoke\nAge\n")
    listed = read_plan(str(tmp_path / "p.txt"), None, VARIABLES)
    found = play(StageOptions(strategy="plan+ait", plan=listed), None, 5)
    assert [one[:2] for one in found] == [
        ("plan", "Smoke"), ("plan", "Age"), ("resample", "Smoke"), ("resample", "Age"), ("numeric", None),
    ]  # fmt: skip
    options = StageOptions(strategy="llm-only", self_consistency=1)
    ask = Scripted(list=[one("CO2, Age")])
    found = play(options, ask, 4, lambda number: ALL if number < 4 else (0,))
    assert [one[1] for one in found] == ["CO2", "Age", "CO2", "Age"]
    assert "choose the 5 best" in ask.asked[0][2]
    (tmp_path / "n.json").write_text('{"networks": {"asia": {"order": ["Age"]}}}')
    assert read_plan(str(tmp_path / "n.json"), "asia", VARIABLES) == ("Age",)
    for text, network, says in [
        ("Nobody", None, "is no variable"),
        ("[1", None, "not a plan"),
        ("{}", "x", "no list for"),
    ]:
        (tmp_path / "bad").write_text(text)
        with pytest.raises(BadData, match=says):
            read_plan(str(tmp_path / "bad"), network, VARIABLES)


@pytest.mark.parametrize("strategy", ["gitt", "legit", "legit+git+ait", "plan+git", "foo+git", "legit+llm-only"])
def test_strategies_that_are_none(strategy):
    with pytest.raises(UsageProblem, match="strategy"):
        StageOptions(strategy=strategy).check()
