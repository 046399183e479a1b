"""A key stands for all that decides a response; a log is never lost and never mixed up; replay finds what was said."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import tracemalloc

import pytest

from tests.tiny import tiny_model_dir
from toolbox.models.generate import Completion, Decoding, TextRequest
from toolbox.models.load import find_model
from toolbox.models.replay import Replay
from toolbox.models.responses import Keys, ResponseLog, check_log, describe_run, model_identity
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.streams import Streams

GREEDY, SAMPLED = Decoding(16), Decoding(16, 1.0, 0.9, seed=3)
RUN = describe_run("local", "sha256:1", GREEDY, dtype="fp32")


def ask(place=0, text="Hello", sample=0, variant=None):
    return TextRequest(f"r{place}", variant, sample, text)


def done(text="Hi.", **more):
    return Completion(
        **{"text": text, "finish_reason": "stop", "n_prompt_tokens": 5, "n_completion_tokens": 3, "logprobs": None,
           **more}
    )  # fmt: skip


def fill(path, count=3, run=RUN, resume=False, decoding=None):
    """Log ``count`` responses; the log's lines."""
    with ResponseLog(str(path), resume=resume) as log:
        log.begin(run, "tiny")
        for place in range(count):
            request = ask(place, f"Say {place}")
            log.add(log.key(request), request, done(f"<{place}>"))
    return path.read_bytes().splitlines(keepends=True)


def replay(path, **more):
    null = os.open(os.devnull, os.O_RDWR)
    return Replay(str(path), Streams(null, null), **more)


# keys

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def key(request=ask(), backend="local", model="sha256:1", decoding=SAMPLED, **more):  # noqa: B008
    return Keys(describe_run(backend, model, decoding, **{"dtype": "fp32", "template": "t", **more}))(request)


def test_all_that_decides_a_response_is_in_its_key():
    base = key()
    others = {
        "backend": key(backend="openai"),
        "model": key(model="sha256:2"),
        "number type": key(dtype="bf16"),
        "template": key(template="u"),
        "raw": key(raw=True),
        "address": key(base_url="http://x/v1"),
        "system": key(system="Be brief."),
        "no system and an empty one": key(system=""),
        "text": key(ask(text="Hello!")),
        "turns": key(ask(text=TURNS)),
        "system turn": key(ask(text=TURNS[1:])),
        "role": key(ask(text=[TURNS[0], {**TURNS[1], "role": "assistant"}])),
        "sample": key(ask(sample=1)),
        "id": key(ask(1)),
        "variant": key(ask(variant="v")),
        **{
            name: key(decoding=dataclasses.replace(SAMPLED, **{name: value}))
            for name, value in [("max_new_tokens", 17), ("temperature", 0.5), ("temperature", 0.0), ("top_p", 0.8),
                                ("stop", ("\n",)), ("seed", 4), ("logprobs", True)]
        },
    }  # fmt: skip
    assert len({base, *others.values()}) == len(others) + 1
    stops = [key(decoding=Decoding(16, stop=stop)) for stop in ((), ("a", "b"), ("b", "a"), ("ab",), ('a","b',))]
    assert len(set(stops)) == 5


def test_nothing_else_is():
    assert key(ask(text=list(TURNS))) == key(ask(text=tuple(dict(reversed(turn.items())) for turn in TURNS)))
    for more in ({"seed": 9}, {"top_p": 0.5}):  # greedy decoding draws nothing
        assert key(decoding=GREEDY) == key(decoding=dataclasses.replace(GREEDY, **more))
    assert key(ask(0), decoding=GREEDY) == key(ask(1, variant="v"), decoding=GREEDY)  # and its noise needs no name
    same_path = TextRequest("a/b", None, 0, "x"), TextRequest("a", "b", 0, "x")
    assert key(same_path[0]) == key(same_path[1])  # one path, one noise
    # Rounding through JSON changes nothing.
    run = describe_run("local", "m", Decoding(16, 1 / 3, 0.1 + 0.2))
    assert Keys(json.loads(json.dumps(run)))(ask()) == Keys(run)(ask())


