"""What every command promises, run over all of them."""

from __future__ import annotations

import json
import os
import signal

import msgspec
import pytest

from tests.contract.commands import CASES, lines
from tests.server import Client

ALL = sorted(CASES.values(), key=lambda case: case.name)
WRITERS = [case for case in ALL if not case.trainer]
FILTERS = [case for case in WRITERS if not case.sums_up]
TRAINERS = [case for case in ALL if case.trainer]
FED = [case for case in ALL if case.fed]
WITH_MODEL = [case for case in ALL if case.model]
ONLY_LINES = [case for case in WRITERS if not case.artefact]
MAKERS = [case for case in ALL if case.trainer or case.artefact]


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


@every(FED)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{oops}\n", "stdin:1: not valid JSON"),
        (b"[1, 2]\n", "expected an object, got int"),
        (b"7\n", "stdin:1: expected an object"),
        (b'{"x": 1}\n', "no known shape"),
        (b'{"x": NaN}\n', "not valid JSON"),
        (b'{"messages": [{"role": "boss", "content": "x"}]}\n', "$.messages[0].role: Invalid enum value 'boss'"),
        (b'{"messages": 3}\n', "$.messages: Expected `array`, got `int`"),
        (b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b"}\n", "nested too deeply"),
        (b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}\n", "nested more than"),
        (b'{"x": "\xff"}\n', "stdin:1: not"),
        (b'{"x": "\\ud800"}\n', "stdin:1: not valid JSON"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b"\x1f\x8b\x08\x00garbage", "damaged gzip"),
        (b'{"x": "' + b"a" * (17 << 20) + b'"}\n', "longer than"),
    ],
)
def test_bad_data_is_one_line_with_its_place_and_code_65(go, case, text, says):
    done = go(case, stdin=text)
    assert done.code == 65
    assert done.out == b""
    if says.startswith("$.messages") and not case.takes_messages:
        says = "no known shape"
    first, *rest = done.err.splitlines()
    assert first.startswith(f"{case.name}: stdin:")
    assert says in first
    assert len(rest) <= 1
    assert done.seconds < 5


@every(FED)
def test_the_bad_line_is_named_and_can_be_skipped_and_kept(go, case, tmp_path):
    bad = b'{"x": 1}\n'
    text = lines(case.good[:2]) + bad + b"\n" + lines(case.good[2:])
    failed = go(case, stdin=text, folder=tmp_path / "f")
    assert failed.code == 65
    assert "stdin:3:" in failed.err
    rejects = tmp_path / "rejects"
    skipped = go(case, "--on-bad", "skip", "--rejects", rejects, stdin=text, folder=tmp_path / "s")
    assert skipped.code == 0, skipped.err
    assert "1 bad rows left out" in skipped.err
    assert rejects.read_bytes() == bad
    clean = go(case, folder=tmp_path / "c")
    if not case.trainer:
        assert skipped.out == clean.out


@every(FED)
def test_input_may_be_an_array_gzip_zstd_crlf_or_carry_a_bom(go, case, tmp_path):
    import gzip

    import zstandard

    plain = lines(case.good)
    shapes = {
        "array": json.dumps(case.good).encode(),
        "gzip": gzip.compress(plain),
        "zstd": zstandard.compress(plain),
        "crlf": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n") + b"\r\n\r\n",
    }
    expected = go(case, "--dry-run").rows[0]
    for name, text in shapes.items():
        found = go(case, "--dry-run", stdin=text, folder=tmp_path / name)
        assert found.code == 0, (name, found.err)
        assert {k: v for k, v in found.rows[0].items() if k != "settings"} == {
            k: v for k, v in expected.items() if k != "settings"
        }


