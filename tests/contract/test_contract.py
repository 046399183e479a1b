"""What every command promises when all goes well, run over all of them. What it promises when not: tests/faults."""

from __future__ import annotations

import json

import msgspec
import pytest

from tests.contract.commands import CASES, lines
from tests.server import Client

ALL = sorted(CASES.values(), key=lambda case: case.name)
WRITERS = [case for case in ALL if not case.trainer]
FILTERS = [case for case in WRITERS if not case.sums_up]
TRAINERS = [case for case in ALL if case.trainer]
WITH_MODEL = [case for case in ALL if case.model]


def every(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


TIMINGS = {"seconds", "labels_per_s", "tokens_per_s", "peak_mem_mb"}


def without_timings(rows: list[dict], more: set[str] = frozenset()) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMINGS | more} for row in rows]


@pytest.fixture
def go(tool: Client, tiny, tmp_path):
    """Run a case's short run with more arguments."""

    def run(case, *more, stdin=None, folder=None, **kw):
        where = tmp_path if folder is None else folder
        where.mkdir(exist_ok=True)
        return tool(
            case.name, *case.arguments(tiny, where), *more, stdin=lines(case.good) if stdin is None else stdin, **kw
        )

    return run


@every(ALL)
def test_help_version_and_schema(tool, case):
    for flag in ("--help", "-h"):
        shown = tool(case.name, flag)
        assert shown.code == 0
        assert shown.out.startswith(f"Usage: {case.name}".encode())
        assert b"Examples:" in shown.out
        assert shown.err == ""
    assert tool(case.name, "--version").out.startswith(f"{case.name} (toolbox-ten) ".encode())
    schema = json.loads(tool(case.name, "--schema").out)
    assert schema["input"]["$defs"]
    assert schema["output"]["$defs"]


@every(ALL)
def test_stdout_is_pure_jsonl_and_stderr_is_for_people(go, case):
    done = go(case)
    assert done.code == 0, done.err
    assert done.rows
    assert "Traceback" not in done.err
    quiet = go(case, "--quiet", *case.again)
    assert quiet.code == 0
    assert all("warning: " in line for line in quiet.err.splitlines())


@every(ALL)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(go, case, tmp_path):
    first, again = (go(case, *case.stochastic, "--seed", "7", folder=tmp_path / name) for name in "ab")
    other = go(case, *case.stochastic, "--seed", "8", folder=tmp_path / "c")
    if not case.trainer:
        assert first.out == again.out
        assert (first.out != other.out) == case.seeded
        return
    for name in case.artefacts:
        one, two, three = ((tmp_path / x / "out" / name).read_bytes() for x in "abc")
        assert one == two, name
        assert (one != three) == (name == case.artefacts[0]), name
    strip = [without_timings(run.rows, {"settings", "model"}) for run in (first, again)]
    assert strip[0] == strip[1]


AMONG_THE_QUICK = ("lm-generate", "lm-tune")  # one of a kind; the others are slow tests


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in AMONG_THE_QUICK else pytest.mark.slow)
        for case in WITH_MODEL
    ],
)
def test_two_processes_give_what_one_gives(go, case, tmp_path):
    more = ["--optimizer", "sgd"] if case.trainer else []  # AdamW magnifies rounding
    one, two = go(case, *more, folder=tmp_path / "one"), go(case, *more, "-j", "2", folder=tmp_path / "two")
    assert two.code == 0, two.err
    if not case.trainer:
        assert two.out == one.out
        return
    assert [row["processes"] for row in two.rows if row["event"] == "start"] == [2]
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "out" / case.artefacts[0]) for name in ("one", "two"))
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= 1e-6


@every(ALL)
def test_a_dry_run_writes_a_plan_and_nothing_else(go, case, tmp_path):
    done = go(case, "--dry-run")
    assert done.code == 0, done.err
    assert [row["event"] for row in done.rows] == ["plan"]
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@every(ALL)
def test_a_flag_wins_over_the_environment_over_a_recipe_which_can_be_printed(go, tool, case, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 3\n")
    printed = go(case, "--recipe", recipe, "--print-recipe")
    assert "seed: 3" in printed.out.decode().splitlines()
    assert "seed: 4" in go(case, "--recipe", recipe, "--seed", "4", "--print-recipe").out.decode().splitlines()
    env = {"TOOLBOX_SEED": "5"}
    assert "seed: 5" in go(case, "--recipe", recipe, "--print-recipe", env=env).out.decode().splitlines()
    recipe.write_bytes(printed.out)
    assert tool(case.name, "--recipe", recipe, "--print-recipe").out == printed.out


@every(FILTERS)
def test_rows_leave_in_order_with_all_their_fields(go, case):
    done = go(case)
    assert [row["id"] for row in done.rows] == [row["id"] for row in case.good]
    for line, before in zip(done.out.splitlines(), case.good, strict=True):
        after = msgspec.json.decode(line)
        kept = {key: value for key, value in before.items() if key not in case.replaces}
        assert {key: after[key] for key in kept} == kept
        assert set(before) <= set(after)


@every(TRAINERS)
def test_events_tell_the_run_and_hold_no_text(go, case, tmp_path):
    done = go(case)
    kinds = [row["event"] for row in done.rows]
    assert kinds[0] == "start"
    assert kinds[-1] == "done"
    assert kinds.count("step") == done.rows[0]["steps"] == done.rows[-1]["steps"]
    for place in (done.out.decode(), done.err, (tmp_path / "out" / "run.json").read_text()):
        assert "likes" not in place
    logged = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert without_timings(logged) == without_timings(done.rows)