def test_a_key_can_be_computed_by_anybody():
    run = describe_run("local", "sha256:1", SAMPLED, system="S", dtype="fp32")
    written = (
        '{"backend":"local","decoding":{"logprobs":false,"max_new_tokens":16,"seed":3,"stop":[],"temperature":1.0,'
        f'"top_p":0.9}},"dtype":"fp32","model":"sha256:1","system":"{_sha256(chr(34) + "S" + chr(34))}"}}'
    )
    asked = f'["{_sha256(written)}",[["user","Gr\\u00fc\\u00dfe"]],2,"r0/v/2"]'
    assert Keys(run)(ask(text=[{"role": "user", "content": "Grüße"}], sample=2, variant="v")) == _sha256(asked)


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_no_text_of_the_system_turn_is_in_the_description():
    assert "secret" not in json.dumps(describe_run("local", "m", GREEDY, system="a secret"))


def test_a_model_is_known_by_what_it_says_not_by_where_it_lies(tmp_path):
    def identity(path):
        return model_identity(find_model(str(path)))

    one = tiny_model_dir(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "copy" / "run.json").write_text('{"seconds": 3}')
    assert identity(one) == identity(tmp_path / "copy")
    seen = {identity(one), identity(tiny_model_dir(tmp_path / "other", seed=1)),
            identity(tiny_model_dir(tmp_path / "plain", chat=False))}  # fmt: skip
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        changed = tmp_path / f"changed-{name}"
        shutil.copytree(one, changed)
        (changed / name).write_text((changed / name).read_text() + " ")
        seen.add(identity(changed))
    assert len(seen) == 7


def test_an_adapter_is_known_with_its_base(tmp_path):
    from toolbox.models.adapters import add_lora
    from toolbox.models.load import load_model

    found = []
    for seed in (0, 1):
        base = tiny_model_dir(tmp_path / f"base{seed}", seed=seed)
        adapter = tmp_path / f"adapter{seed}"
        add_lora(load_model(find_model(str(base))), r=2, seed=5).save_pretrained(adapter)
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(base)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        found.append((model_identity(find_model(str(adapter))), model_identity(find_model(str(base)))))
    assert len({one for pair in found for one in pair}) == 4


def test_a_model_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    from huggingface_hub import constants

    from toolbox.models.load import ModelSource

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = []
    for revision in ("a" * 40, "b" * 40):
        cached = tmp_path / "models--someone--model"
        (cached / "snapshots" / revision).mkdir(parents=True)
        (cached / "snapshots" / revision / "config.json").write_text("{}")
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(revision)
        found.append(model_identity(ModelSource("someone/model", "hub")))
    assert found == ["someone/model@" + "a" * 40, "someone/model@" + "b" * 40]
    with pytest.raises(UsageProblem, match="the revision of someone/other is not known"):
        model_identity(ModelSource("someone/other", "hub"))


# the log


def test_what_was_logged_is_found_with_all_it_had(tmp_path):
    path = tmp_path / "log.jsonl"
    kept = [done("Grüße\n\u2028🙂", logprobs=(-0.1, -1 / 3)), done("", finish_reason="error", n_prompt_tokens=None)]
    with ResponseLog(str(path)) as log:
        assert log.begin(RUN, "tiny")
        keys = [log.key(ask(place, f"{place}")) for place in range(2)]
        assert log.find(keys[0]) is None
        for place, one in enumerate(kept):
            assert log.add(keys[place], ask(place, f"{place}"), one) == one
        assert [log.find(one) for one in keys] == kept
    with ResponseLog(str(path), resume=True) as log:
        assert log.begin(RUN, "tiny")
        assert [log.find(one) for one in keys] == kept
        assert (log.held, log.found, log.added) == (2, 2, 0)
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_each_response_is_in_the_file_when_add_returns(tmp_path):
    path = tmp_path / "log.jsonl"
    log = ResponseLog(str(path))
    log.begin(RUN, "tiny")
    for place in range(3):
        log.add(log.key(ask(place, f"{place}")), ask(place, f"{place}"), done())
        assert path.read_bytes().count(b"\n") == place + 1
        assert path.read_bytes().endswith(b"\n")
    log.close()