@every(ALL)
def test_missing_files_usage_errors_and_bad_models_have_their_codes(go, tool, tiny, tmp_path, case):
    def code(*more):
        done = go(case, *more, folder=tmp_path / "x")
        assert done.out == b""
        assert "Traceback" not in done.err
        assert 1 <= len(done.err.splitlines()) <= 3, done.err
        return done.code

    (tmp_path / "evil.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "folder").mkdir()
    assert code("--no-such-option") == 2
    assert code("--seed", "x") == 2
    assert code("--recipe", tmp_path / "none.yaml") == 66
    assert code("--map", "question") == 2
    if not case.model:
        return
    assert code("--model", tmp_path / "missing") == 66
    assert code("--model", tmp_path / "evil.pt") == 65
    assert code("--model", tmp_path / "folder") == 66
    assert code("--model", "someone/some-model") == 69
    assert code("--accelerate", tmp_path / "none.yaml") == 66


@every(ALL)
def test_recipes_are_strict_and_flags_win(go, tool, case, tmp_path):
    recipe = tmp_path / "r.yaml"
    for text, says in [
        ("sede: 3\n", "r.yaml:1: `sede` is not an option"),
        ("seed: 1\nseed: 2\n", "r.yaml:2: `seed` stands on line 1 already"),
        ("seed: one\n", "`seed`: expected integer"),
        ("seed: yes\n", "`seed`: expected integer"),
        ("seed: !!int 3\n", "tags are not allowed"),
        ("seed: &a 3\n", "anchors and aliases"),
        ("seed: {a: 1}\n", "a value is a scalar"),
        ("seed: -1\n", "`seed`: -1 is below 0"),
        ("- seed\n", "a recipe is a list of"),
        ("seed: [\n", "not valid YAML"),
        ("trust-remote-code: true\n", "`trust-remote-code` is not an option"),
        ("overwrite: true\n", "`overwrite` is not an option"),
    ]:
        recipe.write_text(text)
        done = go(case, "--recipe", recipe)
        assert (done.code, done.out) == (78, b""), (text, done.err)
        assert says in done.err, (text, done.err)
    recipe.write_text("seed: 3\n")
    printed = go(case, "--recipe", recipe, "--print-recipe")
    assert "seed: 3" in printed.out.decode().splitlines()
    assert "seed: 4" in go(case, "--recipe", recipe, "--seed", "4", "--print-recipe").out.decode().splitlines()
    env = {"TOOLBOX_SEED": "5"}
    assert "seed: 5" in go(case, "--recipe", recipe, "--print-recipe", env=env).out.decode().splitlines()
    recipe.write_bytes(printed.out)
    assert tool(case.name, "--recipe", recipe, "--print-recipe").out == printed.out


@every(ALL)
def test_a_full_disk_under_stdout_is_74(tool, tiny, tmp_path, case):
    read_end, write_end = os.pipe()
    with open("/dev/full", "wb") as full, (tmp_path / "err").open("wb") as err:
        running = tool.start(case.name, *case.arguments(tiny, tmp_path), fds=(read_end, full.fileno(), err.fileno()))
        os.close(read_end)
        with open(write_end, "wb") as feed:
            feed.write(lines(case.good))
        assert running.wait() == 74
    assert "No space left" in (tmp_path / "err").read_text()


@every(FILTERS)
def test_rows_leave_in_order_with_all_their_fields(go, case):
    done = go(case)
    assert [row["id"] for row in done.rows] == [row["id"] for row in case.good]
    for line, before in zip(done.out.splitlines(), case.good, strict=True):
        after = msgspec.json.decode(line)
        kept = {key: value for key, value in before.items() if key not in case.replaces}
        assert {key: after[key] for key in kept} == kept
        assert set(before) <= set(after)


@every(FED)
def test_no_rows_in_no_rows_out(go, case):
    for nothing in (b"", b"\n\n"):
        done = go(case, stdin=nothing)
        assert (done.code, done.out) == (case.empty, b"")
        assert case.empty == 0 or "is empty" in done.err


def into_a_closed_pipe(tool, tiny, folder, case) -> tuple[int, str]:
    """The exit status and stderr of a run whose stdout nobody reads."""
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    os.close(read_out)
    with (folder / "err").open("wb") as err:
        running = tool.start(case.name, *case.arguments(tiny, folder), fds=(read_in, write_out, err.fileno()))
        os.close(read_in)
        os.close(write_out)
        with open(write_in, "wb") as feed:
            feed.write(lines(case.good))
        return running.wait(), (folder / "err").read_text()


@every(ONLY_LINES)
def test_a_closed_pipe_ends_a_command_that_only_writes_lines_silently(tool, tiny, tmp_path, case):
    assert into_a_closed_pipe(tool, tiny, tmp_path, case) == (128 + signal.SIGPIPE, "")


@every(MAKERS)
def test_a_closed_pipe_is_a_warning_to_what_makes_something_else_which_finishes(tool, tiny, tmp_path, case):
    code, said = into_a_closed_pipe(tool, tiny, tmp_path, case)
    assert code == 0
    assert said.count("stdout was closed") == 1
    assert (tmp_path / "out" / "run.json").is_file()


@every(TRAINERS)
def test_an_existing_output_is_73_and_survives(go, tmp_path, case):
    assert go(case).code == 0
    before = (tmp_path / "out" / case.artefacts[0]).read_bytes()
    again = go(case, "--seed", "9")
    assert (again.code, again.out) == (73, b"")
    assert "--overwrite" in again.err
    assert (tmp_path / "out" / case.artefacts[0]).read_bytes() == before
    assert go(case, "--seed", "9", "--overwrite").code == 0
    assert (tmp_path / "out" / case.artefacts[0]).read_bytes() != before
    finished = go(case, "--seed", "9", "--resume")
    assert finished.code == 0
    assert finished.rows[-1]["event"] == "done"


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


@every(TRAINERS)
def test_a_disk_that_fills_up_at_the_end_leaves_no_half_output(go, tmp_path, case):
    done = go(case, "--save-every", "0", file_size=case.full_disk)
    assert done.code == 74, done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()
