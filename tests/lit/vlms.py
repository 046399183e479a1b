"""Tiny image processors and a tiny random LLaVA, built in the test: real code paths, no download."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import tiny_tokenizer

_BODY = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    + _BODY
    + "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    + _BODY
    + "{% endgeneration %}{% else %}"
    + _BODY
    + "{% endif %}{{ '\n' }}{% endfor %}"
)
"""The same with what transformers makes its assistant mask of."""

_LINES = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: " + _LINES + "\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
IDEFICS_MARKED = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}: {% if m['role'] == 'assistant' %}"
    "{% generation %}" + _LINES + "{% endgeneration %}{% else %}" + _LINES + "{% endif %}{{ '\n' }}{% endfor %}"
)
MARKED = {"llava": CHATML_MARKED, "llava-next": CHATML_MARKED, "idefics3": IDEFICS_MARKED}


def processor(kind: str = "llava", side: int = 28) -> Any:
    """A processor of one of ``MARKED``, byte tokens, images of ``side`` pixels in patches of 14."""
    import transformers as hf

    tokenizer = tiny_tokenizer()
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    patches = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if kind == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        return hf.LlavaProcessor(hf.CLIPImageProcessorPil(**size), tokenizer, chat_template=CHATML, **patches)
    if kind == "llava-next":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        images = hf.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=[[side, 2 * side], [2 * side, side]])
        return hf.LlavaNextProcessor(images, tokenizer, chat_template=CHATML, **patches)
    tiles = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side})
    return hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS)


def picture(number: int = 0, width: int = 40, height: int = 32) -> Any:
    """A small picture of noise that depends on ``number``."""
    from PIL import Image

    noise = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def data_uri(number: int = 0) -> str:
    """``picture(number)`` as a data URI."""
    handle = io.BytesIO()
    picture(number).save(handle, "PNG")
    return "data:image/png;base64," + base64.b64encode(handle.getvalue()).decode()


def tiny_llava(directory: Path, seed: int = 0, tied: bool = True) -> Path:
    """A random LLaVA (CLIP tower, two layers each) with its processor in a Hugging Face directory."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    made = processor("llava")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(made.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=258, eos_token_id=258,
        bos_token_id=None, initializer_range=0.2, tie_word_embeddings=tied,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=made.image_token_id, image_seq_length=4,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    made.save_pretrained(directory)
    return directory


@functools.cache
def shared_llava() -> Path:
    """A tiny LLaVA, made once a process."""
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="llava-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return tiny_llava(folder / "model")


def chats(count: int = 6) -> list[dict[str, Any]]:
    """Rows with an image, with text alone, with two turns; their supervised counts are very different."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        turns = [
            {"from": "human", "value": ("<image>\n" if i % 3 != 2 else "") + f"What is thing {i}?{' Why?' * (i % 4)}"},
            {"from": "gpt", "value": f"Thing {i} likes {'very ' * (2 * i % 7)}much."},
        ]
        if i % 2:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}]
        row = {"id": f"c{i}", "conversations": turns, "extra": {"big": 2**70, "x": [i, None]}}
        rows.append(row if i % 3 == 2 else {**row, "image": data_uri(i)})
    return rows


@functools.cache
def shared_tower() -> Path:
    """A tiny CLIP tower with its image processor, made once a process."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    folder = shared_llava().parent / "tower"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=8, **sizes)).save_pretrained(
            folder
        )
    side = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessorPil(**side).save_pretrained(folder)
    return folder
