"""The G-effect by depth: names of many models, sums that add up, and a figure that says what it shows."""

from __future__ import annotations

import re

import pytest

from tests.tiny import tiny_model
from toolbox.shell.errors import UsageProblem
from toolbox.unlearning.geffect import by_group, depth_groups, draw_geffect, thirds


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "layer 0"),
        ("model.layers.29.input_layernorm.weight", "layer 29"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        # Wrapped by PEFT, by the loss module, or both; experts have numbers of their own.
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "layer 3"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", "embedding"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "head"),
        ("model.base_model.model.model.layers.11.mlp.down_proj.lora_B.default.weight", "layer 11"),
        ("model.layers.4.mlp.experts.7.w1.weight", "layer 4"),
        # GPT-2, GPT-NeoX, OPT, BLOOM, MPT, Mamba.
        ("transformer.wte.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("transformer.h.3.attn.c_attn.weight", "layer 3"),
        ("transformer.ln_f.bias", "norm"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("gpt_neox.layers.3.mlp.dense_h_to_4h.weight", "layer 3"),
        ("gpt_neox.final_layer_norm.weight", "norm"),
        ("embed_out.weight", "head"),
        ("model.decoder.embed_positions.weight", "embedding"),
        ("model.decoder.layers.10.fc1.weight", "layer 10"),
        ("transformer.word_embeddings_layernorm.weight", "embedding"),
        ("transformer.blocks.5.ffn.up_proj.weight", "layer 5"),
        ("backbone.layers.2.mixer.in_proj.weight", "layer 2"),
        ("lm_head.0.weight", "head"),
        ("something.else", "other"),
    ],
)
def test_a_parameter_is_placed_by_its_name(name, group):
    assert depth_groups(["model.layers.0.x", name]) == ["layer 0", group]


def test_a_stack_with_an_unusual_name_is_known_by_its_number():
    names = ["transformer.embeddings.weight", "transformer.attentions.0.q.weight", "transformer.attentions.1.q.weight"]
    assert depth_groups(names) == ["embedding", "layer 0", "layer 1"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "mamba"])
def test_every_parameter_of_a_real_architecture_has_a_place(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2},
        "gpt_neox": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        "opt": {"num_hidden_layers": 2, "hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2},
        "mamba": {"num_hidden_layers": 2, "hidden_size": 16},
    }
    config = AutoConfig.for_model(kind, vocab_size=30, **sizes[kind])
    if kind == "opt":
        config.word_embed_proj_dim = 16
    model = AutoModelForCausalLM.from_config(config)
    groups = set(depth_groups([name for name, _ in model.named_parameters()]))
    assert {"embedding", "layer 0", "layer 1", "norm"} <= groups
    assert groups <= {"embedding", "layer 0", "layer 1", "norm", "head"}


def test_groups_are_in_order_of_depth_and_add_up():
    names = [name for name, _ in tiny_model(layers=12, tied=False).named_parameters()]
    products = [((7 * place) % 11 - 5) / 4 for place in range(len(names))]  # exact in binary
    sums = by_group(products, depth_groups(names))
    assert list(sums) == ["embedding", *(f"layer {number}" for number in range(12)), "norm", "head"]
    assert sum(sums.values()) == sum(products)
    assert list(by_group(products[::-1], depth_groups(names[::-1]))) == list(sums)
    by_name = [value for name, value in zip(names, products, strict=True) if ".layers.11." in name]
    assert sums["layer 11"] == sum(by_name)


@pytest.mark.parametrize("layers", range(3, 33))
def test_thirds_share_out_the_layers_and_add_up(layers):
    sums = {"embedding": 0.5, **{f"layer {number}": float(2**number) for number in range(layers)}, "head": 0.25}
    found = thirds(sums)
    assert list(found) == ["embedding", "early layers", "middle layers", "late layers", "head"]
    assert sum(found.values()) == sum(sums.values())
    counts = [bin(int(found[f"{third} layers"])).count("1") for third in ("early", "middle", "late")]
    assert sum(counts) == layers
    assert max(counts) - min(counts) <= 1
    assert found["early layers"] < found["middle layers"] < found["late layers"]  # 2**number: depth in order


def test_thirds_are_of_the_models_depth_where_only_some_layers_are_trained():
    sums = {"layer 5": 1.0, "layer 6": 2.0, "layer 7": 4.0}
    assert thirds(sums, layers=30) == {"early layers": 7.0}
    assert thirds(sums, layers=18) == {"early layers": 1.0, "middle layers": 6.0}


def drawn(path) -> str:
    return " ".join(re.findall(r"<!--(.*?)-->", path.read_text(encoding="utf-8"), re.DOTALL))


def lines(tied: bool = True) -> list[dict]:
    more = {} if tied else {"head": 0.5}
    return [
        {
            "step": step,
            "geffect": {"embedding": -2.0 / step, "layer 0": -0.1, "layer 1": 0.02 * step, "layer 2": 0.3} | more,
        }
        for step in (1, 2, 3)
    ]


def test_the_figure_has_thirds_and_embedding_on_scales_of_their_own(tmp_path):
    path = tmp_path / "geffect.svg"
    draw_geffect(lines(), path, "GRU on two people")
    text = drawn(path)
    for words in ("GRU on two people", "Decoder layers", "early layers", "late layers", "embedding", "harms retention"):
        assert words in text
    assert "head" not in text.replace("Embedding and head", "")
    draw_geffect(lines(tied=False), path, "untied")
    assert "head" in drawn(path).replace("Embedding and head", "")


def test_adapters_alone_make_one_panel(tmp_path):
    path = tmp_path / "geffect.svg"
    draw_geffect([{"step": 1, "geffect": {"layer 0": -0.1, "layer 1": 0.2}}], path, "LoRA")
    assert "Decoder layers" in drawn(path)
    assert "Embedding" not in drawn(path)


def test_an_unknown_kind_of_figure_is_refused(tmp_path):
    with pytest.raises(UsageProblem):
        draw_geffect(lines(), tmp_path / "geffect.bmp", "")