def test_a_line_says_what_was_asked_of_whom_and_not_the_prompt(tmp_path):
    line = json.loads(fill(tmp_path / "log.jsonl", 1)[0])
    assert {name: line[name] for name in ("id", "variant", "sample", "model", "completion", "finish_reason")} == {
        "id": "r0", "variant": None, "sample": 0, "model": "tiny", "completion": "<0>", "finish_reason": "stop",
    }  # fmt: skip
    assert line["run"] == RUN
    assert line["key"] == Keys(RUN)(ask(0, "Say 0"))
    assert "Say" not in json.dumps(line)


def test_the_first_response_of_a_key_stands_now_and_later(tmp_path):
    path = tmp_path / "log.jsonl"
    with ResponseLog(str(path)) as log:
        log.begin(RUN, "tiny")
        name = log.key(ask())
        assert log.add(name, ask(), done("first")).text == "first"
        assert log.add(name, ask(), done("second")).text == "first"
        assert log.added == 1
    doubled = path.read_bytes() + path.read_bytes().replace(b"first", b"again")
    path.write_bytes(doubled)
    with ResponseLog(str(path), resume=True) as log:
        assert log.find(name).text == "first"
    assert replay(path).find(ask()).text == "first"


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
    whole = fill(tmp_path / "whole.jsonl")
    path = tmp_path / "log.jsonl"
    last = whole[-1]
    for length in {*range(1, 12), len(last) // 2, len(last) - 2, len(last) - 1}:
        path.write_bytes(b"".join(whole[:-1]) + last[:length])
        fill(path, resume=True)
        assert path.read_bytes() == b"".join(whole)
    path.write_bytes(whole[0][:20])  # nothing but a torn line
    fill(path, resume=True)
    assert path.read_bytes() == b"".join(whole)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"prompt": "my own data"}\n', 1),
        (b"no line end at all", 1),
        (b"\x00\x01\x02", 1),
        (b'[{"key":"x"}]', 1),
        (b'{"key":"zz","id":"a"}\n', 1),
        (b"GOOD" + b'{"prompt": "x"}\n', 2),
        (b"GOOD" + b"my own last line", 2),
        (b"GOOD" + b"GOOD"[:3] + b"\n" + b"GOOD", 2),
    ],
)
def test_a_file_that_is_no_log_is_named_and_stays_as_it_is(tmp_path, content, line):
    good = fill(tmp_path / "good.jsonl", 1)[0]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content.replace(b"GOOD", good))
    before = path.read_bytes()
    with pytest.raises(BadData, match=f"mine.jsonl:{line}: not a response"):
        ResponseLog(str(path), resume=True)
    assert path.read_bytes() == before


