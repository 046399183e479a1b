"""A LLaVA model from a vision tower, a fresh connector and a language model."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from toolbox.lit.images import ImageStore
from toolbox.lit.rows import Counts, Reading, Sample, read_samples
from toolbox.models.load import cache_root, find_model, load_model, load_tokenizer
from toolbox.shell.command import Invocation
from toolbox.shell.errors import BadData, CannotCreate, UsageProblem
from toolbox.shell.files import RUN_FILE, OutputDirectory, atomic_directory, atomic_file, lock
from toolbox.shell.records import RecordReader, parse_map, write_rejects
from toolbox.shell.streams import JsonlWriter

DEFAULT = "efficientnet-lite0+smollm2"
IMAGE = "<image>"
TOWER_FILE = "efficientnet_lite.py"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a system prompt of its own; an image stands before its text, on a line of its own."""

_WORD = r" ?\w+| ?[^\w\s]|\s"
_MOST_CALIBRATED = 2000
_DECIDING = (
    *("vision", "lm", "connector", "lm_dim", "lm_layers", "lm_heads", "vocab_from", "image_size", "calibrate"),
)
_PAD_TO = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """lit-build's options."""

    out: str
    overwrite: bool = False
    map_fields: tuple[str, ...] = ()
    on_bad: str = "fail"
    rejects: str | None = None
    image_root: str | None = None
    max_image_pixels: float = 50e6
    vision: str = "efficientnet-lite0"
    lm: str = "smollm2"
    connector: str = "mlp2x_gelu"
    lm_dim: int = 96
    lm_layers: int = 2
    lm_heads: int = 4
    vocab_from: str | None = None
    image_size: int = 224
    calibrate: str | None = None
    seed: int = 0
    threads: int | None = None


def check(options: Options) -> None:
    """What does not fit together."""
    if options.lm == "scratch" and options.vocab_from is None:
        raise UsageProblem("--lm scratch needs --vocab-from ROWS", "the words of its tokenizer come from there")
    if options.lm != "scratch" and options.vocab_from is not None:
        raise UsageProblem("--vocab-from is for --lm scratch", "leave it out")
    if options.lm_dim % (2 * options.lm_heads):
        raise UsageProblem("--lm-dim must be a multiple of twice --lm-heads", "as in --lm-dim 96 --lm-heads 4")
    if options.vision == "efficientnet-lite0" and options.image_size % 32:
        raise UsageProblem(f"--image-size {options.image_size}: not a multiple of 32", "224 or 96, say")
    if options.calibrate is not None and options.vision != "efficientnet-lite0":
        raise UsageProblem("--calibrate is for the embedded tower", "leave it out")


def run(options: Options, call: Invocation) -> None:
    """Make the directory the options ask for."""
    check(options)
    store = ImageStore(options.image_root, options.max_image_pixels, call.reporter.warn)
    sets: dict[str, list[Sample]] = {}
    rejected: list[bytes] = []
    for name, source in (("vocab-from", options.vocab_from), ("calibrate", options.calibrate)):
        if source is None:
            continue
        if name == "calibrate" and source == options.vocab_from:
            sets[name] = sets["vocab-from"]
            continue
        sets[name] = _read(options, call, source, name, rejected)
    if options.rejects and not call.dry_run:
        write_rejects(options.rejects, rejected)
    writer = JsonlWriter(call.streams, trainer=True)
    if call.dry_run:
        facts = {"rows": {name: len(rows) for name, rows in sets.items()}}
        writer.write({"event": "plan", "command": call.command, "settings": call.settings, **facts})
        writer.close()
        return
    with OutputDirectory(options.out, overwrite=options.overwrite, resumable=False) as out:
        began = time.time()
        facts = build(options, out.partial, store, sets, call.reporter.note)
        record = {
            "command": call.command, "settings": call.settings, "done": facts,
            "versions": {name: version(name) for name in ("toolbox-ten", "torch", "transformers")},
            "wall_seconds": round(time.time() - began, 1),
        }  # fmt: skip
        with atomic_file(out.partial / RUN_FILE) as handle:
            handle.write(json.dumps(record, indent=2).encode() + b"\n")
        out.commit()
        writer.write({"event": "done", **facts})
        writer.close()
        call.reporter.note(f"wrote {options.out}: {facts['parameters'] / 1e6:.1f} M parameters")


