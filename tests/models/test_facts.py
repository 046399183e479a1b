"""What is told of a model without its weights equals what its weights say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.models.test_load import ROOT, write_gguf
from tests.tiny import tiny_model, tiny_model_dir
from toolbox.models.adapters import add_lora, save_adapter
from toolbox.models.facts import count_parameters, is_quantised, weights_digest, weights_directory
from toolbox.models.load import ModelSource, find_model, load_model
from toolbox.shell.errors import BadData

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "pad_token_id": 258, "eos_token_id": 258, "bos_token_id": None,
}  # fmt: skip


GPT2_SIZES = {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 258, "eos_token_id": 258}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "sizes"), [("Llama", SIZES), ("Qwen2", SIZES), ("GPT2", GPT2_SIZES)])
def test_the_count_is_that_of_the_loaded_model(tmp_path, architecture, sizes, tied):
    config = getattr(transformers, f"{architecture}Config")(**sizes, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    expected = sum(p.numel() for p in model.parameters())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for weights in tmp_path.glob("*.safetensors"):
        save_file({"x": torch.zeros(1)}, weights)  # never looked at
    assert count_parameters(find_model(str(tmp_path))) == expected


@pytest.fixture
def adapter(tmp_path):
    base = load_model(find_model(str(tiny_model_dir(tmp_path / "base"))))
    save_adapter(add_lora(base, r=2), tmp_path / "adapter", {"format": "pt"})
    return tmp_path / "adapter"


def test_of_an_adapter_the_base_is_counted_and_its_own_file_digested(adapter):
    source = find_model(str(adapter))
    assert count_parameters(source) == tiny_model().num_parameters()
    assert weights_directory(source) == adapter
    assert weights_digest(source) == hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_quantised_weights_are_told_by_the_configuration(adapter):
    base = adapter.parent / "base"
    config = json.loads((base / "config.json").read_text())
    sources = [find_model(str(path)) for path in (base, adapter)]
    for entry, quantised in ((None, False), ({"quant_method": "gptq", "bits": 4}, True)):
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": entry}))
        assert [is_quantised(source) for source in sources] == [quantised, quantised]
    assert not is_quantised(ModelSource("some/model", "hub"))


def test_an_adapter_on_a_gguf(tmp_path, monkeypatch):
    """The base is named as it was given, not by its place in the cache, and found from there again."""
    monkeypatch.setenv("TOOLBOX_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "tiny.gguf")
    model = add_lora(load_model(find_model(str(path))), r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_adapter(model, tmp_path / "adapter", {"format": "pt"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    source = find_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_model(source)(ids).logits, model.eval()(ids).logits)
    assert count_parameters(source) == tiny_model(vocabulary=260).num_parameters()


def test_digests_tell_weights_apart(tmp_path):
    one, same, other = (
        find_model(str(tiny_model_dir(tmp_path / name, seed=seed))) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert weights_digest(one) == weights_digest(same) != weights_digest(other)
    assert weights_digest(one) == hashlib.sha256((tmp_path / "a" / "model.safetensors").read_bytes()).hexdigest()


def test_of_a_hub_model_nothing_is_told():
    source = ModelSource("some/model", "hub")
    assert weights_directory(source) is None
    assert weights_digest(source) is None


def test_an_unknown_architecture_cannot_be_counted(tmp_path):
    path = tiny_model_dir(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(BadData, match="no-such-model"):
        count_parameters(find_model(str(path)))


def test_facts_are_asked_for_without_torch():
    code = "import sys, toolbox.models.facts; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
