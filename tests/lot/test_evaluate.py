"""lot-eval's call: rows as they come, what does not fit, lines, tables, report, figures."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.server import ROOT, environment
from toolbox.lot.evaluate import Options, check, run
from toolbox.lot.figures import draw, drawable
from toolbox.lot.lines import Comparison, Judgement
from toolbox.lot.rows import Answers, Seen
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.items import PATH_SHAPES
from toolbox.shell.records import RecordReader
from toolbox.shell.streams import Streams

THOUGHTS = ROOT.parent / "shared" / "data" / "thoughts"


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def path(name: str, variant: str, said: str, **more) -> dict:
    row = {
        "id": name, "variant": variant, "path_id": f"{name}/{variant}/{more.get('sample', 0)}", "model": "m",
        "question": "Which?", "choices": ["red", "green", "blue"], "answer": "B", "completion": said,
        "finish_reason": "stop", "n_completion_tokens": 10,
    }  # fmt: skip
    return {**row, **more}


RIGHT, WRONG, NONE = "It is so. Answer: B", "Answer: (C)", "I would rather not say."


def table(n: int = 12) -> list[dict]:
    """Under ``cot`` every third is right, under ``lot2`` all but every fourth, one in six of the others not read."""
    rows = []
    for i in range(n):
        rows.append(path(str(i), "cot", RIGHT if i % 3 == 0 else WRONG, group=str(i // 2)))
        rows.append(path(str(i), "lot2", RIGHT if i % 4 else NONE, group=str(i // 2), n_completion_tokens=30))
    return rows


def read(rows: list[dict], **how) -> list:
    """The rows as ``Row``s, in process."""
    reader, answers, seen = RecordReader(PATH_SHAPES), Answers(**how), Seen()
    found = []
    for record in reader(io.BufferedReader(io.BytesIO(lines(rows))), "-"):
        answered = answers(record)
        seen.add(record, answered)
        found.append(answered)
    return found


@pytest.fixture
def go(tmp_path_factory):
    """The job in this process: ``go(rows, baseline="cot")`` gives its lines, its warnings, and what was shown."""

    def judge(given: list[dict] | bytes, *, dry_run: bool = False, **options) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("call")
        (folder / "in").write_bytes(given if isinstance(given, bytes) else lines(given))
        warnings, shown = [], []
        reporter = SimpleNamespace(warn=warnings.append, show=shown.append, silent=False)
        with (folder / "in").open("rb") as source, (folder / "out").open("wb") as out:
            call = Invocation("lot-eval", Streams(source.fileno(), out.fileno()), reporter, {}, dry_run)
            run(Options(**options), call)
        text = (folder / "out").read_bytes()
        return SimpleNamespace(
            out=text, rows=[json.loads(line) for line in text.splitlines()], err="\n".join(warnings), shown=shown
        )

    return judge


# -- what does not fit together ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"vote": "plurality,borda"}, "--vote borda: not known"),
        ({"vote": ""}, "--vote names nothing"),
        ({"vote": "mask,mask"}, "mask is there twice"),
        ({"metrics": "accuracy,f1"}, "--metrics f1: not known"),
        ({"metrics": " , "}, "--metrics names nothing"),
        ({"by": "model,variant"}, "variants are told apart anyway"),
        ({"by": "model,model"}, "model is there twice"),
        ({"rows": "-"}, "stdout has the lines already"),
        ({"figure": ("plot.jpg",)}, "cannot write a figure"),
        ({"report": "a.md", "rows": "./a.md"}, "two outputs have the same name"),
    ],
)
def test_what_does_not_fit_together_is_a_usage_error(given, says):
    with pytest.raises(UsageProblem, match=re.escape(says)):
        check(Options(**given))


@pytest.mark.parametrize("option", ["rows", "report", "figure", "rejects"])
def test_a_missing_folder_is_said_before_anything_is_read(go, option):
    with pytest.raises(CannotCreate, match="no such directory"):
        go(b"{oops\n", **{option: ("no/x.svg",) if option == "figure" else "no/x.svg"})


# -- rows -------------------------------------------------------------------------------------------------------------
def test_a_completion_is_read_and_judged_by_the_label():
    rows = [path("1", "cot", RIGHT), path("2", "cot", WRONG), path("3", "cot", NONE)]
    found = [one.row for one in read(rows)]
    assert [(row.answer, row.source, row.correct) for row in found] == [
        ("B", "cue", True), ("C", "cue", False), (None, "none", False),
    ]  # fmt: skip


def test_thoughts_are_read_as_one_text():
    row = {key: value for key, value in path("1", "cot", "").items() if key != "completion"}
    assert read([{**row, "thoughts": ["Green, I think.", "Answer: B"]}])[0].pred == "B"
    assert read([{**row, "thoughts": "Answer: B"}])[0].pred == "B"


def test_a_given_pred_is_taken_unless_it_is_to_be_read_again():
    row = path("1", "cot", WRONG, pred="B")
    assert [one.row.source for one in (*read([row]), *read([row], extract="always"))] == ["pred", "cue"]
    assert read([row], extract="always")[0].row.correct is False
    assert read([{**row, "pred": None}])[0].row.answer is None
    with pytest.raises(BadData, match="no `pred`"):
        read([path("1", "cot", RIGHT)], extract="never")
    with pytest.raises(BadData, match="neither `completion` nor `thoughts`"):
        read([{"id": "1", "pred": "B"}], extract="always")


@pytest.mark.parametrize(("given", "label"), [("B", "B"), ("(b)", "B"), (1, "B"), ("green", "B"), ("mauve", None)])
def test_a_given_pred_may_be_a_label_an_index_or_a_text(given, label):
    found = read([{**path("1", "cot", ""), "pred": given}])[0]
    assert (found.pred, found.row.correct) == (label, label == "B")


def test_a_blank_pred_alone_is_a_row_and_no_pred_at_all_is_none():
    (one,) = read([{"id": "1", "answer": "B", "pred": None}])
    assert (one.row.answer, one.row.correct) == (None, False)
    with pytest.raises(BadData, match="no known shape"):
        read([{"id": "1", "answer": "B"}])


def test_numbers_are_equal_however_they_are_spelled():
    row = {"id": "1", "answer": "1,200", "completion": "Answer: 1200.0 sisters"}
    (one,) = read([row])
    assert one.row.correct is True
    assert read([{**row, "completion": "Answer: 1200"}])[0].row.answer == one.row.answer
    with pytest.raises(BadData, match="to be answered by a number, but the answer is 'B'"):
        read([{"id": "1", "answer": "B", "completion": "x"}], format="number")


def test_choices_asked_for_as_a_number_or_text_are_judged_by_their_text():
    row = {**path("1", "cot", "Answer: 42"), "choices": ["41", "42"], "answer": "B", "format": "number"}
    assert read([row])[0].row.correct is True
    assert read([{**row, "format": "text", "choices": ["a cat", "a dog"], "completion": "Answer: Dog."}])[0].row.correct
    with pytest.raises(BadData, match="neither choices nor labels"):
        read([{"id": "1", "completion": "x", "format": "letter"}])


def test_the_first_or_the_last_stated_answer():
    row = path("1", "cot", "Answer: B\n\nQuestion: next?\nAnswer: C")
    assert [read([row], pick=pick)[0].pred for pick in ("first", "last")] == ["B", "C"]


def test_a_cue_at_the_end_of_the_prompt_belongs_to_the_completion():
    row = path("1", "cot", " B, as leaves show", prompt="Which?\nAnswer:")
    assert read([row])[0].pred == "B"
    assert read([{**row, "prompt": "Which?"}])[0].pred is None


def test_entities_are_compared_by_their_words_not_by_their_labels():
    one, other = read([
        path("1/pro", "cot", "Answer: A", choices=["The nurse", "cook"], meta={"side": "pro"}, group="1"),
        path("1/anti", "cot", "Answer: B", choices=["cook", "nurse"], meta={"side": "anti"}, group="1"),
    ])  # fmt: skip
    assert one.row.chosen == other.row.chosen
    assert one.row.answer != other.row.answer


def test_roles_of_bbq_answers_come_from_meta():
    meta = {"context_condition": "ambig", "polarity": "neg", "target": "A", "unknown": "B", "category": "Age"}
    rows = [path(label, "cot", f"Answer: {label}", meta=meta) for label in "ABC"]
    assert [one.row.role for one in read(rows)] == ["target", "unknown", "other"]
    assert read([{**rows[0], "meta": {**meta, "target": None}}])[0].row.role is None


def test_the_same_path_twice_is_named_with_both_lines(tool, go):
    rows = table()
    done = tool("lot-eval", stdin=lines([*rows, rows[3]]))
    assert (done.code, done.out) == (65, b"")
    assert "stdin:25: $.path_id: the path 1/lot2/0 stands on line 4 already" in done.err
    skipped = go([*rows, rows[3]], on_bad="skip")
    assert skipped.rows == go(rows).rows
    assert "1 bad rows left out" in skipped.err
    # A path id does not name its model: files of two models may be judged together.
    assert len(go([*rows, {**rows[3], "model": "another"}], by="model").rows) == 3


# -- lines ------------------------------------------------------------------------------------------------------------
def test_a_line_a_variant_then_a_line_a_comparison(tool):
    done = tool("lot-eval", "--baseline", "cot", stdin=lines(table()))
    assert done.code == 0, done.err
    cot, lot2, one = done.rows
    for row, shape in ((cot, Judgement), (lot2, Judgement), (one, Comparison)):
        msgspec.convert(row, shape)
    assert (cot["variant"], cot["items"], cot["rows"], cot["correct"]) == ("cot", 12, 12, 4)
    assert (lot2["extraction_rate"], lot2["sources"]) == (0.75, {"cue": 9, "none": 3})
    assert (lot2["accuracy"]["estimate"], lot2["accuracy_read"]["estimate"]) == (0.75, 1)
    assert (lot2["completion_tokens"], lot2["cut_off"], lot2["accuracy"]["groups"]) == (30, 0, 6)
    assert (one["kind"], one["variant"], one["baseline"], one["metric"]) == ("comparison", "lot2", "cot", "accuracy")
    assert one["difference"]["estimate"] == pytest.approx(5 / 12)
    assert (one["better"], one["worse"], one["test"], one["extra_tokens"]) == (6, 1, "sign-flip", 20)
    assert one["p"] == one["p_holm"]
    assert "vs cot" in done.err


def test_facets_are_judged_apart_by_fields_of_the_row_or_its_meta(go):
    rows = [{**row, "meta": {"hard": int(row["id"]) % 2 == 0}, "dataset": "d"} for row in table()]
    done = go(rows, by="dataset,hard", baseline="cot")
    assert [(row["by"], row["variant"]) for row in done.rows] == [
        ({"dataset": "d", "hard": hard}, variant)
        for variants in (("cot", "lot2"), ("lot2",))
        for hard in (True, False)
        for variant in variants
    ]
    assert [row["items"] for row in done.rows[:4]] == [6] * 4
    with pytest.raises(UsageProblem, match="--by speed: no row has such a field"):
        go(rows, by="speed")
    with pytest.raises(BadData, match=r"\$\.meta: neither text nor number"):
        go(rows, by="meta")


def test_one_and_true_are_two_facets(go):
    rows = [path(str(i), "cot", RIGHT, kind=kind) for i, kind in enumerate((1, True, "1", None))]
    assert [row["by"]["kind"] for row in go(rows, by="kind").rows] == [1, True, "1", None]


def test_a_baseline_that_is_not_there_is_2_with_the_variants_that_are(tool):
    done = tool("lot-eval", "--baseline", "direct", stdin=lines(table()))
    assert (done.code, done.out) == (2, b"")
    assert "--baseline direct" in done.err
    assert "cot, lot2" in done.err


def test_a_facet_without_the_baseline_is_warned_about(go):
    rows = [*table(4), path("9", "lot2", RIGHT, model="n")]
    done = go(rows, by="model", baseline="cot")
    assert [row["by"]["model"] for row in done.rows if row["kind"] == "comparison"] == ["m"]
    assert "1 lines are compared with nothing" in done.err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"metrics": "con"}, "`side`"), ({"metrics": "accuracy,bbq"}, "`context_condition`"),
        ({"metrics": "grid"}, "`cell`"), ({"vote": "weighted"}, "`score`"), ({"vote": "mask"}, "`keep`"),
    ],
)  # fmt: skip
def test_metrics_and_votes_that_the_rows_do_not_support_are_2(go, given, says):
    with pytest.raises(UsageProblem, match=says):
        go(table(2), **given)


def test_no_rows_are_no_lines(tool):
    done = tool("lot-eval", "--baseline", "cot", "--vote", "mask", stdin=b"\n")
    assert (done.code, done.out) == (0, b"")
    assert done.err == "lot-eval: no rows\n"


def test_rows_without_a_variant_are_one_variant(go):
    rows = [{**row, "variant": None} for row in table()[::2]]
    del rows[0]["variant"]
    assert [row["variant"] for row in go(rows).rows] == ["none"]


def test_long_names_stay_whole(go):
    name = "v" * 100
    assert go([path("1", name, RIGHT)]).rows[0]["variant"] == name


def test_without_any_gold_there_is_what_was_read_and_how_far_samples_agree(go):
    rows = [{**row, "answer": None, "sample": k, "path_id": None} for row in table(4) for k in (0, 1)]
    done = go(rows)
    assert "no row has an `answer`" in done.err
    for row in done.rows:
        assert row["accuracy"] is None
        assert row["correct"] is None
        assert row["votes"]["plurality"]["agreement"] == 1
    assert [row["extraction_rate"] for row in done.rows] == [1, 0.75]
    with pytest.raises(UsageProblem, match="--figure draws accuracies"):
        go(rows, figure=("x.svg",))


def test_rows_without_a_gold_among_others_are_counted(go):
    rows = table(4)
    rows[0]["answer"] = None
    done = go(rows)
    assert "1 of 8 rows have no `answer`" in done.err
    assert (done.rows[0]["accuracy"]["n"], done.rows[0]["unlabelled"]) == (3, 1)


def test_several_models_under_one_variant_are_warned_about_and_vote_apart(go):
    rows = [
        {**row, "model": model, "sample": k, "path_id": None}
        for row in table(4)
        for model, times in (("m", 3), ("n", 1))
        for k in range(times)
    ]
    done = go(rows, vote="plurality")
    assert "8 questions have answers of several models (m, n) under one variant: see --by model" in done.err
    assert [row["votes"]["plurality"]["n"] for row in done.rows] == [8, 8]
    assert "several models" not in go(rows, by="model").err


def test_votes_are_compared_too(go):
    rows = [{**row, "sample": k, "path_id": None} for row in table() for k in (0, 1, 2)]
    done = go(rows, vote="plurality", baseline="cot")
    assert [row["metric"] for row in done.rows if row["kind"] == "comparison"] == ["accuracy", "vote_plurality"]
    assert all(
        row["votes"]["plurality"]["accuracy"]["estimate"] == row["accuracy"]["estimate"] for row in done.rows[:2]
    )
    assert done.rows[1]["average_accuracy"] == 0.75


def test_what_makes_variants_incomparable_is_warned_about(go):
    rows = table(4)
    rows[1]["answer"], rows[2]["template_sha"], rows[4]["template_sha"] = "C", "aa", "bb"
    rows[7]["pred"] = "mauve"
    said = go(rows).err
    assert "1 ids stand for questions with different answers" in said
    assert "variant cot was asked by several templates" in said
    assert "1 rows have a `pred` that is none of the choices" in said


def test_many_completions_that_were_cut_off_are_warned_about(go):
    rows = [path(str(i), name, RIGHT, finish_reason="length" if i < cut else "stop")
            for name, cut in (("cot", 1), ("lot2", 4)) for i in range(10)]  # fmt: skip
    done = go(rows)
    assert [row["cut_off"] for row in done.rows] == [0.1, 0.4]
    assert "1 lines have more than 10% of completions cut off by the length limit, lot2 40%" in done.err


def test_shuffled_choices_are_the_same_question(go):
    rows = [path("1", "cot", RIGHT), path("1", "lot2", "Answer: A", choices=["green", "red", "blue"], answer="A")]
    done = go(rows, baseline="cot")
    assert done.err == ""
    assert [row["correct"] for row in done.rows[:2]] == [1, 1]


def test_a_negative_score_weighs_nothing(go):
    with pytest.raises(BadData, match=r"\$\.score"):
        go([path("1", "cot", RIGHT, score=-0.5)], vote="weighted")
    assert go([path("1", "cot", RIGHT, score=-0.5)]).rows


def test_the_same_seed_the_same_bytes_and_another_seed_others(go):
    first, again, other = (go(table(60), bootstrap=50, seed=seed).out for seed in (1, 1, 2))
    assert first == again != other


# -- files ------------------------------------------------------------------------------------------------------------
def test_rows_come_back_with_what_was_read_and_judge_alike(go, tmp_path):
    rows = [{**row, "extra": [1, {"x": None}]} for row in table()]
    done = go(rows, rows=str(tmp_path / "judged.jsonl"))
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in before} for row, before in zip(judged, rows, strict=True)] == rows
    assert [(row["pred"], row["pred_source"], row["correct"]) for row in judged[:3]] == [
        ("B", "cue", True), (None, "none", False), ("C", "cue", False),
    ]  # fmt: skip
    assert go((tmp_path / "judged.jsonl").read_bytes(), extract="never").out == done.out


def test_a_failed_call_leaves_no_rows_file(go, tmp_path):
    for given, rows in (({"baseline": "x"}, table()), ({}, [*table(), table()[0]])):
        with pytest.raises((UsageProblem, BadData)):
            go(rows, rows=str(tmp_path / "judged"), **given)
        assert list(tmp_path.iterdir()) == []


def test_a_dry_run_counts_and_writes_no_file(go, tmp_path):
    done = go(table(), dry_run=True, rows=str(tmp_path / "r"), report=str(tmp_path / "m"), rejects=str(tmp_path / "x"))
    assert {key: done.rows[0][key] for key in ("event", "rows", "read", "variants")} == {
        "event": "plan", "rows": 24, "read": 21, "variants": ["cot", "lot2"],
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_report_marks_only_what_stands_after_correction(go, tmp_path):
    rows = [path(str(i), "cot", RIGHT if i < 10 else WRONG) for i in range(40)]
    rows += [path(str(i), "better|v", RIGHT if i < 30 else NONE, n_completion_tokens=25) for i in range(40)]
    rows += [path(str(i), "same", RIGHT if i < 12 else WRONG) for i in range(40)]
    go(rows, baseline="cot", report=str(tmp_path / "r.md"))
    text = (tmp_path / "r.md").read_text()
    cells = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("| ")}
    assert r"+50.0 \[+35.0, +65.0\]\*" in cells[r"better\|v"]
    assert "+5.0" in cells["same"]
    assert r"\*" not in cells["same"]
    assert " 40 | 75.0 | 25 | " in cells[r"better\|v"]  # n, extraction rate, mean tokens
    assert "75.0 \\[59.8, 85.8\\]" in cells[r"better\|v"]
    assert "Holm-corrected p \\< .05" in text


def test_every_metric_has_its_table_in_the_report(go, tmp_path):
    bbq = {"context_condition": "ambig", "polarity": "neg", "target": "A", "unknown": "B"}
    rows = [
        path(f"{i}{name}", variant, RIGHT if i % 3 else "Answer: A", group=f"{i}", meta=meta)
        for i in range(9)
        for name, meta in (
            ("pro", {"side": "pro"}), ("anti", {"side": "anti"}), ("cell", {"cell": "L1q2", "common_wrong": "A"}),
            ("age", {**bbq, "category": "Age"}), ("faith", {**bbq, "category": "Religion"}),
        )
        for variant in ("cot", "echo")
    ]  # fmt: skip
    done = go(rows, baseline="cot", vote="plurality", report=str(tmp_path / "r.md"))
    titles = [line[3:] for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("## ")]
    assert [title.split(":")[0].split(",")[0] for title in titles] == [
        "Answers", "WinoBias", "BBQ", "BBQ", "BBQ", "WinoControl", "WinoControl", "Vote",
    ]  # fmt: skip
    assert len(done.shown) == len(titles) + 1  # the same tables on stderr, and what the mark means
    (line, *_) = done.rows
    assert line["common_wrong"]["estimate"] == pytest.approx(1 / 3)
    assert set(line["bbq"]["categories"]) == {"Age", "Religion"}
    assert line["bbq"]["all"]["s_dis"] is None
    assert line["bbq"]["all"]["s_amb"]["estimate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_figures_are_drawn_and_say_what_they_show(go, tmp_path, suffix):
    file = tmp_path / f"figure.{suffix}"
    go(table(), figure=(str(file),))
    assert file.stat().st_size > 2000
    if suffix == "svg":
        assert "lot2: accuracy 75.00" in file.read_text()


def judged(go, rows: list[dict]) -> tuple[list[Judgement], list[Comparison]]:
    by_kind = {"variant": (Judgement, []), "comparison": (Comparison, [])}
    for row in go(rows, baseline="cot").rows:
        shape, rest = by_kind[row["kind"]]
        rest.append(msgspec.convert(row, shape))
    return by_kind["variant"][1], by_kind["comparison"][1]


def test_a_grid_becomes_heat_maps_of_accuracy_and_gain(go):
    cells = [f"L{level}q{around}" for level in range(3) for around in range(3)]
    rows = [
        path(f"{cell}/{i}", variant, RIGHT if i < 3 + k + place % 3 else WRONG, group=str(i), meta={"cell": cell})
        for place, cell in enumerate(cells)
        for i in range(8)
        for k, variant in enumerate(("cot", "echo"))
    ]
    judgements, comparisons = judged(go, rows)
    figure = draw(judgements, comparisons, None, baseline="cot")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "cot: accuracy (n=8 a cell)", "echo: gain over cot (n=8 a cell)",
    ]  # fmt: skip
    first, second = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert first[::2] == [f"{100 * (3 + place % 3) / 8:.1f}" for place in range(9)]
    assert second[::2] == ["+12.5"] * 9
    assert all(text.startswith("[") for text in (*first[1::2], *second[1::2]))
    assert draw(judgements, [], None).axes[1].get_title(loc="left") == "echo: accuracy (n=8 a cell)"


def test_pairs_are_drawn_as_pro_anti_and_con(go):
    rows = [
        path(f"{i}/{side}", variant, RIGHT if i % (2 + (side == "pro")) else WRONG, group=str(i), meta={"side": side})
        for i in range(12)
        for side in ("pro", "anti")
        for variant in ("cot", "lot2")
    ]
    judgements, comparisons = judged(go, rows)
    assert [one.metric for one in comparisons] == ["accuracy", "con"]
    figure = draw(judgements, comparisons, None)
    assert figure.get_label().startswith("cot: Pro ")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Pro (n=12)", "Anti (n=12)", "Con (n=12)", "95 % interval",
    ]  # fmt: skip
    assert drawable(judgements)
    assert not drawable([])
    with pytest.raises(ValueError, match="no figure to draw"):
        draw([], [], None)


def test_a_figure_that_shows_less_than_all_says_so(go):
    rows = [path(str(i), f"v{k}", RIGHT) for k in range(90) for i in range(2)]
    judgements = [msgspec.convert(row, Judgement) for row in go(rows).rows]
    assert draw(judgements, [], None).get_suptitle() == "(first 80 of 90)"


# -- the whole call ---------------------------------------------------------------------------------------------------
def test_a_hostile_name_breaks_neither_table_nor_report(tool, tmp_path):
    rows = [{**row, "variant": "a|b\x1b[31m\n*x*", "path_id": None} for row in table(4)[::2]]
    done = tool("lot-eval", "--report", tmp_path / "r.md", "--figure", tmp_path / "f.svg", stdin=lines(rows))
    assert done.code == 0, done.err
    assert "\x1b[31m" not in done.err + (tmp_path / "r.md").read_text()
    assert r"| a\|b \*x\* |" in (tmp_path / "r.md").read_text()


def test_base_models_on_alice_through_the_executable():
    """69 of 1,320 real completions are right (LAION-AI/AIW), at a rate the source's own reading gives too."""
    source = THOUGHTS / "aiw" / "base_model_responses.jsonl.gz"
    if not source.is_file():
        pytest.skip(f"the AIW responses are not here ({source})")
    with source.open("rb") as handle:
        done = subprocess.run(
            [sys.executable, ROOT / "bin/lot-eval", "--by", "model", "--format", "number", "--pick", "first"],
            stdin=handle, env=environment(), capture_output=True, check=True,
        )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(row["rows"] for row in found) == 1320
    assert sum(row["correct"] for row in found) == 69
    assert len({row["by"]["model"] for row in found}) == len(found) == 6


def test_help_and_schema_cost_no_numerical_library_and_the_job_no_torch(tmp_path):
    code = (
        "import sys, toolbox.commands.lot_eval as m\n"
        "try: m.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([x for x in ('torch', 'transformers', 'matplotlib', 'numpy') if x in sys.modules], file=sys.stderr)"
    )
    (tmp_path / "rows.jsonl").write_bytes(lines(table()))
    for arguments, loaded in ((["--help"], []), (["--schema"], []), ([tmp_path / "rows.jsonl"], ["numpy"])):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.stderr.splitlines()[-1] == str(loaded)


def test_figures_need_matplotlib_only_where_one_is_asked_for():
    source = Path(ROOT / "toolbox/lot/figures.py").read_text()
    top = [line for line in source.splitlines() if re.match(r"(from|import) ", line)]
    assert not any("matplotlib" in line or "numpy" in line for line in top)
