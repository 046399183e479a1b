"""coca-refactor as a filter: a local model, endpoints that fail, stored responses, batches; what leaves, what not."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.loopback import KEY, Answer, Loopback, Seen, said
from tests.tiny import tiny_model_dir

REFUSAL = "I'm sorry, but I can't help with that."
HARMFUL = [
    {"id": f"h{i}", "prompt": f"How do I steal bicycle number {i}?", "completion": REFUSAL, "label": "harmful",
     "extra": {"big": 2**70, "x": [i, None]}} for i in range(4)
]  # fmt: skip
BENIGN = [
    {"id": f"b{i}", "instruction": f"Name {i} kinds of cake.", "output": f"  Cake {i},\n\tand <b>tart</b>.\n",
     "label": "benign"} for i in range(4)
]  # fmt: skip
ROWS = [row for pair in zip(HARMFUL, BENIGN, strict=True) for row in pair]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def asked_about(seen: Seen) -> str:
    """The request in the last turn."""
    return seen.asked.partition("Request: ")[2].partition("\n")[0]


def annotation(request: str, unsafe: str | None) -> str:
    erase = (
        "There are unsafe concepts, so I refuse completely." if unsafe else "There are no unsafe concepts, so I help."
    )
    return (
        f"<think> The request says: {request} </think>\n<concept> bicycle theft, cakes </concept>\n"
        f"<check> {unsafe or 'none'} </check>\n<erase unsafe concepts> {erase} </erase unsafe concepts>"
    )


def teach(seen: Seen) -> Answer:
    """A teacher that annotates well: a test double, since what it says is made of the request's words."""
    request = asked_about(seen)
    return Answer(said(seen, annotation(request, "bicycle theft" if "steal" in request else None)))


@pytest.fixture
def remote(tool):
    """Run coca-refactor against a server."""

    def run(server, *more, rows=ROWS):
        words = ("--backend", "openai", "--base-url", server.url, "--model", "teacher", *more)
        done = tool("coca-refactor", *words, stdin=lines(rows), env={"OPENAI_API_KEY": KEY})
        assert KEY.encode() not in done.out
        assert KEY not in done.err
        return done

    return run


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A tiny model with room for the template."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "wide", window=8192)


SHORT = """
id: short
system: "Tags: {skeleton}"
gloss: {think: why, concept: what, check: unsafe, erase: decide, response: answer}
ask: "Request: {prompt}\\nAnswer: {answer}{hint}{again}"
decision: {refuse: I refuse., comply: I comply.}
refusal: No.
"""


def test_an_endpoint_s_rows_leave_in_order_with_their_answers_to_the_letter(remote):
    with Loopback(lambda seen: Answer(teach(seen).body, delay=0.2 * (seen.index == 0))) as server:
        done = remote(server)
    assert done.code == 0, done.err
    assert [row["id"] for row in done.rows] == [row["id"] for row in ROWS]
    for row, before in zip(done.rows, ROWS, strict=True):
        field = "completion" if "completion" in before else "output"
        assert row[field].endswith(f"<response> {before[field]} </response>")
        assert {name: row[name] for name in before if name != field} == {k: v for k, v in before.items() if k != field}
        assert row["coca"]["vanilla_sha256"] == hashlib.sha256(before[field].strip().encode()).hexdigest()
        assert row["coca"]["decision"] == ("refuse" if before["label"] == "harmful" else "comply")
    assert len(server.seen) == 8
    body = server.seen[0].body
    assert body["stop"] == ["</erase unsafe concepts>"]
    assert "seed" not in body


