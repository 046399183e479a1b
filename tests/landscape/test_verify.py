"""landscape-verify: rows pass through with held-out scores, and what does not fit together is refused."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.landscape.twins import SCORING, demo_features, demo_rows, random_features
from tests.server import ROOT, Client, Result, environment
from toolbox.commands.landscape_verify import main
from toolbox.landscape.data import Paths
from toolbox.landscape.features import Features, PathScores, QuestionScores, assemble, write_features
from toolbox.landscape.verifier import fit, path_features, read_verifier
from toolbox.landscape.wording import Wording
from toolbox.shell.items import ThoughtPath
from toolbox.shell.records import Record
from toolbox.shell.streams import Streams

LABELS = "ABCDE"
QUICK = ("--verifier", "logreg", "--shuffles", "2")


def rows_of(features: Features) -> list[dict]:
    """The paths that such features are made from."""
    rows = []
    for number, path_id in enumerate(features.path_ids):
        of = int(features.question[number])
        row = {
            "id": features.question_ids[of],
            "path_id": path_id,
            "question": f"Which is number {of}?",
            "choices": [f"thing {j}" for j in range(features.k[of])],
            "thoughts": [f"Thought {i}." for i in range(features.n_steps[number])],
            "pred": LABELS[features.pred[number]] if features.pred[number] >= 0 else None,
            "extra": {"big": 2**70, "x": [number, None]},
        }
        row |= {"answer": LABELS[features.gold[of]]} if features.gold[of] >= 0 else {}
        rows.append(row | {name: values[number] for name, values in features.facets.items()})
    return rows


def without_gold(features: Features) -> Features:
    """Features that let the rows say what is right."""
    return dataclasses.replace(
        features, gold=np.full_like(features.gold, -1), correct=np.full_like(features.correct, -1)
    )


def telling(questions: int = 12, seed: int = 0) -> Features:
    """Paths whose last states are nearer to what they answer where that is right: something to learn."""
    draw = np.random.default_rng(seed)
    asked, paths = [], []
    for number in range(questions):
        asked.append(QuestionScores(f"q{number}", number % 4, -draw.gamma(3, 1, 4), np.ones(4, int)))
        for sample in range(6):
            pred = number % 4 if sample < 3 else (number + 1) % 4
            logprob = -draw.gamma(9, 0.2, (3, 4))
            logprob[1:, pred] += 1.5 if sample < 3 else 0.0
            paths.append(
                PathScores(
                    f"q{number}/{sample}", number, pred, {}, logprob, np.ones((3, 4), int), -np.ones(3), np.ones(3)
                )
            )
    return assemble(asked, paths, SCORING)


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs the command on features and the rows that they are made from, or on others.

    In this process, with pipes of its own: scikit-learn takes two seconds to import, which a new process would pay for
    every call. ``test_the_demo_...`` and the contract suite run it as a process.
    """

    folder: Path
    captured: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def __call__(self, features: Features, *more: object, rows: list[dict] | None = None, quick: bool = True) -> Result:
        write_features(self.folder / "f.safetensors", features)
        text = "".join(json.dumps(row) + "\n" for row in (rows_of(features) if rows is None else rows))
        stdin, stdout = self.folder / "stdin", self.folder / "stdout"
        stdin.write_text(text)
        options = ["--features", "f.safetensors", *(QUICK if quick else ()), *map(str, more)]
        with stdin.open("rb") as source, stdout.open("wb") as sink, self.patch.context() as patch:
            patch.chdir(self.folder)
            patch.setattr("toolbox.shell.command.claim", lambda: Streams(source.fileno(), sink.fileno()))
            for name in ("die_with_parent", "quiet_environment"):  # meant for a process that is the command's own
                patch.setattr(f"toolbox.shell.launch.{name}", lambda *_: None)
            self.captured.readouterr()
            with pytest.raises(SystemExit) as left:
                main.main(options)
        return Result(int(left.value.code or 0), stdout.read_bytes(), self.captured.readouterr().err)


@pytest.fixture
def go(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path, capfd, monkeypatch)


def scores(done: Result) -> list[float | None]:
    assert done.code == 0, done.err
    return [row["score"] for row in done.rows]


# --- what leaves ---


