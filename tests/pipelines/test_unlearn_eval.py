"""unlearn-eval by its executable: stored logs without torch, models, references, round trips."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

from tests.contract.commands import QUESTIONS, lines
from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir

KEYS = [
    "model", "n", "template", "es", "em", "prob", "rouge_l", "truth_ratio", "model_utility",
    "model_utility_geometric", "forget_quality", "ks", "intervals", "uwc", "relearn", "quantized", "membership", "run",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, tiny):
    """Two models and rows with all their variants."""
    (tmp_path / "tiny").symlink_to(tiny)
    tiny_model_dir(tmp_path / "other", seed=5)
    (tmp_path / "rows.jsonl").write_bytes(lines(QUESTIONS))
    return tmp_path


@pytest.fixture
def go(tool, here):
    def run(*arguments, **kw):
        return tool("unlearn-eval", *arguments, cwd=here, **kw)

    return run


SETS = ["--forget", "rows.jsonl", "--retain", "rows.jsonl", "--authors", "rows.jsonl", "--facts", "rows.jsonl"]
SHORT = [*SETS, "--max-new-tokens", "3"]


@pytest.fixture(scope="session")
def stored(tofu):
    folder = tofu.parent / "tofu_eval_logs"
    if not folder.is_dir():
        pytest.skip(f"TOFU's evaluation logs are not here ({folder})")
    return [str(folder / f"llama2-7b_{name}_wd0.01.json.gz") for name in ("full", "retain90", "retain95")]


def test_a_stored_log_needs_no_torch_and_under_three_seconds(stored):
    """CPU-seconds of the whole process, the interpreter's start included."""
    code = (
        "import sys; from toolbox.commands.unlearn_eval import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "--from-log", stored[0], "--reference", stored[1]],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    row = json.loads(done.stdout)
    assert list(row) == KEYS
    assert row["forget_quality"] == pytest.approx(1.834066e-21, rel=5e-7)
    assert row["model_utility"] == pytest.approx(0.585886, abs=5e-7)
    assert row["es"]["forget"] is None


def test_a_reference_with_other_questions_is_65_unless_one_wants_to_look(go, stored):
    refused = go("--from-log", stored[0], "--reference", stored[2])
    assert (refused.code, refused.out) == (65, b"")
    assert "300 against 200" in refused.err
    looked = go("--from-log", stored[0], "--reference", stored[2], "--allow-different-items")
    assert looked.code == 0
    assert "warning: " in looked.err
    assert (looked.rows[0]["ks"]["n"], looked.rows[0]["ks"]["n_reference"]) == (300, 200)


def test_a_log_of_ours_gives_the_very_line_that_the_model_run_printed(go, here):
    """Numbers come back bit for bit, and every figure is a function of them."""
    ran = go(
        "--model", "tiny", "--model", "other", *SHORT, "--log", "a.json", "--log", "b.json", "--reference", "other"
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert [list(row) for row in ran.rows] == [KEYS, KEYS]
    again = go("--from-log", "a.json", "--from-log", "b.json", "--reference", "b.json")
    assert again.out == ran.out
    assert ran.rows[0]["n"] == dict.fromkeys(("forget", "retain", "authors", "facts"), 6)
    assert ran.rows[0]["template"] == "chat"
    assert 0 < ran.rows[0]["prob"]["authors"] < 1
    assert ran.rows[1]["forget_quality"] == 1.0  # the reference against itself
    assert ran.rows[0]["ks"] == {**ran.rows[0]["ks"], "n": 6, "n_reference": 6, "reference": "other"}
    assert "likes" not in ran.out.decode() + ran.err + (here / "a.json").read_text()
    with_text = go("--from-log", "a.json", "--log", "c.json")
    assert (here / "c.json").read_text() == (here / "a.json").read_text()
    assert with_text.rows[0]["es"] == ran.rows[0]["es"]


def test_texts_are_logged_when_asked_for(go, here):
    assert go("--model", "tiny", *SHORT, "--log", "a.json", "--log-text").code == 0
    item = json.loads((here / "a.json").read_text())["sets"]["forget"][0]
    assert item["text"]["prompt"] == QUESTIONS[0]["question"]
    assert item["text"]["answer"] == QUESTIONS[0]["answer"]


def test_the_seed_moves_intervals_only(go):
    one, other = (go("--model", "tiny", *SHORT, "--seed", seed).rows[0] for seed in (1, 2))
    assert one.pop("intervals") != other.pop("intervals")
    assert one == other


def test_metrics_bound_what_is_computed_and_shown(go):
    row = go("--model", "tiny", *SETS, "--metrics", "es,prob").rows[0]
    assert row["es"]["forget_paraphrased"] is not None
    assert row["prob"]["facts"] is not None
    assert set(row["rouge_l"].values()) == set(row["em"].values()) == {None}
    assert row["model_utility"] is None


def test_utility_follows_the_variant_of_the_truth_ratio(go):
    arithmetic = go("--model", "tiny", *SHORT, "--log", "a.json").rows[0]
    geometric = go("--from-log", "a.json", "--utility-truth-ratio", "geometric").rows[0]
    assert arithmetic["truth_ratio"]["variant"] == "arithmetic"
    assert geometric["truth_ratio"]["variant"] == "geometric"
    assert geometric["truth_ratio"]["forget"] == arithmetic["truth_ratio"]["geometric"]["forget"]
    assert geometric["model_utility_geometric"] == arithmetic["model_utility_geometric"]


def test_the_people_are_judged_without_a_download(go):
    done = go("--model", "tiny", "--suite", "people", "--limit", "2", "--max-new-tokens", "2", "--metrics", "es,prob")
    assert done.code == 0, done.err
    assert done.rows[0]["n"] == dict.fromkeys(("forget", "retain", "authors", "facts"), 2)
    assert "template chat" in done.err


def test_an_adapter_and_a_tuned_model_are_asked_as_they_were_taught(go, tool, here):
    tuned = tool(
        "lm-tune", "--model", "tiny", "--out", "adapter", "--lora-r", "2", "--epochs", "1", "--template", "qa",
        "rows.jsonl", cwd=here,
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    done = go("--model", "adapter", "--forget", "rows.jsonl", "--metrics", "es,prob")
    assert done.code == 0, done.err
    row = done.rows[0]
    assert row["template"] == "qa"
    assert (row["run"]["command"], row["run"]["options"]["lora_r"]) == ("lm-tune", 2)
    assert "warning: " not in done.err
    both = go("--model", "adapter", "--model", "tiny", "--forget", "rows.jsonl", "--metrics", "es")
    assert "asked in different ways (templates chat, qa)" in both.err


def without_torch(here, *arguments):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from toolbox.commands.unlearn_eval import main; main(sys.argv[1:])"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "--model", "tiny", *arguments],
        cwd=here, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 65
    return done.stderr


def test_a_bad_line_is_reported_before_any_model_loads(here):
    (here / "bad.jsonl").write_bytes(lines(QUESTIONS[:1]) + b'{"question": "Who?", "answer": 3}\n')
    says = without_torch(here, "--retain", "bad.jsonl")
    assert says.startswith("unlearn-eval: bad.jsonl:2: $.answer: Expected `str`")


def test_a_stored_reference_of_other_questions_is_reported_before_any_model_loads(go, here):
    assert go("--model", "tiny", *SHORT, "--limit", "3", "--log", "a.json").code == 0
    says = without_torch(here, *SHORT, "--reference", "a.json")
    assert "are not the same questions: 6 against 3" in says


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "tiny"], 2, "no rows to judge on"),
        (["--model", "tiny", "--from-log", "rows.jsonl"], 2, "exclude one another"),
        (["--model", "tiny", "--forget", "none.jsonl"], 66, "none.jsonl: No such file"),
        (["--model", "tiny", "--suite", "tofu:none"], 66, "no such directory"),
        (["--model", "tiny", "--model", "none/", "--forget", "rows.jsonl"], 66, "--model none/"),
        (["--model", "tiny", "--forget", "rows.jsonl", "--reference", "none.json"], 66, "--reference none.json"),
        (["--model", "tiny", "--forget", "rows.jsonl", "--log", "none/a.json"], 73, "no such directory"),
        (["--model", "tiny", "--forget", "-", "--retain", "-"], 2, "only one input can be stdin"),
        (["--from-log", "none.json"], 66, "none.json: No such file"),
        (["--from-log", "rows.jsonl"], 65, "rows.jsonl:2: not valid JSON"),
        (["--model", "tiny", "--forget", "rows.jsonl", "--reference", "rows.jsonl"], 65, "rows.jsonl:2: not valid"),
        (["--model", "tiny", "--forget", "rows.jsonl", "--limit", "0"], 2, "0 is below 1"),
    ],
)
def test_errors_are_one_line_with_their_code(go, arguments, code, says):
    done = go(*arguments)
    assert (done.code, done.out) == (code, b"")
    assert says in done.err
    assert len(done.err.splitlines()) <= 2


def test_a_model_in_the_environment_does_not_stand_in_the_way_of_a_log(go):
    assert go("--model", "tiny", *SHORT, "--log", "a.json").code == 0
    done = go("--from-log", "a.json", env={"TOOLBOX_MODEL": "somewhere", "TOOLBOX_LIMIT": "3"})
    assert done.code == 0, done.err
    assert go("--from-log", "a.json", "--limit", "3").code == 2


def test_a_dry_run_counts_the_work_and_writes_nothing(go, here):
    plan = go("--model", "tiny", *SHORT, "--dry-run", "--log", "a.json").rows[0]
    assert plan["event"] == "plan"
    assert plan["rows"] == dict.fromkeys(("forget", "retain", "authors", "facts"), 6)
    assert (plan["models"][0]["pairs"], plan["models"][0]["generations"]) == (4 * 6 * 5 - 2 * 6, 4 * 6)
    assert not (here / "a.json").exists()
    assert go("--model", "tiny", *SHORT, "--log", "a.json").code == 0
    logs = go("--from-log", "a.json", "--dry-run").rows[0]["logs"]
    assert logs == [{"model": "tiny", "n": plan["rows"]}]
