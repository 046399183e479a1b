"""The header says how weights were made, in one canonical form without times, hosts and directories."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from toolbox.shell.errors import BadData
from toolbox.weights.provenance import canonical, header, read_provenance, with_input
from toolbox.weights.read import open_weights
from toolbox.weights.write import write_sharded

OPTIONS = {
    "model": "org/name",
    "forget": Path("/home/someone/data/forget.jsonl"),
    "watch": {"near": Path("data/near.jsonl"), "none": None},
    "layers": (3, 1),
    "retain": None,
    "lr": 5e-5,
    "limit": float("inf"),
    "note": "/abs/text.txt",
    "out": Path("runs/"),
    "flag": False,
}


def test_the_header_is_canonical_and_free_of_directories():
    made = header("satimp-unlearn", OPTIONS, 3, {"forget": "ab12"}, {"torch": "2"})
    assert made == {
        "format": "pt",
        "toolbox": '{"command":"satimp-unlearn","inputs":{"forget":"ab12"},"options":{"flag":false,'
        '"forget":"forget.jsonl","layers":[3,1],"limit":"inf","lr":5e-05,"model":"org/name","note":"text.txt",'
        '"out":"runs","watch":{"near":"near.jsonl"}},"seed":3,"versions":{"torch":"2"}}',
    }


def test_the_order_of_options_and_inputs_does_not_matter():
    inputs = {"b": "1", "a": "2"}
    turned = dict(reversed(OPTIONS.items())), 0, dict(reversed(inputs.items()))
    assert header("c", OPTIONS, 0, inputs) == header("c", *turned)


def test_versions_are_those_installed():
    versions = read_provenance(header("c", {}, None, {}))["versions"]
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["transformers"] == importlib.metadata.version("transformers")
    assert set(versions) <= {"toolbox-ten", "torch", "transformers"}


def test_it_survives_a_file_and_reads_back(tmp_path):
    made = header("lm-tune", OPTIONS, 0, {"rows": "00"})
    write_sharded(tmp_path, {f"{i}": torch.zeros(4) for i in range(3)}, made, max_shard_bytes=20)
    with open_weights(tmp_path) as weights:
        assert weights.provenance["command"] == "lm-tune"
        assert weights.provenance["inputs"] == {"rows": "00"}
    with safe_open(tmp_path / "model-00002-of-00003.safetensors", "pt") as shard:
        assert shard.metadata() == made


def test_equal_runs_give_equal_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sharded(tmp_path / name, {"w": torch.ones(4)}, header("c", OPTIONS, seed, {}))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000])
def test_an_entry_that_is_not_an_object_is_bad_data(text):
    assert read_provenance({"format": "pt"}) is None
    with pytest.raises(BadData, match=r"w.safetensors: __metadata__.toolbox"):
        read_provenance({"toolbox": text}, "w.safetensors")


def test_an_input_is_added_and_the_form_stays_canonical():
    made = with_input(header("c", {}, 0, {"z": "1"}), "base", "ff")
    assert read_provenance(made)["inputs"] == {"base": "ff", "z": "1"}
    assert made["toolbox"] == canonical(json.loads(made["toolbox"]))
    assert read_provenance(with_input({}, "base", "ff")) == {"inputs": {"base": "ff"}}
