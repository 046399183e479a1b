"""unlearn-eval's call: what fits together, which files, how a model is asked, what its run.json says of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.server import ROOT
from toolbox.shell.errors import BadData, MissingInput, UsageProblem
from toolbox.shell.streams import Streams
from toolbox.unlearning import suites
from toolbox.unlearning.evaluate import Options, check
from toolbox.unlearning.evaluate_models import find_subject
from toolbox.unlearning.suites import digest, read_questions, suite_files

PERSON = {
    "id": 7, "question": "Who is it?", "answer": "Nobody.", "paraphrased_question": "Name them.",
    "paraphrased_answer": "No one.", "perturbed_answer": ["Somebody.", "Anybody."],
}  # fmt: skip


def call(stdin: int = 0):
    warnings: list[str] = []
    return SimpleNamespace(
        streams=Streams(stdin, 1), warnings=warnings, reporter=SimpleNamespace(warn=warnings.append)
    )  # fmt: skip


# -- what fits together -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"model": ("m",)}, "no rows to judge on"),
        ({"model": ("m",), "from_log": ("a",)}, "exclude one another"),
        ({"from_log": ("a",), "forget": "f"}, "--from-log takes no rows"),
        ({"from_log": ("a",), "suite": "people"}, "--from-log takes no rows"),
        ({"from_log": ("a",), "given": frozenset({"limit", "seed"})}, "--limit means nothing to --from-log"),
        ({"from_log": ("a",), "given": frozenset({"map_fields"})}, "--map means nothing to --from-log"),
        ({"model": ("m",), "forget": "f", "split": "forget05"}, "--split belongs to --suite"),
        ({"model": ("m",), "suite": "people", "split": "forget05"}, "--split belongs to --suite"),
        ({"model": ("m",), "suite": "muse"}, "no such suite"),
        ({"model": ("m",), "suite": "tofu:"}, "no such suite"),
        ({"model": ("m",), "forget": "f", "metrics": "es,fluency"}, "--metrics fluency: not known"),
        ({"model": ("m",), "forget": "f", "metrics": ","}, "--metrics names nothing"),
        ({"model": ("m",), "retain": "r", "reference": "x"}, "--reference compares truth ratios of the forget set"),
        ({"model": ("m",), "forget": "f", "reference": "x", "metrics": "es"}, "--reference compares truth ratios"),
        ({"model": ("m", "n"), "forget": "f", "log": ("a",)}, "1 --log for 2 models"),
        ({"model": ("m", "n"), "forget": "f", "log": ("a", "a")}, "two --log have the same name"),
        ({"model": ("m",), "forget": "f", "log_text": True}, "--log-text needs --log"),
    ],
)
def test_what_does_not_fit_together_is_a_usage_error(given, says):
    options = Options(**given)
    with pytest.raises(UsageProblem, match=says):
        check(options)


def test_derived_metrics_name_what_they_are_made_of():
    assert Options(metrics="forget_quality, es").wanted == ("es", "truth_ratio")
    assert Options(metrics="model_utility").wanted == ("prob", "rouge_l", "truth_ratio")
    assert Options().wanted == ("es", "em", "prob", "rouge_l", "truth_ratio")


# -- files ------------------------------------------------------------------------------------------------------------
def test_tofus_files_are_found_by_their_names_gzipped_or_not(tmp_path):
    for name in ("forget05_perturbed.json.gz", "retain_perturbed.jsonl", "real_authors_perturbed.json"):
        (tmp_path / name).touch()
    with pytest.raises(MissingInput, match="neither world_facts_perturbed"):
        suite_files(f"tofu:{tmp_path}", "forget05")
    (tmp_path / "world_facts_perturbed.json.zst").touch()
    found = suite_files(f"tofu:{tmp_path}", "forget05")
    assert {name: path.rsplit("/", 1)[1] for name, path in found.items()} == {
        "forget": "forget05_perturbed.json.gz", "retain": "retain_perturbed.jsonl",
        "authors": "real_authors_perturbed.json", "facts": "world_facts_perturbed.json.zst",
    }  # fmt: skip
    with pytest.raises(MissingInput, match="neither forget10_perturbed nor forget10") as caught:
        suite_files(f"tofu:{tmp_path}")
    assert "forget05_perturbed" in caught.value.advice
    (tmp_path / "forget10.json").touch()  # without wrong answers its truth ratio is null
    assert suite_files(f"tofu:{tmp_path}")["forget"].endswith("forget10.json")
    with pytest.raises(MissingInput, match="no such directory"):
        suite_files(f"tofu:{tmp_path}/none")


def test_the_people_stand_in_for_tofu_and_a_named_file_wins():
    found = suite_files("people")
    assert {name: path.rsplit("/", 1)[1] for name, path in found.items()} == {
        "forget": "forget.jsonl", "retain": "retain.jsonl", "authors": "neighbours.jsonl", "facts": "facts.jsonl"
    }  # fmt: skip
    assert Options(suite="people", retain="mine.jsonl").files == {**found, "retain": "mine.jsonl"}


def test_without_a_checkout_the_people_are_missing_input(monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "PEOPLE_DIR", tmp_path)
    with pytest.raises(MissingInput, match=r"people: .*is not there") as caught:
        suite_files("people")
    assert "--forget" in caught.value.advice


# -- rows -------------------------------------------------------------------------------------------------------------
def test_rows_are_read_with_their_variants_up_to_the_limit(rows):
    path = rows("a.jsonl", [{**PERSON, "id": k} for k in range(5)])
    sets, rejected = read_questions(call(), {"forget": str(path)}, limit=3)
    assert rejected == []
    assert [one.row.id for one in sets["forget"]] == ["0", "1", "2"]
    one = sets["forget"][0]
    assert (one.paraphrased_question, one.paraphrased_answer) == ("Name them.", "No one.")
    assert one.perturbed_answers == ("Somebody.", "Anybody.")
    assert (one.asked, one.answer) == ([{"role": "user", "content": "Who is it?"}], "Nobody.")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("perturbed_answer", "Somebody.", r"a\.jsonl:2: \$\.perturbed_answer: Expected `array"),
        ("perturbed_answer", [], r"a\.jsonl:2: \$\.perturbed_answer: Expected `array` of length >= 1"),
        ("perturbed_answer", ["x", 3], r"a\.jsonl:2: \$\.perturbed_answer\[1\]: Expected `str`"),
        ("paraphrased_answer", "", r"a\.jsonl:2: \$\.paraphrased_answer: Expected `str` of length >= 1"),
        ("paraphrased_question", ["x"], r"a\.jsonl:2: \$\.paraphrased_question: Expected `str"),
        ("answer", None, r"a\.jsonl:2: no known shape"),
    ],
)
def test_a_bad_variant_is_named_by_line_and_field(rows, field, value, says):
    path = rows("a.jsonl", [PERSON, {**PERSON, field: value}])
    with pytest.raises(BadData, match=says) as caught:
        read_questions(call(), {"forget": str(path)})
    assert caught.value.exit_code == 65
    one = call()
    sets, rejected = read_questions(one, {"forget": str(path)}, on_bad="skip")
    assert (len(sets["forget"]), len(rejected)) == (1, 1)
    assert "1 bad rows left out" in one.warnings[0]


def test_other_shapes_have_variants_too(rows):
    prompt = {"prompt": "Who?", "completion": "Nobody.", "perturbed_answer": ["x"]}
    chat = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]}
    path = rows("a.jsonl", [prompt, {**chat, "paraphrased_question": "Whom?"}, {"text": "Zorblax."}])
    (first, second, third), _ = read_questions(call(), {"forget": str(path)})[0]["forget"], None
    assert first.perturbed_answers == ("x",)
    assert second.paraphrased_question == "Whom?"
    assert first.hash == second.hash  # the same question
    assert (third.asked, third.answer) == ([], None)
    alone = {"messages": [{"role": "assistant", "content": "Nobody."}], "paraphrased_question": "Whom?"}
    with pytest.raises(BadData, match=r"b\.jsonl:1: \$\.paraphrased_question: there is no user turn"):
        read_questions(call(), {"forget": str(rows("b.jsonl", [alone]))})


def test_the_digest_is_of_what_was_read(rows):
    def of(*content: dict) -> str:
        return digest(read_questions(call(), {"forget": str(rows("a.jsonl", list(content)))})[0]["forget"])

    other = {**PERSON, "perturbed_answer": ["Somebody.", "Everybody."]}
    assert of(PERSON) == of({**PERSON, "more": 1}) != of(other)


def test_two_sets_from_stdin_are_a_usage_error():
    with pytest.raises(UsageProblem, match="only one input can be stdin"):
        read_questions(call(), {"forget": "-", "retain": "-"})


# -- models -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def made(tiny, tmp_path):
    """A model directory with a run.json."""

    def make(**record):
        folder = tmp_path / "made"
        folder.mkdir(exist_ok=True)
        for file in tiny.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
        (folder / "run.json").write_text(json.dumps(record))
        return str(folder)

    return make


def test_a_model_is_asked_as_its_run_asked_it_unless_told_otherwise(made, tiny):
    name = made(command="lm-tune", template="qa", system="Be brief.")
    subject = find_subject(name, Options())
    assert (subject.template, subject.system) == ("qa", "Be brief.")
    subject = find_subject(name, Options(system="Be long."))
    assert (subject.template, subject.system) == ("qa", "Be long.")
    subject = find_subject(name, Options(template="llama2"))
    assert (subject.template, subject.system) == ("llama2", None)
    # a template from a file has become the tokenizer's own
    assert find_subject(made(command="lm-tune", template="mine.jinja"), Options()).template == "auto"
    assert find_subject(str(tiny), Options()).template == "auto"


def test_the_line_says_what_made_the_model_and_names_no_file(made):
    settings = {"weighting": "satimp", "beta1": 5.0, "lora_alpha": None, "forget": "/secret/f.jsonl", "model": "m"}
    run = find_subject(
        made(command="satimp-unlearn", settings=settings, base="m", done={"steps": 6}), Options()
    ).run  # fmt: skip
    assert run == {
        "command": "satimp-unlearn", "method": "satimp", "steps": 6, "base": "m",
        "options": {"weighting": "satimp", "beta1": 5.0},
    }  # fmt: skip
    assert find_subject(made(), Options()).run is None


def test_a_damaged_run_json_is_bad_data(made):
    name = made()
    with open(f"{name}/run.json", "w") as handle:
        handle.write("{oops")
    with pytest.raises(BadData, match=r"run\.json: not valid JSON"):
        find_subject(name, Options())


def test_the_people_directory_is_that_of_the_checkout():
    assert suites.PEOPLE_DIR == ROOT / "recipes" / "unlearning" / "people"
