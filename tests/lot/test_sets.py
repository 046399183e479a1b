"""lot-data: which set, which options, what goes where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from tests.server import ROOT, environment
from toolbox.lot.mcq import shapes_for
from toolbox.lot.sets import KINDS, USES, Options, Tally, check, chosen, units
from toolbox.shell.errors import UsageProblem
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

STREAMS = Streams(0, 1)
THOUGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "thoughts"
GIVEN = {
    "types": "1", "splits": "dev", "sides": "pro", "cells": "L0q0", "distractors": 6, "largest": 2, "name": "x",
    "shape": "aqua", "map_fields": ("a=b",), "on_bad": "skip", "rejects": "r",
}  # fmt: skip
PATHS = {"winobias": ("d",), "winocontrol": ("d",), "bbq": ("a", "b"), "alice": (), "mcq": ("a",), "example": ()}
AQUA = {"question": "2 + 2?", "options": ["A)3", "B)4"], "correct": "B"}


@pytest.fixture
def winobias(tmp_path) -> Path:
    folder = tmp_path / "wino"
    folder.mkdir()
    (folder / "male_occupations.txt").write_text("driver\ncook\nCEO\nlawyer\n")
    (folder / "female_occupations.txt").write_text("cashier\nteacher\nnurse\nclerk\n")
    for side, one, two in (("pro", "he", "she"), ("anti", "she", "he")):
        for kind in "12":
            for split in ("dev", "test"):
                (folder / f"{side}_stereotyped_type{kind}.txt.{split}").write_text(
                    f"1 [The cook] met the nurse as [{one}] left.\n2 The CEO saw [the clerk] and [{two}] saw [{two}].\n"
                    f"3 [The driver] asked the teacher if [{one}] might.\n"
                )
    return folder


def start(*arguments: str | Path, **popen: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "bin" / "lot-data", *map(str, arguments)], env=environment(), **popen
    )


# -- options


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("option", GIVEN)
def test_an_option_that_a_set_has_no_use_for_is_refused(name, option):
    options = Options(set=name, paths=PATHS[name], **{option: GIVEN[option]})
    if option in USES[name]:
        check(options)
    else:
        with pytest.raises(UsageProblem, match=rf"has no use in {name}$") as caught:
            check(options)
        assert all(user in caught.value.advice for user, names in USES.items() if option in names)


def test_every_option_of_the_command_is_used_by_a_set_or_by_all():
    from toolbox.commands.lot_data import SETS, main

    assert tuple(USES) == SETS
    used = {name for names in USES.values() for name in names}
    taken = {parameter.name for parameter in main.params if parameter.expose_value}
    general = {"set", "paths", "limit", "seed", "quiet", "debug", "dry_run", "print_recipe"}
    assert used == set(GIVEN) == taken - general


@pytest.mark.parametrize(
    ("name", "paths", "says"),
    [
        ("winobias", (), "winobias needs the folder of its files"),
        ("winocontrol", ("a", "b"), "winocontrol takes the folder"),
        ("bbq", (), "bbq needs its files"),
        ("alice", ("a",), "alice takes no file"),
        ("example", ("a",), "example takes no file"),
        ("mcq", ("a", "b"), "mcq takes one file"),
    ],
)
def test_a_set_takes_the_paths_it_needs(name, paths, says):
    with pytest.raises(UsageProblem, match=says):
        check(Options(set=name, paths=paths))
    check(Options(set=name, paths=PATHS[name]))


def test_distractors_come_in_pairs():
    with pytest.raises(UsageProblem, match="--distractors 5 is odd"):
        check(Options(set="winocontrol", paths=("d",), distractors=5))


def test_comma_lists_are_strict_and_in_their_own_order():
    known = ("dev", "test")
    assert chosen("split", None, known, ["test"]) == ("test",)
    assert chosen("split", "test, dev", known, ["test"]) == known
    for text, says in (("train", "any of dev, test"), ("dev,dev", "once"), (",", "any of dev, test")):
        with pytest.raises(UsageProblem) as caught:
            chosen("split", text, known, ["test"])
        assert says in caught.value.advice


# -- the command


def test_alone_it_prints_the_examples(tool):
    done = tool("lot-data", stdin=b"")
    assert done.code == 0
    assert [row["id"] for row in done.rows] == [f"example/{n}" for n in range(1, 9)]
    assert done.err == "lot-data: 8 rows\n"
    assert tool("lot-data", "example", stdin=b"").out == done.out


def test_a_limit_takes_whole_units(tool, winobias):
    lines = tool("lot-data", "winobias", winobias, "--limit", 2)
    assert [row["id"][-6:] for row in lines.rows] == ["/1/pro", "1/anti", "/2/pro", "2/anti"]
    assert lines.err.splitlines()[0] == "lot-data: 4 rows of 2 lines"
    sentences = tool("lot-data", "winocontrol", winobias, "--limit", 1, "--cells", "L1q1,L0q2")
    assert [row["id"] for row in sentences.rows] == ["winocontrol/L0q2/test/1", "winocontrol/L1q1/test/1"]
    assert len(tool("lot-data", "alice", "--limit", 3).rows) == 3
    assert tool("lot-data", "alice", "--limit", 0).out == b""


def test_irregular_rows_are_counted_by_kind_and_side(tool, winobias):
    done = tool("lot-data", "winobias", winobias, "--type", "2,1", "--split", "dev,test")
    assert done.err.splitlines() == [
        "lot-data: 24 rows of 12 lines",
        f"lot-data: irregular, kept: spans, 8 rows (4 pro, 4 anti): {KINDS['winobias']['spans']}",
    ]
    assert [row["dataset"] for row in done.rows[::6]] == [f"winobias/t{t}/{s}" for t in "12" for s in ("dev", "test")]
    grid = tool("lot-data", "winocontrol", winobias)
    assert grid.err.splitlines() == [
        "lot-data: 27 rows of 3 sentences",
        f"lot-data: irregular, kept: spans, 1 sentence: {KINDS['winocontrol']['spans']}",
    ]
    assert tool("lot-data", "winobias", winobias, "--quiet").err == ""


def test_marks_in_other_peoples_records_mean_nothing_here():
    tally = Tally("mcq")
    tally.add(
        [{"id": "winobias/1", "dataset": "winobias", "choices": ["a", "a"], "answer": "A", "meta": {"irregular": 7}}]
    )
    assert list(tally.notes()) == ["1 row"]
    assert tally.same_texts == 1


def test_the_seed_moves_the_grid_and_nothing_else(tool, winobias):
    grids = [tool("lot-data", "winocontrol", winobias, "--seed", seed).out for seed in (1, 1, 2)]
    assert grids[0] == grids[1] != grids[2]
    for arguments in (("winobias", winobias), ("alice",), ("example",)):
        assert tool("lot-data", *arguments).out == tool("lot-data", *arguments, "--seed", 9).out


def test_missing_files_are_66_and_say_where_the_set_is_published(tool, tmp_path):
    for name, where in (("winobias", "corefBias"), ("winocontrol", "corefBias"), ("bbq", "BBQ"), ("mcq", "AQuA")):
        done = tool("lot-data", name, tmp_path / "none")
        assert (done.code, done.out) == (66, b""), done.err
        assert "none" in done.err.splitlines()[0]
        assert where in done.err.splitlines()[1]


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("winobias",), ("alice", "--cells", "L0q0"), ("winobias", "x", "--type", "3"),
     ("winocontrol", "x", "--cells", "L3q0"), ("winocontrol", "x", "--distractors", "2"),
     ("winobias", "x", "--map", "a=b"), ("mcq", "x", "--shape", "other"), ("alice", "--max", "0"),
     ("example", "--on-bad", "skip"), ("mcq", "x", "--map", "question")],
)  # fmt: skip
def test_what_does_not_exist_or_fit_is_2(tool, arguments):
    done = tool("lot-data", *arguments)
    assert (done.code, done.out) == (2, b"")
    assert len(done.err.splitlines()) <= 2


def test_bad_records_fail_with_their_place_or_are_left_out_and_kept(tool, tmp_path):
    bad = {**AQUA, "correct": "E"}
    text = "".join(json.dumps(row) + "\n" for row in (AQUA, bad, AQUA)).encode() + b"{oops\n"
    failed = tool("lot-data", "mcq", stdin=text)
    assert failed.code == 65
    assert failed.err.startswith("lot-data: stdin:2: $.correct: the answer 'E'")
    rejects = tmp_path / "rejects"
    done = tool("lot-data", "mcq", "-", "--on-bad", "skip", "--rejects", rejects, stdin=text)
    assert [row["id"] for row in done.rows] == ["mcq/1", "mcq/3"]
    assert "2 bad rows left out" in done.err
    kept = rejects.read_bytes().splitlines()
    assert (json.loads(kept[0]), kept[1]) == (bad, b"{oops")


def test_choices_of_equal_text_are_a_warning_even_when_quiet(tool, rows):
    path = rows("f.jsonl", [AQUA, {**AQUA, "options": ["A)4", "B)4"]}])
    done = tool("lot-data", "mcq", path, "--quiet")
    assert done.code == 0
    assert done.err == "lot-data: warning: 1 of 2 items have choices of equal text\n"


def test_a_set_whose_right_answer_is_always_in_one_place_is_a_warning():
    says = "the right answer is B in 19 of 20 items: lot-prompt --shuffle-choices moves it"
    for answers, warnings in (("B" * 19 + "A", [says]), ("B" * 18 + "AA", []), ("B" * 19, [])):
        tally = Tally("mcq")
        for answer in answers:
            tally.add([{"choices": ["x", "y"], "answer": answer}])
        tally.add([{"answer": "B"}, {"choices": ["x", "y"], "answer": None}, {"choices": ["x", "y"]}])
        assert list(tally.warnings()) == warnings


def test_no_rows_in_no_rows_out(tool):
    done = tool("lot-data", "mcq", stdin=b"")
    assert (done.code, done.out) == (0, b"")


def test_a_dry_run_counts_and_writes_a_plan(tool, winobias, tmp_path):
    done = tool("lot-data", "winocontrol", winobias, "--dry-run")
    (plan,) = done.rows
    assert (plan["event"], plan["rows"], plan["skipped"], plan["irregular"]) == ("plan", 27, 0, {"spans": 1})
    rejects = tmp_path / "rejects"
    tool("lot-data", "mcq", "--on-bad", "skip", "--rejects", rejects, "--dry-run", stdin=b"{\n")
    assert not rejects.exists()


def test_recipes_hold_the_set_and_its_paths(tool, rows, tmp_path):
    path = rows("f.jsonl", [AQUA] * 3)
    printed = tool("lot-data", "mcq", path, "--limit", 2, "--print-recipe")
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(printed.out)
    assert tool("lot-data", "--recipe", recipe, "--print-recipe").out == printed.out
    assert len(tool("lot-data", "--recipe", recipe).rows) == 2
    recipe.write_text("set: mcq\npaths: f.jsonl\n")  # relative to the recipe
    assert len(tool("lot-data", "--recipe", recipe).rows) == 3
    recipe.write_text("set: nonsense\n")
    assert tool("lot-data", "--recipe", recipe).code == 78


def test_the_schema_tells_input_and_output(tool):
    schema = json.loads(tool("lot-data", "--schema").out)
    assert {"Aqua", "BbqRow", "Item"} <= set(schema["input"]["$defs"])
    assert {"id", "question", "dataset"} <= set(schema["output"]["$defs"]["Question"]["required"])


# -- what it costs


def test_rows_leave_although_more_input_may_come():
    with start(
        "mcq", "--limit", "2", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        child.stdin.write((json.dumps(AQUA) + "\n").encode() * 2)
        child.stdin.flush()
        assert child.stdout.read().count(b"\n") == 2  # ends although stdin is open
        assert child.wait(timeout=60) == 0


def test_a_reader_that_leaves_ends_it_silently():
    read_end, write_end = os.pipe()
    with start("alice", "--max", "100", stdout=write_end, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as child:
        os.close(write_end)
        os.read(read_end, 10)
        os.close(read_end)
        assert child.stderr.read() == b""
        assert child.wait() == -13


def test_a_run_imports_nothing_heavy(winobias):
    code = (
        "import sys\nfrom toolbox.commands.lot_data import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as leave: assert leave.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'yaml', 'scipy'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "winocontrol", winobias],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) == 27


def peak(options: Options) -> tuple[int, int]:
    """Rows, and the most memory that was held at once while none of them was kept."""
    reader = RecordReader(shapes_for())
    tracemalloc.start()
    try:
        n = sum(len(unit) for unit in units(options, STREAMS, reader))
        return n, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows(rows):
    few = rows("few.jsonl", [{**AQUA, "rationale": "x" * 500}] * 100)
    many = rows("many.jsonl", [{**AQUA, "rationale": "x" * 500}] * 4000)
    peak(Options(set="mcq", paths=(str(few),)))
    small, large = (peak(Options(set="mcq", paths=(str(path),))) for path in (few, many))
    assert (small[0], large[0]) == (100, 4000)
    assert large[1] < small[1] + 100_000
    n, held = peak(Options(set="alice", largest=60))
    assert n == 7200
    assert held < 200_000


def test_the_summary_of_the_published_sets(tool):
    if not THOUGHTS.is_dir():
        pytest.skip(f"the data of Language of Thoughts is not here ({THOUGHTS})")
    done = tool("lot-data", "winobias", THOUGHTS / "winobias", "--type", "1,2", "--split", "dev,test")
    assert len(done.rows) == 8 * 396
    said = [line.removeprefix("lot-data: ").rsplit(": ", 1)[0] for line in done.err.splitlines()]
    assert said == [
        "3,168 rows of 1,584 lines",
        "irregular, kept: spans, 87 rows (44 pro, 43 anti)",
        "irregular, kept: article, 2 rows (1 pro, 1 anti)",
        "irregular, kept: pronoun, 5 rows (2 pro, 3 anti)",
        "irregular, kept: occupations, 2 rows (1 pro, 1 anti)",
        "irregular, kept: pair, 38 rows (19 pro, 19 anti)",
        "irregular, kept: entity, 4 rows (2 pro, 2 anti)",
    ]
    second = tool("lot-data", "winobias", THOUGHTS / "winobias", "--type", "2")
    assert "warning: the right answer is B in 788 of 792 items" in second.err
    warned = tool("lot-data", "mcq", THOUGHTS / "multichoice" / "commonsenseqa.jsonl.gz")
    assert "warning: 24 of 1221 items have choices of equal text" in warned.err
    kept = Counter(row["dataset"] for row in tool("lot-data", "bbq", THOUGHTS / "bbq").rows)
    assert kept == {"bbq/Age": 3680, "bbq/Nationality": 3080, "bbq/Religion": 1200}
