"""Every objective, rectified: one process, two with replicas (DDP) and two with shards (FSDP2) end at one model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.ranks.engines import CASES
from tests.server import ROOT, environment
from tests.tiny import tiny_model

ENGINES = ("alone", "ddp", "fsdp2")
HARDLY_MOVED = ("simnpo", "tnpo", "wtnpo")
"""On a random model these have next to no gradient: p is small, and so are their weights."""


def train(engine: str, out: Path) -> None:
    words = [sys.executable, "-m", "tests.ranks.engines", engine, str(out)]
    if engine != "alone":
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**environment(), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def moved(name: str, trained: dict, start: dict) -> float:
    if "lora" in name:
        return max(float(value.abs().max()) for key, value in trained.items() if "lora_B" in key)
    return max(float((trained[key] - start[key]).abs().max()) for key in trained if key in start)


def test_two_processes_equal_one_for_every_objective_and_for_adapters(tmp_path):
    for engine in ENGINES:
        train(engine, tmp_path)
    start = {f"model.{key}": value.double() for key, value in tiny_model(1).state_dict().items()}
    found = {
        (engine, name): load_file(tmp_path / f"{engine} {name}.safetensors") for engine in ENGINES for name in CASES
    }
    for name in CASES:
        alone = found["alone", name]
        assert moved(name, alone, start) > (0 if name in HARDLY_MOVED else 1e-4), name
        for engine in ("ddp", "fsdp2"):
            assert alone.keys() == found[engine, name].keys()
            for key, value in alone.items():
                assert (value - found[engine, name][key]).abs().max() <= 1e-6, (engine, name, key)
    for engine in ENGINES:  # a saved state and its continuation: the same bits
        for key, value in found[engine, "npo resumed"].items():
            assert value.equal(found[engine, "npo"][key]), (engine, key)
