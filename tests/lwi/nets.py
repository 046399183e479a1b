"""Small random networks of every architecture that has a spec, with biases and norms that a permutation would show."""

from __future__ import annotations

from pathlib import Path

import torch

_LLAMA = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 61, "max_position_embeddings": 64, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "image_size": 16,
    "patch_size": 4, "num_labels": 3,
}  # fmt: skip
LABELS = ["ant", "bee", "cat"]


def _backbone(name, widths):
    from toolbox.classify.backbones import backbone_config, new_backbone

    return new_backbone(backbone_config(name, LABELS, widths=widths, image_size=16), 0)


def _hf(kind, config, **settings):
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


NETS = {
    "cifar-resnet": lambda: _backbone("cifar-resnet8", [6, 10, 12]),
    "preact-resnet": lambda: _backbone("preact-resnet18", [6, 8, 10, 12]),
    "resnet-basic": lambda: _hf("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16],
                                depths=[2, 2], layer_type="basic", num_labels=3),
    "resnet-bottleneck": lambda: _hf("ResNetForImageClassification", "ResNetConfig", embedding_size=8,
                                     hidden_sizes=[16, 24], depths=[2, 2], layer_type="bottleneck", num_labels=3),
    "vit": lambda: _hf("ViTForImageClassification", "ViTConfig", **_VIT),
    "deit": lambda: _hf("DeiTForImageClassification", "DeiTConfig", **_VIT),
    "llama": lambda: _hf("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **_LLAMA),
    "qwen2": lambda: _hf("Qwen2ForCausalLM", "Qwen2Config", **{k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": lambda: _hf("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA),
    "gpt2": lambda: _hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32,
                        bos_token_id=None, eos_token_id=None),
}  # fmt: skip
"""What is made, by a name of its own."""


def stir(model: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Random changes on every floating tensor: fresh biases are 0 and norms 1, which hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                spread = value.std() if value.numel() > 1 and value.std() > 0 else 1
                value.add_(scale * spread * torch.randn(value.shape, generator=generator))
                if "running_var" in key:
                    value.abs_().add_(0.5)
    return model.eval()


def save_net(name: str, directory: Path, seed: int = 0, scale: float = 0.1) -> Path:
    """One of ``NETS`` with random changes by ``seed``, as a Hugging Face directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        stir(NETS[name](), seed, scale).save_pretrained(directory)
    return directory
