"""Adapters start as nothing, train alone, can be switched off, and are files that plain peft loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import tiny_model, tiny_model_dir
from toolbox.models.adapters import adapters_off, add_lora, save_adapter
from toolbox.models.chat import Encoded
from toolbox.models.load import find_model, load_model
from toolbox.models.token_loss import TokenLoss, collate
from toolbox.shell.errors import UsageProblem

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
METADATA = {"format": "pt", "toolbox": "{}"}


def lora(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def trained(seed=0, **given):
    """An adapter whose B is no longer 0."""
    model = add_lora(tiny_model(), r=2, seed=seed, **given)
    with torch.no_grad():
        for name, parameter in lora(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    return model.eval()


def test_a_new_adapter_changes_nothing():
    base = tiny_model()(IDS).logits
    assert torch.equal(add_lora(tiny_model(), r=4)(IDS).logits, base)


def test_the_draw_depends_on_the_seed_alone():
    first = lora(add_lora(tiny_model(), r=4, seed=7))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = lora(add_lora(tiny_model(seed=5), r=4, seed=7))
    assert torch.equal(torch.get_rng_state(), before)
    other = lora(add_lora(tiny_model(), r=4, seed=8))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name])
        if "lora_A" in name:
            assert not torch.equal(first[name], other[name])


def test_only_adapters_are_trainable_and_the_head_has_none():
    model = add_lora(tiny_model(tied=False), r=4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora(model))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in lora(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert type(model.get_base_model().lm_head) is nn.Linear
    assert model.peft_config["default"].lora_alpha == 8  # twice r


@pytest.mark.parametrize(("alpha", "factor"), [(None, 2.0), (1.0, 0.5)])
def test_what_an_adapter_adds(alpha, factor):
    model = trained(alpha=alpha, targets=["q_proj"])
    tensors = lora(model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in tensors} == {"q_proj"}
    merged = tiny_model()
    with torch.no_grad():
        for number, layer in enumerate(merged.model.layers):
            a, b = (
                tensors[f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_{x}.default.weight"]
                for x in "AB"
            )
            layer.self_attn.q_proj.weight += factor * (b @ a)
    torch.testing.assert_close(model(IDS).logits, merged(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["nonsense"], ["q_proj", "nonsense"], ["_proj"], ["self_attn"], ["norm"]])
def test_targets_that_cannot_be_adapted(targets):
    with pytest.raises(UsageProblem, match="--lora-targets") as caught:
        add_lora(tiny_model(), r=2, targets=targets)
    assert caught.value.exit_code == 2
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert name in caught.value.advice


def test_targets_of_other_architectures():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(UsageProblem) as caught:
        add_lora(model, r=2, targets=["q_proj"])
    assert "c_attn" in caught.value.advice
    adapted = lora(add_lora(model, r=2, targets=["c_attn"]))
    assert len(adapted) == 4


def test_switched_off_it_is_the_base_bit_for_bit_and_on_again_afterwards():
    model, base = trained(), tiny_model()
    changed = model(IDS).logits
    assert not torch.equal(changed, base(IDS).logits)
    with adapters_off(model) as off:
        assert torch.equal(off(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS).logits, changed)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(model(IDS).logits, changed)


def test_switching_off_leaves_what_is_frozen_frozen():
    model = trained()
    for name, parameter in lora(model).items():
        parameter.requires_grad_("layers.1" in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapters_off(model):
        pass
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


# files


@pytest.fixture
def saved(tmp_path):
    base = load_model(find_model(str(tiny_model_dir(tmp_path / "base"))))
    model = add_lora(base, r=2, seed=3, targets=["v_proj", "q_proj", "up_proj"])
    with torch.no_grad():
        for name, parameter in lora(model).items():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.eval()
    save_adapter(model, tmp_path / "first", METADATA)
    return model, tmp_path


def test_plain_peft_loads_what_is_saved(saved):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from safetensors import safe_open

    model, path = saved
    expected = model(IDS).logits
    for loaded in (
        PeftModel.from_pretrained(tiny_model(), path / "first"),
        AutoPeftModelForCausalLM.from_pretrained(path / "first"),
        load_model(find_model(str(path / "first"))),
    ):
        assert torch.equal(loaded.eval()(IDS).logits, expected)
    config = json.loads((path / "first" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(path / "base")
    with safe_open(path / "first" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == METADATA
        assert len(file.keys()) == 2 * 2 * 3  # two layers, A and B, three modules: nothing of the base


def test_saving_changes_nothing(saved):
    model, path = saved
    config = model.peft_config["default"]
    assert config.inference_mode is False
    assert isinstance(config.target_modules, set)
    save_adapter(model, path / "second", METADATA)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / "first" / name).read_bytes() == (path / "second" / name).read_bytes()
    assert sorted(p.name for p in (path / "second").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.slow
def test_equal_adapters_are_equal_bytes_in_every_process(tmp_path):
    """Sets are written in the order of their hashes, and text hashes differently in every process."""
    code = (
        "import sys; from pathlib import Path; from tests.tiny import tiny_model\n"
        "from toolbox.models.adapters import add_lora, save_adapter\n"
        "save_adapter(add_lora(tiny_model(), r=2), Path(sys.argv[1]), {'format': 'pt'})"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HOME": "/tmp"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=environment, check=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_targets_are_written_in_order(saved):
    config = json.loads((saved[1] / "first" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]


def test_saving_asks_no_hub(tmp_path, monkeypatch):
    """The base may be named as nothing that a hub knows: its vocabulary is not looked up."""
    import huggingface_hub

    def refuse(*given, **named):
        raise AssertionError("the hub was asked")

    for name in ("file_exists", "hf_hub_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", refuse)
    model = trained()
    model.peft_config["default"].base_model_name_or_path = "smollm2"
    save_adapter(model, tmp_path, METADATA)


# under the loss


def test_the_token_loss_sees_and_trains_adapters():
    rows = [
        Encoded((4, 5, 6, 7), (False, True, True, False), (False,) * 4),
        Encoded((9, 8), (False, True), (False,) * 2),
    ]
    batch = collate(rows, 258)
    model = trained()
    nll, _ = TokenLoss(model)(batch.ids, batch.where, batch.labels)
    logits = model(batch.ids, attention_mask=batch.mask).logits.flatten(0, 1)[batch.where]
    torch.testing.assert_close(nll, nn.functional.cross_entropy(logits, batch.labels, reduction="none"))
    with adapters_off(model):
        off, _ = TokenLoss(model)(batch.ids, batch.where, batch.labels)
    own, _ = TokenLoss(tiny_model())(batch.ids, batch.where, batch.labels)
    assert torch.equal(off, own)
    assert not torch.equal(off, nll)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora(model).values())
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