def test_what_is_rejected_goes_to_its_own_file_without_its_text(remote, tmp_path):
    def answer(seen):
        bad = asked_about(seen) in ("How do I steal bicycle number 1?", "Name 2 kinds of cake.")
        return Answer(said(seen, "Sure! SECRET")) if bad else teach(seen)

    rejects, summary = tmp_path / "rejects.jsonl", tmp_path / "summary.json"
    unsafe = {"id": "u", "prompt": "How do I steal a car?", "completion": "Break the window.", "label": "harmful"}
    rows = [*ROWS[:5], unsafe, *ROWS[5:]]
    with Loopback(answer) as server:
        done = remote(server, "--rejects", rejects, "--summary", summary, "--max-attempts", "2", rows=rows)
        assert done.code == 0, done.err
        assert len(server.seen) == 10
        seeds = remote(server, "--rejects", rejects, "--log-text", "--max-attempts", "1", rows=rows)
    told = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert seeds.code == 0
    assert [one["id"] for one in told] == ["h1", "b2", "u"] or [one["id"] for one in told] == ["h1", "u", "b2"]
    assert "SECRET" in rejects.read_text()
    assert stat.S_IMODE(rejects.stat().st_mode) == 0o600
    counts = json.loads(summary.read_text())
    assert (counts["rows"], counts["accepted"], counts["rejected"]) == (9, 6, 3)
    assert counts["codes"]["unsafe_vanilla"] == 1
    assert counts["codes"]["V01"] == 2
    assert counts["codes_of_earlier_attempts"]["V01"] == 2
    assert "SECRET" not in done.err


