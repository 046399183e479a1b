"""lm-generate as a filter: which prompt is taken, what is refused, what a window does."""

from __future__ import annotations

import pytest

from tests.lm.asking import SHORT, USER, lines


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


def test_what_one_process_must_do_is_refused_before_workers_start(tool, tmp_path):
    stored = tmp_path / "stored.jsonl"
    stored.write_text('{"id": "1", "completion": "x"}\n')
    done = tool("lm-generate", "--backend", "replay", "--replay", stored, "-j", "2", stdin=b'{"prompt": "x"}\n')
    assert (done.code, done.out) == (2, b"")
    assert "-j has no use with --backend replay" in done.err
    assert done.seconds < 5  # workers take longer to import torch, and more than one of them complains
    assert len(done.err.splitlines()) == 2
