"""lm-generate's log: nothing is asked twice, a resumed run is an uninterrupted one, replay is the same bytes."""

from __future__ import annotations

import gzip
import json
import signal

import pytest

from tests.conftest import SHARED
from tests.lm.asking import ROWS, SHORT, lines, of, start, wait_for
from tests.loopback import Answer, Loopback, said
from tests.tiny import tiny_model_dir


def test_requests_of_one_key_are_sent_once_and_answered_alike(remote, tmp_path):
    count = iter(range(100))
    rows = [{"id": f"q{i}", "prompt": f"Say {i % 3}"} for i in range(12)]
    with Loopback(lambda seen: Answer(said(seen, f"{next(count)}"))) as server:
        done = remote(server, "--log", tmp_path / "log.jsonl", "--window", "5", rows=rows)
        assert len(server.seen) == 3
        answers = [row["completion"] for row in done.rows]
        assert answers == answers[:3] * 4
        again = remote(server, "--log", tmp_path / "log.jsonl", "--resume", rows=rows)
        assert again.out == done.out
        assert len(server.seen) == 3


def test_keys_do_not_see_concurrency_and_do_see_the_rest(remote, tmp_path):
    log = tmp_path / "log.jsonl"
    with Loopback() as server:
        base = ("--log", log, "--resume", "--max-new-tokens", "9")
        first = remote(server, *base)
        same = (
            "--concurrency",
            "2",
            "--timeout",
            "9",
            "--retries",
            "1",
            "--rpm",
            "60000",
            "--window",
            "3",
            "--seed",
            "9",
        )
        assert remote(server, *base, *same).out == first.out
        assert len(server.seen) == 7
        for count, more in enumerate((("--system", "S"), ("--raw",), ("--temperature", "1"), ("--stop", "x"),
                                      ("--max-new-tokens", "8")), 2):  # fmt: skip
            told = remote(server, *base, *more)
            assert len(server.seen) == 7 * count, more
            assert "holds no response of this endpoint with these options" in told.err


SAMPLED = ("--n", "2", "--temperature", "1", "--seed", "5", "--max-new-tokens", "6", "--logprobs")


@pytest.fixture
def logged(tool, tiny, tmp_path):
    """A run of the tiny model with its log: what it wrote, and the log's path."""
    log = tmp_path / "log.jsonl"
    done = tool("lm-generate", "--model", tiny, *SAMPLED, "--log", log, stdin=lines(*ROWS))
    assert done.code == 0, done.err
    return done.out, log


def test_a_log_changes_nothing_and_its_replay_is_the_same_bytes(tool, tiny, logged):
    out, log = logged
    assert tool("lm-generate", "--model", tiny, *SAMPLED, stdin=lines(*ROWS)).out == out
    replayed = tool("lm-generate", "--backend", "replay", "--replay", log, "--n", "2", stdin=lines(*ROWS))
    assert (replayed.code, replayed.out, replayed.err) == (0, out, "")
    log.with_suffix(".gz").write_bytes(gzip.compress(log.read_bytes()))
    renamed = [{**row, "id": f"x{i}"} for i, row in enumerate(ROWS)]
    for name, rows, code in ((log.with_suffix(".gz"), ROWS, 0), (log, renamed, 65)):
        assert tool("lm-generate", "--backend", "replay", "--replay", name, "--n", "2", stdin=lines(*rows)).code == code
    (paths := log.with_suffix(".out")).write_bytes(out)
    again = tool("lm-generate", "--backend", "replay", "--replay", paths, "--n", "2", stdin=lines(*ROWS))
    assert again.out == out  # what went to stdout can be replayed as well


@pytest.mark.parametrize("more", [(), ("--window", "3"), ("--batch-size", "4")])
def test_resumed_is_uninterrupted(tool, tiny, tmp_path, more):
    log = tmp_path / "log.jsonl"
    words = ("--model", tiny, *SAMPLED, *more, "--log", log)
    out = tool("lm-generate", *words, stdin=lines(*ROWS)).out
    whole = log.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 5, 13, 14):
        torn = whole[kept][:40] if kept < 14 else b""
        log.write_bytes(b"".join(whole[:kept]) + torn)
        assert tool("lm-generate", *words, stdin=lines(*ROWS)).code == 73
        done = tool("lm-generate", *words, "--resume", stdin=lines(*ROWS))
        assert (done.code, done.out) == (0, out), done.err
        assert log.read_bytes().splitlines(keepends=True) == whole