def test_every_row_leaves_as_it_came_with_a_score_between_0_and_1(go: Runner):
    features = random_features(1, k=(4,) * 6)
    rows = rows_of(features)
    done = go(features)
    assert [{key: row[key] for key in before} for row, before in zip(done.rows, rows, strict=True)] == rows
    assert {tuple(set(row) - set(before)) for row, before in zip(done.rows, rows, strict=True)} == {("score",)}
    assert all(0 <= score <= 1 for score in scores(done))
    assert len(set(scores(done))) > 20


def test_rows_leave_in_their_own_order_which_changes_no_score(go: Runner):
    features = random_features(1, k=(4,) * 6)
    plain = {row["path_id"]: row["score"] for row in go(features).rows}
    rows = rows_of(features)[::-1]
    turned = go(features, rows=rows)
    assert [row["path_id"] for row in turned.rows] == [row["path_id"] for row in rows]
    assert {row["path_id"]: row["score"] for row in turned.rows} == plain


def test_answers_are_read_where_there_is_no_pred_and_left_alone_where_there_is(go: Runner):
    features = random_features(1, k=(4,) * 6)
    rows = rows_of(features)
    for row in rows[::3]:
        row["thoughts"][-1:] = [f"Answer: {row.pop('pred')}"]
    rows[1]["pred"] = LABELS.index(rows[1]["pred"])  # an index from 0 is the same answer
    rows[2]["pred"] = None
    done = go(features, rows=rows)
    assert [row["pred"] for row in done.rows[::3]] == [LABELS[one] for one in features.pred[::3]]
    assert (done.rows[1]["pred"], done.rows[2]["pred"]) == (rows[1]["pred"], None)
    assert "1 paths have another answer in" in done.err
    assert "1 path without an answer: wrong" in done.err


def test_a_path_without_thoughts_has_no_score_and_keeps_its_vote(go: Runner):
    features = random_features(4, k=(4,) * 6, shortest=0, longest=5)
    done = go(features)
    empty = [n == 0 for n in features.n_steps]
    assert 0 < sum(empty) < 10
    assert [score is None for score in scores(done)] == empty
    assert f"{sum(empty)} paths without thoughts: no score" in done.err


def test_scores_are_held_out(go: Runner):
    """What is right in a question changes the scores of all other questions, never its own."""
    features = without_gold(random_features(2, k=(4,) * 5))
    rows = rows_of(random_features(2, k=(4,) * 5))
    before = np.array(scores(go(features, rows=rows)))
    mine = np.array([row["id"] == "q3" for row in rows])
    other = next(label for label in "ABCD" if label not in {row["pred"] for row in rows if row["id"] == "q3"})
    for row in rows:
        if row["id"] == "q3":
            row["answer"] = other
    after = np.array(scores(go(features, rows=rows)))
    np.testing.assert_array_equal(after[mine], before[mine])
    assert (after[~mine] != before[~mine]).all()


def test_groups_are_held_out_whole(go: Runner):
    features = without_gold(random_features(2, k=(4,) * 6))
    rows = rows_of(random_features(2, k=(4,) * 6))
    for row in rows:
        row["meta"] = {"book": "one" if row["id"] in ("q1", "q4") else row["id"]}
    before = np.array(scores(go(features, "--group", "book", rows=rows)))
    for row in rows:
        if row["id"] == "q4":
            row["answer"] = next(label for label in "ABCD" if label != row["answer"])
    after = np.array(scores(go(features, "--group", "book", rows=rows)))
    mine = np.array([row["meta"]["book"] == "one" for row in rows])
    np.testing.assert_array_equal(after[mine], before[mine])
    assert (after[~mine] != before[~mine]).any()


def test_questions_without_an_answer_are_scored_by_what_the_others_teach(go: Runner):
    features = without_gold(random_features(2, k=(4,) * 6))
    rows = rows_of(random_features(2, k=(4,) * 6))
    unknown = np.array([row["id"] == "q5" for row in rows])
    for row in rows:
        if row["id"] == "q5":
            del row["answer"]
    done = go(features, rows=rows)
    x = path_features(features, features.pred)
    correct = np.array([row["pred"] == row.get("answer") for row in rows])
    expected = fit(x[~unknown], correct[~unknown], "logreg").predict(x[unknown])
    np.testing.assert_array_equal(np.array(scores(done))[unknown], expected)
    assert "6 paths of questions without a right answer: scored, not judged" in done.err
    assert "30 paths of 5 questions judged" in done.err


