"""Every objective, rectified: one process, two with replicas (DDP) and two with shards (FSDP2) end at one model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks.engines import CASES
from tests.server import ROOT, environment
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("engines")
    env = {**environment(), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    for engine in ("alone", "ddp", "fsdp2"):
        words = [sys.executable, "-m", "tests.ranks.engines", engine, out]
        if engine != "alone":
            words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [str(word) for word in words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_equal_one(results, name, engine):
    alone, two = (load_file(results / f"{one} {name}.safetensors") for one in ("alone", engine))
    assert alone.keys() == two.keys()
    for key, value in alone.items():
        assert (value - two[key]).abs().max() <= 1e-6, key


@pytest.mark.parametrize("name", list(CASES))
def test_the_steps_did_something(results, name):
    start = {f"model.{key}": value.double() for key, value in tiny_model(1).state_dict().items()}
    trained = load_file(results / f"alone {name}.safetensors")
    moved = (
        max(float((trained[key] - start[key]).abs().max()) for key in trained if key in start)
        if ("lora" not in name)
        else max(float(value.abs().max()) for key, value in trained.items() if "lora_B" in key)
    )
    assert moved > (1e-12 if name == "simnpo" else 1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one(results):
    for engine in ("alone", "ddp", "fsdp2"):
        whole, resumed = (load_file(results / f"{engine} {name}.safetensors") for name in ("npo", "npo resumed"))
        for key, value in resumed.items():
            assert value.equal(whole[key]), (engine, key)