def test_a_batch_is_run_whole_and_only_what_was_missing_is_logged(tool, tiny, logged, monkeypatch):
    """Found responses are taken as they are, even where the model would say something else by now."""
    out, log = logged
    first, *rest = log.read_bytes().splitlines(keepends=True)
    stored = json.loads(first)
    changed = first.replace(json.dumps(stored["completion"], ensure_ascii=False).encode(), b'"changed"')
    assert changed != first
    log.write_bytes(changed + b"".join(rest[:3]))
    done = tool("lm-generate", "--model", tiny, *SAMPLED, "--log", log, "--resume", stdin=lines(*ROWS))
    assert "4 responses from" in done.err
    assert "10 new" in done.err
    texts = {row["path_id"]: row["completion"] for row in done.rows}
    expected = {row["path_id"]: row["completion"] for row in map(json.loads, out.splitlines())}
    assert texts == {**expected, f"{stored['id']}/{stored['sample']}": "changed"}
    assert log.read_bytes().count(b"\n") == 14


def test_a_run_with_other_options_takes_nothing_from_the_log(tool, tiny, tmp_path, logged):
    _, log = logged
    other = ("--model", tiny, "--max-new-tokens", "6")
    plain = tool("lm-generate", *other, stdin=lines(*ROWS))
    mixed = tool("lm-generate", *other, "--log", log, "--resume", stdin=lines(*ROWS))
    assert mixed.out == plain.out
    assert "holds no response of this model with these options" in mixed.err
    assert log.read_bytes().count(b"\n") == 14 + 7
    same = tool(
        "lm-generate", *other, "--batch-size", "2", "--threads", "2", "--log", log, "--resume", stdin=lines(*ROWS)
    )
    assert same.out == plain.out
    assert log.read_bytes().count(b"\n") == 14 + 7


@pytest.mark.parametrize("changed", ["dtype", "system", "template", "raw", "prompt", "weights"])
def test_what_decides_a_local_response_makes_another_key(tool, tiny, tmp_path, changed):
    log, rows = tmp_path / "log.jsonl", ROWS[:2]
    base = ("--max-new-tokens", "3", "--log", log, "--resume")
    assert tool("lm-generate", "--model", tiny, *base, stdin=lines(*rows)).code == 0
    more = {"dtype": ["--dtype", "bf16"], "system": ["--system", "Be long."], "template": ["--template", "qa"],
            "raw": ["--raw"]}.get(changed, [])  # fmt: skip
    if changed == "prompt":
        rows = [{**row, "prompt": row["prompt"] + " "} for row in rows]
    model = tiny_model_dir(tmp_path / "m", seed=3) if changed == "weights" else tiny
    assert tool("lm-generate", "--model", model, *base, *more, stdin=lines(*rows)).code == 0
    assert log.read_bytes().count(b"\n") == 4


def test_equal_prompts_are_answered_alike_with_a_log(tool, tiny, tmp_path):
    rows = [{"id": f"q{i}", "prompt": f"Say {i % 2}"} for i in range(9)]
    plain = tool("lm-generate", "--model", tiny, *SHORT, stdin=lines(*rows))
    log = tmp_path / "log.jsonl"
    with_log = tool("lm-generate", "--model", tiny, *SHORT, "--window", "4", "--log", log, stdin=lines(*rows))
    assert with_log.out == plain.out
    assert log.read_bytes().count(b"\n") == 2


def test_a_response_that_is_missing_is_65_or_left_out(tool, tmp_path):
    stored = tmp_path / "stored.jsonl"
    stored.write_text(lines(*({"id": row["id"], "completion": f"<{row['id']}>"} for row in ROWS if row["id"] != "q3")))
    replay = ("--backend", "replay", "--replay", stored)
    failed = tool("lm-generate", *replay, stdin=lines(*ROWS))
    assert failed.code == 65
    assert "stdin:4: " in failed.err
    assert "has no response for id q3, sample 0" in failed.err
    assert [row["id"] for row in failed.rows] == ["q0", "q1", "q2"]
    skipped = tool("lm-generate", *replay, "--on-bad", "skip", "--rejects", tmp_path / "r", stdin=lines(*ROWS))
    assert [row["completion"] for row in skipped.rows] == [f"<q{i}>" for i in range(7) if i != 3]
    assert "1 bad rows left out" in skipped.err
    assert json.loads((tmp_path / "r").read_text()) == ROWS[3]
    assert tool("lm-generate", *replay, "--dry-run", stdin=lines(*ROWS)).rows[0]["missing"] == 1
    row = skipped.rows[0]
    assert (row["model"], row["finish_reason"], row["n_prompt_tokens"]) == (None, "stop", None)