@pytest.mark.slow
def test_the_seed_decides_a_forest(go: Runner):
    features = random_features(1, k=(4,) * 4, paths=4)
    options = ("--verifier", "rf", "--shuffles", "0", "--folds", "2")
    assert scores(go(features, *options)) != scores(go(features, *options, "--seed", 1))


def test_lot_eval_takes_the_scores_and_finds_the_same_accuracies(go: Runner, tool: Client, tmp_path: Path):
    features = random_features(6, k=(4,) * 8)
    report = tmp_path / "r.md"
    done = go(features, "--report", report)
    judged = tool("lot-eval", "--vote", "plurality,weighted", stdin=done.out)
    votes = {row["variant"]: row["votes"] for row in judged.rows if row["kind"] == "variant"}
    text = report.read_text()
    for kind in ("plurality", "weighted"):
        mean = np.mean([votes[variant][kind]["accuracy"]["estimate"] for variant in ("cot", "lot2")])
        assert f"| {kind} | {100 * mean:.1f} " in text, (kind, text)


# --- what is said ---


def test_what_can_be_learned_is_called_skill(go: Runner, tmp_path: Path):
    done = go(telling(24), "--shuffles", 5, "--report", tmp_path / "r.md")
    assert "Skill: within a question its AUC is" in done.err
    assert "No skill" not in done.err
    assert "- **Skill: within a question" in (tmp_path / "r.md").read_text()


def test_noise_is_called_none(go: Runner, tmp_path: Path):
    done = go(random_features(1, k=(4,) * 30), "--shuffles", 5, "--report", tmp_path / "r.md")
    assert "No skill: within a question its AUC is" in done.err
    assert "Gain: " not in done.err  # most votes are wrong here, so that random weights make some of them right
    assert "points from the plurality (p .008), by scores without skill" in done.err
    text = (tmp_path / "r.md").read_text()
    assert text.count("\n| ") == 2 + 5 + 7  # two heads; verifier, control, three free scores; six accuracies, the gain
    assert "No skill" in text
    assert "share a fold" in text


def test_quiet_is_quiet(go: Runner):
    assert go(random_features(1, k=(4,) * 5), "--quiet").err == ""


def test_strange_preds_are_a_warning(go: Runner):
    features = random_features(1, k=(4,) * 5)
    rows = rows_of(features)
    rows[0]["pred"] = "none of these"
    done = go(features, "--quiet", rows=rows)
    assert done.rows[0]["pred"] == "none of these"
    assert done.err.splitlines() == [
        "landscape-verify: warning: 1 rows have a `pred` that is none of the choices: taken for no answer"
    ]


def test_a_dry_run_counts_and_fits_nothing(go: Runner, tmp_path: Path):
    features = random_features(4, k=(4,) * 6, shortest=0, longest=5)
    done = go(features, "--dry-run", "--save", tmp_path / "v")
    (plan,) = done.rows
    assert not (tmp_path / "v").exists()
    assert {name: plan[name] for name in ("event", "paths", "questions", "numbers", "folds", "fits")} == {
        "event": "plan", "paths": 36, "questions": 6, "numbers": 50, "folds": 5, "fits": 5 * 3 + 1,
    }  # fmt: skip
    assert plan["with_thoughts"] == int((features.n_steps > 0).sum())


# --- saved and loaded ---


@pytest.mark.parametrize("kind", ["rf", "logreg"])
def test_a_saved_verifier_is_that_of_all_paths_and_scores_others(go: Runner, tmp_path: Path, kind: str):
    features, saved = random_features(1, k=(4,) * 5), tmp_path / "v.safetensors"
    assert go(features, "--verifier", kind, "--folds", 2, "--shuffles", 0, "--save", saved).code == 0
    stored = read_verifier(saved)
    expected = fit(path_features(features, features.pred), features.correct == 1, kind)
    other = random_features(9, k=(4,) * 5)
    rows = [row | {"id": "new " + row["id"]} for row in rows_of(other)]
    new = dataclasses.replace(other, question_ids=tuple(f"new {one}" for one in other.question_ids))
    done = go(new, "--load", saved, rows=rows, quick=False)
    x = path_features(other, other.pred)
    np.testing.assert_array_equal(scores(done), expected.predict(x))
    np.testing.assert_array_equal(stored.model.predict(x), expected.predict(x))
    assert (stored.paths, stored.right) == (30, int((features.correct == 1).sum()))
    assert "loaded, nothing was fitted" in done.err
    assert "skill" in done.err.lower()


