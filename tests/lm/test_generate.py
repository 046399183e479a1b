"""lm-generate as a filter: which prompt is taken, what is refused, what a window does; endpoints, logs and replay."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import SHARED
from tests.loopback import KEY, Answer, Loopback, echo, said
from tests.server import ROOT, environment
from tests.tiny import tiny_model_dir


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base model: no chat template."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "plain", chat=False)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


SHORT = ("--max-new-tokens", "4")
USER = {"role": "user", "content": "Hello"}


def test_a_prompt_is_one_user_turn_where_there_is_a_chat_template(tool, tiny):
    as_prompt, as_messages = (
        tool("lm-generate", "--model", tiny, *SHORT, stdin=lines(row)).rows[0]
        for row in ({"id": "x", "prompt": "Hello"}, {"id": "x", "messages": [USER]})
    )
    assert as_prompt["completion"] == as_messages["completion"]
    assert as_prompt["n_prompt_tokens"] == as_messages["n_prompt_tokens"] > len("Hello") + 5


def test_a_base_model_continues_the_prompt_itself(tool, plain):
    done = tool("lm-generate", "--model", plain, *SHORT, stdin=lines({"prompt": "Hello"}))
    assert done.rows[0]["n_prompt_tokens"] == len("Hello")
    both = tool("lm-generate", "--model", plain, *SHORT, stdin=lines({"prompt": "Hello", "messages": [USER]}))
    assert both.rows[0]["n_prompt_tokens"] == len("Hello")
    turns = tool("lm-generate", "--model", plain, *SHORT, stdin=lines({"messages": [USER]}))
    assert turns.rows[0]["n_prompt_tokens"] == len("Question: Hello\nAnswer:")


def test_raw_takes_no_template(tool, tiny):
    done = tool("lm-generate", "--model", tiny, "--raw", *SHORT, stdin=lines({"prompt": "Hello"}))
    assert done.rows[0]["n_prompt_tokens"] == len("Hello")
    assert tool("lm-generate", "--raw", "--template", "qa", stdin="").code == 2


def test_samples_stand_together_and_have_paths_of_their_own(tool, tiny):
    rows = lines({"id": "a", "prompt": "x", "variant": "v"}, {"id": "b", "prompt": "y"})
    done = tool("lm-generate", "--model", tiny, "--n", "3", "--temperature", "2", *SHORT, stdin=rows)
    assert [row["path_id"] for row in done.rows] == ["a/v/0", "a/v/1", "a/v/2", "b/0", "b/1", "b/2"]
    assert len({row["completion"] for row in done.rows}) > 3
    assert tool("lm-generate", "--n", "2", stdin=rows).code == 2


@pytest.mark.parametrize("more", [["--window", "2"], ["--batch-size", "1"], ["--batch-tokens", "40"]])
def test_windows_and_batches_do_not_show(tool, tiny, more):
    rows = lines(*({"id": f"r{i}", "prompt": "word " * (i * 3 % 5 + 1)} for i in range(9)))
    sampled = ("--model", tiny, "--temperature", "1", "--seed", "3", *SHORT)
    assert tool("lm-generate", *sampled, *more, stdin=rows).out == tool("lm-generate", *sampled, stdin=rows).out


def test_a_row_does_not_depend_on_its_neighbours(tool, tiny):
    rows = [{"id": f"r{i}", "prompt": f"Say {i}"} for i in range(4)]
    sampled = ("--model", tiny, "--temperature", "1", *SHORT)
    together = tool("lm-generate", *sampled, stdin=lines(*rows)).rows
    backwards = tool("lm-generate", *sampled, stdin=lines(*rows[::-1])).rows
    assert together == backwards[::-1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "x", "completion": "y"}, "$.completion: the row has a `completion` already"),
        ({"prompt": ""}, "$.prompt"),
        ({"prompt": "x" * 600}, "stdin:2: the prompt has"),
        ({"prompt": "again", "id": "first"}, "$.id: the path first stands on line 1 already"),
        ({"messages": []}, "$.messages"),
    ],
)
def test_bad_rows_are_named_or_left_out(tool, tiny, row, says):
    rows = lines({"id": "first", "prompt": "x"}, row, {"id": "last", "prompt": "z"})
    failed = tool("lm-generate", "--model", tiny, *SHORT, stdin=rows)
    assert failed.code == 65
    assert says in failed.err
    skipped = tool("lm-generate", "--model", tiny, "--on-bad", "skip", *SHORT, stdin=rows)
    assert [r["id"] for r in skipped.rows] == ["first", "last"]
    assert "1 bad rows left out" in skipped.err


def test_a_reference_survives_under_another_name(tool, tiny):
    row = {"prompt": "x", "completion": "gold"}
    done = tool("lm-generate", "--model", tiny, "--map", "reference=completion", *SHORT, stdin=lines(row))
    assert done.rows[0]["reference"] == "gold"


def test_limit_stops_reading(tool, tiny):
    rows = lines(*({"prompt": f"p{i}"} for i in range(2))) + "not json\n"
    done = tool("lm-generate", "--model", tiny, "--limit", "2", *SHORT, stdin=rows)
    assert (done.code, len(done.rows)) == (0, 2)
    assert tool("lm-generate", "--model", tiny, "--limit", "0", stdin=rows).out == b""


@pytest.mark.parametrize("device", ["nonsense", "cuda:7", "cuda"])
def test_a_device_that_is_not_there_is_69(tool, tiny, device):
    if device == "cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    done = tool("lm-generate", "--model", tiny, "--device", device, stdin=lines({"prompt": "x"}))
    assert (done.code, done.out) == (69, b"")
    assert "--device" in done.err


def test_logprobs_and_stop_strings(tool, tiny):
    row = lines({"prompt": "Hello"})
    free = tool("lm-generate", "--model", tiny, "--max-new-tokens", "12", "--logprobs", stdin=row).rows[0]
    assert len(free["logprobs"]) == free["n_completion_tokens"]
    assert all(value <= 0 for value in free["logprobs"])
    stop = free["completion"][3:5]
    cut = tool("lm-generate", "--model", tiny, "--max-new-tokens", "12", "--stop", stop, stdin=row).rows[0]
    assert cut["completion"] == free["completion"][: free["completion"].index(stop)]
    assert cut["finish_reason"] == "stop"


# an endpoint

ROWS = [{"id": f"q{i}", "prompt": f"Say {i}", "extra": {"big": 2**70, "x": [i, None]}} for i in range(7)]
WITH_KEY = {"OPENAI_API_KEY": KEY}


@pytest.fixture
def remote(tool):
    """Run lm-generate against a server; the key may be nowhere in what comes out."""

    def run(server, *more, rows=ROWS, env=WITH_KEY):
        text = rows if isinstance(rows, bytes) else lines(*rows)
        words = ("--backend", "openai", "--base-url", server.url, "--model", "tiny-chat", *more)
        done = tool("lm-generate", *words, stdin=text, env=env)
        assert KEY.encode() not in done.out
        assert KEY not in done.err
        return done

    return run


def refusing(status, *asked, message="no"):
    """Refuses these prompts, answers the others."""

    def answer(seen):
        if seen.asked in asked:
            return Answer({"error": {"message": f"{message} {seen.headers.get('authorization')}"}}, status)
        return echo(seen)

    return answer


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


def start(*words, **more):
    """A true process, so that what is imported and how it ends is its own."""
    script = "import sys; sys.argv[0] = 'lm-generate'; from toolbox.commands.lm_generate import main; "
    check = "import atexit; atexit.register(lambda: 'torch' in sys.modules and print('TORCH', file=sys.stderr)); "
    return subprocess.Popen(
        [sys.executable, "-c", check + script + "main()", *map(str, words)],
        cwd=ROOT,
        env={**environment(), **WITH_KEY},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def of(server, *more):
    return ("--backend", "openai", "--base-url", server.url, "--model", "m", *more)


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


# log, resume, replay

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


def test_what_one_process_must_do_is_refused_before_workers_start(tool, tmp_path):
    stored = tmp_path / "stored.jsonl"
    stored.write_text('{"id": "1", "completion": "x"}\n')
    done = tool("lm-generate", "--backend", "replay", "--replay", stored, "-j", "2", stdin=b'{"prompt": "x"}\n')
    assert (done.code, done.out) == (2, b"")
    assert "-j has no use with --backend replay" in done.err
    assert done.seconds < 5  # workers take longer to import torch, and more than one of them complains
    assert len(done.err.splitlines()) == 2