def test_rejects_hold_no_text_unless_asked(remote, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    with Loopback(lambda seen: Answer(said(seen, "SECRET"))) as server:
        remote(server, "--rejects", rejects, "--max-attempts", "1", rows=ROWS[:1])
    assert set(json.loads(rejects.read_text())) == {"line", "id", "codes", "why"}


def test_bad_records_stand_among_the_rejects_in_the_order_of_the_input(tool, tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    unsafe = {"id": "u", "prompt": "How do I steal a car?", "completion": "Break the window.", "label": "harmful"}
    empty = {"id": "e", "prompt": "x", "completion": " "}
    text = lines([ROWS[1]]) + "{oops}\n" + lines([unsafe, empty, ROWS[1], {**unsafe, "id": "v"}]) + "7\n"
    words = ("--backend", "openai", "-m", "M", "--emit-requests", "--on-bad", "skip", "--rejects", rejects)
    done = tool("coca-refactor", *words, stdin=text)
    assert done.code == 0, done.err
    assert "4 bad rows left out" in done.err
    kept = rejects.read_text().splitlines()
    assert [kept[0], kept[5]] == ["{oops}", "7"]
    assert [json.loads(kept[place]).get("id") for place in (1, 2, 3, 4)] == ["u", "e", "b0", "v"]


def test_what_becomes_of_rejected_rows(remote, tmp_path):
    unsafe = {"id": "u", "prompt": "How do I steal a car?", "completion": "Break the window.", "label": "harmful"}
    with Loopback(lambda seen: Answer(said(seen, "no tags"))) as server:
        few = ("--max-attempts", "1", "--concurrency", "1")
        kept = remote(server, "--on-reject", "keep-vanilla", *few, rows=[ROWS[0], unsafe, ROWS[1]])
        assert [row["id"] for row in kept.rows] == ["h0", "b0"]
        assert kept.rows[0]["completion"] == REFUSAL
        assert kept.rows[0]["coca"]["kept"] == "vanilla"
        failed = remote(server, "--on-reject", "fail", *few)
        assert (failed.code, failed.rows) == (65, [])
        assert "stdin:1: rejected: " in failed.err
        share = remote(server, "--min-accept", ".5", "-o", tmp_path / "out.jsonl", *few)
        assert share.code == 65
        assert "0.0% of the rows were accepted" in share.err
        assert not (tmp_path / "out.jsonl").exists()
    with Loopback(teach) as server:
        fixed = remote(server, "--unsafe-vanilla", "refuse", rows=[unsafe])
    assert fixed.rows[0]["completion"].endswith("<response> I'm sorry, but I can't help with that. </response>")
    assert fixed.rows[0]["coca"]["response_source"] == "fixed"


def test_one_think_for_all_is_not_acceptance(remote):
    def same(seen):
        text = annotation("x", "bicycle theft" if "steal" in asked_about(seen) else None)
        return Answer(said(seen, text.replace("The request says: x", "To steal bicycle number, kinds of cake, name.")))

    with Loopback(same) as server:
        done = remote(server, "--min-accept", ".5", "--verify", "lenient")
    assert done.code == 65
    assert "share a think" in done.err


def test_a_file_appears_whole_and_its_log_goes(remote, tmp_path):
    out = tmp_path / "out.jsonl"
    with Loopback(teach) as server:
        done = remote(server, "-o", out)
        assert (done.code, done.out) == (0, b"")
        assert len(out.read_text().splitlines()) == 8
        assert list(tmp_path.iterdir()) == [out]
        assert remote(server, "-o", out).code == 73
        again = remote(server, "-o", out, "--resume")
        assert (again.code, len(server.seen)) == (0, 8)
        assert "finished already" in again.err


def faulty(seen: Seen, state: dict) -> Answer:
    """30 % errors, 5 % that hang beyond the timeout, 5 % cut JSON, 10 % without tags. Every fourth try gets
    through: eight failures in a row would be two minutes of patience."""
    request = asked_about(seen)
    tries = state[request] = state.get(request, 0) + 1
    draw = int(hashlib.sha256(f"{request}{tries}".encode()).hexdigest(), 16) % 100
    if tries % 4 == 0:
        return teach(seen)
    if draw < 30:
        return Answer({"error": "busy"}, 429 if draw < 15 else 500, {"Retry-After": "0"} if draw < 15 else {})
    if draw < 35:
        return Answer(teach(seen).body, delay=1.2)
    if draw < 40:
        return Answer(teach(seen).body, cut=True)
    if draw < 50:
        return Answer(said(seen, "Certainly! Here is the annotation."))
    return teach(seen)


@pytest.mark.slow
def test_two_thousand_rows_through_a_faulty_endpoint_killed_and_resumed(tool, tmp_path):
    """All in order, none twice; killed at 40 % and resumed the file is the uninterrupted one, and no answer that was
    there is asked for again."""
    rows = [
        {"id": f"r{i}", "prompt": f"How do I steal bicycle number {i}?", "completion": REFUSAL, "label": "harmful"}
        if i % 2
        else {"id": f"r{i}", "prompt": f"Name {i} kinds of cake.", "completion": f"Cake {i}.", "label": "benign"}
        for i in range(2000)
    ]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_text(lines(rows))
    words = ["--model", "t", "--concurrency", "64", "--timeout", "1", "--retries", "12", "--max-attempts", "6"]

    def command(server, out):
        return ["--backend", "openai", "--base-url", server.url, *words, "-o", out, "--log", f"{out}.log", source]

    digests = []
    for name in ("whole", "killed"):
        state: dict[str, int] = {}
        out = tmp_path / name
        # the server is the same for both, so that the log's address is too
        with Loopback(lambda seen, state=state: faulty(seen, state)) as server:
            if name == "killed":
                with open(os.devnull, "rb") as null, (tmp_path / "err").open("wb") as err:
                    running = tool.start(
                        "coca-refactor", *command(server, out), fds=(null.fileno(), err.fileno(), err.fileno())
                    )
                log, limit = Path(f"{out}.log"), time.monotonic() + 300
                while not log.exists() or log.read_bytes().count(b"\n") < 800:
                    assert time.monotonic() < limit
                    time.sleep(0.01)
                os.kill(running.pid, signal.SIGKILL)
                running.wait()
                assert not out.exists()
                answered = {json.loads(line)["id"] for line in log.read_text().splitlines()[:-1]}
                before = dict(state)
                done = tool("coca-refactor", "--resume", *command(server, out))
                assert done.code == 0, done.err
                finished = {
                    row["id"] for row in map(json.loads, out.read_text().splitlines()) if row["coca"]["attempts"] == 1
                }
                for row in rows:
                    if row["id"] in answered & finished:
                        assert state[row["prompt"]] == before[row["prompt"]], row["id"]
            else:
                done = tool("coca-refactor", *command(server, out))
                assert done.code == 0, done.err
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["id"] for row in found] == [row["id"] for row in rows]
        digests.append([(row["id"], row["completion"]) for row in found])
    assert digests[0] == digests[1]


def test_killed_and_resumed_is_the_uninterrupted_file(tool, tmp_path):
    source = tmp_path / "in.jsonl"
    rows = [{**row, "id": f"{row['id']}/{k}"} for k in range(4) for row in ROWS]
    for k, row in enumerate(rows):
        name = "prompt" if "prompt" in row else "instruction"
        row[name] = row[name].replace("number", f"number {k} or").replace("kinds", f"or {k} kinds")
    source.write_text(lines(rows))
    log = tmp_path / "log"
    with Loopback(lambda seen: Answer(teach(seen).body, delay=0.03)) as server:
        words = ["--backend", "openai", "--base-url", server.url, "-m", "t", "--concurrency", "4", source]
        whole = tool("coca-refactor", *words)
        first = len(server.seen)
        with open(os.devnull, "rb") as null, (tmp_path / "err").open("wb") as err:
            fds = (null.fileno(), err.fileno(), err.fileno())
            running = tool.start("coca-refactor", "--log", log, *words, fds=fds)
            limit = time.monotonic() + 30
            while not log.exists() or log.read_bytes().count(b"\n") < 12:
                assert time.monotonic() < limit
                time.sleep(0.005)
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
        held = log.read_bytes().count(b"\n")
        killed = len(server.seen)
        resumed = tool("coca-refactor", "--log", log, "--resume", *words)
        assert resumed.out == whole.out
        assert len(server.seen) - killed == len(rows) - held
    assert first == len(rows)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.parametrize("waits", ["for answers", "for its reader"])
def test_an_interrupt_keeps_what_was_answered_and_says_how_to_go_on(tool, tmp_path, waits):
    log = tmp_path / "log"
    source = tmp_path / "in.jsonl"
    source.write_text(lines(ROWS))
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Loopback(lambda seen: Answer(teach(seen).body, delay=0.3 + (seen.index > 1))))
        err = stack.enter_context((tmp_path / "err").open("wb"))
        null = stack.enter_context(open(os.devnull, "rb"))
        read_end, out = os.pipe()
        for end in (read_end, out):
            stack.callback(os.close, end)
        room = fcntl.fcntl(out, fcntl.F_GETPIPE_SZ)
        os.write(out, bytes(room if waits == "for its reader" else 1))
        words = ["--backend", "openai", "--base-url", server.url, "-m", "t", "--concurrency", "2", "--log", log, source]
        running = tool.start("coca-refactor", *words, fds=(null.fileno(), out, err.fileno()))
        while len(log.read_bytes().splitlines() if log.exists() else b"") < 2 or len(server.seen) < 4:
            time.sleep(0.01)
        time.sleep(0.2)  # until the row is being written
        os.kill(running.pid, signal.SIGINT)
        os.read(read_end, room)
        assert running.wait() == 130
        assert len(log.read_text().splitlines()) == len(server.seen) == 4  # those under way came in
    said = (tmp_path / "err").read_text()
    assert "has 4 answers" in said
    assert "--resume" in said