def test_a_changed_prompt_is_replayed_by_its_name_with_a_warning(tool, logged):
    out, log = logged
    rows = [{**row, "prompt": "Now something else"} for row in ROWS]
    done = tool("lm-generate", "--backend", "replay", "--replay", log, "--n", "2", stdin=lines(*rows))
    assert done.code == 0
    assert [row["completion"] for row in done.rows] == [json.loads(line)["completion"] for line in out.splitlines()]
    assert "14 responses were found by their id alone" in done.err


def test_stdin_is_for_one_of_them(tool, logged, tmp_path):
    out, log = logged
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(lines(*ROWS))
    piped = tool("lm-generate", "--backend", "replay", "--replay", "-", "--n", "2", prompts, stdin=log.read_bytes())
    assert piped.out == out
    both = tool("lm-generate", "--backend", "replay", "--replay", "-", stdin=lines(*ROWS))
    assert both.code == 2
    assert "cannot both be read from stdin" in both.err
    assert tool("lm-generate", "--backend", "replay", "--replay", tmp_path / "none", stdin="").code == 66
    assert tool("lm-generate", "--backend", "replay", stdin="").code == 2


def test_two_runs_into_one_log(tool, tiny, tmp_path):
    log = tmp_path / "log.jsonl"
    with Loopback(lambda seen: Answer(said(seen, "ok"), delay=5)) as server:
        asked = start(*of(server, "--log", log, "--window", "7"))
        asked.stdin.write(lines(*ROWS).encode())
        asked.stdin.flush()
        wait_for(lambda: server.seen)
        for more in ((), ("--resume",)):
            second = tool("lm-generate", "--model", tiny, "--log", log, *more, stdin=lines(*ROWS))
            assert (second.code, second.out) == (73, b"")
            assert "another run is writing" in second.err
        asked.kill()
        asked.communicate()


def test_a_full_disk_under_the_log_is_74(tool, tmp_path):
    import resource

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    log = tmp_path / "log.jsonl"
    with Loopback() as server:
        asked = start(*of(server, "--log", log, "--concurrency", "1"), preexec_fn=limit)
        out, err = asked.communicate(lines(*ROWS).encode())
        assert asked.returncode == 74
        assert str(log).encode() in err
        kept = log.read_bytes().count(b"\n")
        assert out.count(b"\n") == kept > 0
        resumed = start(*of(server, "--log", log, "--resume"))
        again, _ = resumed.communicate(lines(*ROWS).encode())
    assert again.startswith(out)
    assert again.count(b"\n") == 7
    assert len(server.seen) == kept + 1 + (7 - kept)


def test_real_responses_are_replayed_model_by_model(tool):
    """Alice in Wonderland: 60 responses a model and question, without sample numbers."""
    path = SHARED / "thoughts" / "aiw" / "base_model_responses.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the responses are not here ({path})")
    stored = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    model = "mistralai/Mixtral-8x7B-v0.1"
    mine = [row for row in stored if row["model"] == model]
    prompts = {row["id"]: {"id": row["id"], "prompt": row["prompt"], "answer": row["answer"]} for row in mine}
    done = tool(
        "lm-generate", "--backend", "replay", "--replay", path, "--model", model, "--n", "60",
        stdin=lines(*prompts.values()),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [row["completion"] for row in done.rows] == [
        r["completion"] for id in prompts for r in mine if r["id"] == id
    ]
    assert {row["model"] for row in done.rows} == {model}
    assert len(done.rows) == 60 * len(prompts) == len(mine)


@pytest.mark.slow
def test_the_embedded_model_says_the_same_in_every_batch_and_from_its_log(tool, tmp_path):
    from toolbox.models.load import find_model
    from toolbox.shell.errors import Unavailable

    try:
        find_model("smollm2")
    except Unavailable as problem:
        pytest.skip(str(problem))
    rows = lines(
        *({"id": f"{n}-{m}", "prompt": f"Alice has {n} brothers and {m} sisters. How many sisters has her brother?"}
          for n in range(1, 5) for m in range(1, 5))
    )  # fmt: skip

    def run(*words):
        done = tool("lm-generate", "--max-new-tokens", "10", *words, stdin=rows)
        assert done.code == 0, done.err
        assert len(done.rows) == 16
        return done

    assert run("--batch-size", "1").out == run("--batch-size", "8").out
    sampled, log = ("--temperature", "1", "--seed", "1"), tmp_path / "log.jsonl"
    whole = run(*sampled, "--batch-size", "16", "--log", log).out
    assert len({json.loads(line)["completion"] for line in whole.splitlines()}) > 12
    assert run(*sampled, "--batch-size", "4").out == whole
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:7]) + b'{"key":"')
    assert run(*sampled, "--batch-size", "4", "--log", log, "--resume").out == whole
    replayed = tool("lm-generate", "--backend", "replay", "--replay", log, stdin=rows)
    assert replayed.out == whole
