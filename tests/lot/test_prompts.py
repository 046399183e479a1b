"""lot-prompt as a filter: golden bytes, what passes through, answers as labels, shuffles, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.server import ROOT, environment
from toolbox.lot.shuffle import permutation

GOLDEN = Path(__file__).parent / "golden"
NINE = ["direct", "cot", "rar", "rar+cot", "ltm", "echo", "expand", "lot1", "lot2"]
CITY = {"id": "c", "question": "Which city?", "choices": ["Rome", "Paris", "Oslo"], "answer": "C"}
PLAIN = {"id": "p", "question": "How many?", "answer": 4}


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# -- what comes out


@pytest.mark.parametrize("more", [[], ["--with", "none"], ["--bold"]], ids=["all", "all-with-none", "all-bold"])
def test_nine_variants_of_three_items_are_these_bytes(tool, more):
    name = "-".join(["all", *(word.lstrip("-") for word in more)])
    done = tool("lot-prompt", "--variant", "all", *more, stdin=(GOLDEN / "items.jsonl").read_bytes())
    assert (done.code, done.err) == (0, "")
    assert done.out == (GOLDEN / f"{name}.jsonl").read_bytes()
    assert len(done.rows) == 27


def test_an_item_leaves_once_a_variant_with_its_fields_untouched(tool):
    items = [
        {"id": 7, "question": "Q", "extra": {"big": 2**70, "x": [None, 0.1]}, "group": 3, "meta": {"m": [1]}},
        {"question": "R", "context": "c", "choices": ["x", "y"], "labels": ["1", "2"], "answer": None},
    ]
    done = tool("lot-prompt", "--variant", "cot,lot1,direct", stdin=lines(*items))
    assert [(row["id"], row["variant"]) for row in done.rows] == list(
        itertools.product(("7", "2"), ("cot", "lot1", "direct"))
    )
    added = {"id", "variant", "prompt", "messages", "format", "template_sha"}
    for row, item in zip(done.rows, [items[0]] * 3 + [items[1]] * 3, strict=True):
        assert set(row) == set(item) | added
        assert {key: row[key] for key in item if key != "id"} == {key: item[key] for key in item if key != "id"}
        assert row["messages"] == [{"role": "user", "content": row["prompt"]}]


def test_rows_follow_the_schema(tool):
    schema = json.loads(tool("lot-prompt", "--schema").out)["output"]["$defs"]["Prompt"]
    row = tool("lot-prompt", stdin=lines(CITY)).rows[0]
    assert set(schema["required"]) <= set(row) <= set(schema["properties"])


def test_the_default_is_lot2(tool):
    assert [row["variant"] for row in tool("lot-prompt", stdin=lines(CITY, PLAIN)).rows] == ["lot2", "lot2"]


@pytest.mark.parametrize(
    ("item", "answer", "format"),
    [
        ({"choices": ["Rome", "Oslo"], "answer": "b"}, "B", "letter"),
        ({"choices": ["Rome", "Oslo"], "answer": 0}, "A", "letter"),
        ({"choices": ["Rome", "Oslo"], "answer": "Oslo"}, "B", "letter"),
        ({"choices": ["yes", "no"], "answer": False}, "B", "letter"),
        ({"choices": ["12", "7"], "labels": ["i", "ii"], "answer": "7"}, "ii", "letter"),
        ({"labels": ["A", "B"], "answer": "A"}, "A", "letter"),
        ({"choices": ["Rome", "Oslo"]}, None, "letter"),
        ({"answer": 4}, 4, "number"),
        ({"answer": "1,234"}, "1,234", "number"),
        ({"answer": "Oslo"}, "Oslo", "text"),
        ({}, None, "text"),
    ],
)
def test_the_answer_becomes_a_label_and_decides_how_to_ask(tool, item, answer, format):
    (row,) = tool("lot-prompt", stdin=lines({"question": "Q?", **item})).rows
    assert (row.get("answer"), row["format"]) == (answer, format)
    assert ("answer" in row) == ("answer" in item)
    asked = row["prompt"].rpartition("\n\n")[2]
    assert ("is a number" in asked, "is one of" in asked) == (format == "number", format == "letter")


def test_labels_without_choices_are_named_but_not_listed(tool):
    (row,) = tool(
        "lot-prompt", "--variant", "direct", stdin=lines({"question": "x) or y)?", "labels": ["x", "y"]})
    ).rows
    assert row["prompt"] == 'x) or y)?\n\nEnd with one line: "Answer: X", where X is one of x, y.'


def test_a_format_can_be_forced_where_it_can_be_answered(tool):
    def run(format: str, item: dict) -> tuple[int, str]:
        done = tool("lot-prompt", "--format", format, stdin=lines(item))
        return done.code, done.rows[0]["format"] if done.rows else done.err

    assert run("text", CITY) == (0, "text")
    assert run("text", PLAIN) == (0, "text")
    assert run("number", PLAIN) == (0, "number")
    assert run("number", {"question": "Q", "choices": ["x", "5"], "answer": "B"}) == (0, "number")
    assert run("number", {"question": "Q"}) == (0, "number")
    assert run("letter", CITY) == (0, "letter")
    for format, item, says in [
        ("letter", PLAIN, "the item has no choices"),
        ("number", {"question": "Q", "answer": "two"}, "the answer is 'two'"),
        ("number", CITY, "the answer is 'Oslo'"),
    ]:
        code, said = run(format, item)
        assert code == 65
        assert "stdin:1:" in said
        assert says in said


def test_a_system_text_is_a_turn_and_stands_before_the_prompt_of_models_without_turns(tool):
    plain, system = (tool("lot-prompt", *more, stdin=lines(CITY)).rows[0] for more in ((), ("--system", "Be {brief}.")))
    assert [turn["role"] for turn in system["messages"]] == ["system", "user"]
    assert system["messages"][0]["content"] == "Be {brief}."
    assert system["messages"][1:] == plain["messages"]
    assert system["prompt"] == "Be {brief}.\n\n" + plain["prompt"]
    assert system["template_sha"] != plain["template_sha"]


# -- shuffled choices

MANY = [
    {"id": f"q{i}", "question": f"Q{i}", "choices": [f"{i}-{c}" for c in "abcde"], "answer": "ABCDE"[i % 5]}
    for i in range(40)
]


def shuffle(tool, items: list[dict], *more: str) -> list[dict]:
    done = tool("lot-prompt", "--variant", "direct", "--shuffle-choices", *more, stdin=lines(*items))
    assert done.code == 0, done.err
    return done.rows


def test_a_shuffle_moves_texts_and_the_answer_follows(tool):
    for row, item in zip(shuffle(tool, MANY), MANY, strict=True):
        order = row["meta"]["permutation"]
        assert row["choices"] == [item["choices"][old] for old in order]
        assert sorted(order) == list(range(5))
        right = item["choices"]["ABCDE".index(item["answer"])]
        assert row["choices"]["ABCDE".index(row["answer"])] == right
        assert [line[:3] for line in row["prompt"].splitlines()[1:6]] == ["A) ", "B) ", "C) ", "D) ", "E) "]
        assert f"{row['answer']}) {right}\n" in row["prompt"]


def test_a_shuffle_depends_on_seed_and_id_alone(tool):
    base = {row["id"]: row["choices"] for row in shuffle(tool, MANY)}
    backwards = {row["id"]: row["choices"] for row in shuffle(tool, MANY[::-2])}
    assert backwards.items() <= base.items()
    other = {row["id"]: row["choices"] for row in shuffle(tool, MANY, "--seed", "1")}
    assert sum(other[key] != base[key] for key in base) > 30
    rows = tool("lot-prompt", "--variant", "all", "--shuffle-choices", stdin=lines(*MANY[:3])).rows
    assert all(row["choices"] == base[row["id"]] for row in rows)
    assert len(rows) == 27


def test_permutations_are_uniform():
    times = Counter(tuple(permutation(0, f"id{i}", 3)) for i in range(6000))
    assert sorted(times) == sorted(itertools.permutations(range(3)))
    # 5 degrees of freedom: above 25 once in seven thousand
    assert sum((seen - 1000) ** 2 / 1000 for seen in times.values()) < 25
    assert permutation(3, "x", 6) == permutation(3, "x", 6) != permutation(4, "x", 6)


def test_choices_named_in_meta_follow_and_nothing_else_there_changes(tool):
    kept = {"polarity": "A", "other": "Rome", "counts": [0, 1]}
    items = [{**CITY, "id": i, "meta": {"unknown": "C", "target": "A", "common_wrong": 2, **kept}} for i in range(20)]
    rows = shuffle(tool, items)
    for row in rows:
        text = dict(zip("ABC", row["choices"], strict=True))
        named = {name: text[row["meta"][name]] for name in ("unknown", "target", "common_wrong")}
        assert named == {"unknown": "Oslo", "target": "Rome", "common_wrong": "Oslo"}
        assert {name: row["meta"][name] for name in kept} == kept
    assert len({row["meta"]["unknown"] for row in rows}) == 3


def test_a_number_in_meta_is_a_label_before_it_is_a_place(tool):
    meta = {"common_wrong": 2, "target": "Paris", "unknown": True}
    for row in shuffle(tool, [{**CITY, "id": i, "labels": [1, 2, 3], "answer": 3, "meta": meta} for i in range(9)]):
        text = dict(zip("123", row["choices"], strict=True))
        assert (text[row["meta"]["common_wrong"]], text[row["answer"]]) == ("Paris", "Oslo")
        assert (row["meta"]["target"], row["meta"]["unknown"]) == ("Paris", True)


def test_what_was_shuffled_is_not_shuffled_again(tool):
    again = tool("lot-prompt", "--shuffle-choices", stdin=lines(*shuffle(tool, [CITY])))
    assert again.code == 65
    assert "stdin:1: $.meta.permutation: the choices were shuffled already" in again.err


def test_items_without_choices_are_not_shuffled(tool):
    items = [PLAIN, {"id": "l", "question": "x or y?", "labels": ["x", "y"], "answer": "y"}]
    done = tool("lot-prompt", "--shuffle-choices", stdin=lines(*items))
    assert done.out == tool("lot-prompt", stdin=lines(*items)).out
    assert "1 items have labels but no choices" in done.err


@pytest.mark.parametrize(
    "text",
    ["All of the above", "none of these.", "None of the choices", "Both A and C", "(A) and (B) only",
     "A, B, and C", "None", "all the above", "Neither B nor D", "one of the others"],
)  # fmt: skip
def test_a_choice_that_speaks_of_others_is_warned_about_once_when_shuffled(tool, text):
    item = {**CITY, "choices": ["Rome", "Paris", text], "answer": "A"}
    done = tool("lot-prompt", "--shuffle-choices", "--quiet", stdin=lines(*({**item, "id": i} for i in range(3))))
    assert done.err.count("speaks of others") == 1
    assert (
        f"3 of the shuffled items have a choice that speaks of others or of its place, the first in item 0: {text!r}"
        in (done.err)
    )
    assert tool("lot-prompt", stdin=lines(item)).err == ""


def test_choices_that_only_look_like_it_are_not_warned_about(tool):
    choices = [
        "above the table", "none of the children", "Vitamin A and E deficiency", "all people", "a and b", "A", "nobody",
        "one of his brothers", "the options", "I and the King", "both legs", "another",
    ]  # fmt: skip
    assert tool("lot-prompt", "--shuffle-choices", stdin=lines({"question": "Q", "choices": choices})).err == ""


# -- layouts and wordings


def test_a_layout_of_ones_own(tool):
    item = {"question": "{clause} %s \\1 {{question}}", "context": "{question}", "answer": "x"}
    layout = "<{context}>\n{question} // {clause}{prefix}\n\n{choices}\n\n{format}"
    (row,) = tool("lot-prompt", "--variant", "rar", "--layout", layout, stdin=lines(item)).rows
    assert row["prompt"] == (
        "<{question}>\n{clause} %s \\1 {{question}} // Rephrase and expand the question, and respond.\n\n"
        'End with one line: "Answer: ..."'
    )


def test_what_a_layout_leaves_out_of_items_is_counted(tool):
    items = [{**CITY, "context": "c"}, {**CITY, "context": ""}, PLAIN]
    done = tool("lot-prompt", "--layout", "{question} {clause} {prefix}", stdin=lines(*items))
    assert "1 items have context that --layout leaves out" in done.err
    assert "2 items have choices that --layout leaves out" in done.err
    assert done.rows[2]["prompt"].startswith("How many? Please")


def test_line_breaks_that_the_shell_did_not_make_are_warned_about(tool):
    assert "two characters" in tool("lot-prompt", "--variant", "direct", "--layout", "{question}\\nx", stdin="").err
    assert tool("lot-prompt", "--variant", "direct", "--layout", "{question}\nx", stdin="").err == ""


def test_wordings_of_ones_own_join_the_nine(tool, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "- {id: facts, prefix: cot, clause: First list the facts, source: me}\n- {id: bare, prefix: none}\n"
    )

    def run(*more: str):
        return tool("lot-prompt", "--template", mine, *more, stdin=lines(PLAIN))

    done = run("--variant", "facts,cot")
    assert [row["variant"] for row in done.rows] == ["facts", "cot"]
    assert "Let's think step by step. First list the facts.\n" in done.rows[0]["prompt"]
    assert "\n\nFirst list the facts.\n" in run("--variant", "facts", "--with", "none").rows[0]["prompt"]
    assert "step. **First list the facts.**\n" in run("--variant", "facts", "--bold").rows[0]["prompt"]
    assert [row["variant"] for row in run("--variant", "all").rows] == [*NINE, "facts", "bare"]
    assert "brings facts, bare, but --variant names none" in run().err
    mine.write_text("- {id: a, prefix: none}\n- {id: lot2, prefix: cot, clause: Try again}\n")
    taken = run("--variant", "all")
    assert (taken.code, taken.out) == (65, b"")
    assert "mine.yaml:2: `lot2` is a variant of the toolbox" in taken.err


def test_the_list_names_every_variant_with_its_source_and_reads_nothing(tool, tmp_path):
    done = tool("lot-prompt", "--list", stdin="{not read")
    assert done.code == 0
    assert [row["id"] for row in done.rows] == NINE
    assert all(row["source"] for row in done.rows)
    shown = {row["variant"]: row for row in tool("lot-prompt", "--variant", "all", stdin=lines(PLAIN)).rows}
    for row in done.rows:
        assert row["text"] in shown[row["id"]]["prompt"]
        assert row["template_sha"] == shown[row["id"]]["template_sha"]
        assert row["id"] in done.err
    assert "2505.12896" in done.err
    (tmp_path / "m.yaml").write_text("- {id: mine, prefix: none}\n")
    quiet = tool("lot-prompt", "--list", "--quiet", "--bold", "--template", tmp_path / "m.yaml", stdin="")
    assert quiet.err == ""
    assert quiet.rows[-1]["id"] == "mine"
    assert quiet.rows[-2]["text"].endswith("question.**")


# -- dry runs, limits, memory


def test_a_dry_run_counts_what_a_run_writes(tool):
    items = (GOLDEN / "items.jsonl").read_bytes()
    rows = tool("lot-prompt", "--variant", "cot,lot2", stdin=items).rows
    done = tool("lot-prompt", "--variant", "cot,lot2", "--dry-run", stdin=items)
    (plan,) = done.rows
    assert (plan["event"], plan["items"], plan["prompts"], plan["skipped"]) == ("plan", 3, 6, 0)
    assert plan["characters"] == sum(len(row["prompt"]) for row in rows)
    assert plan["formats"] == {"letter": 1, "number": 1, "text": 1}
    for one, first in zip(plan["variants"], rows[:2], strict=True):
        assert one["variant"] == first["variant"]
        assert one["characters"] == sum(len(row["prompt"]) for row in rows if row["variant"] == first["variant"])
        assert (one["sample"], one["template_sha"]) == (first["prompt"], first["template_sha"])
        assert first["prompt"] in done.err
    assert tool("lot-prompt", "--dry-run", "--quiet", stdin=items).err == ""
    empty = tool("lot-prompt", "--dry-run", stdin="")
    assert (empty.code, empty.rows[0]["items"], empty.rows[0]["variants"][0]["sample"]) == (0, 0, None)


def test_a_limit_stops_reading_an_open_pipe(tool, tmp_path):
    read_end, write_end = os.pipe()
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        running = tool.start("lot-prompt", "--limit", "2", fds=(read_end, out.fileno(), err.fileno()))
        os.close(read_end)
        os.write(write_end, lines(*MANY[:3]).encode())
        assert running.wait() == 0
        os.close(write_end)
    assert [json.loads(line)["id"] for line in (tmp_path / "out").read_text().splitlines()] == ["q0", "q1"]
    assert tool("lot-prompt", "--limit", "0", stdin="{not read").out == b""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Held, the rows would be 24 MB and what is made of them more; so would skipped ones be."""
    row = lines({"question": "word " * 600, "choices": ["a", "b"]})
    bad = lines({"question": "word " * 600, "choices": ["a"]})

    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        path.write_text((row + bad) * rows)
        code = "import sys; from toolbox.commands.lot_prompt import main; main(sys.argv[1:])"
        arguments = [path, "--on-bad", "skip", "--rejects", tmp_path / "rejects"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        with (tmp_path / "rejects").open() as rejects:
            assert sum(1 for _ in rejects) == rows
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    assert peak(8_000) - peak(10) < 8 << 20


def test_rendering_imports_no_numerical_library(tmp_path):
    (tmp_path / "items.jsonl").write_text(lines(CITY))
    code = (
        "import sys\nfrom toolbox.commands.lot_prompt import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([x for x in ('torch', 'numpy', 'scipy', 'transformers', 'jinja2', 'rich') if x in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "items.jsonl"), "--variant", "all", "--shuffle-choices"], cwd=ROOT,
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 9
    assert done.stderr == "[]\n"


# -- what is refused


def test_choices_of_equal_text_are_kept_and_counted(tool):
    done = tool("lot-prompt", "--quiet", stdin=lines({**CITY, "choices": ["x", "y", "x"]}, CITY, PLAIN))
    assert done.code == 0
    assert len(done.rows) == 3
    assert done.err == "lot-prompt: warning: 1 of 3 items have choices of equal text\n"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"answer": "x"}, "no known shape"),
        ({"question": ""}, "$.question"),
        ({"question": "Q", "choices": ["x"]}, "$.choices: 1 choice"),
        ({"question": "Q", "labels": ["A"]}, "$.labels: 1 label"),
        ({"question": "Q", "choices": ["x", "y"], "labels": ["A", "A"]}, "$.labels"),
        ({"question": "Q", "choices": ["x", "y"], "labels": ["A"]}, "$.labels: 1 label"),
        ({"question": "Q", "choices": ["x", "y"], "answer": "C"}, "$.answer: the answer 'C' is not among"),
        ({"question": "Q", "choices": "xy"}, "$.choices"),
    ],
)
def test_a_bad_item_is_65_with_its_place_or_left_out_and_kept(tool, tmp_path, item, says):
    text = lines(CITY, item, PLAIN)
    failed = tool("lot-prompt", stdin=text)
    assert failed.code == 65
    assert failed.err.startswith("lot-prompt: stdin:2: ")
    assert says in failed.err
    rejects = tmp_path / "rejects"
    skipped = tool("lot-prompt", "--on-bad", "skip", "--rejects", rejects, stdin=text)
    assert skipped.code == 0
    assert skipped.out == tool("lot-prompt", stdin=lines(CITY, PLAIN)).out
    assert "1 bad rows left out" in skipped.err
    assert json.loads(rejects.read_text()) == item


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variant", "lot3"], "--variant lot3: not known"),
        (["--variant", "LOT2"], "--variant LOT2: not known"),
        (["--variant", "cot,lot2,cot"], "cot is there twice"),
        (["--variant", "all,cot"], "cot is there twice"),
        (["--variant", ","], "--variant names nothing"),
        (["--with", "rar"], "'rar' is not one of 'cot', 'none'"),
        (["--format", "word"], "'word' is not one of"),
        (["--layout", "{question} {x}"], "--layout has an unknown slot {x}"),
        (["--layout", "{question}"], "--layout has no {prefix}"),
        (["--map", "question"], "expected NEW=OLD"),
    ],
)
def test_what_does_not_exist_is_2_before_anything_is_read(tool, arguments, says):
    done = tool("lot-prompt", *arguments, stdin="{not read")
    assert (done.code, done.out) == (2, b"")
    assert says in done.err
    if "--variant" in arguments:
        assert "twice" in says or "any of direct, cot, rar, rar+cot, ltm, echo, expand, lot1, lot2" in done.err


def test_files_of_variants_have_their_own_codes(tool, tmp_path):
    mine = tmp_path / "mine.yaml"
    assert tool("lot-prompt", "--template", mine).code == 66
    for text, code, says in [
        (
            "- {id: x, prefix: cot, clause: 'List {facts}'}\n",
            2,
            "mine.yaml:1: the clause of x has an unknown slot {facts}",
        ),
        ("- {id: x}\n", 65, "mine.yaml:1: an entry without `prefix`"),
        ("#" * (2 << 20), 65, "larger than"),
    ]:
        mine.write_text(text)
        done = tool("lot-prompt", "--template", mine, "--variant", "x", stdin=lines(PLAIN))
        assert (done.code, done.out) == (code, b"")
        assert says in done.err


def test_text_that_is_no_text_is_refused(tool):
    done = subprocess.run(
        [sys.executable, ROOT / "bin" / "lot-prompt", "--system", b"\xff"], input=lines(PLAIN).encode(),
        env=environment(), capture_output=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert b"--system is not UTF-8 text" in done.stderr


def test_no_items_no_prompts(tool):
    done = tool("lot-prompt", stdin="")
    assert (done.code, done.out, done.err) == (0, b"", "")