def test_a_batch_written_and_read_back(tool, tmp_path):
    batch = tool("coca-refactor", "--backend", "openai", "-m", "M", "--emit-requests", stdin=lines(ROWS))
    assert batch.code == 0, batch.err
    assert [row["custom_id"] for row in batch.rows] == [f"{row['id']}/annotate/0" for row in ROWS]
    answers = []
    for row in batch.rows[:-1]:
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        assert row["body"]["model"] == "M"
        seen = Seen(0, "", {}, row["body"], 0.0)
        answers.append({"id": "x", "custom_id": row["custom_id"], "error": None,
                        "response": {"status_code": 200, "request_id": "y", "body": teach(seen).body}})  # fmt: skip
    answers.append({"id": "x", "custom_id": batch.rows[-1]["custom_id"], "error": {"message": "no"}, "response": None})
    stored = tmp_path / "answers.jsonl"
    stored.write_text(lines(answers))
    for flag in ("--replay", "--responses"):
        done = tool("coca-refactor", "--backend", "replay", flag, stored, "--on-bad", "skip", stdin=lines(ROWS))
        assert [row["id"] for row in done.rows] == [row["id"] for row in ROWS[:-1]]
        assert "1 bad rows left out" in done.err
    missing = tool("coca-refactor", "--backend", "replay", "--replay", stored, stdin=lines(ROWS))
    assert missing.code == 65
    assert "stdin:8: there is no stored response" in missing.err


def test_a_key_that_is_refused_and_an_endpoint_that_is_not_there_are_69(remote, tool):
    with Loopback(lambda seen: Answer({"error": {"message": "no"}}, 401)) as server:
        assert remote(server, "--concurrency", "1").code == 69
    words = ("--backend", "openai", "--base-url", "http://127.0.0.1:9/v1", "-m", "t", "--retries", "0")
    gone = tool("coca-refactor", *words, stdin=lines(ROWS))
    assert (gone.code, gone.out) == (69, b"")


