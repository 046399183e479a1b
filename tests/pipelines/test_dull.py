"""DULL from a manifest of real images to a list of doubts, in a shell."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.conftest import SHARED

IMAGES = SHARED / "images"
SCRIPT = """
tar xJf "$IMAGES/cifar10_jpeg.tar.xz"
dull-noise "$IMAGES/cifar10n_train.jsonl.gz" --max-per-class 150 --imbalance .1 --mode t2h --profile flat --rate .3 \
    --seed 1 --report noise.json > noisy.jsonl
dull-noise "$IMAGES/cifar10n_train.jsonl.gz" --mode field --field label_worse --t2h-only --class-order confusion \
    --imbalance .1 --max-per-class 100 > human.jsonl
zcat "$IMAGES/cifar10_test.jsonl.gz" | awk 'NR % 25 == 0' > test.jsonl
dull-train noisy.jsonl --root . --eval test.jsonl --recipe "$RECIPE" --epochs 4 -o dull | tee dull.jsonl | tail -n 1
jq -c 'select(.dull.flagged)' dull/samples.jsonl > to_review.jsonl
dull-train human.jsonl --root . --recipe "$RECIPE" --epochs 1 -o human | tail -n 1
dull-eval test.jsonl --root . --model dull --summary-only --plot confusion.png
dull-eval noisy.jsonl --root . --model dull --samples dull/samples.jsonl --summary-only
"""


@pytest.mark.slow
@pytest.mark.skipif(not IMAGES.is_dir(), reason=f"CIFAR-10 is not here ({IMAGES})")
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_injected_and_human_noise_on_real_images(sh, tmp_path):
    from tests.server import ROOT

    done = sh(SCRIPT, tmp_path, IMAGES=str(IMAGES), RECIPE=str(ROOT / "recipes/dull/cifar10-cpu.yaml"))
    assert done.returncode == 0, done.stderr
    trained, human, judged, detected = (json.loads(line) for line in done.stdout.splitlines())
    assert judged["acc"] == trained["acc"]
    assert judged["n"] == 400
    assert judged["acc"] > 0.1
    assert detected["detection"]["n"] == trained["samples"] == json.loads((tmp_path / "noise.json").read_text())["n"]
    assert detected["detection"]["noise_before"] == pytest.approx(0.3, abs=0.01)
    assert human["detection"]["noise_before"] > 0.1
    reviewed = (tmp_path / "to_review.jsonl").read_text().splitlines()
    assert len(reviewed) == trained["detection"]["flagged"] == detected["detection"]["flagged"]
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
