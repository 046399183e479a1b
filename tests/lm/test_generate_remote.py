"""lm-generate at an endpoint: order, failures, interrupts, what each backend has no use for."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time

import pytest

from tests.lm.asking import ROWS, USER, WITH_KEY, lines, of, refusing, start, wait_for
from tests.loopback import KEY, Answer, Loopback, echo, said
from tests.server import ROOT, environment


def test_rows_of_an_endpoint_leave_in_order_with_all_their_fields(remote):
    with Loopback(lambda seen: Answer(said(seen, seen.asked.upper()), delay=0.2 * (seen.index == 0))) as server:
        done = remote(server)
    assert done.code == 0, done.err
    assert [{name: row[name] for name in before} for row, before in zip(done.rows, ROWS, strict=True)] == ROWS
    assert [row["completion"] for row in done.rows] == [f"SAY {i}" for i in range(7)]
    assert done.rows[3] == {
        **ROWS[3], "path_id": "q3/0", "sample": 0, "model": "tiny-chat", "completion": "SAY 3", "finish_reason": "stop",
        "n_prompt_tokens": 5, "n_completion_tokens": 5,
    }  # fmt: skip
    assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.seen)


@pytest.mark.parametrize(
    "more", [["--window", "2"], ["--concurrency", "1"], ["--concurrency", "64"], ["--rpm", "6000"]]
)
def test_windows_and_concurrency_do_not_show(remote, more):
    sampled = ("--n", "2", "--temperature", "1", "--seed", "3")
    with Loopback() as server:
        assert remote(server, *sampled, *more).out == remote(server, *sampled).out
        one, two = server.seen[: len(server.seen) // 2], server.seen[len(server.seen) // 2 :]
    assert sorted(str(seen.body) for seen in one) == sorted(str(seen.body) for seen in two)


def test_messages_and_system_and_raw_reach_the_endpoint(remote):
    rows = [{"prompt": "Hello"}, {"messages": [USER]}, {"prompt": "Hi", "messages": [USER]}]
    with Loopback() as server:
        done = remote(server, "--system", "Be brief.", "--concurrency", "1", rows=rows)
        plain = remote(server, "--raw", "--concurrency", "1", rows=rows)
    assert (done.code, plain.code) == (0, 0)
    chats, texts = server.seen[:3], server.seen[3:]
    assert all(seen.body["messages"] == [{"role": "system", "content": "Be brief."}, USER] for seen in chats)
    assert [(seen.path, seen.body["prompt"]) for seen in texts] == [("/v1/completions", "Hello")] * 3


def test_a_refused_key_is_69_at_once_and_finished_rows_are_kept(remote, tmp_path):
    log = tmp_path / "log.jsonl"
    with Loopback(refusing(401, "Say 3")) as server:
        done = remote(server, "--concurrency", "1", "--log", log, "--debug")
    assert done.code == 69
    assert [row["id"] for row in done.rows] == ["q0", "q1", "q2"]
    assert len(server.seen) == 4
    assert "401: no Bearer [key]" in done.err.splitlines()[-2]
    assert [json.loads(line)["id"] for line in log.read_text().splitlines()] == ["q0", "q1", "q2"]
    assert KEY not in log.read_text()


def test_a_row_that_is_refused_is_65_or_left_out(remote, tmp_path):
    rows = lines(*ROWS[:4]).encode() + b"\n" + lines(*ROWS[4:]).encode()
    with Loopback(refusing(400, "Say 4", message="\x1b[31mtoo long:\x1b[0m")) as server:
        failed = remote(server, "--concurrency", "1", rows=rows)
        assert failed.code == 65
        assert "stdin:6: the endpoint refuses this row: 400: too long: Bearer [key]" in failed.err
        assert [row["id"] for row in failed.rows] == ["q0", "q1", "q2", "q3"]
        assert len(server.seen) == 5
        rejects = tmp_path / "rejects"
        skipped = remote(server, "--on-bad", "skip", "--rejects", rejects, rows=rows)
    assert skipped.code == 0
    assert "1 bad rows left out" in skipped.err
    assert [row["id"] for row in skipped.rows] == [f"q{i}" for i in range(7) if i != 4]
    assert json.loads(rejects.read_text()) == ROWS[4]


def test_what_is_under_way_when_a_row_fails_is_finished_and_kept(remote, tmp_path):
    """q1 is refused while q0 and q2 take their time: both are paid for."""
    together = threading.Barrier(3)

    def answer(seen):
        together.wait(20)
        if seen.asked == "Say 1":
            return Answer({"error": "no"}, 422)
        return Answer(said(seen, "ok"), delay=0.5)

    log = tmp_path / "log.jsonl"
    with Loopback(answer) as server:
        done = remote(server, "--concurrency", "3", "--log", log)
    assert done.code == 65
    assert "stdin:2: the endpoint refuses" in done.err
    assert [row["id"] for row in done.rows] == ["q0", "q2"]
    assert len(server.seen) == 3
    assert sorted(json.loads(line)["id"] for line in log.read_text().splitlines()) == ["q0", "q2"]


def test_no_answer_after_all_retries_is_69_and_the_rest_can_be_had_later(remote, tmp_path):
    log = tmp_path / "log.jsonl"
    down = [True]
    with Loopback(lambda seen: Answer({}, 500) if down and seen.asked == "Say 5" else echo(seen)) as server:
        done = remote(server, "--retries", "1", "--log", log)
        assert done.code == 69
        assert "500 (tried 2 times)" in done.err
        assert "--resume" in done.err
        assert [row["id"] for row in done.rows] == ["q0", "q1", "q2", "q3", "q4", "q6"]
        down.clear()
        whole, asked = remote(server), len(server.seen)
        resumed = remote(server, "--log", log, "--resume")
        assert (resumed.code, resumed.out) == (0, whole.out)
        assert [seen.asked for seen in server.seen[asked:]] == ["Say 5"]


def test_a_bad_line_is_65_after_the_rows_before_it(remote):
    text = lines(*ROWS[:5]).encode() + b"{oops}\n" + lines(*ROWS[5:]).encode()
    with Loopback(lambda seen: Answer(said(seen, "ok"), delay=0.1)) as server:
        failed = remote(server, "--window", "2", "--concurrency", "8", rows=text)
        skipped = remote(server, "--window", "2", "--on-bad", "skip", rows=text)
    assert failed.code == 65
    assert "stdin:6: not valid JSON" in failed.err
    assert [row["id"] for row in failed.rows] == ["q0", "q1", "q2", "q3"]  # whole windows, as with a model here
    assert [row["id"] for row in skipped.rows] == [row["id"] for row in ROWS]


def test_an_endpoint_needs_what_it_needs_before_anything_is_read(tool, tiny, monkeypatch):
    address = ("--base-url", "http://localhost:9/v1")
    for words, says in [
        ((*address,), "needs --model"),
        (("--model", "m"), "needs an address"),
        (("--model", "m", "--base-url", f"http://me:{KEY}@h/v1"), "carries more than an address"),
        (("--model", "m", "--base-url", "https://models.example.org/v1"), "--api-key-env is not set"),
        (("--model", "m", *address, "--api-key-env", KEY), "never a key"),
        (("--model", "m", *address, "--n", "2"), "equal completions"),
        (("--model", "m", *address, "--resume"), "--resume goes on with a log"),
    ]:
        for more in ((), ("--dry-run",), ("--debug",)):
            done = tool(
                "lm-generate", "--backend", "openai", *words, *more, stdin=lines(*ROWS), env={"OPENAI_API_KEY": ""}
            )
            assert (done.code, done.out) == (2, b""), words
            assert says in done.err
            assert KEY not in done.err


def test_a_dry_run_asks_nobody_and_writes_no_log(remote, tmp_path):
    log = tmp_path / "log.jsonl"
    with Loopback() as server:
        done = remote(server, "--dry-run", "--log", log)
        assert (done.rows[0]["rows"], done.rows[0]["event"]) == (7, "plan")
        assert server.seen == []
    assert not log.exists()
    log.write_text("x\n")
    assert remote(server, "--dry-run", "--log", log).code == 73


UNUSED = {
    "openai": ["--template qa", "--trust-remote-code", "--dtype fp32", "--device cpu", "--batch-size 2", "--threads 1",
               "--batch-tokens 9", "--replay x", "-j 1"],
    "replay": ["--template qa", "--dtype fp32", "--batch-size auto", "--base-url http://x/v1", "--api-key-env A",
               "--concurrency 8", "--rpm 3", "--timeout 3", "--retries 6", "--system x", "--raw", "--temperature 0",
               "--top-p 1", "--max-new-tokens 3", "--stop x", "--logprobs", "--seed 0", "--log x", "-j 1"],
    "local": ["--base-url http://x/v1", "--api-key-env A", "--concurrency 8", "--rpm 3", "--timeout 3", "--retries 6",
              "--replay x"],
}  # fmt: skip


@pytest.mark.parametrize(("backend", "flag"), [(backend, flag) for backend in UNUSED for flag in UNUSED[backend]])
def test_what_a_backend_has_no_use_for_is_refused(tool, tmp_path, backend, flag):
    stored = tmp_path / "stored.jsonl"
    stored.write_text('{"id": "q0", "completion": "x"}\n')
    needs = {"openai": ["--base-url", "http://localhost:9/v1", "--model", "m"], "replay": ["--replay", stored]}
    words = ("--backend", backend, *needs.get(backend, []), *flag.split())
    done = tool("lm-generate", *words, "--dry-run", stdin=lines(*ROWS))
    assert (done.code, done.out) == (2, b"")
    assert f"{flag.split()[0]} has no use with --backend {backend}" in done.err


def test_a_recipe_with_such_an_option_is_refused_and_a_printed_one_is_not(tool, tmp_path):
    stored, recipe = tmp_path / "stored.jsonl", tmp_path / "r.yaml"
    stored.write_text(lines(*({"id": row["id"], "completion": "x"} for row in ROWS)))
    replay = ("--backend", "replay", "--replay", stored)
    printed = tool("lm-generate", *replay, "--print-recipe")
    recipe.write_bytes(printed.out)
    assert tool("lm-generate", "--recipe", recipe, stdin=lines(*ROWS)).code == 0
    recipe.write_text("temperature: 1\n")
    done = tool("lm-generate", "--recipe", recipe, *replay, stdin=lines(*ROWS))
    assert done.code == 2
    assert "--temperature has no use" in done.err
    env = {"TOOLBOX_TEMPERATURE": "1", "TOOLBOX_MODEL": "other"}  # meant for other commands
    assert tool("lm-generate", *replay, stdin=lines(*ROWS), env=env).code == 0


def test_no_torch_without_a_model_here(tmp_path):
    stored = tmp_path / "log.jsonl"
    with Loopback() as server:
        asked = start(*of(server, "--log", stored))
        out, err = asked.communicate(lines(*ROWS).encode())
    assert (asked.returncode, err) == (0, b"")
    replayed = start("--backend", "replay", "--replay", stored)
    assert replayed.communicate(lines(*ROWS).encode()) == (out, b"")


def test_whoever_waits_for_an_answer_before_the_next_question_gets_it():
    with Loopback() as server:
        talk = start(*of(server, "--window", "1"))
        for place in range(3):
            talk.stdin.write(lines({"prompt": f"Say {place}"}).encode())
            talk.stdin.flush()
            assert json.loads(talk.stdout.readline())["completion"] == f"Say {place}! "
        talk.stdin.close()
        assert talk.wait(60) == 0
        talk.stdout.close()
        talk.stderr.close()


def test_a_refused_key_ends_it_although_the_input_stays_open():
    with Loopback(refusing(403, "Say 1")) as server:
        asked = start(*of(server, "--window", "1", "--concurrency", "1"))
        asked.stdin.write(lines(*ROWS[:2]).encode())
        asked.stdin.flush()
        assert asked.wait(60) == 69
        assert b"403" in asked.stderr.read()
        for pipe in (asked.stdin, asked.stdout, asked.stderr):
            pipe.close()


def test_an_interrupt_ends_it_at_once_and_what_came_is_in_the_log(tmp_path):
    log = tmp_path / "log.jsonl"
    with Loopback(lambda seen: Answer(said(seen, "ok"), delay=30 * (seen.asked == "Say 0"))) as server:
        asked = start(*of(server, "--log", log))
        asked.stdin.write(lines(*ROWS).encode())
        asked.stdin.close()
        wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") == 6)
        began = time.monotonic()
        asked.send_signal(signal.SIGINT)
        assert asked.wait(60) == -signal.SIGINT
        assert time.monotonic() - began < 10
        for pipe in (asked.stdout, asked.stderr):
            pipe.close()


def test_the_endpoint_of_the_docs_page_runs_as_written(tmp_path):
    _, block = re.findall(r"```\n(.*?)```", (ROOT / "docs/lm-generate.md").read_text(), re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text(lines(*ROWS))
    with Loopback() as server:
        script = block.replace("http://localhost:8000/v1", server.url)
        assert server.url in script
        done = subprocess.run(
            ["bash", "-euc", script], cwd=tmp_path, env={**environment(), **WITH_KEY}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert len(server.seen) == 7
    assert "7 responses from answers.jsonl, 0 new" in done.stderr
    assert len((tmp_path / "completed.jsonl").read_text().splitlines()) == 7