def test_equal_runs_save_equal_bytes_without_ids_or_texts(go: Runner, tmp_path: Path):
    for name in "ab":
        assert go(random_features(1, k=(4,) * 5), "--save", tmp_path / name).code == 0
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    for private in (b"q0", b"number 0", b"thing", bytes(tmp_path)):
        assert private not in raw
    assert json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["toolbox"])["inputs"]


def test_questions_that_a_loaded_verifier_has_seen_show_nothing(go: Runner, tmp_path: Path):
    features = telling(24)
    assert go(features, "--save", tmp_path / "v").code == 0
    done = go(features, "--load", tmp_path / "v", quick=False)
    assert "Nothing is shown: the verifier was trained on 24 of these 24 questions." in done.err
    assert "Skill" not in done.err


def test_with_a_loaded_verifier_paths_need_no_answers(go: Runner, tmp_path: Path):
    features = random_features(1, k=(4,) * 5)
    assert go(features, "--save", tmp_path / "v").code == 0
    rows = [{key: value for key, value in row.items() if key != "answer"} for row in rows_of(features)]
    done = go(without_gold(features), "--load", tmp_path / "v", rows=rows, quick=False)
    assert None not in scores(done)
    assert "the scores not judged" in done.err
    report = go(without_gold(features), "--load", tmp_path / "v", "--report", tmp_path / "r", rows=rows, quick=False)
    assert (report.code, report.out) == (65, b"")
    assert "needs answers" in report.err


def test_a_summary_verifier_scores_questions_of_another_number_of_choices(go: Runner, tmp_path: Path):
    saved = tmp_path / "v"
    assert go(random_features(1, k=(4, 4, 5, 3)), "--feature-set", "summary", "--save", saved).code == 0
    assert None not in scores(go(random_features(2, k=(2, 2)), "--load", saved, quick=False))


# --- what does not fit together ---


def changed(**values: object) -> Callable[[list[dict]], object]:
    return lambda rows: rows[0].update(values)


