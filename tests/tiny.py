"""Two-layer random models and byte tokenizers, built in the test: real code paths in milliseconds, no download."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat: bool = True):
    """A byte-level tokenizer of 259 tokens whose pad and end token are the same, as in SmolLM2."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>" if chat else "<|endoftext|>",
        pad_token="<|im_end|>" if chat else "<|endoftext|>",
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    seed: int = 0, layers: int = 2, width: int = 32, vocabulary: int = 259, tied: bool = True, window: int = 512
):
    """A random Llama in fp32 (grouped-query attention, tied embeddings), in eval mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=tied,
        pad_token_id=258,
        eos_token_id=258,
        bos_token_id=None,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_model_dir(directory: Path | str, seed: int = 0, chat: bool = True, **sizes: int) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face directory; returns the path."""
    directory = Path(directory)
    tiny_model(seed, **sizes).save_pretrained(directory)
    tiny_tokenizer(chat).save_pretrained(directory)
    return directory