def _read(options: Options, call: Invocation, source: str, name: str, rejected: list[bytes]) -> list[Sample]:
    from toolbox.lit.lines import CAPTIONS, TURNS

    reader = RecordReader(
        (*TURNS, *CAPTIONS), renames=parse_map(options.map_fields), on_bad=options.on_bad,
        rejects=lambda raw, _: rejected.append(raw),
    )  # fmt: skip
    samples = list(read_samples(source, call.streams, reader, Reading(answers=False), Counts(), f"--{name}"))
    if reader.skipped:
        call.reporter.warn(f"{source}: {reader.skipped} bad rows left out")
    if not samples:
        raise BadData("the set is empty", "give at least one row", file="stdin" if source == "-" else source)
    return samples


def default_model(note: Callable[[str], None]) -> Path:
    """EfficientNet-Lite0 and SmolLM2 as one model, built once into the user's cache."""
    target = cache_root() / "efficientnet-lite0-smollm2-1"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreate(f"{target}: {error.strerror}", "set TOOLBOX_CACHE to a directory you can write") from None
    with lock(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            note(f"building {DEFAULT} into {target} (once, about half a minute)")
            with atomic_directory(target) as part:
                build(Options(out=str(target)), part, ImageStore(None), {}, note)
    return target


def build(
    options: Options, directory: Path, store: ImageStore, sets: dict[str, list[Sample]], note: Callable[[str], None]
) -> dict[str, Any]:
    """Write the model below ``directory``; returns what is told of it."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(options.seed)
    tower, images, select = _tower(options)
    if "calibrate" in sets:
        seen = _calibrate(tower, images, store, sets["calibrate"], options.seed)
        note(f"features standardised over {seen} images")
    lm, tokenizer = _language_model(options, sets.get("vocab-from", []))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if options.lm != "scratch" or lm.get_input_embeddings().num_embeddings < len(tokenizer):
        lm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_PAD_TO, mean_resizing=False)
    side = options.image_size if options.vision == "efficientnet-lite0" else tower.config.image_size
    config = LlavaConfig(
        vision_config=tower.config, text_config=lm.config, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu" if options.connector == "mlp2x_gelu" else "linear",
        image_seq_length=(side // tower.config.patch_size) ** 2,
        tie_word_embeddings=lm.config.tie_word_embeddings, **select,
    )  # fmt: skip
    torch.manual_seed(options.seed)
    with torch.device("cpu"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(lm.base_model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        images, tokenizer, patch_size=tower.config.patch_size, chat_template=TEMPLATE,
        vision_feature_select_strategy=select["vision_feature_select_strategy"],
        num_additional_image_tokens=int(select["vision_feature_select_strategy"] == "default"),
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    return _write(directory, model, processor, options)


def _write(directory: Path, model: Any, processor: Any, options: Options) -> dict[str, Any]:
    from toolbox.models.vlm import OUR_TOWER
    from toolbox.training.save import save_whole
    from toolbox.weights.provenance import header

    if model.config.vision_config.model_type == OUR_TOWER:
        add_tower_file(directory)
        model.config.auto_map = tower_map()
    deciding = {name: getattr(options, name) for name in _DECIDING}
    save_whole(directory, model, None, header("lit-build", deciding, options.seed, {}))
    processor.save_pretrained(directory)
    parts = {"vision": model.model.vision_tower, "connector": model.model.multi_modal_projector}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "parts": {**counts, "lm": total - sum(counts.values())},
            "image_tokens": model.config.image_seq_length}  # fmt: skip


def tower_map() -> dict[str, str]:
    """The ``auto_map`` of a directory with the embedded tower."""
    stem = TOWER_FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{stem}.EfficientNetLlavaConfig",
        "AutoModelForImageTextToText": f"{stem}.EfficientNetLlava",
    }


def add_tower_file(directory: Path) -> None:
    """The tower's class file beside its weights: plain transformers needs it, our commands never run it."""
    import toolbox.models.effnet_lite

    shutil.copyfile(str(toolbox.models.effnet_lite.__file__), directory / TOWER_FILE)


# -- parts ------------------------------------------------------------------------------------------------------------
def _tower(options: Options) -> tuple[Any, Any, dict[str, Any]]:
    """The tower, its image processor, and how LLaVA picks features from it."""
    from transformers import AutoImageProcessor, AutoModel, CLIPImageProcessorPil

    from toolbox.models.vlm import quiet_transformers

    if options.vision == "efficientnet-lite0":
        from toolbox.models.effnet_weights import MEAN, SCALE, efficientnet_lite0

        size = options.image_size
        images = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=[MEAN] * 3,
            image_std=[SCALE] * 3,
        )  # fmt: skip
        select = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        return efficientnet_lite0(size), images, select
    source = find_model(options.vision)
    if source.path is None:
        raise UsageProblem(f"--vision {options.vision}: not a directory", "a CLIP, SigLIP or DINOv2 directory")
    try:
        with quiet_transformers():
            whole, report = AutoModel.from_pretrained(
                str(source.path), trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
            images = AutoImageProcessor.from_pretrained(str(source.path), use_fast=False)
    except (ImportError, ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
        raise BadData(f"the tower does not load: {what}", "is the directory whole?", file=options.vision) from None
    tower = getattr(whole, "vision_model", whole)
    own = "" if tower is whole else "vision_model."
    # What pools the patches is not used, and checkpoints of other heads lack it.
    if lost := sorted(key for key in report["missing_keys"] if key.startswith(own) and "pool" not in key):
        raise BadData(
            f"the weights of {len(lost)} tensors are missing, {lost[0]} among them",
            "not a whole tower, or weights of another one",
            file=options.vision,
        )
    if not hasattr(tower.config, "patch_size"):
        raise UsageProblem(f"--vision {options.vision}: no patches", "a vision transformer, or efficientnet-lite0")
    siglip = tower.config.model_type.startswith("siglip")
    return tower.eval(), images, {
        "vision_feature_layer": -2, "vision_feature_select_strategy": "full" if siglip else "default",
    }  # fmt: skip


def _calibrate(tower: Any, images: Any, store: ImageStore, samples: Sequence[Sample], seed: int) -> int:
    """Mean and scale of each channel over at most 2,000 images."""
    import random

    import torch

    names = sorted({name for sample in samples for name in sample.images})
    if not names:
        raise BadData("--calibrate: no row has an image", "give rows with images")
    if len(names) > _MOST_CALIBRATED:
        names = random.Random(seed).sample(names, _MOST_CALIBRATED)
    owner = {name: sample for sample in samples for name in sample.images}
    total, squares, count = 0.0, 0.0, 0
    with torch.no_grad():
        for start in range(0, len(names), 16):
            pictures = [_open(store, name, owner[name]) for name in names[start : start + 16]]
            pixels = images(images=pictures, return_tensors="pt")["pixel_values"]
            found = tower(pixels).last_hidden_state.flatten(0, 1).double()
            total, squares, count = total + found.sum(0), squares + found.square().sum(0), count + len(found)
        mean = total / count
        spread = (squares / count - mean.square()).clamp_min(0).sqrt()
        tower.feature_mean.copy_(mean)
        tower.feature_scale.copy_(spread.clamp_min(1e-3))
    return len(names)


def _open(store: ImageStore, name: str, sample: Sample) -> Any:
    from toolbox.lit.images import Unreadable

    try:
        return store.open(name)
    except Unreadable as reason:
        raise sample.bad(f"{name[:80]}: {reason}", "check --image-root", "$.image") from None


def _language_model(options: Options, samples: Iterable[Sample]) -> tuple[Any, Any]:
    if options.lm == "scratch":
        return _scratch(options, samples)
    source = find_model(options.lm)
    lm, tokenizer = load_model(source), load_tokenizer(source)
    if "<|im_end|>" not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token = "<|im_end|>"
    return lm, tokenizer


def _scratch(options: Options, samples: Iterable[Sample]) -> tuple[Any, Any]:
    """A small Llama and a tokenizer of the words of ``samples``, the frequent ones first."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    counts: Counter[str] = Counter()
    for sample in samples:
        for message in sample.messages:
            counts.update(re.findall(_WORD, message.text))
    counts.update({"user": 1, "assistant": 1, "system": 1, "\n": 1, " ": 1})
    words = ["<unk>", *sorted(counts, key=lambda word: (-counts[word], word))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    size = -(-(len(tokenizer) + 1) // _PAD_TO) * _PAD_TO
    config = LlamaConfig(
        vocab_size=size, hidden_size=options.lm_dim, intermediate_size=4 * options.lm_dim,
        num_hidden_layers=options.lm_layers, num_attention_heads=options.lm_heads,
        num_key_value_heads=options.lm_heads, max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def vlm_named(name: str, note: Callable[[str], None] = lambda text: None) -> str:
    """``--model`` as a path or id: the default one is built first where it is not there yet."""
    return str(default_model(note)) if name == DEFAULT else name