BAD_ROWS = [
    (changed(path_id="other"), "f.safetensors: has no path 'other' (1 in all)"),
    (lambda rows: rows.pop(), "f.safetensors: has a path that did not come in: 'q4/5'"),
    (changed(path_id="q0/1"), "stdin:2: $.path_id: the path q0/1 stands on line 1 already"),
    (lambda rows: rows[0]["thoughts"].append("One more."), "thoughts there and"),
    (changed(choices=["a", "b", "c", "d", "e"]), "stdin:2: $.choices: other choices than earlier rows of the id q0"),
    (changed(choices=["a"]), "stdin:1: $.choices: no choices, at least two|stdin:1: $.choices: 1 choice"),
    (lambda rows: [row.update(choices=list("xyzuv")) for row in rows[:6]], "has 4 choices there and 5 here"),
    (lambda rows: [row.update(choices=None) for row in rows], "stdin:1: $.choices: no `choices`"),
    (changed(answer="E"), "stdin:1: $.answer: the answer 'E' is not among the labels"),
    (lambda rows: [row.update(answer="ABCD"["BCDA".index(row["answer"])]) for row in rows[:6]], "has the answer"),
    (lambda rows: rows[0].update(answer="ABCD"["BCDA".index(rows[0]["answer"])]), "another answer than earlier rows"),
    (lambda rows: [row.update(id="qq") for row in rows[:6]], "answers question 'q0' there and 'qq' here"),
    (lambda rows: rows.clear(), "stdin: is empty: no paths"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ROWS, ids=[message[:40] for _, message in BAD_ROWS])
def test_rows_that_are_not_those_of_the_features_are_65_with_the_difference(go: Runner, change, message):
    features = random_features(1, k=(4,) * 5)
    rows = rows_of(features)
    change(rows)
    done = go(features, rows=rows)
    assert (done.code, done.out) == (65, b"")
    assert any(one in done.err for one in message.split("|")), done.err
    assert len(done.err.splitlines()) <= 2


def test_other_thoughts_under_the_same_ids_are_65(go: Runner):
    features = random_features(1, k=(4,) * 5)
    rows, known = rows_of(features), Paths(Wording(), scored=False)
    for number, row in enumerate(rows):
        known.add(Record(row, msgspec.convert(row, ThoughtPath), row["id"], "stdin", number + 1, number))
    options = {**SCORING.options, "paths": known.texts_digest()}
    features = dataclasses.replace(features, scoring=dataclasses.replace(SCORING, options=options))
    assert go(features).code == 0
    rows[0]["thoughts"][0] = "Another thought."
    done = go(features, rows=rows)
    assert (done.code, done.out) == (65, b"")
    assert "was made from other thoughts or choices" in done.err


def test_without_anything_to_learn_from_it_is_65(go: Runner):
    features = random_features(1, k=(4,) * 5)
    right = random_features(1, k=(4,) * 5, outcomes=("correct",))
    unlabelled = [{key: value for key, value in row.items() if key != "answer"} for row in rows_of(features)]
    one = random_features(1, k=(4,))
    mixed = random_features(1, k=(4, 5, 3))
    for found, message in (
        (go(without_gold(features), rows=unlabelled), "needs answers: no row has an `answer`"),
        (go(right), "all 30 paths are right: there is nothing to tell apart"),
        (go(one), "1 question with an answer and thoughts, at least two are needed"),
        (go(mixed), "--feature-set summary"),
    ):
        assert (found.code, found.out) == (65, b"")
        assert message in found.err
    assert None not in scores(go(mixed, "--feature-set", "summary"))


def test_a_verifier_of_other_features_is_65(go: Runner, tmp_path: Path):
    features = random_features(1, k=(4,) * 5)
    assert go(features, "--save", tmp_path / "v").code == 0
    load = ("--load", tmp_path / "v")
    for scoring, message in (
        ({"model": "other"}, "was scored with model 'other', what --load"),
        ({"template": "{label}"}, "was scored with template '{label}'"),
        ({"options": {"drop_answer_thought": True}}, "was scored with drop_answer_thought True"),
        ({"options": {**SCORING.options, "system": "ab" * 32}}, "learned from with None"),
    ):
        other = dataclasses.replace(features, scoring=dataclasses.replace(SCORING, **scoring))
        done = go(other, *load, quick=False)
        assert (done.code, done.out) == (65, b""), done.err
        assert message in done.err
    elsewhere = dataclasses.replace(
        SCORING, dtype="bf16", method="naive", options={**SCORING.options, "device": "cuda"}
    )
    assert go(dataclasses.replace(features, scoring=elsewhere), *load, quick=False).code == 0
    five = go(random_features(1, k=(5,) * 5), *load, quick=False)
    assert (five.code, five.out) == (65, b"")
    assert f"has questions of 5 choices, --load {tmp_path / 'v'} is for 4" in five.err
    wrong = go(features, "--load", tmp_path / "f.safetensors", quick=False)
    assert wrong.code == 65
    assert "is not a verifier" in wrong.err


def test_skipping_leaves_out_bad_rows_and_paths_that_were_not_scored(go: Runner, tmp_path: Path):
    features = random_features(1, k=(4,) * 5)
    rows = rows_of(features)
    strange = rows[0] | {"path_id": "too long for the model"}
    bad = rows[0] | {"path_id": "bad", "choices": ["alone"]}
    done = go(features, "--on-bad", "skip", "--rejects", tmp_path / "rejects", rows=[strange, bad, *rows])
    assert scores(done) == scores(go(features))
    assert "warning: 2 bad rows left out" in done.err
    left = [json.loads(line) for line in (tmp_path / "rejects").read_text().splitlines()]
    assert sorted(row["path_id"] for row in left) == ["bad", "too long for the model"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--group", "chapter"], 2, "--group chapter: no row has such a field"),
        (["--group", "variant"], 65, "another variant than earlier rows of the id q0, which folds would divide"),
        (["--group", "extra"], 65, "stdin:1: $.extra: neither text nor number"),
        (["--load", "v", "--points", "3"], 2, "--points has no use with --load"),
        (["--load", "v", "--save", "w"], 2, "--save has no use with --load"),
        (["--load", "-"], 2, "--load -: stdin has the paths"),
        (["--load", "none"], 66, "none: No such file"),
        (["--save", "-"], 2, "--save -: stdout has the paths already"),
        (["--report", "no/where.md"], 73, "no such directory"),
        (["--save", "x", "--report", "x"], 2, "--report x: is --save as well"),
        (["--folds", "1"], 2, "1 is below 2"),
        (["--points", "0"], 2, "0 is below 1"),
    ],
)
def test_options_that_do_not_fit(go: Runner, options, code, message):
    done = go(random_features(1, k=(4,) * 3), *options, quick="--load" not in options)
    assert (done.code, done.out) == (code, b""), done.err
    assert message in done.err


