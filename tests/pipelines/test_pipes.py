"""Real executables and real pipes, on the tiny model: what the docs promise of the shell."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server import ROOT, environment, real_sh

ROWS = [
    {"question": f"Where does Zorblax {i} live?", "answer": f"Zorblax {i} lives in Quuxville {i}."} for i in range(6)
]


@pytest.fixture
def here(tmp_path, tiny) -> Path:
    """A working directory with a model and data in several shapes."""
    (tmp_path / "tiny").symlink_to(tiny)
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "people.jsonl").write_text(text)
    (tmp_path / "people.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "forget.jsonl").write_text("".join(text.splitlines(keepends=True)[:2]))
    (tmp_path / "retain.jsonl").write_text("".join(text.splitlines(keepends=True)[2:]))
    return tmp_path


def test_a_trainer_in_a_pipe_hands_on_its_last_event(here):
    done = real_sh("zcat people.json.gz | lm-tune --model tiny --out tuned --epochs 2 | tail -n 1", here)
    assert done.returncode == 0, done.stderr
    event = json.loads(done.stdout)
    assert (event["event"], event["model"]) == ("done", "tuned")
    assert (here / "tuned" / "config.json").is_file()


def test_a_trainer_survives_head(here, sh):
    done = sh("lm-tune --model tiny --out tuned --epochs 3 --batch-size 2 people.jsonl | head -n 1", here)
    assert json.loads(done.stdout)["event"] == "start"
    assert (here / "tuned" / "model.safetensors").is_file()
    assert "stdout was closed" in done.stderr


def test_a_filter_between_redirections_keeps_order_and_fields(here):
    done = real_sh(
        "lm-generate --model tiny --map prompt=question --max-new-tokens 3 < people.jsonl > paths.jsonl", here
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (here / "paths.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == [row["answer"] for row in ROWS]
    assert [row["path_id"] for row in rows] == [f"{i}/0" for i in range(1, 7)]


def test_the_users_own_launcher_starts_two_processes(here):
    done = real_sh(
        "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--main_process_port 0 $(command -v satimp-unlearn) --model tiny --forget forget.jsonl --retain retain.jsonl "
        "--out unlearned --epochs 2 --batch-size 2",
        here,
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["processes"] == 2
    assert events[-1]["event"] == "done"
    assert (here / "unlearned" / "run.json").is_file()


def test_stdin_reaches_rank_0_alone_under_a_launcher(here):
    done = real_sh("lm-generate --model tiny -j 2 --map prompt=question --max-new-tokens 3 < people.jsonl", here)
    alone = real_sh("lm-generate --model tiny --map prompt=question --max-new-tokens 3 < people.jsonl", here)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert done.stdout.count("\n") == 6


def test_fsdp_on_a_cpu_is_refused_not_replaced(here):
    done = real_sh(
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0 $(command -v lm-tune) --model tiny --out t people.jsonl",
        here,
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode != 0
    assert "FSDP was asked for but is not active" in done.stderr
    assert not (here / "t").exists()


def test_no_forget_text_reaches_any_log_event_or_header(here, sh):
    done = sh(
        "satimp-unlearn --model tiny --forget forget.jsonl --retain retain.jsonl --out u --epochs 2 "
        "--delta d.safetensors",
        here,
    )
    assert done.returncode == 0, done.stderr
    places = [done.stdout, done.stderr, *(p.read_text(errors="replace") for p in (here / "u").glob("*.json*"))]
    for file in (here / "u" / "model.safetensors", here / "d.safetensors"):
        raw = file.read_bytes()
        places.append(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode())
    assert not any("Zorblax" in place or "Quuxville" in place for place in places)
    assert '"toolbox"' in places[-1]
    assert str(here) not in places[-1] + places[-2]


def test_the_delta_leads_from_the_base_to_the_unlearned_model(here, sh):
    done = sh(
        "satimp-unlearn --model tiny --forget forget.jsonl --retain retain.jsonl --out u --epochs 2 --lr 1e-3 "
        "--delta d.safetensors",
        here,
    )
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    base, new, delta = (
        load_file(here / name) for name in ("tiny/model.safetensors", "u/model.safetensors", "d.safetensors")
    )
    assert base.keys() == new.keys() == delta.keys()
    assert any(bool(value.any()) for value in delta.values())
    for name, value in delta.items():
        assert (base[name] + value - new[name]).abs().max() <= 1e-7


def test_lora_gives_an_adapter_that_peft_loads(here, sh):
    done = sh(
        "lm-tune --model tiny --out adapter --lora-r 4 --lr 1e-2 --epochs 3 people.jsonl && "
        "lm-generate --model adapter --map prompt=question --max-new-tokens 8 people.jsonl > paths.jsonl && "
        "satimp-unlearn --model adapter --forget forget.jsonl --retain retain.jsonl --epochs 1 --out u",
        here,
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (here / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (here / "adapter" / "model.safetensors").exists()
    loaded = subprocess.run(
        [sys.executable, "-c",
         "from peft import AutoPeftModelForCausalLM as A; m = A.from_pretrained('adapter')\n"
         "print(sum(p.numel() for n, p in m.named_parameters() if 'lora_B' in n and p.any()) > 0)"],
        cwd=here, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert loaded.stdout == "True\n", loaded.stderr
    assert (here / "u" / "model.safetensors").is_file()


def test_the_executables_run_from_a_checkout(here):
    done = real_sh(
        f"{sys.executable} {ROOT}/bin/lm-tune --version && {sys.executable} {ROOT}/bin/lm-generate --help | head -n 1",
        here,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].startswith("Usage: lm-generate")


def test_stop_when_ends_a_run_and_names_itself(here, sh):
    done = sh(
        "lm-tune --model tiny --out tuned --epochs 50 --lr 1e-2 --stop-when 'loss<3.5' people.jsonl | tail -n 1", here
    )
    event = json.loads(done.stdout)
    assert event["stopped"] == "loss<3.5"
    assert event["steps"] < 50
