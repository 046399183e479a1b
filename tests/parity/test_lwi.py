"""Against published references: the fused MNIST nets of otfusion's own code, and what they score."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SHARED

IMAGES = SHARED / "images"


@pytest.fixture(scope="module")
def digits():
    if not (IMAGES / "otfusion_mnist_mlp_0.safetensors").is_file():
        pytest.skip(f"the reference networks are not here ({IMAGES})")
    with gzip.open(IMAGES / "mnist_5k.csv.gz") as handle:
        table = torch.from_numpy(np.loadtxt(handle, delimiter=",", dtype=np.float32))
    return (table[:, :-1] / 255 - 0.1307) / 0.3081, table[:, -1].long()


def accuracy(weights, digits):
    hidden, labels = digits
    for layer in (1, 2, 3):
        hidden = (hidden @ weights[f"fc{layer}.weight"].T).relu()
    return 100 * float(((hidden @ weights["fc4.weight"].T).argmax(1) == labels).double().mean())


def fuse(tool, out, *options):
    nets = [IMAGES / f"otfusion_mnist_mlp_{n}.safetensors" for n in (0, 1)]
    done = tool("lwi-fuse", *nets, "-o", out, *options)
    assert done.code == 0, done.err
    return load_file(out), done.rows


def test_two_mnist_nets_fuse_as_otfusion_fuses_them(tool, tmp_path, digits):
    """One greedy pass by Euclidean distances is otfusion's algorithm (weights, exact, step .5)."""
    reference = load_file(IMAGES / "otfusion_mnist_fused_ref_wts_exact.safetensors")
    greedy, _ = fuse(
        tool, tmp_path / "g.safetensors", "--matching", "greedy", "--metric", "euclidean", "--no-diversion"
    )
    assert max(float((greedy[key] - reference[key]).abs().max()) for key in reference) < 1e-4
    assert accuracy(greedy, digits) == pytest.approx(96.9, abs=0.1)
    naive, rows = fuse(tool, tmp_path / "i.safetensors", "--matching", "identity")
    assert accuracy(naive, digits) == pytest.approx(72.3, abs=0.1)
    assert {row["mode"] for row in rows[:-1]} == {"identity"}
    both, rows = fuse(tool, tmp_path / "c.safetensors", "--no-diversion")
    assert accuracy(both, digits) >= 97.3
    assert {row["mode"] for row in rows[:-1]} == {"similar"}
    assert 1 < rows[-1]["sweeps"] < 100
    # The last hidden layer diverted: the average loses, as it must where nothing was trained together.
    diverted, rows = fuse(tool, tmp_path / "d.safetensors")
    assert [row["mode"] for row in rows[:-1]] == ["similar", "similar", "dissimilar"]
    assert accuracy(diverted, digits) < 90


def test_k_weighs_old(tool, tmp_path, digits):
    old, new = (load_file(IMAGES / f"otfusion_mnist_mlp_{n}.safetensors") for n in (0, 1))
    found, _ = fuse(tool, tmp_path / "k.safetensors", "--matching", "identity", "--k", "0.9")
    assert all(torch.allclose(found[key], 0.9 * old[key] + 0.1 * new[key], atol=1e-6) for key in old)
    assert accuracy(fuse(tool, tmp_path / "one.safetensors", "--k", "1")[0], digits) == pytest.approx(
        accuracy(old, digits), abs=0.05
    )