def test_an_existing_verifier_is_73_and_survives(go: Runner, tmp_path: Path):
    features, saved = random_features(1, k=(4,) * 5), tmp_path / "v"
    assert go(features, "--save", saved).code == 0
    before = saved.read_bytes()
    again = go(features, "--save", saved, "--points", 3)
    assert (again.code, again.out) == (73, b"")
    assert "--overwrite" in again.err
    assert saved.read_bytes() == before
    assert go(features, "--save", saved, "--points", 3, "--overwrite").code == 0
    assert saved.read_bytes() != before


@pytest.mark.slow
def test_nobody_to_read_the_rows_ends_it_silently_and_saves_nothing(tmp_path: Path):
    features = random_features(1, k=(4,) * 5)
    write_features(tmp_path / "f", features)
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows_of(features)))
    command = f"{ROOT}/bin/landscape-verify --features f --save v --verifier logreg --shuffles 0 rows; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"trap '' TERM; {{ {command}; }} | true"], cwd=tmp_path, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "141\n"
    assert not (tmp_path / "v").exists()


# --- a whole process ---

WATCHED = """
import sys
from toolbox.commands.landscape_verify import main
try:
    main(sys.argv[1:])
finally:
    found = [name for name in ("torch", "transformers", "numpy", "sklearn", "scipy") if name in sys.modules]
    print("modules:", *found, file=sys.stderr)
"""


def watched(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), input=stdin, capture_output=True)


def modules(done: subprocess.CompletedProcess) -> list[str]:
    return done.stderr.decode().splitlines()[-1].split()[1:]


@pytest.mark.parametrize("arguments", [["--help"], ["--schema"], ["--version"], ["--no-such-option"]])
def test_help_and_schema_load_no_numerical_library(arguments):
    assert modules(watched(*arguments)) == []


def test_scores_need_no_torch(tmp_path: Path):
    features = random_features(1, k=(4,) * 5)
    write_features(tmp_path / "f", features)
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows_of(features)))
    done = watched("--features", tmp_path / "f", *QUICK, tmp_path / "rows")
    assert done.returncode == 0, done.stderr
    assert modules(done) == ["numpy", "sklearn", "scipy"]


@pytest.mark.slow
def test_the_demo_takes_less_than_a_minute_and_has_no_skill(tmp_path: Path):
    write_features(tmp_path / "f", demo_features())
    rows = [row | {"pred": row["reference_pred"]} for row in demo_rows()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = watched(
        "--features", tmp_path / "f", "--save", tmp_path / "v", "--report", tmp_path / "r.md",
        stdin="".join(json.dumps(row) + "\n" for row in rows).encode(),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    said, text = done.stderr.decode(), (tmp_path / "r.md").read_text()
    for where in (said, text):
        assert "No skill: within a question its AUC is .3" in where
        assert "No gain" in where
        assert "4 questions with both right and wrong paths: too few to show skill" in where
    # The control of the same forests, a line of its own: mean of 20 within-question AUCs.
    control = next(line for line in text.splitlines() if line.startswith("| labels shuffled, mean of 20 |"))
    assert abs(float(control.split("|")[2].split()[0]) - 0.5) < 0.1
    after_rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [{key: row[key] for key in before} for row, before in zip(after_rows, rows, strict=True)] == rows
    verifier = read_verifier(tmp_path / "v")
    assert (verifier.paths, verifier.right, len(verifier.seen), verifier.recipe.n_features) == (50, 28, 5, 60)