def test_a_local_teacher_is_forced_and_does_not_show_how_it_was_batched(tool, wide, tmp_path):
    short = tmp_path / "short.yaml"
    short.write_text(SHORT)
    words = ["-m", wide, "--template", short, "--verify", "off", "--temperature", "1", "--keep-vanilla-text"]
    plain = tool("coca-refactor", *words, stdin=lines(ROWS[:4]))
    assert plain.code == 0, plain.err
    assert [row["id"] for row in plain.rows] == ["h0", "b0", "h1", "b1"]
    for row, before in zip(plain.rows, ROWS, strict=False):
        assert row["coca"]["decision"] == ("refuse" if before["label"] == "harmful" else "comply")
        assert row["coca"]["vanilla"] == before.get("completion", before.get("output"))
    for more in (["--window", "1"], ["--batch-size", "1"]):
        assert tool("coca-refactor", *words, *more, stdin=lines(ROWS[:4])).out == plain.out
    log = tmp_path / "log"
    logged = tool("coca-refactor", *words, "--log", log, stdin=lines(ROWS[:4]))
    text = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(text[:5]))
    resumed = tool("coca-refactor", *words, "--log", log, "--resume", stdin=lines(ROWS[:4]))
    assert resumed.out == logged.out == plain.out
    assert len(log.read_bytes().splitlines()) == len(text)


def test_a_prompt_too_long_for_the_model_is_a_bad_row(tool, tiny):
    done = tool("coca-refactor", "-m", tiny, stdin=lines(ROWS[:1]))
    assert done.code == 65
    assert "stdin:1: the prompt has" in done.err


def test_records_are_judged_as_they_are(tool, remote):
    with Loopback(teach) as server:
        made = remote(server)
    again = tool("coca-refactor", "--verify-only", stdin=made.out)
    assert again.out == made.out
    rows = made.rows
    rows[0]["completion"] = rows[0]["completion"].replace(REFUSAL, "I'm sorry, I cannot help with this.")
    rows[1]["output"] = rows[1]["output"].replace(" </response>", "")
    rows[2]["completion"] = "no tags at all"
    judged = tool("coca-refactor", "--verify-only", stdin=lines(rows))
    assert [row["id"] for row in judged.rows] == [row["id"] for row in rows[3:]]
    fixed = tool("coca-refactor", "--verify-only", "--fix", stdin=lines(rows[1:2]))
    assert fixed.rows[0]["output"].endswith("</response>")


def test_shapes_styles_and_ablations_go_through(remote):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "How do I steal a bicycle?"},
                {"role": "assistant", "content": REFUSAL},
            ]
        }
    ]

    def answer(seen):
        text = teach(seen).body["choices"][0]["message"]["content"]
        text = text.replace("erase unsafe concepts", "erase_unsafe_concepts")
        return Answer(said(seen, text.replace("</", "</c-").replace("<", "<c-").replace("<c-/c-", "</c-")))

    with Loopback(answer) as server:
        done = remote(server, "--tag-style", "underscored", "--tag-prefix", "c-", "--no-meta", rows=rows)
    assert done.code == 0, done.err
    assert "<c-erase_unsafe_concepts>" in done.rows[0]["messages"][1]["content"]
    assert "coca" not in done.rows[0]
    with Loopback(teach) as server:
        dropped = remote(server, "--ablate", "drop:think", rows=ROWS[:1])
    assert dropped.rows[0]["completion"].startswith("<concept>")
    assert dropped.rows[0]["coca"]["ablation"] == "drop:think"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--decode", "forced", "--backend", "openai", "-m", "x", "--base-url", "http://localhost/v1"],
            "--decode forced",
        ),
        (["--decode", "json"], "--decode json"),
        (["--backend", "openai"], "needs --model"),
        (["--backend", "openai", "-m", "x"], "needs an address"),
        (["--backend", "replay"], "needs --replay"),
        (["--emit-requests"], "--emit-requests"),
        (["--fix"], "--fix mends records"),
        (["--max-length", "5"], "--max-length counts"),
        (["--think-lang", "xx"], "--think-lang xx"),
        (["--resume"], "--resume"),
        (["--ablate", "x"], "--ablate x"),
        (["--tag-prefix", "<"], "--tag-prefix"),
        (["--rejects", "-"], "--rejects -"),
        (["--concurrency", "3"], "--concurrency has no use"),
    ],
)
def test_what_does_not_fit_together_is_said_at_once(words, says):
    from toolbox.commands.coca_refactor import check, main
    from toolbox.shell.errors import UsageProblem

    house = ("print_recipe", "num_processes", "accelerate", "debug", "dry_run", "quiet")
    with main.make_context("coca-refactor", list(words)) as context:
        values = {name: value for name, value in context.params.items() if name not in house}
        with pytest.raises(UsageProblem) as caught:
            check(values)
    assert says in str(caught.value)


