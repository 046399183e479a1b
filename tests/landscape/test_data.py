"""Rows as questions, contexts, thoughts and answers; and as chains of tokens for a model."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path as FilePath
from typing import Any

import pytest

from tests.conftest import SHARED
from tests.tiny import tiny_tokenizer
from toolbox.landscape.data import Asking, Paths
from toolbox.landscape.encode import Encoder, encode_paths, model_digest, tokenizer_digest
from toolbox.landscape.output import notes, warnings
from toolbox.landscape.wording import Wording, split_thoughts
from toolbox.models.load import ModelSource
from toolbox.shell.errors import BadData, UsageProblem
from toolbox.shell.items import PATH_SHAPES, Choices
from toolbox.shell.records import RecordReader

ROW = {"id": "q", "question": "Which?", "choices": ["red", "blue"], "answer": "B", "completion": "Hm.\nAnswer: B"}


def read(rows: list[dict[str, Any]], wording: Wording | None = None, **more: Any) -> Paths:
    paths = Paths(Wording() if wording is None else wording, **more)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for record in RecordReader(PATH_SHAPES)(io.BufferedReader(io.BytesIO(text)), "rows.jsonl"):
        paths.add(record)
    return paths


def rows_of(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """``ROW`` changed; a None takes the field out."""
    return [{name: value for name, value in {**ROW, **change}.items() if value is not None} for change in changes]


def labels(paths: Paths) -> list[str | None]:
    return [None if p.pred < 0 else paths.questions[p.question].choices.labels[p.pred] for p in paths.paths]


@pytest.fixture(scope="module")
def demo() -> list[dict[str, Any]]:
    """The released paths, where the shared data lies beside the checkout."""
    path = SHARED / "thoughts" / "landscape" / "demo_paths.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the released paths are not here ({path})")
    return [json.loads(line) for line in gzip.open(path)]


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "text", "thoughts"),
    [
        ("line", " one\n\n  two. Three \r\n", ["one", "two. Three"]),
        ("line", " \n\t\n", []),
        ("sentence", "It costs 2.12 dollars. So what? Yes!\nNext line", ["It costs 2.12 dollars.", "So what?", "Yes!",
                                                                       "Next line"]),
        ("sentence", "1. Find x. 2. Use e.g. Euler. It is approx. 5, vs. Bob.", ["1. Find x.", "2. Use e.g. Euler.",
                                                                               "It is approx. 5, vs. Bob."]),
        ("sentence", "He said “stop.” Then he left. and so on", ["He said “stop.”", "Then he left. and so on"]),
        ("sentence", "一。二！三", ["一。", "二！", "三"]),
        ("regex:\\n\\n+", "a\nb\n\n\nc", ["a\nb", "c"]),
        ("regex:(;|,)", "a;b,c", ["a", "b", "c"]),
        ("regex:x*", "ab", ["a", "b"]),
    ],
)  # fmt: skip
def test_a_completion_is_cut_into_thoughts(split, text, thoughts):
    assert split_thoughts(text, split) == thoughts


@pytest.mark.parametrize("split", ["line", "sentence", "regex:[.]"])
def test_cutting_loses_and_invents_no_word(split):
    draw = random.Random(0)
    gone = {".", " ", "\n"} if split == "regex:[.]" else {" ", "\n"}
    for _ in range(300):
        text = "".join(draw.choices('ab.?! \n12"e.g', k=draw.randint(0, 60)))
        parts = split_thoughts(text, split)
        assert [c for part in parts for c in part if c not in gone] == [c for c in text if c not in gone]
        assert all(part == part.strip() != "" for part in parts)


@pytest.mark.parametrize("split", ["words", "regex:", "regex:(", ""])
def test_another_way_of_cutting_is_refused(split):
    with pytest.raises(UsageProblem, match="--split"):
        Wording(split=split)


def test_given_thoughts_are_taken_as_they_are_and_texts_are_cut():
    given = read(rows_of({"thoughts": [" a\nb ", "", "  ", "c"]}, {"thoughts": "a\nb"}, {}, {"thoughts": []}))
    assert [path.thoughts for path in given.paths] == [(" a\nb ", "c"), ("a", "b"), ("Hm.", "Answer: B"), ()]
    assert [path.cut for path in given.paths] == [False, True, True, False]


def test_the_thought_that_states_the_answer_can_be_left_out():
    rows = rows_of(
        {"completion": "Maybe answer: B.\nNo.\nAnswer: B\nBye."},
        {"completion": "Only this.", "path_id": "none"},
        {"completion": "The answer is A.\nOr is it?", "pred": "B", "path_id": "other"},
    )
    kept = [path.thoughts for path in read(rows, Wording(drop_answer_thought=True)).paths]
    assert kept == [("Maybe answer: B.", "No.", "Bye."), ("Only this.",), ("The answer is A.", "Or is it?")]


# --- questions, paths, answers ----------------------------------------------------------------------------------------


def test_paths_are_named_by_their_rows_or_by_id_variant_and_ordinal():
    rows = rows_of({}, {"variant": "cot"}, {"path_id": "mine"}, {"variant": "cot"}, {}, {"id": 7})
    assert [path.id for path in read(rows).paths] == ["q/0", "q/cot/0", "mine", "q/cot/1", "q/2", "7/0"]
    with pytest.raises(BadData, match=r"rows.jsonl:2: \$.path_id: the path x stands on line 1 already"):
        read(rows_of({"path_id": "x"}, {"path_id": "x"}))


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"choices": ["red", "green"]}, r":2: \$.choices: other choices than earlier rows of the id q"),
        ({"choices": ["blue", "red"]}, r":2: \$.choices: other choices"),
        ({"labels": ["B", "A"]}, r":2: \$.choices: other choices"),
        ({"answer": "A"}, r":2: \$.answer: another answer than earlier rows"),
        ({"answer": "E"}, r":2: \$.answer: the answer 'E' is not among the labels A, B"),
        ({"choices": ["red"]}, r":2: \$.choices: 1 choice, at least two"),
        ({"choices": None}, r":2: \$.choices: no `choices`"),
        ({"choices": None, "labels": ["A", "B"], "id": "r"}, r":2: \$.choices: labels without the texts"),
        ({"question": None}, r":2: neither `question` nor a prompt"),
        ({"messages": [{"role": "boss", "content": "x"}]}, r":2: \$.messages\[0\].role: Invalid enum value 'boss'"),
        ({"messages": 3}, r":2: \$.messages: Expected `array`"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_changes_nothing(second, says):
    with pytest.raises(BadData, match=says):
        read(rows_of({}, second))
    paths = read(rows_of({}))
    before = paths.digest()
    record = next(iter(RecordReader(PATH_SHAPES)(_open(rows_of(second)), "x")))
    with pytest.raises(BadData):
        paths.add(record)
    assert paths.digest() == before
    assert len(paths.questions) == 1


def _open(rows: list[dict[str, Any]]) -> Any:
    return io.BufferedReader(io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode()))


def test_a_right_answer_may_stand_on_any_row_of_its_question():
    paths = read(rows_of({"answer": None}, {"answer": 1}, {"answer": "blue"}, {"answer": None}))
    assert [question.gold for question in paths.questions] == [1]
    assert [question.gold for question in read(rows_of({"answer": None})).questions] == [-1]


def test_answers_are_given_or_read_strictly():
    rows = rows_of(
        {}, {"pred": "A"}, {"pred": "red"}, {"pred": None, "completion": "Answer: B"}, {"pred": "Z"},
        {"completion": "Perhaps a Boat."}, {"completion": "", "prompt": "Which? Answer:"},
        {"completion": " B, since", "prompt": "Which? The answer is"},
        {"completion": None, "thoughts": ["x", "Answer: A"]}, {"completion": "Answer: Blue!", "format": "text"},
    )  # fmt: skip
    rows[3]["pred"] = None
    paths = read(rows)
    assert labels(paths) == ["B", "A", "A", None, None, None, None, "B", "A", "B"]
    assert [path.source for path in paths.paths][:3] == ["cue", "pred", "pred"]
    assert paths.strangers == 1


def test_facets_come_from_the_row_or_its_meta():
    rows = rows_of({"model": "m", "dataset": "d", "meta": {"level": 3}}, {"meta": {"level": True}})
    paths = read(rows, by=("level", "model", "nowhere"))
    assert paths.paths[0].facets == {"model": "m", "variant": None, "dataset": "d", "level": "3", "nowhere": None}
    assert paths.paths[1].facets["level"] == "true"
    assert paths.seen_facets == {"model", "dataset", "level"}
    with pytest.raises(BadData, match=r"\$.meta.level: neither text nor number"):
        read(rows_of({"meta": {"level": [1]}}), by=("level",))


def test_what_is_scored_of_questions_without_thoughts():
    rows = rows_of({"completion": ""}, {"completion": ""}, {"id": "r", "completion": ""}, {"id": "r"})
    paths = read(rows)
    assert paths.to_score() == [0, 3]
    assert paths.drawn == {1}
    paths.leave_out([paths.paths[3]])
    assert paths.to_score() == [0, 2]
    paths.leave_out(paths.paths[:2])
    assert [question.id for question in paths.questions] == ["r"]
    assert [(path.id, path.question) for path in paths.paths] == [("r/0", 0)]


def test_digests_tell_what_matters_to_them():
    base = read(rows_of({}, {}))
    for change in ({"completion": "Else."}, {"answer": "A"}, {"pred": "A"}, {"variant": "cot"}, {"prompt": "P"}):
        assert (
            read(rows_of({}, change) if "answer" not in change else rows_of(change, change)).digest() != base.digest()
        )
    same_texts = read(rows_of({"path_id": "q/1", "prompt": "Other", "pred": "A"}, {"path_id": "q/0"}), scored=False)
    assert same_texts.texts_digest() == base.texts_digest()
    assert read(rows_of({}, {"completion": "Hm."})).texts_digest() != base.texts_digest()


# --- contexts and answer strings --------------------------------------------------------------------------------------


def test_the_context_is_the_prompt_of_the_row_or_the_question_with_its_choices():
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Which?"}]
    rows = rows_of({}, {"prompt": "P"}, {"messages": turns, "prompt": "P"}, {"context": "Read this.", "labels": [1, 2]})
    rows[3]["id"], rows[3]["answer"] = "r", 2
    bare = Asking(text="Which?\nA) red\nB) blue")
    both = Asking((("system", "Short."), ("user", "Which?")), "P")
    passage = Asking(text="Read this.\n\nWhich?\n1) red\n2) blue")
    assert [p.asking for p in read(rows).paths] == [bare, Asking(None, "P"), both, passage]
    assert [p.asking for p in read(rows, Wording(context="question")).paths] == [bare, bare, bare, passage]
    assert [p.asking for p in read(rows, scored=False).paths] == [None] * 4
    with pytest.raises(BadData, match=r":1: \$.prompt: neither `messages` nor `prompt`"):
        read(rows, Wording(context="prompt"))


def test_answer_strings():
    choices = Choices(("A", "B"), ("{label}", "x\\1"))
    assert Wording().answers(choices) == ("Answer is: A) {label}", "Answer is: B) x\\1")
    assert Wording(template="\\boxed{{label}}").answers(choices) == ("\\boxed{A}", "\\boxed{B}")
    assert Wording(template="is {label}").answers(Choices(("A", "B"), ())) == ("is A", "is B")
    for template, says in (("Answer", "no slot"), ("{labels}", "unknown slot {labels}")):
        with pytest.raises(UsageProblem, match=says):
            Wording(template=template)


def test_as_the_released_code_has_it(demo):
    paths = read(demo, Wording.reference())
    assert len(paths.questions) == 5
    assert [path.asking.text for path in paths.paths] == [row["reference_prompt"] for row in demo]
    assert labels(paths) == [row["reference_pred"] for row in demo]
    right = [path.pred == paths.questions[path.question].gold for path in paths.paths]
    assert right == [row["reference_correct"] for row in demo]
    assert sum(right) == 28
    assert paths.questions[0].answers == tuple(f"Answer is: {label}" for label in "ABCDE")


def test_the_strict_reading_of_the_released_paths(demo):
    paths = read(demo)
    assert sum(len(path.thoughts) for path in paths.paths) == 661
    assert [path.id for path in paths.paths] == [row["path_id"] for row in demo]
    found = [(mine, row["stated"]) for mine, row in zip(labels(paths), demo, strict=True)
             if row["stated_kind"] != "ambiguous"]  # fmt: skip
    assert [mine for mine, _ in found] == [stated for _, stated in found]
    assert sum(path.pred == paths.questions[path.question].gold for path in paths.paths) == 21


def test_the_last_letter_is_no_answer_where_no_choice_has_it():
    compat = Wording.reference()
    assert labels(read(rows_of({"completion": "A or B, or D"}, {"completion": "none"}), compat)) == [None, None]
    assert labels(read(rows_of({"completion": "A Boat"}), compat)) == ["B"]


# --- chains -----------------------------------------------------------------------------------------------------------


def text_of(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def test_a_chain_is_context_thoughts_and_answers_with_separators():
    tokenizer = tiny_tokenizer()
    paths = read(rows_of({"completion": "one\ntwo"}, {"prompt": "P", "completion": "one"}))
    chains = encode_paths(paths, Encoder(tokenizer, paths.wording), None, refuse)
    plain, prompted = chains
    states = [text_of(tokenizer, plain.ids[:cut]) for cut in plain.cuts]
    question = "Which?\nA) red\nB) blue"
    assert states == [question, f"{question}\none", f"{question}\none\ntwo"]
    for here in plain.continuations:
        assert [text_of(tokenizer, one) for one in here] == ["\nAnswer is: A) red", "\nAnswer is: B) blue"]
    # A rendered prompt ends in white space: what follows stands right behind it.
    opened = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
    assert [text_of(tokenizer, prompted.ids[:cut]) for cut in prompted.cuts] == [opened, f"{opened}one"]
    assert text_of(tokenizer, prompted.continuations[0][0]) == "Answer is: A) red"
    assert text_of(tokenizer, prompted.continuations[1][0]) == "\nAnswer is: A) red"


def test_the_released_codes_joints():
    tokenizer = tiny_tokenizer()
    paths = read(rows_of({"completion": "one\ntwo"}), Wording.reference())
    (chain,) = encode_paths(paths, Encoder(tokenizer, paths.wording), None, refuse)
    assert text_of(tokenizer, chain.ids) == "Which?\nOptions: A)red B)blue one two"
    assert [text_of(tokenizer, one) for one in chain.continuations[-1]] == ["Answer is: A", "Answer is: B"]


def refuse(problem: BadData, path: Any) -> None:
    raise problem


def test_a_state_too_long_for_the_window_is_refused_by_name_and_never_cut():
    paths = read(rows_of({}, {"completion": "x" * 400, "path_id": "long"}, {"completion": "", "id": "r"}))
    encoder = Encoder(tiny_tokenizer(), paths.wording)
    with pytest.raises(BadData, match=r"rows.jsonl:2: path long: it has \d+ tokens, too many for .* window of 300"):
        encode_paths(paths, encoder, 300, refuse)
    longest = max(chain.longest for chain in encode_paths(paths, encoder, None, refuse)[:1])
    with pytest.raises(BadData, match="and a continuation of 19 are too many"):
        encode_paths(paths, encoder, longest - 1, refuse)
    gone: list[str] = []
    chains = encode_paths(paths, encoder, 300, lambda problem, path: gone.append(path.id))
    assert gone == ["long"]
    assert [path.id for path in paths.paths] == ["q/0", "r/0"]
    assert len(chains) == 2


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_rendered_as_lm_generate_renders_them(tool, tmp_path, chat):
    from tests.tiny import tiny_model_dir

    model = tiny_model_dir(tmp_path / "model", chat=chat)
    turns = [{"role": "user", "content": "Hi <|im_end|>"}]
    if chat:
        turns.insert(0, {"role": "system", "content": "S"})
    asked = [{"prompt": "Say it"}, {"messages": turns}, {"messages": turns, "prompt": "Hi there"}]
    asked = [{**ROW, **row, "id": f"q{number}"} for number, row in enumerate(asked)]
    for row in asked:
        del row["completion"]
    done = tool("lm-generate", "--model", model, "--max-new-tokens", "3",
                stdin="".join(json.dumps(row) + "\n" for row in asked))  # fmt: skip
    assert done.code == 0, done.err
    paths = read([{**row, "completion": "x"} for row in done.rows])
    encoder = Encoder(tiny_tokenizer(chat), paths.wording)
    mine = [encoder.context(path.asking) for path in paths.paths]
    assert [len(ids) for ids in mine] == [row["n_prompt_tokens"] for row in done.rows]
    assert encoder.template == ("chat" if chat else "qa")
    if not chat:
        assert text_of(tiny_tokenizer(False), mine[0]) == "Say it"


def test_a_model_is_told_by_its_weights_and_its_tokenizer_by_its_files(tiny, tmp_path):
    from tests.tiny import tiny_model_dir

    again = tiny_model_dir(tmp_path / "again")
    other = tiny_model_dir(tmp_path / "other", seed=1, chat=False)
    here, there, else_ = (ModelSource(str(path), "directory", FilePath(path)) for path in (tiny, again, other))
    assert model_digest(here) == model_digest(there) != model_digest(else_)
    assert tokenizer_digest(here) == tokenizer_digest(there) != tokenizer_digest(else_)


# --- what people are told ---------------------------------------------------------------------------------------------


def test_what_makes_a_picture_say_less_is_told():
    rows = rows_of(
        {"completion": "", "model": "a/m"}, {"completion": "one"}, {"completion": "two", "prompt": "P"}, {"pred": "Z"},
        {"id": "r", "answer": None, "choices": ["a", "b", "c"], "model": "n"},
    )  # fmt: skip
    paths = read(rows)
    assert list(warnings(paths)) == [
        "1 of 5 paths have no thoughts: they count as paths, but are not on the map",
        "2 of 5 paths have a single thought: --split sentence cuts them further",
        "1 rows have a `pred` that is none of the choices: taken for no answer",
        "1 of 5 paths have no `answer` to compare with: no right or wrong for them",
    ]
    assert list(notes(paths, "x/y")) == [
        "one map for each number of choices: 4 paths with 2 choices, 1 paths with 3 choices",
        "1 questions are asked in several ways: the start drawn is that of the first path of each",
        "the paths are of m, n; y scores them as somebody else's",
    ]
    quiet = read(rows_of({"model": "/models/m"}, {}))
    assert [*warnings(quiet), *notes(quiet, "m")] == []
