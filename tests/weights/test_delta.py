"""base + delta is the new model: to the last bit where fp32 can hold the difference, within its rounding elsewhere."""

import hashlib
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolbox.shell.errors import BadData, MissingInput
from toolbox.weights.delta import apply_delta, sha256_weights, write_delta
from toolbox.weights.provenance import header, read_provenance
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_sharded

HEADER = header("satimp-unlearn", {}, 0, {"forget": "00"})


def round_trip(directory, base, new, *, dtype=None):
    """Write base and new - base to files; returns the delta as the library reads it, and base + delta."""
    directory.mkdir(exist_ok=True)
    save_file(base, directory / "base.safetensors")
    with open_weights(directory / "base.safetensors") as weights:
        write_delta(weights, new, directory / "delta.safetensors", HEADER)
        with open_weights(directory / "delta.safetensors") as delta:
            return load_file(directory / "delta.safetensors"), dict(apply_delta(weights, delta, dtype=dtype))


def uniform(seed, low, high, dtype=torch.float32, count=20_000):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low).to(dtype)


def test_fp32_is_exact_within_a_factor_of_two_and_within_two_roundings_elsewhere(tmp_path):
    base = uniform(0, -1, 1)
    near = base * uniform(1, 0.5, 2)
    near = torch.where((near.abs() <= 2 * base.abs()) & (near.abs() >= base.abs() / 2), near, base)
    far = uniform(2, -1, 1) * 10.0 ** uniform(3, -6, 6)
    delta, got = round_trip(tmp_path, {"near": base, "far": base.clone()}, {"near": near, "far": far})
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in delta.items()} == {
        "near": (torch.float32, base.shape),
        "far": (torch.float32, base.shape),
    }
    assert torch.equal(got["near"], near)
    bound = 2.0**-24 * ((far.double() - base.double()).abs() + far.double().abs()) * (1 + 2.0**-20)
    error = (got["far"].double() - far.double()).abs()
    assert (error <= bound).all()
    assert (error > 0).any()  # not exact there, as promised


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 14), (torch.float16, 11)])
def test_half_precision_is_exact_over_many_binades_and_from_zero(tmp_path, dtype, bits):
    base = uniform(0, 2.0**-2, 2.0**2, dtype) * uniform(4, -1, 1).sign().to(dtype)
    span = (bits - 4) / 2
    new = (uniform(1, 1, 2) * 2 ** uniform(2, -span, span)).to(dtype) * uniform(3, -1, 1).sign().to(dtype)
    base[:100], new[100:200] = 0, 0
    _, got = round_trip(tmp_path, {"w": base}, {"w": new})
    assert got["w"].dtype == dtype
    assert torch.equal(got["w"], new)


def test_a_bf16_base_trained_in_fp32_comes_back_in_fp32_when_asked(tmp_path):
    base = uniform(0, 0.5, 1, torch.bfloat16)
    new = base.float() * uniform(1, 0.99, 1.01)
    _, got = round_trip(tmp_path, {"w": base}, {"w": new}, dtype=torch.float32)
    assert torch.equal(got["w"], new)
    _, got = round_trip(tmp_path, {"w": base}, {"w": new})
    assert torch.equal(got["w"], new.to(torch.bfloat16))


def test_integers_scalars_and_empty_tensors_come_back_and_large_changes_are_refused(tmp_path):
    base = {"n": torch.tensor([2**40, -5, 0]), "m": torch.tensor([True, False]), "s": torch.tensor(1.5),
            "e": torch.empty(0, 3)}  # fmt: skip
    new = {"n": torch.tensor([2**40 + 7, 2**24 - 5, 0]), "m": torch.tensor([False, True]), "s": torch.tensor(2.0),
           "e": torch.empty(0, 3)}  # fmt: skip
    _, got = round_trip(tmp_path, base, new)
    assert all(torch.equal(got[name], new[name]) and got[name].dtype == new[name].dtype for name in new)
    with pytest.raises(BadData, match="'n': its integers changed"):
        round_trip(tmp_path, base, {**new, "n": torch.tensor([0, 0, 0])})
    with pytest.raises(BadData, match="'n': no difference"):
        round_trip(tmp_path, base, {**new, "n": torch.zeros(3)})


def test_the_delta_of_two_sharded_checkpoints_in_other_shards(tmp_path):
    base = {f"layer.{i}": torch.randn(50) for i in range(6)}
    new = {name: value + 1e-3 for name, value in base.items()}
    write_sharded(tmp_path / "base", base, max_shard_bytes=500)
    write_sharded(tmp_path / "new", new, max_shard_bytes=300)
    with open_weights(tmp_path / "base") as one, open_weights(tmp_path / "new") as two:
        write_delta(one, two, tmp_path / "delta.safetensors", HEADER)
        with open_weights(tmp_path / "delta.safetensors") as delta:
            assert delta.provenance["inputs"] == {"base": sha256_weights(tmp_path / "base"), "forget": "00"}
            assert delta.provenance["command"] == "satimp-unlearn"
            got = dict(apply_delta(one, delta))
            assert all(torch.equal(delta[name], new[name] - base[name]) for name in base)
            with pytest.raises(BadData, match="made from other weights"):
                list(apply_delta(two, delta))
    assert all((got[name] - new[name]).abs().max() <= 2.0**-22 for name in base)


def test_names_and_shapes_must_agree_both_ways(tmp_path):
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for new, message in [
        ({"a": torch.zeros(2)}, "the new weights: has no tensor 'b'"),
        ({**base, "c": torch.zeros(1), "d": torch.zeros(1)}, r"base.safetensors: has no tensor 'c' \(2 names differ\)"),
        ({**base, "b": torch.zeros(2, 1)}, r"'b' has shape \[2, 1\], not \[2\]"),
    ]:
        with pytest.raises(BadData, match=message):
            round_trip(tmp_path, base, new)
        assert not (tmp_path / "delta.safetensors").exists()
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "delta.safetensors")
    with (
        open_weights(tmp_path / "base.safetensors") as weights,
        open_weights(tmp_path / "delta.safetensors") as delta,
        pytest.raises(BadData, match="has shape"),
    ):
        list(apply_delta(weights, delta))


def test_trained_parameters_can_be_given_as_they_are(tmp_path):
    new = {"w": torch.nn.Parameter(torch.full((2, 3), 2.0).t())}
    delta, _ = round_trip(tmp_path, {"w": torch.ones(3, 2)}, new)
    assert torch.equal(delta["w"], torch.ones(3, 2))


def test_the_digest_of_a_checkpoint_is_what_sha256sum_says(tmp_path):
    tensors = {f"{i}": torch.full((10,), float(i)) for i in range(4)}
    write_sharded(tmp_path, tensors)
    alone = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert sha256_weights(tmp_path) == sha256_weights(tmp_path / "model.safetensors") == alone
    write_sharded(tmp_path, tensors, max_shard_bytes=50)
    command = "sha256sum *.safetensors | sha256sum"
    said = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sha256_weights(tmp_path) == said.split()[0] != alone
    with pytest.raises(MissingInput):
        sha256_weights(tmp_path / "absent")


def test_the_header_of_a_delta_keeps_what_the_command_said(tmp_path):
    round_trip(tmp_path, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    with open_weights(tmp_path / "delta.safetensors") as delta:
        said = read_provenance(HEADER)
        assert {**delta.provenance, "inputs": said["inputs"]} == said
        assert delta.metadata["format"] == "pt"