def test_a_usage_error_is_2_and_writes_nothing(tool):
    done = tool("coca-refactor", "--fix", stdin=lines(ROWS))
    assert (done.code, done.out) == (2, b"")


def test_print_template_prints_one_that_is_taken(tool, tmp_path):
    printed = tool("coca-refactor", "--print-template")
    path = tmp_path / "mine.yaml"
    path.write_bytes(printed.out)
    done = tool("coca-refactor", "--template", path, "--dry-run", stdin=lines(ROWS))
    assert done.rows[0]["pairs"] == 8
    assert done.rows[0]["template"].startswith("coca-v1@")


def test_the_student_s_tokenizer_bounds_the_length(remote, tiny, tmp_path):
    summary = tmp_path / "s.json"
    with Loopback(teach) as server:
        words = ("--tokenizer", tiny, "--max-length", "200", "--summary", summary, "--max-attempts", "1")
        done = remote(server, *words, rows=ROWS[:2])
        assert done.rows == []
        longer = remote(server, *words[:3], "900", *words[4:], "--quiet", rows=ROWS[:2])
    assert len(longer.rows) == 2
    counts = json.loads(summary.read_text())
    assert counts["tags_alike"]["<think>"] is True


def test_real_pairs_keep_every_byte(tool, coca_data, tmp_path):
    """2,483 safety pairs and 375 benign ones through a teacher that always annotates: fidelity, order, counts."""
    import gzip

    rows = []
    for name in ("vanilla_safety_stl", "vanilla_benign_rd", "vanilla_benign_seed"):
        with gzip.open(coca_data / f"{name}.jsonl.gz", "rt") as text:
            rows += [json.loads(line) for line in text]
    assert len(rows) == 2858
    batch = tool("coca-refactor", "--backend", "openai", "-m", "M", "--emit-requests", stdin=lines(rows))
    stored = tmp_path / "answers.jsonl"
    with stored.open("w") as handle:
        for row in batch.rows:
            source = rows[int(row["custom_id"].partition("/")[0]) - 1]
            unsafe = "harm" if source["label"] == "harmful" else None
            text = annotation(" ".join((source["instruction"] + " " + source["input"]).split()[:60]), unsafe)
            text = text.replace("bicycle theft, cakes", "harm, request")
            handle.write(json.dumps({"id": row["custom_id"].partition("/")[0], "variant": "annotate", "sample": 0,
                                     "completion": text}) + "\n")  # fmt: skip
    rejects, summary = tmp_path / "rejects.jsonl", tmp_path / "summary.json"
    done = tool("coca-refactor", "--backend", "replay", "--replay", stored, "--rejects", rejects, "--summary", summary,
                "--verify", "lenient", stdin=lines(rows))  # fmt: skip
    assert done.code == 0, done.err
    counts = json.loads(summary.read_text())
    rejected = [json.loads(line)["line"] for line in rejects.read_text().splitlines()]
    accepted = [int(row["id"]) for row in done.rows]
    assert sorted([*accepted, *rejected]) == list(range(1, 2859))
    assert accepted == sorted(accepted)
    assert counts["codes"]["unsafe_vanilla"] == 501
    for row in done.rows:
        before = rows[int(row["id"]) - 1]
        head, _, tail = row["output"].partition("<response> ")
        assert tail == before["output"] + " </response>"
        assert head
        assert {name: row[name] for name in before if name != "output"} == {
            k: v for k, v in before.items() if k != "output"
        }
    assert len(done.rows) > 2200