def test_an_existing_log_needs_resume_and_another_run_is_not_disturbed(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = fill(path)
    with pytest.raises(CannotCreate, match="exists already"):
        ResponseLog(str(path))
    with ResponseLog(str(path), resume=True), pytest.raises(CannotCreate, match="another run"):
        ResponseLog(str(path), resume=True)
    ResponseLog(str(path), resume=True).close()
    assert path.read_bytes() == b"".join(lines)
    for name in ("empty.jsonl", "new.jsonl"):  # nothing to lose; with --resume from the very first start on
        (tmp_path / "empty.jsonl").touch()
        for resume in (False, True):
            ResponseLog(str(tmp_path / name), resume=resume).close()


def test_a_log_that_cannot_be_is_refused(tmp_path):
    for path, says in ((tmp_path, "not a regular file"), (tmp_path / "no" / "log", "does not exist"),
                       (tmp_path / "file" / "log", "does not exist"), ("/dev/null", "not a regular file")):  # fmt: skip
        (tmp_path / "file").touch()
        with pytest.raises(CannotCreate, match=says):
            ResponseLog(str(path))
    with pytest.raises(UsageProblem, match="among the rows"):
        check_log("-", resume=True)


def test_a_log_of_other_options_is_told(tmp_path):
    path = tmp_path / "log.jsonl"
    fill(path)
    other = describe_run("local", "sha256:1", Decoding(17), dtype="fp32")
    with ResponseLog(str(path), resume=True) as log:
        assert not log.begin(other, "tiny")
        assert log.find(log.key(ask(0, "Say 0"))) is None
        assert log.begin(RUN, "tiny")
    fill(path, 2, other, resume=True)
    assert [line["run"] for line in map(json.loads, path.read_bytes().splitlines())] == [RUN] * 3 + [other] * 2


def test_memory_is_that_of_an_index(tmp_path):
    path = tmp_path / "log.jsonl"
    (line,) = fill(path, 1)
    name = json.loads(line)["key"].encode()
    with path.open("wb") as handle:
        for number in range(4000):
            handle.write(line.replace(name, b"%064x" % number).replace(b"<0>", b"x" * 5000))
    for reader in (lambda: ResponseLog(str(path), resume=True), lambda: replay(path)):
        tracemalloc.start()
        held = reader()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        held.close()
        assert size < 4000 * 600
    assert path.stat().st_size > 4000 * 5000


# replay


def test_a_log_is_replayed_by_key_whatever_the_rows_are_called(tmp_path):
    path = tmp_path / "log.jsonl"
    fill(path)
    stored = replay(path)
    for place in range(3):
        found = stored.find(TextRequest("another name", "v", 0, f"Say {place}"))
        assert found == dataclasses.replace(done(f"<{place}>"), model="tiny")
    assert stored.find(TextRequest("another name", None, 0, "Say 9")) is None
    assert stored.find(TextRequest("another name", None, 0, [{"role": "user", "content": "Say 1"}])) is None
    assert stored.find(TextRequest("another", None, 0, TURNS), "Say 2").text == "<2>"  # the form that was used
    assert stored.changed == 0


def test_a_changed_prompt_is_found_by_name_and_counted(tmp_path):
    path = tmp_path / "log.jsonl"
    fill(path)
    stored = replay(path)
    assert stored.find(ask(1, "Say it differently")).text == "<1>"
    assert stored.changed == 1
    assert stored.find(ask(1, "Say it differently", sample=1)) is None
    assert stored.find(ask(1, "Say it differently", variant="v")) is None


def test_samples_are_replayed_to_their_own_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    requests = [TextRequest(id, None, sample, "same") for id, sample in itertools.product("ab", range(2))]
    with ResponseLog(str(path)) as log:
        log.begin(describe_run("openai", "m", SAMPLED), "m")
        for request in reversed(requests):
            log.add(log.key(request), request, done(request.key))
    stored = replay(path)
    assert [one.text for one in stored.complete(requests, GREEDY)] == ["a/0", "a/1", "b/0", "b/1"]
    with pytest.raises(BadData, match="no response for id c, sample 0"):
        stored.complete([TextRequest("c", None, 0, "same")], GREEDY)


def test_several_runs_in_one_log_do_not_mix(tmp_path):
    one, two = (describe_run("local", model, GREEDY) for model in ("sha256:1", "sha256:2"))
    for run, name in ((one, "a"), (two, "b")):
        with ResponseLog(str(tmp_path / name)) as log:
            log.begin(run, f"model-{name}")
            for place in range(2 + (name == "b")):
                log.add(log.key(ask(place, f"{place}")), ask(place, f"{place}"), done(f"{name}{place}"))
    (tmp_path / "both").write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    asked = [ask(place, f"{place}") for place in range(3)]
    assert [one.text for one in replay(tmp_path / "both").complete(asked, GREEDY)] == ["a0", "a1", "b2"]
    only = replay(tmp_path / "both", model="model-b")
    assert [(one.text, one.model) for one in only.complete(asked, GREEDY)] == [(f"b{n}", "model-b") for n in range(3)]
    with pytest.raises(BadData, match=r"no response is of the model nobody"):
        replay(tmp_path / "both", model="nobody")


ROWS = [
    {"id": "q1", "path_id": "x/0", "model": "base", "question": "?", "completion": "one"},
    {"id": "q1", "model": "base", "completion": "two", "finish_reason": "eos"},
    {"id": "q2", "model": "large", "completion": "three", "finish_reason": "length", "n_completion_tokens": 9},
    {"id": "q1", "model": "large", "completion": "four"},
    {"id": 7, "variant": "cot", "sample": 3, "completion": "five", "logprobs": [-1.0]},
    {"completion": "six"},
]


def test_anybodys_rows_with_completions_can_be_replayed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\r\n")
    stored = replay(path)
    assert [stored.find(ask_for("q1", sample)).text for sample in range(3)] == ["one", "two", "four"]
    assert stored.find(ask_for("q1", 3)) is None
    third = stored.find(ask_for("q2", 0))
    assert third == Completion("three", "length", None, 9, None, "large")
    assert stored.find(TextRequest("7", "cot", 3, "x")).logprobs == (-1.0,)
    assert stored.find(ask_for("11", 0)).text == "six"  # without an id the number of its line
    assert stored.find(ask_for("q1", 1)).finish_reason == "stop"
    assert stored.changed == 0
    large = replay(path, model="large")
    assert [large.find(ask_for("q1", 0)).text, large.find(ask_for("q1", 1))] == ["four", None]


def ask_for(id, sample):
    return TextRequest(id, None, sample, "whatever")


def test_compressed_rows_and_pipes_are_replayed_too(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "rows.gz").write_bytes(gzip.compress(text))
    assert replay(tmp_path / "rows.gz").find(ask_for("q1", 2)).text == "four"
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as pipe:
        pipe.write(text)
    stored = Replay("-", Streams(read_end, os.open(os.devnull, os.O_WRONLY)))
    assert stored.find(ask_for("q2", 0)).text == "three"
    assert stored.name == "stdin"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops}", "rows.jsonl:2: not valid JSON"),
        ('{"id": "x"}', "rows.jsonl:2: .*completion"),
        ('{"completion": null}', "rows.jsonl:2: .*completion"),
        ('{"completion": "x", "sample": "first"}', r"rows.jsonl:2: \$.sample"),
        ("[]", "rows.jsonl:2"),
    ],
)
def test_a_line_that_is_no_response_is_named(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"completion": "x"}}\n{line}\n{{"completion": "y"}}\n')
    with pytest.raises(BadData, match=says):
        replay(path)


def test_a_torn_last_line_is_left_out_of_a_replay(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = fill(path)
    path.write_bytes(b"".join(lines)[:-10])
    stored = replay(path)
    assert stored.torn
    assert [stored.find(ask(place, f"Say {place}")) is None for place in range(3)] == [False, False, True]
    path.write_bytes(b"".join(lines)[:-1])  # whole but for its line end
    stored = replay(path)
    assert not stored.torn
    assert stored.find(ask(2, "Say 2")).text == "<2>"


def test_a_log_read_from_the_middle_of_a_file_is_no_matter(tmp_path):
    path = tmp_path / "log.jsonl"
    fill(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, len(path.read_bytes().splitlines(keepends=True)[0]), os.SEEK_SET)
    stored = Replay("-", Streams(descriptor, os.open(os.devnull, os.O_WRONLY)))
    assert [stored.find(ask(place, f"Say {place}")) is None for place in range(3)] == [True, False, False]
    assert isinstance(stored._handle, io.BufferedReader)
